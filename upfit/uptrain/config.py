"""The settings of an uptraining run: the fields are the keys of its TOML file, and those few that most runs give are also the
flags of `upfit uptrain`. docs/uptrain-settings.md is made from them (scripts/write_settings_page.py).

Imports no torch, so that `upfit uptrain --help` stays fast.
"""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from upfit import options
from upfit.bounded import SETTINGS_BYTES, read_text
from upfit.errors import UpfitError
from upfit.options import option

DTYPES = Literal["auto", "float32", "bfloat16"]
NAMES = ("layerwise", "distill", "lm", "answers")  # of the stages
OF_TEXT = ("length", "kl_weight", "ce_weight", "temperature", "teacher", "document_mask", "verify_data")
OF_ANSWERS = ("mix", "mix_share", "mix_weight")
# Settings that change how a run is carried out but not what it computes (beyond rounding): a resumed run may change them.
FREE = frozenset(
    {
        "micro_batch",
        "gradient_checkpointing",
        "compile",
        "liger",
        "packed",
        "parallel",
        "shard_teacher",
        "chunk",
        "verify_data",
        "measure_every",
    }
    | {"save_every", "keep", "async_save", "max_bad_steps", "max_rollbacks", "track"}
)


@dataclass(frozen=True)
class Config:
    """What `upfit uptrain` may be told. None means: chosen from the model, the budget or the machine."""

    tokens: str | None = option(None, help="tokens to train on, such as 200k or 50M")
    share: str | None = option(None, flag=False, help="instead of tokens: the share of original_tokens to train on, such as 5%")
    original_tokens: str | None = option(
        None, flag=False, help="tokens the model was pretrained on, such as 2T; goes with share"
    )
    stages: str | None = option(
        None,
        help="what to do, in order, with shares of the budget: layerwise, distill, lm, answers, such as layerwise=10%,distill; "
        "default: lm right after a conversion that lost nothing or merged heads (with layerwise=35% before it where they were "
        "merged without text); else distill, lm where there is no teacher, answers where DATA holds questions",
    )
    questions: str | None = option(
        None, flag=False, help="with answers among several stages: the folder of upfit synth that they are in"
    )
    length: int | None = option(None, at_least=2, help="tokens a row; default: what the model can take, at most 2048")
    batch_tokens: str | None = option(
        None, help="tokens an optimiser step, over all processes; default: what makes about a hundred steps, at most 524288"
    )
    micro_batch: int | None = option(
        None,
        flag=False,
        at_least=1,
        help="rows at once on each process: memory and speed, not the result beyond rounding; default: as many as hold 2048 "
        "tokens on a CPU, 8192 elsewhere",
    )
    learning_rate: float | None = option(
        None,
        above=0,
        help="peak learning rate; default: 0.2 / hidden size, for answers a tenth, for lm right after an aligned merge or a "
        "conversion that lost nothing a fifth",
    )
    added_rate: float = option(
        1.0,
        flag=False,
        at_least=0,
        help="learning rate of parameters that the conversion added, in units of the peak; some of them take it several times, "
        "as the attention's page tells, and they never decay",
    )
    query_rate: float = option(
        0.5,
        flag=False,
        at_least=0,
        help="learning rate of queries that the conversion duplicated, in units of the peak: a pair moves twice as far",
    )
    warmup: float = option(0.02, flag=False, at_least=0, at_most=1, help="share of the steps in which the learning rate rises")
    decay: float = option(
        0.2, flag=False, at_least=0, at_most=1, help="share of the steps, at the end, in which the learning rate falls"
    )
    min_rate: float = option(
        0.0, flag=False, at_least=0, at_most=1, help="share of the peak learning rate at which the fall ends"
    )
    weight_decay: float = option(0.1, flag=False, at_least=0, help="AdamW's weight decay, on matrices other than embeddings")
    clip: float = option(1.0, flag=False, above=0, help="largest gradient norm; larger gradients are scaled down to it")
    kl_weight: float = option(
        1.0, flag=False, at_least=0, help="weight of the KL divergence from the teacher; 0 trains without a teacher"
    )
    ce_weight: float = option(
        0.0, flag=False, at_least=0, help="weight of the cross-entropy with the text; 1 where there is no teacher"
    )
    temperature: float = option(1.0, flag=False, above=0, help="temperature of the KL divergence")
    teacher: str | None = option(None, help="teacher, a folder or hub id; default: the source in recipe.json; none: no teacher")
    mix: str | None = option(None, help="with answers as DATA: general text, as for DATA, learned from in every step too")
    mix_share: float = option(
        0.25, flag=False, above=0, below=1, help="with mix: share of a step's tokens that are general text"
    )
    mix_weight: float = option(
        1.0, flag=False, above=0, help="with mix: weight of the text's mean loss beside the answers' mean loss"
    )
    trainable: Literal["all", "attention"] = option(
        "all",
        flag=False,
        help="what learns: all weights, or attention's alone; the rest then shares the teacher's memory where it is equal",
    )
    gradient_checkpointing: bool = option(
        False, help="keep only the borders of layers for the backward pass and compute the rest again: slower, far less memory"
    )
    compile: bool = option(
        False, flag=False, help="torch.compile each layer (and the teacher's): faster steps for a minute or so at the start"
    )
    liger: bool = option(
        False,
        flag=False,
        help="norms and gated feed-forward layers, the teacher's too, by Liger's Triton kernels, on a GPU (extra liger): "
        "faster, less memory",
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] | None = option(
        None,
        help="over several processes: the whole model on each (ddp), sharded over all (fsdp), or sharded within nodes (hsdp); "
        "default: as accelerate launch is told, else ddp",
    )
    shard_teacher: bool = option(
        False, flag=False, help="with fsdp or hsdp: shard the teacher too instead of keeping it whole everywhere"
    )
    document_mask: bool = option(True, flag=False, help="keep documents packed in one row from seeing each other")
    packed: bool = option(
        True,
        flag=False,
        help="attend to packed documents one by one where the class allows it, instead of hiding the others with a mask",
    )
    dtype: DTYPES = option(
        "auto",
        help="compute dtype; auto: bfloat16 on CUDA and on CPUs with AMX, else float32. Weights and moments are float32",
    )
    chunk: int = option(512, flag=False, at_least=1, help="token positions whose logits are in memory at once")
    save_every: str = option("15m", help="most work to lose, such as 15m, or steps between checkpoints, such as 200")
    keep: int = option(2, flag=False, at_least=1, help="checkpoints to keep")
    async_save: bool = option(
        True, flag=False, help="write checkpoints while training goes on; takes memory of the host for a copy"
    )
    holdout: int = option(
        32,
        flag=False,
        at_least=0,
        help="rows of DATA never trained on, to measure the loss before and after (at most a tenth)",
    )
    measure_every: int | None = option(
        None,
        flag=False,
        at_least=1,
        help="steps between measurements of those rows, told as holdout_ce and so on; default: only before and after",
    )
    verify_data: bool = option(
        False,
        flag=False,
        help="compare token shards with their SHA-256 before the first step, not each part when it is first read",
    )
    max_bad_steps: int = option(
        5,
        flag=False,
        at_least=1,
        help="steps in a row that are skipped for a loss or gradient that is not finite; one more, and the run goes back",
    )
    max_rollbacks: int = option(
        3,
        flag=False,
        at_least=0,
        help="times that the run then goes back to its newest checkpoint, leaving out the data of those steps, before it ends",
    )
    seed: int = option(0, at_least=0, help="seed of the order of the rows and of dropout")
    track: str | None = option(None, help="tracker that accelerate knows, such as trackio, tensorboard or wandb")


def default(name: str) -> Any:
    """The default of the setting `name`."""
    return options.field_of(Config, name).default


def check(config: Config) -> Config:
    """The same config, if every value is of its type and in its range; raises UpfitError naming the first that is not."""
    options.check(config)
    save_interval(config.save_every)
    return config


def save_interval(text: str) -> tuple[int | None, float | None]:
    """`"200"` → (200 steps, None); `"15m"` → (None, 900 seconds). Raises UpfitError for anything else."""
    number = text.removesuffix("m")
    if number.isdecimal() and int(number) > 0:
        return (None, 60.0 * int(number)) if text.endswith("m") else (int(number), None)
    raise UpfitError(f"--save-every got {text!r}; give steps such as 200 or minutes such as 15m")


class Budgeted(Protocol):
    """Settings that name a budget, of `upfit uptrain` or `upfit plan`."""

    @property
    def tokens(self) -> str | None: ...
    @property
    def share(self) -> str | None: ...
    @property
    def original_tokens(self) -> str | None: ...


def check_budget(settings: Budgeted) -> None:
    """Raise UpfitError unless there is one budget: `tokens`, or `share` with `original_tokens`."""
    tokens, share, original = (options.shown(settings, name) for name in ("tokens", "share", "original_tokens"))
    if settings.tokens is not None and (settings.share is not None or settings.original_tokens is not None):
        raise UpfitError(f"{tokens} got company; give either {tokens}, or {share} with {original}")
    if settings.tokens is None and (settings.share is None or settings.original_tokens is None):
        raise UpfitError(f"the budget is missing; give {tokens} 50M, or {share} 5% with {original} 2T")


def count_of(settings: Any, name: str) -> int:
    """The setting `name`, such as `50M`, as a number. Raises UpfitError when it is none."""
    return options.parse_count(getattr(settings, name), options.shown(settings, name))


def share_of(settings: Budgeted) -> float:
    """The setting `share` as a number. Raises UpfitError when it is none."""
    assert settings.share is not None, "only asked where it is given"
    return options.parse_share(settings.share, options.shown(settings, "share"))


def budget(config: Config) -> int:
    """The tokens to train on, from `tokens`, or from `share` and `original_tokens`."""
    check_budget(config)
    if config.tokens is not None:
        return count_of(config, "tokens")
    return max(1, round(share_of(config) * count_of(config, "original_tokens")))


def check_sharding(settings: Any, sharded: bool) -> None:
    """Raise UpfitError when a teacher is to be sharded beside a model that is not."""
    if settings.shard_teacher and not sharded:
        raise UpfitError(f"{options.shown(settings, 'shard_teacher')} goes with --parallel fsdp or hsdp; leave it out")


def resolve(file: Path | None, flags: dict[str, Any]) -> Config:
    """The checked config: defaults, over them the TOML `file` (if any), over it the flags the user `flags`.

    `--tokens` on the command line replaces a `share` of the file, and the other way round.
    """
    from_file = {name: value for name, value in (read(file) if file is not None else {}).items() if name not in NAMES}
    if flags.get("tokens") is not None:
        from_file = {name: value for name, value in from_file.items() if name not in ("share", "original_tokens")}
    elif flags.get("share") is not None:
        from_file.pop("tokens", None)
    return check(Config(**{**from_file, **flags}))


def tables(file: Path | None) -> dict[str, dict[str, Any]]:
    """What a config file says of single stages, by their names."""
    return {name: value for name, value in (read(file) if file is not None else {}).items() if name in NAMES}


def read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file, and a table of settings for each stage that has some of its own.

    Raises UpfitError when it cannot be read or has a key that is no setting.
    """
    try:
        settings = tomllib.loads(read_text(file.expanduser(), SETTINGS_BYTES))
    except UpfitError as error:
        raise UpfitError(f"--config {error}; give a TOML file") from error
    except RecursionError as error:
        raise UpfitError(f"--config {file} is not valid TOML: nested too deeply") from error
    except ValueError as error:
        raise UpfitError(f"--config {file} is not valid TOML: {error}") from error
    allowed = [field.name for field in dataclasses.fields(Config)]
    of_stages = [(name, table) for name, table in settings.items() if name in NAMES and isinstance(table, dict)]
    keys = [name for name, _ in settings.items() if name not in dict(of_stages)] + [
        key for _, table in of_stages for key in table
    ]
    for name in keys:
        if name not in allowed:
            raise UpfitError(f"--config {file} has an unknown key {name!r}; allowed are {', '.join(allowed)}")
    for table in (settings, *dict(of_stages).values()):
        options.check_values(Config, {key: value for key, value in table.items() if key in allowed})
    return settings


def dump(config: Config, of_stages: dict[str, dict[str, Any]]) -> str:
    """The config as TOML with each field's help above it, and the tables of stages; a setting that is None is a comment."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        lines.append(f"# {field.metadata['help']}")
        # JSON's spelling of strings, numbers and booleans is valid TOML.
        lines.append(f"# {field.name} =" if value is None else f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
    for name, table in of_stages.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"

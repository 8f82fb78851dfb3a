"""The settings of an uptraining run: the fields are the flags of `upfit uptrain` and the keys of its TOML file.

Imports no torch, so that `upfit uptrain --help` stays fast.
"""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upfit import options
from upfit.bounded import SETTINGS_BYTES, read_text
from upfit.errors import UpfitError
from upfit.options import flag, option

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
    share: str | None = option(None, help="instead of --tokens: the share of --original-tokens to train on, such as 5%")
    original_tokens: str | None = option(None, help="tokens the model was pretrained on, such as 2T; goes with --share")
    stages: str | None = option(
        None,
        help="what to do, in order, with shares of the budget: layerwise, distill, lm, answers, such as layerwise=10%,distill; "
        "default: lm right after a conversion that lost nothing or merged heads (with layerwise=35% before it where they were "
        "merged without text); else distill, lm where there is no teacher, answers where DATA holds questions",
    )
    questions: str | None = option(None, help="with answers among several stages: the folder of upfit synth that they are in")
    length: int | None = option(None, help="tokens a row; default: what the model can take, at most 2048")
    batch_tokens: str | None = option(
        None, help="tokens an optimiser step, over all processes; default: what makes about a hundred steps, at most 524288"
    )
    micro_batch: int | None = option(
        None, help="rows at once on each process; default: as many as hold 2048 tokens on a CPU, 8192 elsewhere"
    )
    learning_rate: float | None = option(
        None,
        help="peak learning rate; default: 0.2 / hidden size, for answers a tenth, for lm right after an aligned merge or a "
        "conversion that lost nothing a fifth",
    )
    added_rate: float = option(
        1.0,
        help="learning rate of parameters that the conversion added, in units of the peak; some of them take it several times, "
        "as the attention's page tells",
    )
    query_rate: float = option(
        0.5, help="learning rate of queries that the conversion duplicated, in units of the peak: a pair moves twice as far"
    )
    warmup: float = option(0.02, help="share of the steps in which the learning rate rises")
    decay: float = option(0.2, help="share of the steps, at the end, in which the learning rate falls")
    min_rate: float = option(0.0, help="share of the peak learning rate at which the fall ends")
    weight_decay: float = option(0.1, help="AdamW's weight decay, on matrices other than embeddings")
    clip: float = option(1.0, help="largest gradient norm; larger gradients are scaled down to it")
    kl_weight: float = option(1.0, help="weight of the KL divergence from the teacher; 0 trains without a teacher")
    ce_weight: float = option(0.0, help="weight of the cross-entropy with the text; 1 where there is no teacher")
    temperature: float = option(1.0, help="temperature of the KL divergence")
    teacher: str | None = option(None, help="teacher, a folder or hub id; default: the source in recipe.json; none: no teacher")
    mix: str | None = option(None, help="with answers as DATA: general text, as for DATA, learned from in every step too")
    mix_share: float = option(0.25, help="with --mix: share of a step's tokens that are general text")
    mix_weight: float = option(1.0, help="with --mix: weight of the text's mean loss beside the answers' mean loss")
    trainable: Literal["all", "attention"] = option(
        "all",
        help="what learns: all weights, or attention's alone; the rest then shares the teacher's memory where it is equal",
    )
    gradient_checkpointing: bool = option(
        False, help="keep only the borders of layers for the backward pass and compute the rest again: slower, far less memory"
    )
    compile: bool = option(
        False, help="torch.compile each layer (and the teacher's): faster steps for a minute or so at the start"
    )
    liger: bool = option(
        False, help="norms and gated feed-forward layers by Liger's Triton kernels, on a GPU (extra liger): faster, less memory"
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] | None = option(
        None,
        help="over several processes: the whole model on each (ddp), sharded over all (fsdp), or sharded within nodes (hsdp); "
        "default: as accelerate launch is told, else ddp",
    )
    shard_teacher: bool = option(False, help="with fsdp or hsdp: shard the teacher too instead of keeping it whole everywhere")
    document_mask: bool = option(True, help="keep documents packed in one row from seeing each other")
    packed: bool = option(
        True, help="attend to packed documents one by one where the class allows it, instead of hiding the others with a mask"
    )
    dtype: DTYPES = option("auto", help="compute dtype; auto: bfloat16 on CUDA and on CPUs with AMX, else float32")
    chunk: int = option(512, help="token positions whose logits are in memory at once")
    save_every: str = option("15m", help="most work to lose, such as 15m, or steps between checkpoints, such as 200")
    keep: int = option(2, help="checkpoints to keep")
    async_save: bool = option(True, help="write checkpoints while training goes on; takes memory of the host for a copy")
    holdout: int = option(32, help="rows of DATA never trained on, to measure the loss before and after (at most a tenth)")
    measure_every: int | None = option(None, help="steps between measurements of those rows; default: only before and after")
    verify_data: bool = option(
        False,
        help="compare token shards with their SHA-256 before the first step, not each part when it is first read",
    )
    max_bad_steps: int = option(
        5, help="steps in a row that are skipped for a loss or gradient that is not finite; one more, and the run goes back"
    )
    max_rollbacks: int = option(
        3,
        help="times that the run then goes back to its newest checkpoint, leaving out the data of those steps, before it ends",
    )
    seed: int = option(0, help="seed of the order of the rows and of dropout")
    track: str | None = option(None, help="tracker that accelerate knows, such as trackio, tensorboard or wandb")


def default(name: str) -> Any:
    """The default of the setting `name`."""
    return next(field.default for field in dataclasses.fields(Config) if field.name == name)


def check(config: Config) -> Config:
    """The same config, if every value is of its type and in its range; raises UpfitError naming the first flag that is not."""
    options.check(config)
    ranges: dict[str, tuple[bool, str]] = {
        "length": (config.length is None or config.length >= 2, "2 or more"),
        "micro_batch": (config.micro_batch is None or config.micro_batch >= 1, "1 or more"),
        "learning_rate": (config.learning_rate is None or config.learning_rate > 0, "a number above 0"),
        "added_rate": (config.added_rate >= 0, "0 or more"),
        "query_rate": (config.query_rate >= 0, "0 or more"),
        "warmup": (0 <= config.warmup <= 1, "a share from 0 to 1"),
        "decay": (0 <= config.decay <= 1, "a share from 0 to 1"),
        "min_rate": (0 <= config.min_rate <= 1, "a share from 0 to 1"),
        "weight_decay": (config.weight_decay >= 0, "0 or more"),
        "clip": (config.clip > 0, "a number above 0"),
        "kl_weight": (config.kl_weight >= 0, "0 or more"),
        "ce_weight": (config.ce_weight >= 0, "0 or more"),
        "temperature": (config.temperature > 0, "a number above 0"),
        "mix_share": (0 < config.mix_share < 1, "a share above 0 and below 1"),
        "mix_weight": (config.mix_weight > 0, "a number above 0"),
        "chunk": (config.chunk >= 1, "1 or more"),
        "keep": (config.keep >= 1, "1 or more"),
        "holdout": (config.holdout >= 0, "0 or more"),
        "measure_every": (config.measure_every is None or config.measure_every >= 1, "1 or more"),
        "max_bad_steps": (config.max_bad_steps >= 1, "1 or more"),
        "max_rollbacks": (config.max_rollbacks >= 0, "0 or more"),
        "seed": (config.seed >= 0, "0 or more"),
    }
    for name, (fits, allowed) in ranges.items():
        if not fits:
            raise UpfitError(f"{flag(name)} got {getattr(config, name)}; it takes {allowed}")
    save_interval(config.save_every)
    return config


def save_interval(text: str) -> tuple[int | None, float | None]:
    """`"200"` → (200 steps, None); `"15m"` → (None, 900 seconds). Raises UpfitError for anything else."""
    number = text.removesuffix("m")
    if number.isdecimal() and int(number) > 0:
        return (None, 60.0 * int(number)) if text.endswith("m") else (int(number), None)
    raise UpfitError(f"--save-every got {text!r}; give steps such as 200 or minutes such as 15m")


def budget(config: Config) -> int:
    """The tokens to train on, from `tokens`, or from `share` and `original_tokens`."""
    if config.tokens is not None:
        if config.share is not None or config.original_tokens is not None:
            raise UpfitError("--tokens got company; give either --tokens, or --share with --original-tokens")
        return options.parse_count(config.tokens, "--tokens")
    if config.share is None or config.original_tokens is None:
        raise UpfitError("the budget is missing; give --tokens 50M, or --share 5% with --original-tokens 2T")
    share = options.parse_share(config.share, "--share")
    return max(1, round(share * options.parse_count(config.original_tokens, "--original-tokens")))


def resolve(file: Path | None, given: dict[str, Any]) -> Config:
    """The checked config: defaults, over them the TOML `file` (if any), over it the flags the user `given`.

    `--tokens` on the command line replaces a `share` of the file, and the other way round.
    """
    told = {name: value for name, value in (read(file) if file is not None else {}).items() if name not in NAMES}
    if given.get("tokens") is not None:
        told = {name: value for name, value in told.items() if name not in ("share", "original_tokens")}
    elif given.get("share") is not None:
        told.pop("tokens", None)
    return check(Config(**{**told, **given}))


def tables(file: Path | None) -> dict[str, dict[str, Any]]:
    """What a config file says of single stages, by their names."""
    return {name: value for name, value in (read(file) if file is not None else {}).items() if name in NAMES}


def read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file, and a table of settings for each stage that has some of its own.

    Raises UpfitError when it cannot be read or has a key that is no setting.
    """
    try:
        told = tomllib.loads(read_text(file.expanduser(), SETTINGS_BYTES))
    except UpfitError as error:
        raise UpfitError(f"--config {error}; give a TOML file") from error
    except RecursionError as error:
        raise UpfitError(f"--config {file} is not valid TOML: nested too deeply") from error
    except ValueError as error:
        raise UpfitError(f"--config {file} is not valid TOML: {error}") from error
    allowed = [field.name for field in dataclasses.fields(Config)]
    of_stages = [(name, table) for name, table in told.items() if name in NAMES and isinstance(table, dict)]
    keys = [name for name, _ in told.items() if name not in dict(of_stages)] + [key for _, table in of_stages for key in table]
    for name in keys:
        if name not in allowed:
            raise UpfitError(f"--config {file} has an unknown key {name!r}; allowed are {', '.join(allowed)}")
    return told


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

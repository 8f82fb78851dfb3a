"""The settings of `upfit plan`, one field a flag. Imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from upfit.errors import UpfitError
from upfit.options import check, option, same_option
from upfit.uptrain.config import Config, check_budget, check_sharding
from upfit.uptrain.stages import check_unsharded, parse


@dataclass(frozen=True)
class Options:
    """The uptraining that is asked about; names are those of `upfit uptrain`."""

    tokens: str | None = same_option(Config, "tokens")
    share: str | None = same_option(
        Config,
        "share",
        help="instead of --tokens: the share of the original compute to spend, the teacher's counted, such as 5%",
    )
    original_tokens: str | None = same_option(Config, "original_tokens")
    length: int | None = same_option(Config, "length")
    micro_batch: int | None = same_option(
        Config, "micro_batch", help="rows at once on each GPU; default: as many as hold 8192 tokens"
    )
    teacher: Literal["self", "none"] = option("self", help="learn from a model of the same size, or from the text alone")
    stages: str | None = same_option(
        Config, "stages", help="as in upfit uptrain, of layerwise, distill and lm; default: that of upfit uptrain"
    )
    trainable: Literal["all", "attention"] = same_option(Config, "trainable", help="as in upfit uptrain: what learns")
    gradient_checkpointing: bool = same_option(
        Config, "gradient_checkpointing", help="as in upfit uptrain: layers are computed again in the backward pass"
    )
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", help="type of the computation")
    gpu: str = option("h200", help="kind of GPU: a100, h100, h200 or b200")
    gpus: int = option(1, at_least=1, help="GPUs; each works on a share of the rows")
    parallel: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp",
        help="as in upfit uptrain: the whole model on each GPU (ddp), a share of it (fsdp), or a share within a node",
    )
    gpus_a_node: int = option(8, at_least=1, help="with hsdp: GPUs over which the model is sharded")
    shard_teacher: bool = same_option(
        Config, "shard_teacher", help="as in upfit uptrain: with fsdp or hsdp the teacher is sharded too"
    )
    mfu: float = option(0.4, above=0, at_most=1, help="share of the GPU's peak that is reached; an assumption, told as one")


def stage_shares(options: Options) -> dict[str, float]:
    """--stages as shares. Raises UpfitError for what is no such list, or needs what the other settings leave out."""
    assert options.stages is not None, "only asked where it is given"
    parsed = parse(options.stages)
    shares = {name: share for name, share in parsed.items() if share is not None}
    if len(shares) < len(parsed) or "answers" in shares:
        raise UpfitError("--stages got answers, whose cost is that of its questions; plan for the other stages")
    if options.teacher == "none" and shares.keys() != {"lm"}:
        raise UpfitError(f"--stages {options.stages} learns from a teacher, and --teacher none leaves none; give lm alone")
    for name in shares:
        check_unsharded(name, options.parallel != "ddp")
    return shares


def check_options(options: Options) -> None:
    """Raise UpfitError for a value of the wrong type or out of range, and for settings that do not go together."""
    check(options)
    check_budget(options)
    check_sharding(options, options.parallel != "ddp")
    if options.parallel == "hsdp" and options.gpus % options.gpus_a_node:
        raise UpfitError(f"--gpus {options.gpus} are no whole number of nodes of {options.gpus_a_node}; give --gpus-a-node")

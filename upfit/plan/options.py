"""The settings of `upfit plan`, one field a flag. Imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from upfit.errors import UpfitError
from upfit.options import check, flag, option


@dataclass(frozen=True)
class Options:
    """The uptraining that is asked about; names are those of `upfit uptrain`."""

    tokens: str | None = option(None, help="tokens to train on, such as 200k or 50M")
    share: str | None = option(
        None, help="instead of --tokens: the share of the original compute to spend, the teacher's counted, such as 5%"
    )
    original_tokens: str | None = option(None, help="tokens the model was pretrained on, such as 2T; goes with --share")
    length: int | None = option(None, help="tokens a row; default: what the model can take, at most 2048")
    micro_batch: int | None = option(None, help="rows at once on each GPU; default: as many as hold 8192 tokens")
    teacher: Literal["self", "none"] = option("self", help="learn from a model of the same size, or from the text alone")
    stages: str | None = option(
        None,
        help="as in upfit uptrain, of layerwise, distill and lm; default: that of upfit uptrain",
    )
    trainable: Literal["all", "attention"] = option("all", help="as in upfit uptrain: what learns")
    gradient_checkpointing: bool = option(False, help="as in upfit uptrain: layers are computed again in the backward pass")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", help="type of the computation")
    gpu: str = option("h200", help="kind of GPU: a100, h100, h200 or b200")
    gpus: int = option(1, help="GPUs; each works on a share of the rows")
    parallel: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp",
        help="as in upfit uptrain: the whole model on each GPU (ddp), a share of it (fsdp), or a share within a node",
    )
    gpus_a_node: int = option(8, help="with hsdp: GPUs over which the model is sharded")
    shard_teacher: bool = option(False, help="as in upfit uptrain: with fsdp or hsdp the teacher is sharded too")
    mfu: float = option(0.4, help="share of the GPU's peak that is reached; an assumption, told as one")


def stage_shares(options: Options) -> dict[str, float]:
    """--stages as shares. Raises UpfitError for what is no such list, or needs what the other settings leave out."""
    from upfit.uptrain.stages import parse

    assert options.stages is not None, "only asked where it is given"
    shares = {name: share for name, share in parse(options.stages).items() if share is not None}
    if len(shares) < len(parse(options.stages)) or "answers" in shares:
        raise UpfitError("--stages got answers, whose cost is that of its questions; plan for the other stages")
    if options.teacher == "none" and shares.keys() != {"lm"}:
        raise UpfitError(f"--stages {options.stages} learns from a teacher, and --teacher none leaves none; give lm alone")
    if "layerwise" in shares and options.parallel != "ddp":
        raise UpfitError(f"--parallel {options.parallel} is not for the stage layerwise, which is not sharded; leave it out")
    return shares


def check_options(options: Options) -> None:
    """Raise UpfitError for a value of the wrong type or out of range."""
    check(options)
    limits = {
        "length": (options.length is None or options.length >= 2, "2 or more"),
        "micro_batch": (options.micro_batch is None or options.micro_batch >= 1, "1 or more"),
        "gpus": (options.gpus >= 1, "1 or more"),
        "gpus_a_node": (options.gpus_a_node >= 1, "1 or more"),
        "mfu": (0 < options.mfu <= 1, "a share above 0, at most 1"),
    }
    for name, (good, allowed) in limits.items():
        if not good:
            raise UpfitError(f"{flag(name)} got {getattr(options, name)}; give {allowed}")
    if options.shard_teacher and options.parallel == "ddp":
        raise UpfitError("--shard-teacher goes with --parallel fsdp or hsdp; leave it out")
    if options.parallel == "hsdp" and options.gpus % options.gpus_a_node:
        raise UpfitError(f"--gpus {options.gpus} are no whole number of nodes of {options.gpus_a_node}; give --gpus-a-node")
    if options.tokens is not None and (options.share is not None or options.original_tokens is not None):
        raise UpfitError("--tokens got company; give either --tokens, or --share with --original-tokens")
    if options.tokens is None and (options.share is None or options.original_tokens is None):
        raise UpfitError("the budget is missing; give --tokens 50M, or --share 5% with --original-tokens 2T")

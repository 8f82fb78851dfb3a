"""`upfit plan`: FLOPs, memory and hours of an uptraining, from what its model computes and keeps (see trace.py).

Conventions, told with the result: a forward pass multiplies and adds once for each weight of each matrix a token (2 FLOPs), a
causal attention looks at half of the map, a backward pass is twice its forward pass. A teacher's forward pass counts; layers
computed again (gradient checkpointing) take time but are no FLOPs of the model.
"""

from typing import Any

from upfit.convert.checkpoint import most_positions, read_config
from upfit.convert.folders import Source, find_source, teacher_source
from upfit.errors import UpfitError
from upfit.options import parse_count, parse_share
from upfit.output import human_bytes
from upfit.plan.hardware import Gpu, find_gpu
from upfit.plan.options import Options, check_options
from upfit.plan.trace import Trace, trace

DEFAULT_LENGTH, MICRO_TOKENS, CHUNK = 2048, 8192, 512
BACKWARD = 2.0  # forward passes
FREE_SHARE = 0.95  # of a GPU's memory; the rest is its driver's, and lost between allocations


def plan(model: str, options: Options, revision: str | None = None) -> dict[str, Any]:
    """What uptraining `model` would take, as a dictionary that JSON can hold.

    Raises UpfitError for settings out of range, a model that cannot be traced, and one that does not fit into the GPU.
    """
    check_options(options)
    gpu = find_gpu(options.gpu)
    source = find_source(model, revision)
    length = _length(source, options)
    student = trace(read_config(source.path), length, options.dtype)
    teacher = _teacher(source, length, options)
    flops = flops_a_token(student, teacher)
    tokens = _tokens(options, flops, student if teacher is None else teacher)
    memory = memory_by_part(student, teacher, options, length)
    needed, room = memory["peak"], FREE_SHARE * gpu.memory
    if needed > room:
        raise UpfitError(_too_large(needed, gpu, memory, options))
    return {
        "model": source.record(),
        "parameters": student.parameters,
        "teacher_parameters": teacher.parameters if teacher else None,
        "length": length,
        "tokens": tokens,
        "flops_a_token": flops,
        "flops": flops["total"] * tokens,
        "share_of_original": _share(options, flops, student if teacher is None else teacher, tokens),
        "memory": memory,
        "gpu": {"name": gpu.name, "gpus": options.gpus, "memory": gpu.memory, "peak_flops": gpu.peak(options.dtype)},
        "mfu": options.mfu,
        "gpu_hours": hours(student, teacher, options, gpu) * tokens,
        "hours": hours(student, teacher, options, gpu) * tokens / options.gpus,
    }


def _length(source: Source, options: Options) -> int:
    longest = most_positions(read_config(source.path))
    length = options.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest and length > longest:
        raise UpfitError(f"--length {length} is longer than the model's {longest} positions; choose {longest} or less")
    return length


def _teacher(source: Source, length: int, options: Options) -> Trace | None:
    """The teacher that `upfit uptrain` would take: the source in recipe.json where it is there, else a model like this one."""
    if options.teacher == "none":
        return None
    found = teacher_source(source.path)
    return trace(read_config((found or source).path), length, options.dtype)


def flops_a_token(student: Trace, teacher: Trace | None) -> dict[str, float]:
    """FLOPs of training on a token, by part, and by the rule of six FLOPs a parameter (embeddings not counted)."""
    learned = teacher.forward if teacher else 0.0
    return {
        "forward": student.forward,
        "attention_in_forward": student.attention,
        "backward": BACKWARD * student.forward,
        "teacher": learned,
        "total": (1 + BACKWARD) * student.forward + learned,
        "six_n": 6.0 * (student.parameters - student.embedding) + (0.0 if _untied(student) else 6.0 * student.embedding),
    }


def _untied(trace: Trace) -> bool:
    """Whether the head has weights of its own: then those of the embedding multiply nothing."""
    return trace.parameters - trace.embedding >= trace.head / 2 + trace.matrices / 2


def _tokens(options: Options, flops: dict[str, float], original: Trace) -> int:
    """The budget: given, or what a share of the original compute pays for when the teacher has to be paid too."""
    if options.tokens is not None:
        return parse_count(options.tokens, "--tokens")
    assert options.share is not None and options.original_tokens is not None
    spent = (1 + BACKWARD) * original.forward * parse_count(options.original_tokens, "--original-tokens")
    return max(1, int(parse_share(options.share, "--share") * spent / flops["total"]))


def _share(options: Options, flops: dict[str, float], original: Trace, tokens: int) -> float | None:
    if options.original_tokens is None:
        return None
    spent = (1 + BACKWARD) * original.forward * parse_count(options.original_tokens, "--original-tokens")
    return flops["total"] * tokens / spent


def memory_by_part(student: Trace, teacher: Trace | None, options: Options, length: int) -> dict[str, float]:
    """Bytes on each GPU. `peak` is the larger of two moments: the end of the forward pass, when everything is kept, and the
    end of the backward pass, when all of that has become gradients."""
    rows = options.micro_batch or max(1, MICRO_TOKENS // length)
    short = options.dtype == "bfloat16"
    kept = float(rows * student.kept)
    layer = kept / student.layers  # gradients of about as many numbers, while a layer's backward pass runs
    if options.gradient_checkpointing:
        kept = layer + 4.0 * rows * length * student.hidden * student.layers
    width = 2.0 if short else 4.0
    shards = shards_of(options)
    beside = 0.0
    if shards > 1:
        beside = gathered(student, width) + (width + 4.0) * ends_and_layer(student)[1]  # a layer's gradients, to be added up
        beside += gathered(teacher, width) if teacher and options.shard_teacher else 0.0
    parts = {
        "weights": 4.0 * student.parameters / shards,
        "moments": 8.0 * student.parameters / shards,
        "weights_in_bfloat16": float(student.cast) if shards == 1 else 0.0,
        "gathered": beside,
        "teacher": width * teacher.parameters / (shards if options.shard_teacher else 1) if teacher else 0.0,
        "activations": kept,
        "one_layer_backward": layer,
        "mask": rows * length**2 * (3.0 if short else 5.0),  # keeps packed documents apart: as bool, and as it is added
        # the gradient of the head is made with the loss, and its weight is cast for it
        "head": (4.0 + 2.0 * short) * student.vocabulary * student.hidden + 4.0 * rows * length * student.hidden,
        "logits": (6.0 if teacher else 4.0) * 4.0 * min(CHUNK, rows * length) * student.vocabulary,
        "gradients": 4.0 * student.parameters / shards,
    }
    always = sum(parts[name] for name in ("weights", "moments", "weights_in_bfloat16", "gathered", "teacher"))
    forward = sum(parts[name] for name in ("activations", "one_layer_backward", "mask", "head", "logits"))
    return parts | {"rows": float(rows), "peak": always + max(forward, parts["gradients"])}


def shards_of(options: Options) -> int:
    """GPUs that a copy of the model is spread over."""
    return {"ddp": 1, "fsdp": options.gpus, "hsdp": options.gpus_a_node}[options.parallel]


def gathered(trace: Trace, width: float) -> float:
    """Bytes that are whole beside the shards, `width` a number: embedding and head, the layer at work and the next one."""
    ends, layer = ends_and_layer(trace)
    return width * (ends + 2 * layer)


def ends_and_layer(trace: Trace) -> tuple[float, float]:
    """Parameters of embedding and head together, and of one layer."""
    ends = trace.embedding * (2 if _untied(trace) else 1)
    return ends, (trace.parameters - ends) / trace.layers


def hours(student: Trace, teacher: Trace | None, options: Options, gpu: Gpu) -> float:
    """GPU-hours a token: the FLOPs that are really done over what the GPU is taken to reach."""
    again = student.forward if options.gradient_checkpointing else 0.0
    done = (1 + BACKWARD) * student.forward + again + (teacher.forward if teacher else 0.0)
    return done / (options.mfu * gpu.peak(options.dtype)) / 3600


def _too_large(needed: float, gpu: Gpu, memory: dict[str, float], options: Options) -> str:
    advice = []
    if not options.gradient_checkpointing:
        advice.append("give --gradient-checkpointing")
    if memory["rows"] > 1:
        advice.append("a smaller --micro-batch")
    if options.teacher != "none":
        advice.append("--teacher none")
    if options.parallel == "ddp":
        advice.append("--parallel fsdp with more --gpus")
    words = f"{human_bytes(needed)} are needed on each GPU, {gpu.name} has {human_bytes(gpu.memory)}"
    parts = ", ".join(f"{name.replace('_', ' ')} {human_bytes(memory[name])}" for name in ("weights", "moments", "activations"))
    return f"{words} ({parts}); {', or '.join([*advice, 'a smaller model or a larger --gpu'])}"

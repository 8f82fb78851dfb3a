"""`upfit plan`: FLOPs, memory and hours of an uptraining, from what its model computes and keeps (see trace.py).

Conventions, told with the result: a forward pass costs 2 FLOPs for each token and each weight of a matrix; causal attention
computes half of the map; a backward pass costs two forward passes. A teacher's forward pass counts. Layers that are computed
again (gradient checkpointing) take time but are no FLOPs of the model.
"""

from dataclasses import dataclass, replace
from functools import cache

from upfit.checkpoint.reader import most_positions, read_config
from upfit.checkpoint.source import Source, find_source, teacher_source
from upfit.errors import UpfitError
from upfit.output import human_bytes
from upfit.plan.hardware import Gpu, find_gpu
from upfit.plan.options import Options, check_options, stage_shares
from upfit.plan.result import Flops, Gpus, Memory, StageCost, TrainingCost
from upfit.plan.trace import Trace, Trained, trace
from upfit.results import Origin
from upfit.uptrain.config import Config, count_of, default, share_of
from upfit.uptrain.default_stages import default_stages
from upfit.uptrain.schedule import MICRO_BATCH_TOKENS, row_length

BACKWARD = 2.0  # forward passes
FREE_SHARE = 0.95  # of a GPU's memory; the rest is its driver's, and lost between allocations


@dataclass(frozen=True)
class TracedStage:
    """One stage: what learns from whom, and its share of the tokens."""

    name: str
    share: float
    student: Trace
    teacher: Trace | None

    @property
    def layerwise(self) -> bool:
        return self.name == "layerwise"


def plan(model: str, options: Options, revision: str | None = None) -> TrainingCost:
    """What uptraining `model` would take: of all stages together, and of each in `stages`.

    `flops_a_token` is the mean over the tokens, `memory` that of the stage that needs most. Raises UpfitError for settings out
    of range, a model that cannot be traced, and one that does not fit into the GPU.
    """
    check_options(options)
    gpu = find_gpu(options.gpu)
    source = find_source(model, revision)
    length = row_length(options.length, most_positions(read_config(source.path)) or None)
    traced = _traced_stages(source, length, options)
    flops = [flops_a_token(stage, options) for stage in traced]
    mean = {key: sum(stage.share * counts[key] for stage, counts in zip(traced, flops, strict=True)) for key in flops[0]}
    original = next((stage.teacher for stage in traced if stage.teacher), traced[0].student)
    tokens = _tokens(options, mean, original)
    memories = [memory_by_part(stage, options, length) for stage in traced]
    memory = max(memories, key=lambda parts: parts["peak"])
    if memory["peak"] > FREE_SHARE * gpu.memory:
        raise UpfitError(_too_large(gpu, memory, options))
    costs = [
        StageCost(
            stage=stage.name,
            tokens=round(stage.share * tokens),
            flops_a_token=Flops(**counts),
            flops=counts["total"] * stage.share * tokens,
            memory=Memory(**parts),
            gpu_hours=hours(stage, counts, options, gpu) * stage.share * tokens,
        )
        for stage, counts, parts in zip(traced, flops, memories, strict=True)
    ]
    spent = sum(cost.gpu_hours for cost in costs)
    return TrainingCost(
        model=Origin(**source.record()),
        parameters=traced[0].student.parameters,
        teacher_parameters=next((stage.teacher.parameters for stage in traced if stage.teacher), None),
        length=length,
        tokens=tokens,
        flops_a_token=Flops(**mean),
        flops=mean["total"] * tokens,
        share_of_original=_share(options, mean, original, tokens),
        memory=Memory(**memory),
        gpu=Gpus(gpu.name, options.gpus, gpu.memory, gpu.peak(options.dtype)),
        mfu=options.mfu,
        gpu_hours=spent,
        hours=spent / options.gpus,
        stages=costs,
    )


def _traced_stages(source: Source, length: int, options: Options) -> list[TracedStage]:
    """The stages with their traces; without --stages the one that `upfit uptrain` would take."""
    if options.stages is None and options.teacher == "self":
        named = default_stages(Config(), source, options.parallel != "ddp") or "distill"
        options = replace(options, stages=named)
    shares = {"lm": 1.0} if options.stages is None else stage_shares(options)
    student, teacher = read_config(source.path), read_config((teacher_source(source.path) or source).path)

    @cache
    def traced(of_teacher: bool, trained: Trained) -> Trace:
        return trace(teacher if of_teacher else student, length, options.dtype, trained)

    return [
        TracedStage(
            name,
            share,
            traced(False, "layerwise" if name == "layerwise" else options.trainable),
            traced(True, "all") if name != "lm" else None,
        )
        for name, share in shares.items()
    ]


def flops_a_token(stage: TracedStage, options: Options) -> dict[str, float]:
    """FLOPs of training on a token, by part, and by the rule of six FLOPs a parameter (embeddings not counted).

    A backward pass is the gradients of what goes through, as many FLOPs as forward, and those of the weights that learn.
    Layer by layer, the teacher runs to its last layer, and of the student attention alone.
    """
    student, teacher = stage.student, stage.teacher
    learning = 2.0 * student.attention_parameters
    forward = learning + student.attention if stage.layerwise else student.forward
    if stage.layerwise or options.trainable == "all":
        backward = BACKWARD * forward
    else:
        backward = student.forward + student.attention + learning
    learned = 0.0 if teacher is None else teacher.forward - (teacher.head if stage.layerwise else 0.0)
    return {
        "forward": forward,
        "attention_in_forward": student.attention,
        "backward": backward,
        "teacher": learned,
        "total": forward + backward + learned,
        "six_n": 6.0 * (student.parameters - student.embedding) + (0.0 if _untied(student) else 6.0 * student.embedding),
    }


def _untied(trace: Trace) -> bool:
    """Whether the head has weights of its own: then those of the embedding multiply nothing."""
    return trace.parameters - trace.embedding >= trace.head / 2 + trace.matrices / 2


def _tokens(options: Options, flops: dict[str, float], original: Trace) -> int:
    """The budget: given, or what a share of the original compute pays for when the teacher has to be paid too."""
    if options.tokens is not None:
        return count_of(options, "tokens")
    return max(1, int(share_of(options) * _original_flops(options, original) / flops["total"]))


def _share(options: Options, flops: dict[str, float], original: Trace, tokens: int) -> float | None:
    return flops["total"] * tokens / _original_flops(options, original) if options.original_tokens is not None else None


def _original_flops(options: Options, original: Trace) -> float:
    """What the model's pretraining took."""
    return (1 + BACKWARD) * original.forward * count_of(options, "original_tokens")


def memory_by_part(stage: TracedStage, options: Options, length: int) -> dict[str, float]:
    """Bytes on each GPU. `peak` is the larger of two moments: the end of the forward pass, when everything is kept, and the
    end of the backward pass, when all of that has become gradients.

    What does not learn lies in the teacher's memory, if there is one that is whole, and else as it is.
    """
    student, teacher, shards = stage.student, stage.teacher, shards_of(options)
    rows = options.micro_batch or max(1, MICRO_BATCH_TOKENS // length)
    short = options.dtype == "bfloat16"
    attention_alone = stage.layerwise or options.trainable == "attention"
    learning = student.attention_parameters if attention_alone else student.parameters
    frozen = 0 if teacher and shards == 1 else student.parameters - learning
    activations = float(rows * student.saved)
    layer = activations / student.layers  # gradients of about as many numbers, while a layer's backward pass runs
    if options.gradient_checkpointing and not stage.layerwise:
        activations = layer + 4.0 * rows * length * student.hidden * student.layers
    width = 2.0 if short else 4.0
    beside = 0.0
    if shards > 1:
        beside = gathered(student, width) + (width + 4.0) * ends_and_layer(student)[1]  # a layer's gradients, to be added up
        beside += gathered(teacher, width) if teacher and options.shard_teacher else 0.0
    weight_of_head = 0.0 if attention_alone else 4.0
    mask = 0.0 if student.packed and (teacher is None or teacher.packed) else rows * length**2 * (3.0 if short else 5.0)
    parts = {
        "weights": 4.0 * (learning + frozen) / shards,
        "moments": 8.0 * learning / shards,
        "weights_in_bfloat16": student.cast + 2.0 * short * frozen if shards == 1 else 0.0,
        "gathered": beside,
        "teacher": width * teacher.parameters / (shards if options.shard_teacher else 1) if teacher else 0.0,
        "activations": activations,
        "one_layer_backward": layer,
        "mask": mask,  # keeps packed documents apart: as bool, and as it is added
        # the gradient of the head is made with the loss, and its weight is cast for it
        "head": (weight_of_head + 2.0 * short) * student.vocabulary * student.hidden + 4.0 * rows * length * student.hidden,
        "logits": (6.0 if teacher else 4.0) * 4.0 * min(default("chunk"), rows * length) * student.vocabulary,
        "gradients": 4.0 * learning / shards,
    }
    if stage.layerwise:
        parts |= {"head": 0.0, "logits": 0.0}
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


def hours(stage: TracedStage, flops: dict[str, float], options: Options, gpu: Gpu) -> float:
    """GPU-hours a token: the FLOPs that are really done over what the GPU is taken to reach."""
    again = stage.student.forward if options.gradient_checkpointing and not stage.layerwise else 0.0
    return (flops["total"] + again) / (options.mfu * gpu.peak(options.dtype)) / 3600


def _too_large(gpu: Gpu, memory: dict[str, float], options: Options) -> str:
    advice = []
    if not options.gradient_checkpointing:
        advice.append("give --gradient-checkpointing")
    if memory["rows"] > 1:
        advice.append("a smaller --micro-batch")
    if options.trainable == "all":
        advice.append("--trainable attention")
    if options.teacher != "none":
        advice.append("--teacher none")
    if options.parallel == "ddp":
        advice.append("--parallel fsdp with more --gpus")
    words = f"{human_bytes(memory['peak'])} are needed on each GPU, {gpu.name} has {human_bytes(gpu.memory)}"
    parts = ", ".join(f"{name.replace('_', ' ')} {human_bytes(memory[name])}" for name in ("weights", "moments", "activations"))
    return f"{words} ({parts}); {', or '.join([*advice, 'a smaller model or a larger --gpu'])}"

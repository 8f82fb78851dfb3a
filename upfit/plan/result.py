"""What `upfit plan` answers."""

from dataclasses import dataclass

from upfit.output import Output, human_bytes, human_count
from upfit.results import Origin, Part, Result

# fmt: off
PARTS = (
    "weights", "moments", "gradients", "weights_in_bfloat16", "gathered", "teacher", "activations", "one_layer_backward",
    "mask", "head", "logits",
)
# fmt: on


@dataclass(frozen=True)
class Flops(Part):
    """FLOPs of training on one token.

    forward: of the student's forward pass
    attention_in_forward: of these, those of the attention maps (causal: half of each)
    backward: of the backward pass
    teacher: of the teacher's forward pass
    total: of all three passes
    six_n: by the rule of six FLOPs a parameter, attention and teacher left out
    """

    forward: float
    attention_in_forward: float
    backward: float
    teacher: float
    total: float
    six_n: float


@dataclass(frozen=True)
class Memory(Part):
    """Bytes on each GPU, by part.

    weights: weights that learn, and those that do not and have no other place
    moments: AdamW's moments
    weights_in_bfloat16: copies that are computed with
    gathered: what is whole beside the shards
    teacher: the teacher's weights
    activations: what is kept for the backward pass
    one_layer_backward: gradients within a layer while its backward pass runs
    mask: what keeps packed documents apart
    head: output layer and hidden states before it
    logits: logits in memory at once
    gradients: gradients of the weights
    rows: rows at once (a number, not bytes)
    peak: the most at any moment
    """

    weights: float
    moments: float
    weights_in_bfloat16: float
    gathered: float
    teacher: float
    activations: float
    one_layer_backward: float
    mask: float
    head: float
    logits: float
    gradients: float
    rows: float
    peak: float


@dataclass(frozen=True)
class Gpus(Part):
    """What it would run on.

    name: the kind of GPU
    gpus: how many
    memory: memory of one, bytes
    peak_flops: peak of one, FLOP/s
    """

    name: str
    gpus: int
    memory: float
    peak_flops: float


@dataclass(frozen=True)
class StageCost(Part):
    """One stage.

    stage: its name
    tokens: tokens of it
    flops_a_token: FLOPs of a token
    flops: FLOPs of all of it
    memory: bytes on each GPU
    gpu_hours: hours of one GPU
    """

    stage: str
    tokens: int
    flops_a_token: Flops
    flops: float
    memory: Memory
    gpu_hours: float


@dataclass(frozen=True, repr=False)
class TrainingCost(Result):
    """What an uptraining would take.

    model: the model to train
    parameters: its number of weights
    teacher_parameters: its teacher's; None without one
    length: tokens a row
    tokens: tokens to train on
    flops_a_token: FLOPs of a token, the mean over all stages
    flops: FLOPs of all of it
    share_of_original: share of the original compute; None where its tokens are not given
    memory: bytes on each GPU, of the stage that needs most
    gpu: what it would run on
    mfu: share of the GPU's peak that is taken to be reached: an assumption
    gpu_hours: hours of one GPU
    hours: hours of all GPUs together
    stages: each stage
    """

    model: Origin
    parameters: int
    teacher_parameters: int | None
    length: int
    tokens: int
    flops_a_token: Flops
    flops: float
    share_of_original: float | None
    memory: Memory
    gpu: Gpus
    mfu: float
    gpu_hours: float
    hours: float
    stages: list[StageCost]

    def show(self, output: Output) -> None:
        for name, value in (*self._lines(), *self._stage_lines()):
            output.line(f"{name:12} {value}")

    def _lines(self) -> list[tuple[str, str]]:
        flops, memory, gpu = self.flops_a_token, self.memory, self.gpu
        teacher = "none" if self.teacher_parameters is None else human_count(self.teacher_parameters)
        share = "" if self.share_of_original is None else f", {self.share_of_original:.2%} of the original compute"
        # fmt: off
        return [
            ("parameters", f"{human_count(self.parameters)}, teacher {teacher}"),
            ("tokens", f"{human_count(self.tokens)}, rows of {self.length}"),
            ("FLOPs", f"{self.flops:.3g}{share}"),
            ("a token", f"{_giga(flops.total)}: forward {_giga(flops.forward)}, of which attention "
                        f"{_giga(flops.attention_in_forward)} (causal); backward {_giga(flops.backward)}; "
                        f"teacher {_giga(flops.teacher)}"),
            ("by the rule", f"{_giga(flops.six_n)} a token without the teacher (six a parameter, attention left out)"),
            ("time", f"{self.hours:,.1f} h on {gpu.gpus} x {gpu.name} ({self.gpu_hours:,.1f} GPU-hours), if {self.mfu:.0%} of "
                     f"{gpu.peak_flops / 1e12:,.0f} TFLOP/s are reached: an assumption, not a measurement"),
            ("memory", f"{human_bytes(memory.peak)} of {human_bytes(gpu.memory)} a GPU, {memory.rows:.0f} rows at once"),
            *[("" if number else "by part", f"{name.replace('_', ' ')} {human_bytes(getattr(memory, name))}")
              for number, name in enumerate(PARTS)],
        ]
        # fmt: on

    def _stage_lines(self) -> list[tuple[str, str]]:
        return [
            (
                stage.stage,
                f"{human_count(stage.tokens)} tokens, {_giga(stage.flops_a_token.total)} a token, "
                f"{stage.gpu_hours:,.1f} GPU-hours, {human_bytes(stage.memory.peak)}",
            )
            for stage in (self.stages if len(self.stages) > 1 else [])
        ]


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.3g} GFLOP"

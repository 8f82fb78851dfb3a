"""How long work on a model takes on this machine, and how much memory, before any of it is done: from shapes alone.

Counts are of what grows with a model and with a text: multiplications in products of matrices, in float32 and in float64, and
numbers that are passed over one by one. The clock is one small product, measured; how long the rest takes beside it was looked
at in profiles of a few models on a CPU. A busy machine takes longer, which the upper end has room for.
"""

import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from upfit.architecture.attention import Geometry, Layer
    from upfit.checkpoint.safetensors_header import TensorInfo

# Multiplications that take as long as one unit of something else.
A_NUMBER = 24  # a number read, changed and written
A_DOUBLE = 3  # a multiplication in float64, most of them in decompositions
A_LAYER = 4 * 10**10  # what of a layer does not grow: modules, loading, small solves
A_BYTE = 25  # of weights that are made to be a model
LIBRARY = 2 * 10**11  # reading Python's standard library, the default text
SECONDS_A_BYTE = 2e-9  # of weights that are written or read back
LESS, MORE = 1.7, 2.5  # how many times shorter or longer it may be
WASTE = 1.3  # memory that is taken for what is held, for it is let go of in pieces
TEXT_BYTES = 10**8  # the tokenizer, and the text that is drawn from
TRIED = 4  # strengths of a ridge
CHECKED = 512  # tokens of the sample text that source and result are run over
BLOCK = re.compile(r".*?\.\d+\.")  # what the names of all that is in a layer of the model begin with


@dataclass(frozen=True)
class Work:
    """`products`: multiplications in float32, or what takes as long; `bytes`: memory at the peak, beside what the process
    holds."""

    products: float = 0.0
    bytes: float = 0.0

    def then(self, other: "Work") -> "Work":
        """This work and then the other."""
        return Work(self.products + other.products, max(self.bytes, other.bytes))


@dataclass(frozen=True)
class Block:
    """A layer of the model, with its attention's shape. `weights`: numbers in it; `hidden` and `mlp`: widths of the stream and
    of what the MLP's last matrix is given (0 where no single matrix is the last)."""

    geometry: "Geometry"
    weights: int
    hidden: int
    mlp: int


@dataclass(frozen=True)
class Weights:
    """Of source and result, how many numbers and bytes they have; `vocabulary`: logits of a token."""

    numbers: list[int]
    nbytes: list[int]
    vocabulary: int


@dataclass(frozen=True)
class Machine:
    """Multiplications a second in float32 and in the type that is stored; memory that the process holds, and that is free."""

    rate: float
    stored_rate: float
    held: int
    free: int


def block_of(layer: "Layer", tensors: Mapping[str, "TensorInfo"]) -> Block:
    """The block around an attention layer, from the names and shapes of a checkpoint."""
    start = BLOCK.match(layer.stem)
    inside = {name: info for name, info in tensors.items() if name.startswith(start[0] if start else layer.stem)}
    own = set(layer.names.values())
    hidden = tensors[layer.names["o.weight"]].shape[0]
    others = [info.shape for name, info in inside.items() if name not in own]
    into_stream = [shape[1] for shape in others if len(shape) == 2 and shape[0] == hidden]
    weights = sum(info.numel for info in inside.values())
    return Block(layer.geometry, weights, hidden, into_stream[0] if len(into_stream) == 1 else 0)


def forward(block: Block, tokens: float, length: float) -> float:
    """Multiplications of one pass of `tokens` in windows of `length`; masked products are taken whole."""
    shape = block.geometry
    return tokens * (block.weights + length * shape.heads * (shape.head_dim + shape.v_head_dim))


def ridge(inputs: int, outputs: int, tokens: float) -> float:
    """The fit of a Linear to what it should give out, in float64, each strength tried and held against held-back rows."""
    sums = tokens * inputs * (inputs + outputs)
    return sums + A_DOUBLE * TRIED * (inputs**3 / 6 + 3 * outputs * inputs**2)


def conversion_of(fit: Work, weights: Weights, machine: Machine, compared: bool, read_back: bool) -> tuple[float, float]:
    """(seconds, bytes) of fitting, writing and, where source and result are `compared`, running both over the sample text."""
    seconds, memory = fit.products / machine.rate, fit.bytes
    seconds += SECONDS_A_BYTE * weights.nbytes[1] * (1 + read_back)
    if compared:
        wider = machine.stored_rate < machine.rate  # then they are run in float32
        products = CHECKED * sum(weights.numbers) + A_BYTE * sum(weights.nbytes)
        seconds += products / max(machine.rate, machine.stored_rate)
        memory = max(memory, (2.2 if wider else 1.2) * max(weights.nbytes) + 3 * 4 * CHECKED * weights.vocabulary)
    return seconds, machine.held + memory


def ends(seconds: float) -> list[float]:
    """The least and the most that what is estimated at so many seconds may take, as precise as that is."""
    return [float(f"{end:.1g}") for end in (seconds / LESS, seconds * MORE)]


def this_machine(dtype: "torch.dtype") -> Machine:
    """What is here now; `dtype` is that of the weights."""
    import psutil
    import torch

    held, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    return Machine(measured_rate(torch.float32), measured_rate(dtype), held, free)


def measured_rate(dtype: "torch.dtype") -> float:
    """Multiplications a second of a small product in this type, as torch is set up here and the machine is busy."""
    import torch

    tokens, weights = (torch.ones(shape, dtype=dtype) for shape in ((512, 1024), (1024, 1024)))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        tokens @ weights
        times.append(time.perf_counter() - began)
    return tokens.numel() * weights.shape[1] / statistics.median(times)

"""How long work on a model takes on this machine, and how much memory, before any of it is done: from shapes alone.

Counts are of what grows with a model and with a text: multiplications in products of matrices, in float32 and in float64, and
numbers that are passed over one by one. The clock is one small product, measured; how long the rest takes beside it was looked
at in profiles of a few models on a CPU. A busy machine takes longer, which the upper end has room for.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upfit.architecture.attention import BLOCK

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
START_UP = 4.0  # CPU seconds of a new process until torch and transformers are there
SECONDS_A_BYTE = 2e-9  # of weights that are written or read back
LESS, MORE = 1.7, 2.5  # how many times shorter or longer it may be
WASTE = 1.3  # memory that is taken for what is held, for it is let go of in pieces
TEXT_BYTES = 10**8  # the tokenizer, and the text that is drawn from
TRIED = 4  # strengths of a ridge
CHECKED = 512  # tokens of the sample text that source and result are run over
KEYS_VALUES = ("k.weight", "v.weight")
ENCODER, EMBEDDING = "encoder", "embed"  # a part of the names of what is in an encoder; and of what is only looked up


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
class Windows:
    """`count` windows of `length` tokens. Of an encoder-decoder, `length` is what the decoder writes, and `read` how many
    positions the encoder makes of what it reads beside each (0: there is no encoder)."""

    count: float
    length: int
    read: int = 0

    @property
    def tokens(self) -> float:
        return self.count * self.length

    @property
    def positions(self) -> float:
        """Of the encoder."""
        return self.count * self.read


@dataclass(frozen=True)
class Block:
    """A layer of the model, with one attention's shape. `weights`: numbers in it; `hidden` and `mlp`: widths of the stream and
    of what the MLP's last matrix is given (0 where no single matrix is the last, or another attention of the layer comes after
    this one). `reading`: how many of the weights are multiplied with what an encoder gave; `cross`: this attention's keys are
    made of that."""

    geometry: "Geometry"
    weights: int
    hidden: int
    mlp: int
    reading: int = 0
    cross: bool = False


@dataclass(frozen=True)
class Encoder:
    """What runs before a decoder's layers: `layers` of width `hidden` with `weights` numbers in all."""

    layers: int
    weights: int
    hidden: int


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


def block_of(layer: "Layer", tensors: Mapping[str, "TensorInfo"], layers: Sequence["Layer"]) -> Block:
    """The block around one of the attention `layers` of a model, from the names and shapes of its checkpoint."""
    inside = {name: info for name, info in tensors.items() if name.startswith(layer.block)}
    attentions = [each for each in layers if each.block == layer.block]
    own = {name for each in attentions for name in each.names.values()}
    hidden = tensors[layer.names["o.weight"]].shape[0]
    others = [info.shape for name, info in inside.items() if name not in own]
    into_stream = [shape[1] for shape in others if len(shape) == 2 and shape[0] == hidden]
    mlp = into_stream[0] if len(into_stream) == 1 and layer is attentions[-1] else 0
    read = [each.names[part] for each in attentions if each.cross for part in KEYS_VALUES if part in each.names]
    weights, reading = sum(info.numel for info in inside.values()), sum(tensors[name].numel for name in read)
    return Block(layer.geometry, weights, hidden, mlp, reading, layer.cross)


def encoder_of(tensors: Mapping[str, "TensorInfo"], hidden: int) -> Encoder:
    """The encoder beside a decoder of width `hidden`, from the names and shapes of a checkpoint."""
    names = [name for name in tensors if ENCODER in name.split(".") and EMBEDDING not in name]
    layers = {start[0] for name in names if (start := BLOCK.match(name))}
    return Encoder(len(layers), sum(tensors[name].numel for name in names), hidden)


def forward(block: Block, windows: Windows) -> float:
    """Multiplications of one pass through a layer; masked products are taken whole."""
    shape = block.geometry
    seen = windows.length + windows.read
    each = block.weights - block.reading + seen * shape.heads * (shape.head_dim + shape.v_head_dim)
    return windows.tokens * each + windows.positions * block.reading


def encoded(encoder: Encoder, windows: Windows) -> float:
    """Multiplications of what the encoder reads."""
    return windows.positions * (encoder.weights + encoder.layers * 2 * windows.read * encoder.hidden)


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

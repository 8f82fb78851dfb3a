"""What an aligned merge takes: counts of its steps, layer by layer, as `convert_layers.py` does them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Windows, Work
from upfit.calibration.estimate_text import drawn_windows, sampled
from upfit.calibration.example_sample import ExampleSample
from upfit.calibration.fit_values import ITERATIONS, ROUNDS
from upfit.calibration.observe import Opaque
from upfit.calibration.sample import BATCH_TOKENS, FLAG, Sample
from upfit.calibration.sample_for import sample_for
from upfit.calibration.scores.fit import Effort
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.examples.images import all_images
from upfit.examples.kinds import kind_of, sees
from upfit.output import Output

if TYPE_CHECKING:
    from upfit.convert.recipe import FitContext

FORWARDS = 2.3  # passes of a block: the teacher's, and the student's in pieces
STREAMS = 10  # of an encoder's width, that one of its layers holds
PASSES = 6  # over all sampled scores, for each product with the curvature


def work(context: "FitContext", choice: Choice) -> Work:
    """The whole fit; what an encoder-decoder is calibrated on is read for it, as its lengths are not known before.

    Raises UpfitError for calibration that cannot be used, Opaque for an encoder-decoder that has none, and for images.
    """
    statistics, config = statistics_for(context, choice), context.checkpoint.config
    of_images = statistics is not None and kind_of(config) == "text" and not isinstance(statistics.sample, Sample)
    if of_images or (statistics is None and sees(config) and all_images(choice.calibration, FLAG)):
        raise Opaque("nobody has counted what images take")
    sample = statistics.sample if statistics is not None else _examples(context, choice)
    windows = drawn_windows(choice.tokens, choice.length, config) if sample is None else windows_in(sample)
    every, tensors = context.architecture.layers, context.checkpoint.tensors
    total = Work(0 if choice.calibration or sample is not None else estimate.LIBRARY)
    for layer in (layer for layer in every if layer.geometry.kv_heads > choice.kv_heads):
        block = estimate.block_of(layer, tensors, every)
        total = total.then(aligned(block, choice.kv_heads, windows, choice.refit))
    if any(each.read for each in windows):
        total = total.then(_encoded(context, windows))
    embeddings = max(info.numel for info in tensors.values())
    return Work(total.products, estimate.WASTE * (total.bytes + 4 * embeddings) + estimate.TEXT_BYTES)


def _encoded(context: "FitContext", windows: list[Windows]) -> Work:
    """The encoder, which runs once, whole, before the layers."""
    tensors, every = context.checkpoint.tensors, context.architecture.layers
    block = estimate.block_of(every[0], tensors, every)
    encoder = estimate.encoder_of(tensors, block.hidden)
    each = max(at.positions * (STREAMS * encoder.hidden + block.geometry.heads * at.read) for at in windows)
    return Work(sum(estimate.encoded(encoder, at) for at in windows), 4 * (encoder.weights + each))


def _examples(context: "FitContext", choice: Choice) -> "Sample | ExampleSample | None":
    """What an encoder-decoder is calibrated on; None for a decoder, of which only numbers and lengths of windows are asked."""
    if kind_of(context.checkpoint.config) == "text":
        return None
    asked = (choice.calibration, choice.tokens, choice.length)
    return sample_for(context.folder, context.checkpoint, *asked, Output(quiet=True), choice.field)


def windows_in(sample: "Sample | ExampleSample") -> list[Windows]:
    """Windows of text, or batches of examples, padded as they are run."""
    if isinstance(sample, Sample):
        return [Windows(len(rows), length) for length, rows in sample.windows.items()]
    return [Windows(*size) for size in sample.sizes()]


def aligned(block: Block, kv_heads: int, windows: Sequence[Windows], refit: bool = True) -> Work:
    """One attention of a layer, on `windows`."""
    shape, hidden = block.geometry, block.hidden
    tokens, joint = sum(each.tokens for each in windows), shape.heads * shape.v_head_dim
    positions = sum(each.positions for each in windows)
    keys = positions if block.cross else tokens
    rows, pairs = (sum(part) for part in zip(*(sampled(each, block.cross) for each in windows), strict=True))
    passes = FORWARDS if refit else 1.3
    total = sum(passes * estimate.forward(block, each) for each in windows)
    total += min(tokens, BATCH_TOKENS) * block.weights + _statistics(block, rows, pairs) + _closed_form(block, kv_heads)
    total += _values(block, kv_heads, rows, pairs)
    if refit:
        total += _scores(block, kv_heads, keys, rows, pairs) + estimate.ridge(joint, hidden, tokens)
        total += estimate.ridge(block.mlp, hidden, tokens) if block.mlp else 0.0
        total += (3 * tokens + keys) * hidden**2 + estimate.A_DOUBLE * 3 * hidden**3  # drift and moments of the inputs
    streams = 4 * (tokens * (7 * hidden + joint) + keys * shape.kv_heads * shape.v_head_dim + positions * hidden)
    scores = 4 * 4 * pairs * shape.heads
    ridges = 8 * (5 * block.mlp**2 + 4 * hidden * block.mlp) + 4 * tokens * (block.mlp + 2 * hidden)
    return Work(total + estimate.A_LAYER, streams + max(scores, ridges) + 2 * 4 * block.weights)


def _statistics(block: Block, rows: float, pairs: float) -> float:
    shape = block.geometry
    keys = shape.kv_heads * shape.head_dim
    return shape.heads * (3 * pairs * keys + 2 * rows * keys**2 + 4 * estimate.A_NUMBER * pairs)


def _closed_form(block: Block, kv_heads: int) -> float:
    """Decompositions in float64 of each group, for each of a few cuts."""
    shape = block.geometry
    group = shape.kv_heads // kv_heads * shape.head_dim
    return estimate.A_DOUBLE * kv_heads * 60 * group**3


def _values(block: Block, kv_heads: int, rows: float, pairs: float) -> float:
    shape = block.geometry
    group, joint = shape.kv_heads // kv_heads * shape.v_head_dim, shape.heads * shape.v_head_dim
    step = 2 * rows * (shape.heads * shape.v_head_dim * group + block.hidden * joint)
    solve = rows * joint * (joint + block.hidden) + estimate.A_DOUBLE * (joint**3 / 3 + block.hidden * joint**2)
    return pairs * shape.heads * group + (ROUNDS + 1) * (ITERATIONS * step + solve)


def _scores(block: Block, kv_heads: int, keys: float, rows: float, pairs: float) -> float:
    """Gauss–Newton: products with the curvature. Errors are tried as well, and steps end early: one makes up for the other."""
    shape, effort = block.geometry, Effort()
    projections = 2 * block.hidden * shape.head_dim * (rows * shape.heads + keys * kv_heads)
    scores = pairs * shape.heads * (5 * shape.head_dim + PASSES * estimate.A_NUMBER)
    return (sum(effort.iterations) + len(effort.iterations) + 2) * (projections + scores)

"""What an aligned merge takes: counts of its steps, layer by layer, as `convert_layers.py` does them."""

from typing import TYPE_CHECKING

from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Work
from upfit.calibration.observe import Opaque
from upfit.calibration.sample import BATCH_TOKENS, FLAG, LENGTH, SHORT, TOKENS, Sample
from upfit.calibration.statistics import ROWS, SEGMENT
from upfit.checkpoint.reader import most_positions
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.convert.gqa.fit_scores import Effort
from upfit.convert.gqa.fit_values import ITERATIONS, ROUNDS
from upfit.examples.images import all_images
from upfit.examples.kinds import kind_of, sees
from upfit.options import parse_count

if TYPE_CHECKING:
    from upfit.convert.recipe import FitContext

FORWARDS = 2.3  # passes of a block: the teacher's, and the student's in pieces
PASSES = 6  # over all sampled scores, for each product with the curvature


def work(context: "FitContext", choice: Choice) -> Work:
    """The whole fit. Raises UpfitError for calibration that cannot be used, Opaque for an encoder-decoder and for images."""
    config = context.checkpoint.config
    if kind_of(config) != "text":
        raise Opaque("nobody has counted what its encoder takes")
    statistics = statistics_for(context, choice)
    of_images = statistics is not None and not isinstance(statistics.sample, Sample)
    if of_images or (statistics is None and sees(config) and all_images(choice.calibration, FLAG)):
        raise Opaque("nobody has counted what images take")
    if statistics is not None and isinstance(statistics.sample, Sample):
        windows = {length: float(rows.numel()) for length, rows in statistics.sample.windows.items()}
    else:
        windows = windows_of(parse_count(choice.tokens or str(TOKENS), "--calibration-tokens"), choice.length, context)
    layers = [layer for layer in context.architecture.layers if layer.geometry.kv_heads > choice.kv_heads]
    blocks = [estimate.block_of(layer, context.checkpoint.tensors) for layer in layers]
    total = Work(0 if choice.calibration else estimate.LIBRARY)
    for block in blocks:
        total = total.then(aligned(block, choice.kv_heads, windows, choice.refit))
    embeddings = max(info.numel for info in context.checkpoint.tensors.values())
    return Work(total.products, estimate.WASTE * (total.bytes + 4 * embeddings) + estimate.TEXT_BYTES)


def windows_of(tokens: int, length: int | None, context: "FitContext") -> dict[int, float]:
    """Tokens in windows of each length, as they are drawn."""
    longest = length or min(LENGTH, most_positions(context.checkpoint.config) or LENGTH)
    lengths = {longest, min(longest, SHORT)}
    return {size: tokens / len(lengths) for size in lengths}


def aligned(block: Block, kv_heads: int, windows: dict[int, float], refit: bool = True) -> Work:
    """One layer, on `windows`: length → tokens."""
    shape, hidden = block.geometry, block.hidden
    tokens, joint = sum(windows.values()), shape.heads * shape.v_head_dim
    rows, pairs = (sum(part) for part in zip(*(_sampled(size, count) for size, count in windows.items()), strict=True))
    passes = FORWARDS if refit else 1.3
    total = sum(passes * estimate.forward(block, count, size) for size, count in windows.items())
    total += min(tokens, BATCH_TOKENS) * block.weights + _statistics(block, rows, pairs) + _closed_form(block, kv_heads)
    total += _values(block, kv_heads, rows, pairs)
    if refit:
        total += _scores(block, kv_heads, tokens, rows, pairs) + estimate.ridge(joint, hidden, tokens)
        total += estimate.ridge(block.mlp, hidden, tokens) if block.mlp else 0.0
        total += 4 * tokens * hidden**2 + estimate.A_DOUBLE * 3 * hidden**3  # drift and moments of the inputs
    streams = 4 * tokens * (7 * hidden + joint + shape.kv_heads * shape.v_head_dim)
    scores = 4 * 4 * pairs * shape.heads
    ridges = 8 * (5 * block.mlp**2 + 4 * hidden * block.mlp) + 4 * tokens * (block.mlp + 2 * hidden)
    return Work(total + estimate.A_LAYER, streams + max(scores, ridges) + 2 * 4 * block.weights)


def _sampled(length: int, tokens: float) -> tuple[float, float]:
    """(rows, scores of one head) sampled in `tokens` of windows of `length`, as `statistics.sample_rows` does."""
    each, rows, scores = ROWS if length <= SEGMENT else ROWS // 2, 0, 0
    for start in range(0, length, SEGMENT):
        end = min(start + SEGMENT, length)
        rows += min(each, end - start)
        scores += min(each, end - start) * end
    return tokens / length * rows, tokens / length * scores


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


def _scores(block: Block, kv_heads: int, tokens: float, rows: float, pairs: float) -> float:
    """Gauss–Newton: products with the curvature. Errors are tried as well, and steps end early: one makes up for the other."""
    shape, effort = block.geometry, Effort()
    projections = 2 * block.hidden * shape.head_dim * (rows * shape.heads + tokens * kv_heads)
    scores = pairs * shape.heads * (5 * shape.head_dim + PASSES * estimate.A_NUMBER)
    return (sum(effort.iterations) + len(effort.iterations) + 2) * (projections + scores)

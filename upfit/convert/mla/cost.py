"""What a latent takes: counts of its steps, layer by layer, as `choose.py` and `convert_layers.py` do them.

Shapes: E inputs, H query heads, K key/value heads, D and V head widths, P rotated pairs, S slots, N unrotated dimensions, r
latent width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Windows, Work
from upfit.calibration.estimate_text import drawn_windows, sampled
from upfit.calibration.sample import BATCH_TOKENS, HELD_SHARE
from upfit.calibration.scores.fit import Effort
from upfit.calibration.statistics import SEGMENT
from upfit.convert.mla import refine
from upfit.convert.mla.choose import LAYERS, TOKENS, looked_at
from upfit.convert.mla.latent import ROUNDS
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.watch_layer import BALANCES

if TYPE_CHECKING:
    from upfit.convert.mla.fit import Choice
    from upfit.convert.recipe import FitContext

FORWARDS = 2.3  # passes of a block: the teacher's, and the student's in pieces
ALONE = 1.3  # without the student
PASSES = 6  # over all sampled scores, for each product with the curvature
DECOMPOSED = 16  # times E³, of the moments of a layer's inputs


def work(context: "FitContext", choice: "Choice") -> Work:
    """The whole fit, and the choice of sizes where there is one. Raises UpfitError for no number of tokens."""
    every, tensors = context.architecture.layers, context.checkpoint.tensors
    config, possible = context.checkpoint.config, choice.possible
    windows = drawn_windows(choice.tokens, choice.length, config)
    total, blocks = Work(), [estimate.block_of(layer, tensors, every) for layer in every]
    if not choice.calibration:
        total = Work((1 + (len(possible) > 1)) * estimate.LIBRARY)
    if len(possible) > 1:
        few = drawn_windows(TOKENS, choice.length, config)
        total = total.then(chosen(blocks[: max(looked_at(len(blocks))) + 1], possible, few))
    for block in blocks:
        total = total.then(fitted(block, possible[len(possible) // 2], windows, choice.refit))
    embeddings = max(info.numel for info in tensors.values())
    return Work(total.products, estimate.WASTE * (total.bytes + 4 * embeddings) + estimate.TEXT_BYTES)


def chosen(blocks: Sequence[Block], possible: Sequence[Sizes], windows: Sequence[Windows]) -> Work:
    """The choice among `possible` sizes: `blocks` are run, of LAYERS of them every closed form is made."""
    total = Work()
    for block in blocks:
        total = total.then(Work(sum(estimate.forward(block, each) for each in windows), 4 * block.weights))
    for block in blocks[-LAYERS:]:
        forms = sum(_closed_form(block, sizes, windows) for sizes in possible)
        total = total.then(Work(_watched(block, windows) + forms, _watched_bytes(block, windows)))
    return total


def fitted(block: Block, sizes: Sizes, windows: Sequence[Windows], refit: bool = True) -> Work:
    """One layer, on `windows`."""
    shape, hidden, tokens = block.geometry, block.hidden, sum(each.tokens for each in windows)
    total = (FORWARDS if refit else ALONE) * sum(estimate.forward(block, each) for each in windows)
    total += min(tokens, BATCH_TOKENS) * block.weights + _watched(block, windows)
    total += len(BALANCES) * _closed_form(block, sizes, windows)
    ridges = scores = 0.0
    if refit:
        total += _scores(block, sizes, windows) + _refined(block, sizes, windows)
        total += estimate.ridge(shape.heads * shape.v_head_dim, hidden, tokens)
        total += estimate.ridge(block.mlp, hidden, tokens) if block.mlp else 0.0
        total += 4 * tokens * hidden**2 + estimate.A_DOUBLE * 3 * hidden**3  # drift and moments of the inputs
        ridges = 8 * (5 * block.mlp**2 + 4 * hidden * block.mlp) + 4 * tokens * (block.mlp + 2 * hidden)
        # Inputs as they are and whitened; queries and Σ p k, what pulls on them, and a change of both.
        scores = 4 * (2 * tokens * hidden + 6 * _rows(windows)[0] * shape.heads * (2 * sizes.slots + sizes.latent))
    streams = 4 * tokens * (7 * hidden + shape.heads * shape.v_head_dim)
    return Work(total + estimate.A_LAYER, max(streams + ridges + 4 * block.weights, _watched_bytes(block, windows) + scores))


def _rows(windows: Sequence[Windows]) -> tuple[float, float, float]:
    """Of sampled rows: how many, their scores of one head, and the keys that rows of a stretch share, over all stretches."""
    rows, pairs = (sum(part) for part in zip(*(sampled(each) for each in windows), strict=True))
    keys = sum(w.count * sum(min(at + SEGMENT, w.length) for at in range(0, w.length, SEGMENT)) for w in windows)
    return rows, pairs, keys


def _watched(block: Block, windows: Sequence[Windows]) -> float:
    """The sums of a layer, and the basis in which its two moments of inputs are diagonal."""
    shape, hidden, (rows, pairs, keys) = block.geometry, block.hidden, _rows(windows)
    rotated = shape.kv_heads * shape.head_dim // 2  # complex numbers
    each = pairs * (shape.head_dim + hidden + 4 * rotated + 4 * estimate.A_NUMBER) + 2 * rows * hidden**2
    each += 4 * (rows + keys) * rotated * shape.kv_heads + estimate.A_NUMBER * keys * rotated
    tokens = sum(window.tokens for window in windows)
    return shape.heads * each + (tokens + keys) * hidden**2 + estimate.A_DOUBLE * DECOMPOSED * hidden**3


def _watched_bytes(block: Block, windows: Sequence[Windows]) -> float:
    """What is held once a layer has been watched: streams and values, scores, sums in float64."""
    shape, hidden, tokens = block.geometry, block.hidden, sum(each.tokens for each in windows)
    streams = 4 * tokens * (6 * hidden + shape.kv_heads * shape.v_head_dim)
    scores = 4 * 4 * _rows(windows)[1] * shape.heads
    return streams + scores + 8 * 10 * hidden**2 + 2 * 4 * block.weights


def _closed_form(block: Block, sizes: Sizes, windows: Sequence[Windows]) -> float:
    """One closed form, and its error on what is held back."""
    shape, hidden, r, (rows, pairs, _) = block.geometry, block.hidden, sizes.latent, _rows(windows)
    of_keys, of_values = shape.kv_heads * sizes.unrotated, shape.kv_heads * shape.v_head_dim
    both, tokens = of_keys + of_values, sum(each.tokens for each in windows)
    step = (4 * r**2 + 3 * r * both) * hidden
    form = (of_keys**2 + of_values**2) * hidden + 2 * both * hidden**2 + 10 * min(both, hidden) ** 2 * max(both, hidden)
    form += ROUNDS * step + 2 * r * hidden**2
    width = 2 * sizes.slots
    held = tokens * hidden * (width + r) + pairs * shape.heads * (width + 2 * r + shape.v_head_dim + 4 * estimate.A_NUMBER)
    held += rows * shape.heads * (hidden * (width + sizes.unrotated) + r * (sizes.unrotated + shape.v_head_dim))
    held += 2 * rows * shape.heads * shape.v_head_dim * hidden
    return estimate.A_DOUBLE * form + held / HELD_SHARE


def _refined(block: Block, sizes: Sizes, windows: Sequence[Windows]) -> float:
    """Latent and outputs in turn, by both ridges; a second round as a rule gains nothing."""
    shape, hidden, r, (rows, pairs, _) = block.geometry, block.hidden, sizes.latent, _rows(windows)
    span = min(shape.kv_heads * (sizes.unrotated + shape.v_head_dim), hidden)
    outputs, read = shape.heads * shape.v_head_dim, shape.heads * r
    mixed = sum(each.tokens for each in windows) * hidden * span
    mixed += pairs * (shape.heads * (span + shape.v_head_dim)) + rows * outputs * hidden
    step = 2 * rows * read * span + rows * read**2  # one product with the curvature
    once = 2 * rows * outputs * (span + hidden) + rows * outputs**2 + rows * read * hidden + estimate.A_DOUBLE * outputs**3 / 2
    return mixed + 2 * (once + (refine.ITERATIONS + 1) * step)


def _scores(block: Block, sizes: Sizes, windows: Sequence[Windows]) -> float:
    """Gauss–Newton: products with the curvature. Errors are tried as well, and steps end early: one makes up for the other."""
    shape, hidden, effort, (rows, pairs, _) = block.geometry, block.hidden, Effort(), _rows(windows)
    width, tokens = 2 * sizes.slots + sizes.latent, sum(each.tokens for each in windows)
    projections = 2 * hidden * (rows * shape.heads * (2 * sizes.slots + sizes.unrotated) + tokens * width)
    projections += 2 * rows * shape.heads * sizes.unrotated * sizes.latent + width * hidden**2
    scores = pairs * shape.heads * (5 * width + PASSES * estimate.A_NUMBER)
    return (sum(effort.iterations) + len(effort.iterations) + 2) * (projections + scores)

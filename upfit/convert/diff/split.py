"""One query head as a differential pair of half its width: which dimensions each half keeps, its scale, and λ.

A half that does not keep a dimension sees its query as 0 there, so keys stay whole and nothing is added to the cache. A
rotated pair of dimensions stays together. Shapes: H query heads, D their width, P groups of two dimensions, N sampled rows.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.modeling.modeling_upfit_diff import lambda_init

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer

FIRST_SCALES = (1.0, 1.15, 1.3, 1.5, 1.8)  # of a query, for the map that stays: all combinations are tried
SECOND_SCALES = (0.5, 1.0, 1.5)  # for the map that is subtracted, flatter to sharper
LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # denser near 0, where the head is what it was


@dataclass(frozen=True)
class Split:
    """`scale` [H, 2, D] of the query's dimensions for both halves, `lambdas` [H], and `gain` [H]: what the output columns are
    to be multiplied with, so that the difference is nearest to what the head gave before."""

    scale: Tensor
    lambdas: Tensor
    gain: Tensor

    def outputs(self, seen: Seen) -> Tensor:
        """[B, T, H, V]: the difference of the two halves' attention, for the queries, keys and values of `seen`."""
        pairs = (seen.q[:, :, None] * self.scale[:, :, None].to(seen.q)).flatten(1, 2)  # [B, 2H, T, D]
        sinks = None if seen.sinks is None else seen.sinks.repeat_interleave(2, 0)
        both = replace(seen, q=pairs, sinks=sinks).attended()
        return both[:, :, 0::2] - self.lambdas[:, None].to(both) * both[:, :, 1::2]

    def start(self, weight: Tensor) -> Tensor:
        """Output columns [E, H·V], each head's times its gain."""
        return (weight.unflatten(1, (len(self.gain), -1)) * self.gain[:, None].to(weight)).flatten(1)

    def tensors(self, layer: "Layer") -> dict[str, Tensor]:
        return {layer.stem + "split_scale": self.scale, layer.stem + "lambda_logit": self.lambdas.logit()}

    def record(self) -> dict[str, Any]:
        return {"lambda": self.lambdas.tolist(), "scale": self.scale.amax(-1).tolist(), "gain": self.gain.tolist()}


def naive(heads: int, width: int, layer: int) -> Split:
    """The middle cut: dimensions of the lower half to the first, the rest to the second, at the scale of half the width and
    with the paper's λ_init, no gain: what a conversion without calibration does."""
    scale = torch.zeros(heads, 2, width)
    scale[:, 0, : width // 2] = 2**0.5
    scale[:, 1, width // 2 :] = 2**0.5
    start = torch.full((heads,), lambda_init(layer))
    return Split(scale, start, torch.ones(heads))


def groups_of_two(order: tuple[int, ...], pairs: int) -> Tensor:
    """[P, 2]: rotated pairs, then neighbours among the dimensions that no rotation touches (`AttentionTraits.order`)."""
    turned = torch.tensor([order[:pairs], order[pairs : 2 * pairs]]).T
    return torch.cat([turned, torch.tensor(order[2 * pairs :], dtype=torch.long).reshape(-1, 2)])


def choose(views: list[tuple[Seen, Tensor, int]], groups: Tensor) -> Split:
    """The split that keeps each head's output best on sampled rows: `views` are (what was seen, query positions, keys).

    The first half keeps the P / 2 groups whose scores vary most under the attention weights; scales and λ are the best of a
    grid for the head's own output, up to a factor that the output projection takes up.
    """
    heads, width = views[0][0].q.shape[1], views[0][0].q.shape[-1]
    power = sum(_variances(seen, rows, keys, groups) for seen, rows, keys in views)
    assert isinstance(power, Tensor)
    first = power.argsort(1, descending=True)[:, : (len(groups) + 1) // 2]  # [H, P / 2]
    mask = torch.zeros(heads, 2, width, device=power.device)
    mask[:, 1] = 1
    for head in range(heads):
        dimensions = groups[first[head].cpu()].flatten()
        mask[head, 0, dimensions], mask[head, 1, dimensions] = 1, 0
    products = sum(_products(seen, rows, keys, mask) for seen, rows, keys in views)
    assert isinstance(products, Tensor)
    return _best(products, mask)


def _variances(seen: Seen, rows: Tensor, keys: int, groups: Tensor) -> Tensor:
    """[H, P]: how much each group's part of the scores varies under the attention weights, Σ over rows."""
    _, weights = seen.scores(rows, keys)
    variances = []
    for group in groups:
        part = _part(seen, rows, keys, group)
        mean = (weights * part).sum(-1, keepdim=True)
        variances.append((weights * (part - mean).square()).sum((0, 2, 3)))
    return torch.stack(variances, 1)


def _part(seen: Seen, rows: Tensor, keys: int, dimensions: Tensor) -> Tensor:
    """Scores [B, H, R, keys] of some dimensions alone."""
    narrowed = replace(seen, q=seen.q[..., dimensions], k=seen.k[..., dimensions])
    return narrowed.scores(rows, keys)[0]


def _products(seen: Seen, rows: Tensor, keys: int, mask: Tensor) -> Tensor:
    """[H, 1 + F + S, 1 + F + S]: inner products of outputs over the rows, of the head as it is, of its first half at each of
    FIRST_SCALES and its second at each of SECOND_SCALES."""
    values = seen.v[:, :, :keys].repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)
    _, weights = seen.scores(rows, keys)
    outputs = [weights @ values]
    for half, scales in enumerate((FIRST_SCALES, SECOND_SCALES)):
        masked = replace(seen, q=seen.q * mask[:, half][:, None])
        raw, _ = masked.scores(rows, keys)
        outputs += [seen.weights(raw * scale, rows) @ values for scale in scales]
    stacked = torch.stack(outputs).transpose(1, 2).flatten(2)  # [n, H, B·R·V]
    return torch.einsum("nhx,mhx->hnm", stacked, stacked).double()


def _best(products: Tensor, mask: Tensor) -> Split:
    """The grid's best for each head by |whole − gain · (first − λ second)|², the gain being the best there is."""
    splits = []
    for gram in products:
        options = []
        for f, first in enumerate(FIRST_SCALES, 1):
            for s, second in enumerate(SECOND_SCALES, 1 + len(FIRST_SCALES)):
                for share in LAMBDAS:
                    along = gram[0, f] - share * gram[0, s]
                    power = gram[f, f] - 2 * share * gram[f, s] + share**2 * gram[s, s]
                    gain = along / power.clamp_min(1e-30)  # no division by 0
                    options.append((float(gram[0, 0] - gain * along), first, second, share, float(gain)))
        splits.append(min(options)[1:])
    best = torch.tensor(splits, device=mask.device)  # [H, (first scale, second scale, λ, gain)]
    return Split(mask * best[:, :2, None], best[:, 2], best[:, 3])

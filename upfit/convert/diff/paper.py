"""The first Differential Transformer (arXiv 2410.05258, equations 1 to 3) as transformers' DiffLlama has it.

Shapes: H heads (two for each pair), K key/value heads, D their width. Pair p is heads p and p + H/2; it looks at key heads
p // g and K/2 + p // g (g = H / K) and at both value heads of these numbers, side by side.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.modeling.modeling_upfit_diff import lambda_init

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.diff.fit import Form

LAMBDAS = (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5)  # below 0 both maps add up, which loses less and subtracts nothing
SMALL = 0.1  # λ's two exponents begin at log(1 + SMALL): where both vectors of one are 0, no gradient ever reaches them


def pairs(seen: Seen, lam: float | Tensor, lambda_init: float, eps: float) -> Tensor:
    """[B, T, H, D]: pair after pair, (1 − λ_init) · norm((A_p − λ A_{p + H/2}) [v_j; v_{j + K/2}]) in two pieces of width D."""
    first, second = seen.v.chunk(2, 1)
    wide = torch.cat([first, second], -1)  # [B, K/2, T, 2D]
    values = torch.cat([wide, wide], 1)  # for the key heads of either half
    both = replace(seen, v=values).attended()  # [B, T, H, 2D]
    plus, minus = both.chunk(2, 2)
    apart = plus - lam * minus
    normed = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps)
    return ((1 - lambda_init) * normed).unflatten(-1, (2, -1)).flatten(2, 3)


def lambda_vectors(lam: float, lambda_init: float, width: int) -> dict[str, Tensor]:
    """Four vectors [D] with exp(q1 · k1) − exp(q2 · k2) + λ_init = λ (equation 2)."""
    exponents = {"1": 1 + SMALL + max(lam - lambda_init, 0.0), "2": 1 + SMALL + max(lambda_init - lam, 0.0)}
    vectors: dict[str, Tensor] = {}
    for number, value in exponents.items():
        each = (torch.tensor(value, dtype=torch.float64).log() / width).sqrt()
        vectors |= {f"lambda_{name}{number}": torch.full((width,), float(each)) for name in "qk"}
    return vectors


@dataclass(frozen=True)
class Paired:
    """A layer as DiffLlama with this λ; `gain` [H/2] brings the normed pairs back to the size of what they replace."""

    lam: float
    lambda_init: float
    eps: float
    gain: Tensor

    def outputs(self, seen: Seen) -> Tensor:
        return pairs(seen, self.lam, self.lambda_init, self.eps)

    def start(self, weight: Tensor) -> Tensor:
        """Columns of heads p and p + H/2 go to the pieces of pair p, times its gain."""
        heads = 2 * len(self.gain)
        columns = weight.unflatten(1, (heads, -1))
        order = torch.arange(heads).reshape(2, -1).T.flatten()
        return (columns[:, order] * self.gain.repeat_interleave(2)[:, None].to(weight)).flatten(1)

    def tensors(self, layer: "Layer") -> dict[str, Tensor]:
        vectors = lambda_vectors(self.lam, self.lambda_init, layer.geometry.head_dim)
        return {layer.stem + name: vector for name, vector in vectors.items()}

    def record(self) -> dict[str, Any]:
        return {"lambda": self.lam}


def gains(views: list[tuple[Seen, Tensor, int]], form: Paired) -> Tensor:
    """[H/2]: rms of a pair's heads over rms of its normed difference, on what was seen."""
    wanted = actual = torch.zeros(())
    for seen in {id(view[0]): view[0] for view in views}.values():
        before = seen.output.square().sum((0, 1, 3))  # [H]
        wanted = wanted + before.unflatten(0, (2, -1)).sum(0)
        actual = actual + form.outputs(seen).square().sum((0, 1, 3)).unflatten(0, (-1, 2)).sum(1)
    return (wanted / actual.clamp_min(1e-30)).sqrt()  # no division by 0


def candidates(layer: int, views: list[tuple[Seen, Tensor, int]], eps: float) -> "list[Form]":
    """The layer with each λ of the grid, at the gain that goes with it."""
    forms: list[Form] = []
    for lam in sorted({*LAMBDAS, lambda_init(layer)}):
        form = Paired(lam, lambda_init(layer), eps, torch.ones(views[0][0].q.shape[1] // 2))
        forms.append(replace(form, gain=gains(views, form)))
    return forms

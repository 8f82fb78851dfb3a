"""How a layer adds to its stream, found by least squares of what it gives out on what its parts give out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upfit.calibration.observe import by_window
from upfit.calibration.watch import Place, Watched

FEW = 2  # windows are enough for a test
CLOSE = 1e-7  # share of the energy that a test may leave unexplained, in float32


@dataclass(frozen=True)
class Residual:
    """How a layer adds to its stream: out = input + `attention` · o_proj(…) [+ `mlp` · down(…)], the stream's scalars; of a
    layer with several attentions, what each of them adds.

    Where norms follow the sums (`normed`), the attention's output is added to what `base` gives out (None: the layer's input),
    and the MLP's to what `mlp_base` gives out; the norm `mlp_sum` is given that sum.
    """

    attention: float
    mlp: float = 0.0
    down: str | None = None  # path in the layer of the Linear that ends the MLP; None when no single Linear does
    earlier: tuple[float, ...] = ()  # the scalars of the layer's attentions that run before this one
    normed: bool = False
    base: str | None = None  # paths in the layer
    mlp_base: str | None = None
    mlp_sum: str | None = None


def find_residual(watched: Watched, place: Place, outer: list[str], reasons: list[str]) -> Residual | None:
    """The stream's structure, by least squares of what the layer adds on what its parts give out."""

    def output_of(name: str) -> Tensor:
        return by_window(watched.taps[name][1], watched.hidden)[:FEW].double().reshape(-1)

    added = (watched.output - watched.hidden)[:FEW].double().reshape(-1)
    outputs = [name for name in place.outputs if name in watched.taps]
    if any(output_of(name).shape != added.shape for name in outputs):
        reasons.append("its stream is not one of hidden states, so the output is refitted without the stream's drift")
        return None
    others = [name for name in outer if name in watched.taps and name not in outputs]
    others = [name for name in others if output_of(name).numel() == added.numel()]
    linears = [name for name in others if _is_whole(place.block.module.get_submodule(name), watched.taps[name])]
    for name in [*reversed(linears), *reversed([name for name in others if name not in linears])]:
        parts = torch.stack([*map(output_of, outputs), output_of(name)], 1)
        scalars = torch.linalg.pinv(parts.T @ parts, hermitian=True) @ (parts.T @ added)
        if unexplained(added, parts @ scalars) < CLOSE:
            *attentions, mlp = scalars.tolist()
            own = outputs.index(place.path("o"))
            return Residual(attentions[own], mlp, name if name in linears else None, tuple(attentions[:own]))
    residual = _normed_sums(watched, place, others, linears)
    if residual is None:
        reasons.append(
            "its layer does not simply add the attention's output, so the output is refitted without the stream's drift"
        )
    return residual


def _is_whole(module: nn.Module, tap: tuple[Tensor, Tensor]) -> bool:
    """Whether the module is a Linear whose output is still what it gave out: some layers add other experts' in place."""
    if not isinstance(module, nn.Linear):
        return False
    rows, output = tap[0].flatten(0, -2)[:FEW], tap[1].flatten(0, -2)[:FEW]
    with torch.no_grad():
        return unexplained(output, module(rows)) < CLOSE


def _normed_sums(watched: Watched, place: Place, others: list[str], linears: list[str]) -> Residual | None:
    """The structure of a stream whose sums are normed (BART, Marian): which modules are given a sum, and of what."""
    attended = watched.taps[place.path("o")][1][:FEW].double()
    inputs = {name: watched.taps[name][0][:FEW].double() for name in others}
    sums = {name: tensor for name, tensor in inputs.items() if tensor.shape == attended.shape}
    bases: dict[str | None, Tensor] = {None: watched.hidden[:FEW].double()}
    bases |= {name: watched.taps[name][1][:FEW].double() for name in sums if name not in linears}
    own = _sum(sums, bases, attended)
    if own is None:
        return None
    for down in reversed(linears):
        last = _sum(sums, bases, watched.taps[down][1][:FEW].double())
        if last is not None:
            return Residual(own.factor, last.factor, down, (), True, own.base, last.base, last.name)
    return Residual(own.factor, normed=True, base=own.base)


@dataclass(frozen=True)
class _Sum:
    name: str  # the module that is given the sum
    base: str | None
    factor: float


def _sum(sums: dict[str, Tensor], bases: dict[str | None, Tensor], part: Tensor) -> _Sum | None:
    """Which of `sums` is one of `bases` and a factor times `part`."""
    for name, total in sums.items():
        for base, start in bases.items():
            factor = float(((total - start) * part).sum() / part.square().sum().clamp_min(1e-30))  # no division by 0
            if base != name and factor and unexplained(total - start, factor * part) < CLOSE:
                return _Sum(name, base, factor)
    return None


def unexplained(actual: Tensor, predicted: Tensor) -> float:
    """Share of the energy of `actual` that `predicted` does not have."""
    actual, predicted = actual.double(), predicted.double()
    return float((actual - predicted).square().sum() / actual.square().sum().clamp_min(1e-30))  # no division by 0

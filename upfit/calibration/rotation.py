"""Finds out how an attention turns its queries and keys by their position, from what they are before and after."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from upfit.architecture.attention import Geometry
from upfit.calibration.observe import Seen
from upfit.calibration.residual import CLOSE, unexplained


@dataclass(frozen=True)
class Turns:
    """The rotation of queries and keys as complex factors [T, P] and [S, P] (with the family's scaling of them), in
    `AttentionTraits.order`. `scale`: by how much scores are larger for what the family multiplies with besides."""

    q: Tensor
    k: Tensor
    scale: float = 1.0


def heads_view(tensor: Tensor, tokens: int, heads: int) -> Tensor:
    """[B, T, heads, D] of a tensor that holds it as [B, T, heads·D], [B, T, heads, D] or [B, heads, T, D]."""
    if tensor.ndim == 4 and tensor.shape[1] == heads and tensor.shape[2] == tokens and heads != tokens:
        return tensor.transpose(1, 2)
    return tensor.reshape(tensor.shape[0], tokens, heads, -1)


def queries_of(projected: Tensor, seen: Seen) -> Tensor:
    """What q_proj gave out [B, T, H·D], without the gates that stand behind each head's queries in some families."""
    heads, width = seen.q.shape[1], seen.q.shape[3]
    if projected.numel() != 2 * seen.q.numel():
        return projected
    return projected.reshape(*projected.shape[:2], heads, 2 * width)[..., :width].flatten(2)


@dataclass(frozen=True)
class Layout:
    """See `AttentionTraits`."""

    pairs: int
    order: tuple[int, ...]
    speeds: tuple[float, ...]
    norm_last: bool = False
    unit: tuple[float, ...] = ()


@dataclass
class _Sides:
    """Queries ("q") and keys ("k") [B, T, heads, D] before and after the rotation."""

    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    norm_last: bool = False
    unit: tuple[float, ...] = ()


def find_rotation(
    seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], shape: Geometry, reasons: list[str]
) -> tuple[bool, Turns, Layout]:
    """Which dimensions the rotation pairs, and its factor at every position, from keys and queries before and after it."""
    tokens, width = {"q": seen.q.shape[2], "k": seen.k.shape[2]}, shape.head_dim
    none = torch.empty(tokens["k"], 0, device=seen.k.device)
    nothing = Turns(none[: tokens["q"]], none), Layout(0, tuple(range(width)), ())
    sides = _sides(seen, taps, shape, reasons)
    if sides is None:
        return False, *nothing
    before, after = sides.before, sides.after
    still = bool(sides.unit) and all(unexplained(after[part], before[part]) < CLOSE for part in after)
    moved = [d for d in range(width) if not still and not torch.equal(before["k"][..., d], after["k"][..., d])]
    free = [d for d in range(width) if d not in set(moved)]
    half = len(moved) // 2
    candidates = [(moved[:half], moved[half:]), (moved[0::2], moved[1::2])] if len(moved) % 2 == 0 else []
    scales = {part: _scale(before[part][..., free], after[part][..., free]) for part in ("k", "q")}
    for first, second in candidates:
        turns = {part: _factors(before[part], after[part], first, second) for part in ("k", "q")}
        turned = {part: _turned(before[part] * scales[part], turns[part] / scales[part], first, second) for part in turns}
        if all(unexplained(after[part], turned[part]) < CLOSE for part in ("k", "q")):
            step = (turns["k"][1] * turns["k"][0].conj()).angle().abs() if tokens["k"] > 1 else turns["k"][0].abs()
            fast = sorted(range(half), key=lambda pair: -float(step[pair]))
            order = tuple([first[p] for p in fast] + [second[p] for p in fast] + free)
            q, k = ((turns[part] / scales[part])[:, fast].to(torch.complex64) for part in ("q", "k"))
            layout = Layout(half, order, tuple(float(step[p]) for p in fast), sides.norm_last, sides.unit)
            return True, Turns(q, k, scales["q"] * scales["k"]), layout
    reasons.append("its rotation of keys is not one of pairs of dimensions by position, so keys are averaged")
    return False, *nothing


def _sides(seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], shape: Geometry, reasons: list[str]) -> _Sides | None:
    """None, with a reason, where queries and keys are not what their projections, or norms that follow these, give out."""
    tokens = {"q": seen.q.shape[2], "k": seen.k.shape[2]}
    after = {"k": seen.k.transpose(1, 2).double(), "q": seen.q.transpose(1, 2).double()}
    sides = _Sides({}, after, all(_norm_is_last(after[part], taps.get(f"{part}_norm")) for part in after))
    for part, heads in (("k", shape.kv_heads), ("q", shape.heads)):
        raw, after[part], norm = _around_rotation(part, seen, taps, heads, sides.norm_last)
        if raw.numel() != after[part].numel() or after[part].shape[2] != heads:
            name = "keys" if part == "k" else "queries"
            reasons.append(f"its {name} are not the output of {part}_proj, so keys are averaged")
            return None
        sides.before[part] = heads_view(raw, tokens[part], heads).double()
        if norm is not None and not _same(norm[0], taps[part][1], tokens[part], heads):
            reasons.append(f"its {part}_norm does not follow {part}_proj at once, so keys are averaged")
            return None
    if "q_norm" not in taps and "k_norm" not in taps:
        of_q, of_k = (find_unit(sides.before[part], after[part]) for part in ("q", "k"))
        if of_q is not None and of_k is not None:
            sides.unit = (*of_q, *of_k)
            sides.before = {"q": unit_norm(sides.before["q"], *of_q), "k": unit_norm(sides.before["k"], *of_k)}
    return sides


def _around_rotation(
    part: str, seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], heads: int, norm_last: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries or keys before the rotation, in the form that the family has them in, and after it [B, T, heads, D]; the norm
    (its input and output) before it, if there is one."""
    attended = (seen.k if part == "k" else seen.q).transpose(1, 2).double()
    norm = taps.get(f"{part}_norm")
    if norm_last and norm is not None:  # rotated first: the rotation ends where the norm begins
        return taps[part][1], heads_view(norm[0], attended.shape[1], heads).double(), None
    return taps[part][1] if norm is None else norm[1], attended, norm


def turns_of(seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], layout: Layout, shape: Geometry) -> Turns:
    """The rotation in one run of an attention whose keys are rotated as `layout` says; `taps`: (input, output) of its q and k,
    and of their norms, by these names."""
    pairs, order, factors = layout.pairs, list(layout.order), dict[str, Tensor]()
    first, second, free = order[:pairs], order[pairs : 2 * pairs], order[2 * pairs :]
    taps = taps | {"q": (taps["q"][0], queries_of(taps["q"][1], seen))}
    units = {"q": layout.unit[:2], "k": layout.unit[2:]}
    for part, heads in (("k", shape.kv_heads), ("q", shape.heads)):
        raw, after, _ = _around_rotation(part, seen, taps, heads, layout.norm_last)
        before = heads_view(raw, after.shape[1], heads).double()
        before = unit_norm(before, *units[part]) if layout.unit else before
        scale = _scale(before[..., free], after[..., free])
        factors[part] = (_factors(before, after, first, second) / scale).to(torch.complex64)
    return Turns(factors["q"], factors["k"])


def unit_norm(heads: Tensor, scale: float, epsilon: float) -> Tensor:
    """`scale`·x / √(mean x² + ε) of each head x, a row of `heads` [..., D]."""
    return scale * heads * (heads.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def find_unit(before: Tensor, after: Tensor) -> tuple[float, float] | None:
    """a and ε where each head of `after` [B, T, heads, D] is as long as `unit_norm` makes that of `before`; None where none
    does, or the lengths have one ratio: then there is no norm. A rotation changes no length."""
    power, normed = before.square().mean(-1).flatten(), after.square().mean(-1).flatten()
    ratio = power / normed.clamp_min(1e-30)  # no division by 0
    if unexplained(ratio, ratio.mean().expand_as(ratio)) < CLOSE:
        return None
    lines = torch.stack([power, torch.ones_like(power)], 1)  # the ratio is (mean x² + ε) / a²
    slope, offset = torch.linalg.lstsq(lines, ratio[:, None]).solution.flatten().tolist()
    if slope <= 0 or unexplained(ratio, slope * power + offset) > CLOSE:
        return None
    return slope**-0.5, max(offset / slope, 0.0)


def _norm_is_last(after: Tensor, norm: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the attention is given what the norm gave out: heads `after` [B, T, heads, D], as numbers in any order."""
    if norm is None or norm[1].numel() != after.numel():
        return False
    return torch.equal(heads_view(norm[1], after.shape[1], after.shape[2]).double(), after)


def _scale(before: Tensor, after: Tensor) -> float:
    """The number that takes `before` to `after`, dimensions that nothing turns; 1 where there are none."""
    if torch.equal(before, after):
        return 1.0
    return float((before * after).sum() / before.square().sum().clamp_min(1e-30))


def _same(attended: Tensor, projected: Tensor, tokens: int, heads: int) -> bool:
    return attended.numel() == projected.numel() and torch.equal(
        heads_view(attended, tokens, heads), heads_view(projected, tokens, heads)
    )


def _factors(before: Tensor, after: Tensor, first: list[int], second: list[int]) -> Tensor:
    """The complex factor [T, P] that best takes `before` [B, T, heads, D] to `after` on each pair, at each position."""
    source = torch.complex(before[..., first], before[..., second])
    target = torch.complex(after[..., first], after[..., second])
    return (target * source.conj()).sum((0, 2)) / source.abs().square().sum((0, 2)).clamp_min(1e-30)


def _turned(before: Tensor, factors: Tensor, first: list[int], second: list[int]) -> Tensor:
    turned = torch.complex(before[..., first], before[..., second]) * factors[:, None]
    result = before.clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result

"""Finds out what one attention layer does with its projections, by running it.

A merge changes some weights of a layer and lets others make up for it. Whether that is exact depends on what lies between them:
a rotation by position, a norm, a gate. Each assumption is tested on real activations; a change whose test fails is not made.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import Geometry
from upfit.calibration.observe import Call, Opaque, Seen
from upfit.calibration.residual import CLOSE, FEW, Residual, find_residual, unexplained
from upfit.calibration.watch import Place, has_module, watch


@dataclass(frozen=True)
class AttentionTraits:
    """What may be changed in one layer. P rotated pairs, fastest first; `order` [D] lists the dimensions as the first of
    every pair, the second of every pair, and those that no rotation touches.

    `values`: the values are v_proj's output and o_proj sees the attention's output, so a re-basis of V is taken up by O.
    `keys`: queries and keys are projections, normed if `normed`, then rotated (before the norm if `norm_last`), so a factor on
    a pair is taken up by the queries. `factors`: such factors are exact (always without norms; with them only if their scales
    agree on each pair). `movable`: no weight but the projections belongs to a head, and no bias by position, so heads may
    change places. `reasons` tells what is left out.
    """

    values: bool
    keys: bool
    normed: bool
    factors: bool
    movable: bool
    pairs: int
    order: tuple[int, ...]
    speeds: tuple[float, ...]  # radians a token, of each pair
    residual: Residual | None
    reasons: tuple[str, ...] = ()
    norm_last: bool = False


@dataclass(frozen=True)
class Turns:
    """The rotation of queries and keys as complex factors [T, P] and [S, P] (with the family's scaling of them), in
    `AttentionTraits.order`. `scale`: by how much scores are larger for what the family multiplies with besides."""

    q: Tensor
    k: Tensor
    scale: float = 1.0


def probe_attention(place: Place, hidden: Tensor, call: Call) -> tuple[AttentionTraits, Turns]:
    """Watch one batch pass and test every assumption. Raises Opaque when nothing at all can be said."""
    block, entry, shape = place.block, place.entry, place.shape
    attention = block.module.get_submodule(place.at)
    parts = {part: getattr(entry, part) for part in ("q", "k", "v", "o", "q_norm", "k_norm")}
    present = {part: name for part, name in parts.items() if has_module(attention, name)}
    if not {"q", "k", "v", "o"} <= present.keys():
        raise Opaque("it does not have q, k, v and o as modules of their own")
    if not isinstance(attention.get_submodule(present["o"]), nn.Linear):
        raise Opaque("its output projection is stored transposed")
    outer = [name for name, _ in block.module.named_modules() if name and not f"{name}.".startswith(f"{place.at}.")]
    inner = [f"{place.at}.{name}" for name in present.values()]
    watched = watch(place, hidden, call, tuple(outer + inner))
    inside = {part: watched.taps.get(f"{place.at}.{name}") for part, name in present.items()}
    taps = {part: tap for part, tap in inside.items() if tap is not None}
    if not {"q", "k", "v", "o"} <= taps.keys():
        raise Opaque("it does not run its q, k, v and o as modules of their own")
    if taps["k"][0].data_ptr() != taps["v"][0].data_ptr():
        raise Opaque("its keys and values are made of different inputs")
    reasons: list[str] = []
    seen, taps = _few(watched.seen), {part: (tap[0][:FEW], tap[1][:FEW]) for part, tap in taps.items()}
    values = _values_are_plain(seen, taps, shape, reasons)
    keys, turns, layout = _rotation(seen, taps, shape, reasons)
    normed = "k_norm" in taps or "q_norm" in taps
    factors = keys and (not normed or _scales_agree(attention, present, layout))
    if keys and not factors:
        reasons.append("its key norm has a scale for each dimension, so keys cannot be turned exactly before they are merged")
    movable = keys and values and _only_projections(attention, present, shape) and _heads_alike(seen.mask)
    residual = find_residual(watched, place, outer, reasons)
    traits = AttentionTraits(
        values,
        keys,
        normed,
        factors,
        movable,
        layout.pairs,
        layout.order,
        layout.speeds,
        residual,
        tuple(reasons),
        layout.norm_last,
    )
    return traits, turns


def _few(seen: Seen) -> Seen:
    mask = seen.mask if seen.mask is None or seen.mask.shape[0] == 1 else seen.mask[:FEW]
    return replace(seen, q=seen.q[:FEW], k=seen.k[:FEW], v=seen.v[:FEW], output=seen.output[:FEW], mask=mask)


def _values_are_plain(seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], shape: Geometry, reasons: list[str]) -> bool:
    batch, _, tokens, _ = seen.v.shape
    projected, attended = taps["v"][1], taps["o"][0]
    if projected.numel() != seen.v.numel() or seen.v.shape[-1] != shape.v_head_dim:
        reasons.append("its values are not the output of v_proj, so they are averaged")
        return False
    plain = projected.reshape(batch, tokens, shape.kv_heads, shape.v_head_dim).transpose(1, 2)
    if seen.v.shape != plain.shape or unexplained(seen.v, plain) > CLOSE:
        reasons.append("its values are not the output of v_proj, so they are averaged")
        return False
    if attended.numel() != seen.output.numel() or unexplained(attended.reshape(seen.output.shape), seen.output) > CLOSE:
        reasons.append("something lies between its attention and o_proj (a gate, a norm), so values are averaged")
        return False
    return True


def heads_view(tensor: Tensor, tokens: int, heads: int) -> Tensor:
    """[B, T, heads, D] of a tensor that holds it as [B, T, heads·D], [B, T, heads, D] or [B, heads, T, D]."""
    if tensor.ndim == 4 and tensor.shape[1] == heads and tensor.shape[2] == tokens and heads != tokens:
        return tensor.transpose(1, 2)
    return tensor.reshape(tensor.shape[0], tokens, heads, -1)


@dataclass(frozen=True)
class _Layout:
    pairs: int
    order: tuple[int, ...]
    speeds: tuple[float, ...]
    norm_last: bool = False


def _rotation(
    seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], shape: Geometry, reasons: list[str]
) -> tuple[bool, Turns, _Layout]:
    """Which dimensions the rotation pairs, and its factor at every position, from keys and queries before and after it."""
    tokens, width = {"q": seen.q.shape[2], "k": seen.k.shape[2]}, shape.head_dim
    none = torch.empty(tokens["k"], 0, device=seen.k.device)
    nothing = Turns(none[: tokens["q"]], none), _Layout(0, tuple(range(width)), ())
    before, after = dict[str, Tensor](), dict[str, Tensor]()
    sides = (("k_norm", seen.k), ("q_norm", seen.q))
    norm_last = all(_norm_is_last(heads.transpose(1, 2).double(), taps.get(norm)) for norm, heads in sides)
    for part, heads in (("k", shape.kv_heads), ("q", shape.heads)):
        raw, after[part], norm = _around_rotation(part, seen, taps, heads, norm_last)
        if raw.numel() != after[part].numel() or after[part].shape[2] != heads:
            reasons.append(
                f"its {'keys' if part == 'k' else 'queries'} are not the output of {part}_proj, so keys are averaged"
            )
            return False, *nothing
        before[part] = heads_view(raw, tokens[part], heads).double()
        if norm is not None and not _same(norm[0], taps[part][1], tokens[part], heads):
            reasons.append(f"its {part}_norm does not follow {part}_proj at once, so keys are averaged")
            return False, *nothing
    moved = [d for d in range(width) if not torch.equal(before["k"][..., d], after["k"][..., d])]
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
            layout = _Layout(half, order, tuple(float(step[p]) for p in fast), norm_last)
            return True, Turns(q, k, scales["q"] * scales["k"]), layout
    reasons.append("its rotation of keys is not one of pairs of dimensions by position, so keys are averaged")
    return False, *nothing


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


def turns_of(seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], traits: AttentionTraits, shape: Geometry) -> Turns:
    """The rotation in one run of an attention whose keys are rotated as `traits` say; `taps`: (input, output) of its q and k,
    and of their norms, by these names."""
    pairs, order, factors = traits.pairs, list(traits.order), dict[str, Tensor]()
    first, second, free = order[:pairs], order[pairs : 2 * pairs], order[2 * pairs :]
    for part, heads in (("k", shape.kv_heads), ("q", shape.heads)):
        raw, after, _ = _around_rotation(part, seen, taps, heads, traits.norm_last)
        before = heads_view(raw, after.shape[1], heads).double()
        scale = _scale(before[..., free], after[..., free])
        factors[part] = (_factors(before, after, first, second) / scale).to(torch.complex64)
    return Turns(factors["q"], factors["k"])


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


def _scales_agree(attention: nn.Module, present: dict[str, str], layout: _Layout) -> bool:
    first, second = list(layout.order[: layout.pairs]), list(layout.order[layout.pairs : 2 * layout.pairs])
    for part in ("q_norm", "k_norm"):
        if part not in present:
            continue
        for scale in attention.get_submodule(present[part]).parameters():
            if scale.numel() != len(layout.order) or layout.pairs * 2 != len(layout.order):
                return False
            flat = scale.reshape(-1)
            if not torch.allclose(flat[first], flat[second], rtol=1e-5, atol=0):
                return False
    return True


def _only_projections(attention: nn.Module, present: dict[str, str], shape: Geometry) -> bool:
    """No parameter of the attention is bound to a head's place, but rows and columns of the four projections."""
    moved = tuple(f"{present[part]}." for part in ("q", "k", "v", "o"))
    others = [parameter for name, parameter in attention.named_parameters() if not name.startswith(moved)]
    return all(parameter.numel() in (1, shape.head_dim) for parameter in others)


def _heads_alike(mask: Tensor | None) -> bool:
    """Whether every head's scores are added the same by position (ALiBi and relative biases add to each something else)."""
    return mask is None or mask.dtype == torch.bool or torch.allclose(mask, mask[:, :1].expand_as(mask), atol=1e-3)


def traits_record(traits: AttentionTraits) -> dict[str, Any]:
    """`traits` as JSON can hold it."""
    from dataclasses import asdict

    return asdict(traits)


def bands(traits: AttentionTraits) -> tuple[str, ...]:
    """What a merge can do with the layer's keys and values: keys that are "turning" in pairs (a complex factor commutes),
    "free" (any linear map does), "normed" (behind a norm, which leaves less); "values" that may be re-based. What is missing
    is averaged."""
    keys: list[str] = []
    if traits.keys and traits.normed:
        keys = ["normed"]
    elif traits.keys:
        keys = ["turning"] * bool(traits.pairs) + ["free"] * (2 * traits.pairs < len(traits.order))
    return (*keys, *(["values"] if traits.values else []))

"""Finds out what one attention layer does with its projections, by running it.

A merge changes some weights of a layer and lets others make up for it. Whether that is exact depends on what lies between them:
a rotation by position, a norm, a gate. Each assumption is tested on real activations; a change whose test fails is not made.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import Geometry
from upfit.calibration.between import OF_DIMENSIONS, OTHER, PLAIN, find_gates
from upfit.calibration.observe import Call, Opaque, Seen
from upfit.calibration.residual import CLOSE, FEW, Residual, find_residual, unexplained
from upfit.calibration.rotation import Layout, Turns, find_rotation, find_unit, queries_of, unit_norm
from upfit.calibration.watch import Place, Watched, has_module, watch


@dataclass(frozen=True)
class AttentionTraits:
    """What may be changed in one layer. P rotated pairs, fastest first; `order` [D] lists the dimensions as the first of
    every pair, the second of every pair, and those that no rotation touches.

    `values`: the values are v_proj's output and o_proj sees the attention's output, so a re-basis of V is taken up by O; with
    `gated` "heads" it sees that times a number of each head, which changes nothing; with "dimensions" times one of each
    dimension, and of a re-basis only factors are taken up (see `between.py`); with `value_unit` they are what a norm without
    scales makes of that output, which leaves rotations.
    `keys`: queries and keys are projections, normed if `normed`, then rotated (before the norm if `norm_last`), so a factor on
    a pair is taken up by the queries. `factors`: such factors are exact (always without norms; with them only if their scales
    agree on each pair). `unit`: of norms without scales that are no modules (Llama 4's), x ↦ a·x / √(mean x² + ε), a and ε of
    queries and of keys; `value_unit`: of values (Gemma 4's). `movable`: no weight but the projections belongs to a head, and no
    bias by position, so heads may change places. `reasons` tells what is left out.
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
    gated: str = PLAIN
    unit: tuple[float, ...] = ()
    value_unit: tuple[float, ...] = ()


def probe_attention(place: Place, hidden: Tensor, call: Call, lent: bool = False) -> tuple[AttentionTraits, Turns]:
    """Watch one batch pass and test every assumption; `lent`: later layers have no keys and values of their own. Raises Opaque
    when nothing at all can be said."""
    shape, attention = place.shape, place.block.module.get_submodule(place.at)
    watched, present, outer = _watched(place, hidden, call)
    inside = {part: watched.taps.get(f"{place.at}.{name}") for part, name in present.items()}
    taps = {part: tap for part, tap in inside.items() if tap is not None}
    if not {"q", "k", "v", "o"} <= taps.keys():
        raise Opaque("it does not run its q, k, v and o as modules of their own")
    if taps["k"][0].data_ptr() != taps["v"][0].data_ptr():
        raise Opaque("its keys and values are made of different inputs")
    reasons: list[str] = []
    seen, taps = _few(watched.seen), {part: (tap[0][:FEW], tap[1][:FEW]) for part, tap in taps.items()}
    taps["q"] = taps["q"][0], queries_of(taps["q"][1], seen)
    gated = find_gates(place, hidden, call, watched)
    values, value_unit = _values(seen, taps, shape, gated, reasons)
    keys, turns, layout = find_rotation(seen, taps, shape, reasons)
    if lent and _is_left(call, watched.seen.k):
        values, keys = False, False
        reasons.append("later layers use its keys and values too, so heads are averaged")
    normed = "k_norm" in taps or "q_norm" in taps or bool(layout.unit)
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
        gated,
        layout.unit,
        value_unit,
    )
    return traits, turns


def _watched(place: Place, hidden: Tensor, call: Call) -> tuple[Watched, dict[str, str], list[str]]:
    """One run of the layer; the names of the attention's parts that there are; the paths of the layer's other modules."""
    block, entry = place.block, place.entry
    attention = block.module.get_submodule(place.at)
    parts = {part: getattr(entry, part) for part in ("q", "k", "v", "o", "q_norm", "k_norm")}
    present = {part: name for part, name in parts.items() if has_module(attention, name)}
    if not {"q", "k", "v", "o"} <= present.keys():
        raise Opaque("it does not have q, k, v and o as modules of their own")
    if not isinstance(attention.get_submodule(present["o"]), nn.Linear):
        raise Opaque("its output projection is stored transposed")
    outer = [name for name, _ in block.module.named_modules() if name and not f"{name}.".startswith(f"{place.at}.")]
    inner = [f"{place.at}.{name}" for name in present.values()]
    return watch(place, hidden, call, tuple(outer + inner), copies=True), present, outer


def _is_left(call: Call, keys: Tensor) -> bool:
    """Whether the layer has left its `keys` in a dictionary that it was given, for later layers."""
    shared = [value for value in (*call.arguments, *call.keywords.values()) if isinstance(value, MutableMapping)]
    parts = [part for left in shared for value in left.values() for part in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(part, Tensor) and part.data_ptr() == keys.data_ptr() for part in parts)


def _few(seen: Seen) -> Seen:
    mask = seen.mask if seen.mask is None or seen.mask.shape[0] == 1 else seen.mask[:FEW]
    return replace(seen, q=seen.q[:FEW], k=seen.k[:FEW], v=seen.v[:FEW], output=seen.output[:FEW], mask=mask)


def _values(
    seen: Seen, taps: dict[str, tuple[Tensor, Tensor]], shape: Geometry, gated: str, reasons: list[str]
) -> tuple[bool, tuple[float, ...]]:
    """`AttentionTraits.values` and `value_unit`."""
    if gated == OTHER:
        reasons.append("what lies between its attention and o_proj is not understood, so values are averaged")
        return False, ()
    batch, _, tokens, _ = seen.v.shape
    projected = taps["v"][1]
    if projected.numel() == seen.v.numel() and seen.v.shape[-1] == shape.v_head_dim:
        plain = projected.reshape(batch, tokens, shape.kv_heads, shape.v_head_dim).transpose(1, 2)
        if seen.v.shape == plain.shape and unexplained(seen.v, plain) <= CLOSE:
            return True, ()
        unit = find_unit(plain.double(), seen.v.double()) if seen.v.shape == plain.shape and not gated else None
        if unit is not None and unexplained(seen.v, unit_norm(plain.double(), *unit)) <= CLOSE:
            return True, unit
    reasons.append("its values are not the output of v_proj, so they are averaged")
    return False, ()


def _scales_agree(attention: nn.Module, present: dict[str, str], layout: Layout) -> bool:
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
    "free" (any linear map does), "normed" (behind a norm, which leaves less); "values" that may be re-based, or "gated" ones,
    which a number of each dimension multiplies before o_proj, or "normed values". What is missing is averaged."""
    keys: list[str] = []
    if traits.keys and traits.normed:
        keys = ["normed"]
    elif traits.keys:
        keys = ["turning"] * bool(traits.pairs) + ["free"] * (2 * traits.pairs < len(traits.order))
    name = "gated" if traits.gated == OF_DIMENSIONS else "normed values" if traits.value_unit else "values"
    return (*keys, *([name] if traits.values else []))

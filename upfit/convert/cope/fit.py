"""Watches the source on text: where queries and keys are before their rotation, and what gates reach how far.

A gate's logit is scale · q · k / √d + bias. Per head, the scale gives the logits of the nearest `span` keys a standard
deviation of SPREAD; the bias then makes the mean gate there (positions - 1) / span, so that the last position is reached about
`span` keys away. With embeddings of zero any gates are exact: this is only where training begins. It begins near constant
gates and learns to choose: gates that choose at random from the first step on send noise to the queries and keys that they are
made of, and training falls behind (docs/log.md).
"""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfit.calibration.observe import Opaque
from upfit.calibration.teacher_student import LayerPair
from upfit.calibration.watch import Watched
from upfit.checkpoint.plan import Plan
from upfit.convert.cope.options import CALIBRATION, Options, new_tensors
from upfit.convert.fitting import LayerFits, read_calibration
from upfit.errors import UpfitError
from upfit.modeling.cope_equations import grouped, positions_of
from upfit.modeling.modeling_upfit_cope import heads_of, is_heads_first, rotate_back

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

SPREAD = 0.1
ROWS = 16  # query positions of each window, in its second half
CLOSE = 1e-9  # share of the energy that an undone rotation may leave unexplained, in float32
Rotation = tuple[str, str | None, str]
# Of one batch: logits of each query's nearest keys [H, N], of all keys [H, rows, T], and which of those are seen [rows, T].
Sampled = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Of one layer: paths in it of the modules that give queries and keys before their rotation, and how that is undone (None:
    it cannot be; an empty list: nothing is rotated)."""

    taps: dict[str, str]
    rotation: Rotation | list[Any] | None


def fit(context: "FitContext", plan: Plan, options: Options, chosen: "list[Layer]") -> Plan:
    """`plan` with its config completed and a rule for each layer. Raises UpfitError when the gates asked for cannot be had."""
    sizes = (options.calibration_tokens, options.calibration_length)
    calibration = read_calibration(context, options.calibration, *sizes, options.field)
    words = {name: value for name, value in asdict(options).items() if name not in CALIBRATION}
    settings = {"recipe": "cope", "config": plan.config, **words}
    fits = LayerFits(context, calibration, "gates", settings, chosen, alone=True)
    for pair in fits:
        rotation, tensors, record = _fit_layer(pair, options)
        if options.drop_rope and pair.layer is chosen[0]:
            assert isinstance(rotation, tuple)
            tensors[f"{rotation[0]}.cope_rope_share"] = torch.ones(())
        fits.store(pair, record, tensors, {"rotation": list(rotation)} if isinstance(rotation, tuple) else {})
    rotations = {entry.layer: entry.extra["rotation"] for entry in fits.entries if entry.extra}
    config = {**plan.config, "cope": {**plan.config["cope"], "rotations": rotations}}
    report = {**(plan.report or {}), "calibration": calibration.record(), "layers": fits.records}
    rules = fits.rules(f"contextual positions, {options.gates} gates")
    return replace(plan, config=config, rules=(*plan.rules, *rules), report=report)


def _fit_layer(pair: LayerPair, options: Options) -> tuple[Rotation | list[Any] | None, dict[str, Tensor], dict[str, Any]]:
    """Run a layer over all batches: how its rotation is undone, its new tensors by name, and its record."""
    attention, entry = pair.block.module.get_submodule(pair.place.at), pair.entry
    names = {name for name, _ in attention.named_modules()} & {entry.q, entry.k, entry.q_norm, entry.k_norm}
    inside = tuple(f"{pair.place.at}.{name}" for name in sorted(names))
    layout: Layout | None = None
    samples, placed = [], list[bool]()  # of each call, whether the positions of its tokens are given
    hook = attention.register_forward_pre_hook(
        lambda module, arguments, keywords: placed.append(keywords.get("position_ids") is not None), with_kwargs=True
    )
    for batch, watched, _ in pair.watch(inside):
        if layout is None:
            layout = _find(pair, watched, all(placed))
            _check(layout, options, pair.layer)
        if options.gates != "constant":
            samples.append(_sampled(layout, watched, options))
        batch.teacher = watched.output
    hook.remove()
    assert layout is not None
    return layout.rotation, *_tensors(pair, samples, options)


def _find(pair: LayerPair, watched: Watched, placed: bool) -> Layout:
    seen, taps, before = watched.seen, {}, {}
    for part, after in (("q", seen.q), ("k", seen.k)):
        own, norm = pair.path(part), pair.path(f"{part}_norm")
        tapped, normed = watched.taps.get(own), watched.taps.get(norm)
        name = getattr(pair.entry, part)
        if tapped is None:
            raise Opaque(f"it does not run its {name} as a module of its own")
        heads = after.shape[1]
        first = normed is not None and is_heads_first(normed[0], heads)
        if normed is not None and torch.equal(heads_of(normed[0], heads, first), heads_of(tapped[1], heads)):
            taps[part], before[part] = norm, heads_of(normed[1], heads, first)
        else:
            taps[part], before[part] = own, heads_of(tapped[1], heads)
        if before[part].shape != after.shape:
            raise Opaque(f"its {name} gives more than it attends with")
    rotation = _rotation(pair, before["k"], seen.k)
    if isinstance(rotation, tuple) and not placed:
        rotation = None  # where the newest token stands must be known to undo it
    return Layout(taps, rotation)


def _rotation(pair: LayerPair, before: Tensor, after: Tensor) -> Rotation | list[Any] | None:
    """How `after` [B, K, T, D] is brought back to `before`: by trying what the model has."""
    if torch.equal(before, after):
        return []
    positions = torch.arange(after.shape[2], device=after.device)[None]
    attention, model = pair.block.module.get_submodule(pair.place.at), pair.model.model
    kinds = [None, *sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()))]
    rotaries = [name for name, module in model.named_modules() if type(module).__name__.endswith("RotaryEmbedding")]
    for name, kind, part in itertools.product(rotaries, kinds, ("whole", "first")):
        rotary = model.get_submodule(name)
        try:
            back = rotate_back(type(attention).__module__, rotary, kind, part, after, positions)
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError):
            continue
        if back.shape == before.shape and float((back - before).square().sum() / before.square().sum()) < CLOSE:
            return name, kind, part
    return None


def _check(layout: Layout, options: Options, layer: "Layer") -> None:
    if options.gates == "content" and layout.rotation is None:
        raise UpfitError(
            f"{layer.path}: the rotation of its keys cannot be undone here, so content gates could not be decoded; "
            "choose --gates keys or --gates constant"
        )
    if options.drop_rope and not isinstance(layout.rotation, tuple):
        raise UpfitError(f"{layer.path} has no rotary positions that could be dropped; leave out --drop-rope")


def _tensors(pair: LayerPair, samples: list[Sampled], options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layer's new tensors by name, and its record."""
    layer = pair.layer
    tensors = {name: torch.zeros(size) for name, size in new_tensors(layer, options).items()}
    record: dict[str, Any] = {"layer": layer.path}
    if options.gates == "constant":
        tensors["cope_gate_bias"] += torch.tensor(options.share).logit()
    else:
        near, rows = torch.cat([logits for logits, _, _ in samples], 1), [(logits, seen) for _, logits, seen in samples]
        scale = SPREAD / near.std(1).clamp_min(1e-6)  # a head whose logits are all alike: no division by 0
        bias = _bias(near * scale[:, None], options.share)
        tensors |= {"cope_gate_scale": scale, "cope_gate_bias": bias}
        last = options.positions - 1
        active, passed = [], []
        for logits, seen in rows:
            gates = torch.sigmoid(logits * scale[:, None, None] + bias[:, None, None]) * seen
            active.append(((positions_of(gates, last) < last) & seen).sum(-1).float().flatten())
            passed.append((gates.sum(-1) >= last).float().flatten())
        measures = {"span": torch.cat(active).mean(), "saturated": torch.cat(passed).mean()}
        record |= {name: round(float(value), 4) for name, value in measures.items()}
    if options.gates == "keys":
        weight = pair.block.module.get_parameter(f"{pair.path('k')}.weight")
        tensors["cope_gate_keys.weight"] = weight.detach().clone()
    return {layer.stem + name: tensor for name, tensor in tensors.items()}, record


def _sampled(layout: Layout, watched: Watched, options: Options) -> Sampled:
    """Unscaled gate logits of some queries of one batch."""
    seen = watched.seen
    q, k = _before(watched, layout.taps["q"], seen.q.shape[1]), _before(watched, layout.taps["k"], seen.k.shape[1])
    tokens = q.shape[2]
    at = torch.linspace(tokens // 2, tokens - 1, min(ROWS, tokens - tokens // 2)).long().unique().to(q.device)
    logits = (grouped(q[:, :, at], k) * seen.scaling).movedim(1, 0).cpu()  # [H, B, rows, T]
    at, keys = at.cpu(), torch.arange(tokens)
    below = keys <= at[:, None]
    close = below & (keys > at[:, None] - options.reach)
    return logits[:, :, close].flatten(1), logits.flatten(1, 2), below.repeat(logits.shape[1], 1)


def _before(watched: Watched, path: str, heads: int) -> Tensor:
    inputs, out = watched.taps[path]
    return heads_of(out, heads, is_heads_first(inputs, heads))


def _bias(logits: Tensor, share: float) -> Tensor:
    """[H]: what makes the mean of sigmoid(logits [H, N] + bias) be `share`, by bisection."""
    low, high = torch.full((len(logits),), -40.0), torch.full((len(logits),), 40.0)  # sigmoid is 0 or 1 there in float32
    for _ in range(40):
        middle = (low + high) / 2
        above = torch.sigmoid(logits + middle[:, None]).mean(1) > share
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2

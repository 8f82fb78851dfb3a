"""Aligned merging of a whole checkpoint, layer by layer, in the converted model's own stream.

Two streams go through the layers side by side: the teacher's and the converted model's. At each layer the teacher is watched,
its heads are merged in closed form (`align.py`), and then, with `refit`, queries and keys are fitted to the teacher's scores
on what the converted model really sees (`scores.py`), the output projection to the teacher's stream after the attention, and
the last matrix of the MLP to the teacher's stream after the layer (`values.py`). Nothing is chosen on the rows that are
fitted: the cut of slow pairs, Gauss–Newton steps and ridges are chosen on held-back windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upfit.convert.architectures import Architecture, Entry
from upfit.convert.attention import LAYOUTS, Attention, Geometry, Layer
from upfit.convert.checkpoint import Checkpoint
from upfit.convert.facts import Facts, Turns, understand, watch
from upfit.convert.gqa import align, scores, values
from upfit.convert.gqa.grouping import pair_costs, partition
from upfit.convert.gqa.merge import mean
from upfit.convert.gqa.merge import merge as merge_plainly
from upfit.convert.statistics import ROWS, add, observe, sample_rows
from upfit.convert.stream import Block, Call, Opaque, Seen, Stream, find_blocks, observed_model, run_block, run_until

CUTS = (0.4, 0.5, 0.6, 0.75, 1.0)  # shares of the rotated pairs, from the fastest, that are merged as rotated
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
DRIFT_RIDGE = 1e-3
Kept = tuple[Facts, dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """`rows`: sampled query positions of every 512 of a window. `refit`: fit in the converted stream, not only merge."""

    kv_heads: int
    refit: bool = True
    rows: int = ROWS
    effort: scores.Effort = scores.Effort()
    importance: float = 1.0
    token_power: float = 2.0  # a token weighs 1 / rms of the teacher's stream to this power


@dataclass
class Told:
    """What happened to one layer, for people and for recipe.json. Errors are shares of the teacher's energy, held back."""

    layer: str
    reasons: tuple[str, ...] = ()
    groups: list[list[int]] | None = None
    cut: int | None = None
    pairs: int = 0
    merged_error: float | None = None  # of the scores after the merge
    fitted_error: float | None = None  # of the scores after the fit
    stream_error: float | None = None  # |student − teacher|² / |teacher|² of the hidden states, mean over tokens

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Lane:
    """One batch of windows on its way through both models: hidden states [B, T, E] before the next layer."""

    held: bool
    calls: list[Call]
    student_calls: list[Call]
    teacher: Tensor
    student: Tensor


@dataclass
class View:
    """What the teacher's layer showed on one batch: `inputs` [B, T, E] of the projections, `given` [B, T, E] by o_proj,
    `output` [B, T, E] after the layer, `values` [B, T, K, V]."""

    inputs: Tensor
    given: Tensor
    output: Tensor
    values: Tensor
    scaling: float
    targets: list[scores.Target]


@dataclass(frozen=True)
class Place:
    """The layer at hand, in both models."""

    index: int
    block: Block
    student: nn.Module
    layer: Layer
    entry: Entry
    kv_heads: int

    @property
    def shape(self) -> Geometry:
        return self.layer.geometry

    def path(self, part: str) -> str:
        return f"{self.block.attention}.{getattr(self.entry, part)}"


@dataclass
class Merged:
    """The layer being changed. q [H, D, E'], k [G, D, E'] in `Facts.order`, v [G, V, E'] (= `down` [G, V, g·V] of the old
    ones), o [E, H, V]; E' is E, or one more where the projections have biases (the last column). Query heads stand in the
    order of their groups: `heads` lists the old ones."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    down: Tensor
    heads: list[int]
    groups: list[list[int]]


def convert_layers(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target_config: dict[str, Any],
    stream: Stream,
    held: list[bool],
    kept: Callable[[str], Kept | None],
    settings: Settings,
) -> Iterator[tuple[Told, dict[str, Tensor]]]:
    """Yields, for every layer of the model in order, what was done and the new tensors by their names in the checkpoint.

    `held` says which of the stream's batches are held back; `kept(path)` gives an attention's facts and statistics if
    calibration left them, else they are gathered on the way.
    """
    students = find_blocks(observed_model(target_config, str(stream.batches[0].ids.device)), architecture)
    lanes = list(_lanes(stream, held))
    layers = {layer.path: layer for layer in architecture.layers}
    for index, (block, student) in enumerate(zip(stream.blocks, students, strict=True)):
        stream.load(index)
        layer = layers.get(block.attention_path) if block.attention else None
        if layer is None or layer.geometry.kv_heads <= settings.kv_heads:
            for lane in lanes:
                lane.student = run_block(block.module, lane.student, lane.student_calls[index])
                lane.teacher = run_block(block.module, lane.teacher, lane.calls[index])
        else:
            _adopt(student.module, block.module)
            place = Place(index, block, student.module, layer, architecture.entry, settings.kv_heads)
            yield _convert(place, checkpoint, stream, lanes, kept(layer.path), settings)
            stream.empty(student.module)
        stream.empty(block.module)


def _lanes(stream: Stream, held: list[bool]) -> Iterator[Lane]:
    for batch, back in zip(stream.batches, held, strict=True):
        memo: dict[int, Any] = {}

        def own(value: Any, memo: dict[int, Any] = memo) -> Any:
            """Dictionaries that layers write to (keys and values shared between layers) belong to one stream."""
            return memo.setdefault(id(value), dict(value)) if isinstance(value, dict) else value

        copies = [Call(tuple(map(own, c.arguments)), {k: own(v) for k, v in c.keywords.items()}) for c in batch.calls]
        assert batch.hidden is not None
        yield Lane(back, batch.calls, copies, batch.hidden, batch.hidden)


def _adopt(student: nn.Module, teacher: nn.Module) -> None:
    """The student's layer shares every weight of the teacher's that has the same shape."""
    theirs = dict(teacher.named_modules())
    for path, module in student.named_modules():
        for kind in ("_parameters", "_buffers"):
            own, other = getattr(module, kind), getattr(theirs[path], kind)
            for name, tensor in own.items():
                if tensor is not None and other[name].shape == tensor.shape:
                    own[name] = other[name]


def _put(module: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    target = module.get_submodule(path)
    target._parameters["weight"] = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        target._parameters["bias"] = nn.Parameter(bias.float().contiguous(), requires_grad=False)


def _convert(
    place: Place, checkpoint: Checkpoint, stream: Stream, lanes: list[Lane], kept: Kept | None, settings: Settings
) -> tuple[Told, dict[str, Tensor]]:
    shape, told = place.shape, Told(place.layer.path)
    stored = {part: checkpoint.read(name).float().to(lanes[0].teacher.device) for part, name in place.layer.names.items()}
    attention = LAYOUTS[place.layer.layout].unpack(stored, shape)
    try:
        longest = max(lanes, key=lambda lane: lane.teacher.shape[1])
        facts, turns = understand(place.block, place.entry, shape, longest.teacher, longest.calls[place.index])
    except Opaque as reason:
        told.reasons = (f"{reason}, so heads are averaged",)
        return told, _averaged(place, attention, lanes)
    told.reasons, told.pairs = facts.reasons, facts.pairs
    views, sums = _watch(place, facts, attention, lanes, settings)
    facts, sums = kept if kept is not None else (facts, sums)
    sums = {name: tensor.float().double().to(lanes[0].teacher.device) for name, tensor in sums.items()}
    choices = _merge(facts, attention, sums, place.kv_heads, told)
    merged = next(iter(choices.values()))
    if facts.values:
        _refine(facts, attention, merged, views, lanes, settings)
    form = _form(place, facts, turns, attention, views)
    inputs = [_student_inputs(place, lane) if settings.refit else view.inputs for lane, view in zip(lanes, views, strict=True)]
    drift = _drift(inputs, views, lanes) if settings.refit else None
    if drift is not None:
        merged.v = _mapped(merged.v, drift)
    if facts.keys and form is not None:
        _fit_scores(choices, merged, form, inputs, views, lanes, drift, settings, told)
    elif drift is not None:
        merged.q, merged.k = _mapped(merged.q, drift), _mapped(merged.k, drift)
    changed = _packed(place, facts, attention, merged)
    for part in ("q", "k", "v"):
        _put(place.student, place.path(part), changed[f"{part}.weight"], changed.get(f"{part}.bias"))
    if "k_norm.weight" in changed:
        _put(place.student, place.path("k_norm"), changed["k_norm.weight"], changed.get("k_norm.bias"))
    _put(place.student, place.path("o"), changed["o.weight"])
    new = {place.layer.names[part]: tensor for part, tensor in changed.items()}
    if settings.refit:
        _refit_stream(place, facts, checkpoint, stream, lanes, views, new, settings)
    for lane, view in zip(lanes, views, strict=True):
        lane.teacher = view.output
        if not settings.refit:
            lane.student = view.output
    told.stream_error = _stream_error(lanes) if settings.refit else None
    return told, new


def _averaged(place: Place, attention: Attention, lanes: list[Lane]) -> dict[str, Tensor]:
    """The mean of the heads, for a layer that cannot be watched; both streams move on."""
    merged = merge_plainly(attention, place.kv_heads, "mean", 0, 0.0)
    packed = LAYOUTS[place.layer.layout].pack(merged, place.shape)
    for part in ("k", "v", "k_norm"):
        if f"{part}.weight" in packed:
            _put(place.student, place.path(part), packed[f"{part}.weight"], packed.get(f"{part}.bias"))
    for lane in lanes:
        lane.student = run_block(place.student, lane.student, lane.student_calls[place.index])
        lane.teacher = run_block(place.block.module, lane.teacher, lane.calls[place.index])
    return {place.layer.names[part]: tensor for part, tensor in packed.items() if part[0] in "kv"}


def _watch(
    place: Place, facts: Facts, attention: Attention, lanes: list[Lane], settings: Settings
) -> tuple[list[View], dict[str, Tensor]]:
    """The teacher's layer over every batch, and the statistics of the batches that are fitted."""
    views, sums = [], dict[str, Tensor]()
    for number, lane in enumerate(lanes):
        watched = watch(place.block, lane.teacher, lane.calls[place.index], (place.path("q"), place.path("o")))
        rows = sample_rows(lane.teacher.shape[1], settings.rows, place.index, number, lane.teacher.device)
        if not lane.held:
            add(sums, observe(watched.seen, facts, rows))
        given, output = watched.taps[place.path("o")][1], watched.output
        assert output is not None
        stream = lane.teacher + (facts.residual.attention * given if facts.residual else 0.0)
        weight = _token_weights(stream, 2.0)
        targets = [_target(watched.seen, some.at, some.keys, attention, weight, settings) for some in rows]
        shared = watched.seen.v.transpose(1, 2)
        views.append(View(watched.taps[place.path("q")][0], given, output, shared, watched.seen.scaling, targets))
    return views, sums


def _target(seen: Seen, at: Tensor, keys: int, attention: Attention, token_weight: Tensor, settings: Settings) -> scores.Target:
    wanted, weights = seen.scores(at, keys)
    importance = torch.ones_like(weights[..., :1])
    if settings.importance and attention.o is not None and attention.o.shape[1] == seen.q.shape[1]:
        importance = _spread(seen, weights, keys, attention.o) * token_weight[:, at][:, None, :, None]
        importance = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-4) ** settings.importance
        importance = importance / importance.mean()
    return scores.Target(at, keys, wanted.masked_fill_(weights == 0, 0.0), weights, importance)


def _spread(seen: Seen, weights: Tensor, keys: int, outputs: Tensor) -> Tensor:
    """[B, H, R, 1]: how far apart in the output the values lie that a row weighs, Σ p |O_h(v − v̄)|²: what its scores
    matter."""
    gram = torch.einsum("ehv,ehw->hvw", outputs, outputs)
    heads = seen.v[:, :, :keys].repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)  # [B, H, L, V]
    length = ((heads @ gram) * heads).sum(-1)
    middle = weights @ heads
    spread = (weights @ length[..., None])[..., 0] - ((middle @ gram) * middle).sum(-1)
    return spread.clamp_min(0)[..., None]


def _token_weights(stream: Tensor, power: float) -> Tensor:
    """[B, T]: 1 / rms of each token's stream to `power`."""
    return stream.square().mean(-1).clamp_min(1e-12) ** (-power / 2)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[..., None]], -1)


def _augmented(inputs: Tensor, width: int) -> Tensor:
    """`inputs` [.., E], with a column of ones where the weights are one wider."""
    return inputs if inputs.shape[-1] == width else torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def _merge(facts: Facts, attention: Attention, sums: dict[str, Tensor], kv_heads: int, told: Told) -> dict[int, Merged]:
    """The closed-form merges, one for each cut of slow pairs that is to be tried; all share their values and outputs."""
    assert attention.q is not None and attention.k is not None and attention.v is not None and attention.o is not None
    q = _with_bias(attention.q, attention.q_bias).double()
    k = _with_bias(attention.k, attention.k_bias).double()
    v = _with_bias(attention.v, attention.v_bias).double()
    o = attention.o.double()
    count, heads = k.shape[0], o.shape[1]
    pairs = torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None
    groups = choose_groups(facts, sums, o, count, kv_heads)
    told.groups = groups
    per = heads // count
    order = [h for group in groups for j in group for h in range(j * per, (j + 1) * per)]
    new_v, downs, new_o = [], [], o[:, order].clone()
    size = heads // kv_heads
    for r, group in enumerate(groups):
        if not facts.values:
            new_v.append(v[group].mean(0))
            downs.append(torch.empty(0, 0, dtype=v.dtype))
            continue
        width = v.shape[1]
        joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
        owners = torch.arange(len(group)).repeat_interleave(per)
        outputs = new_o[:, r * size : (r + 1) * size].transpose(0, 1)
        found = align.merge_values(sums["values"][joint][:, joint], align.output_metric(outputs, owners, len(group)), width)
        downs.append(found.values)
        new_v.append(found.values @ v[group].flatten(0, 1))
        new_o[:, r * size : (r + 1) * size] = torch.einsum("hev,hvw->ehw", outputs, found.outputs[owners])
    told_cuts = _cuts(facts)
    result = {}
    for cut in told_cuts:
        if facts.keys:
            new_q, new_k = _merge_keys(facts, q, k, sums, pairs, groups, per, cut)
        else:
            new_q, new_k = q, torch.stack([k[group].mean(0) for group in groups])
        result[cut] = Merged(
            new_q.float(), new_k.float(), torch.stack(new_v).float(), new_o.float(), torch.stack(downs).float(), order, groups
        )
    return result


def choose_groups(facts: Facts, sums: dict[str, Tensor], outputs: Tensor, count: int, kv_heads: int) -> list[list[int]]:
    """Which of `count` old heads share a new one: searched where heads may change places, else contiguous."""
    size, heads = count // kv_heads, outputs.shape[1]
    if not facts.movable or kv_heads == 1 or size == 1:
        return [list(range(r * size, (r + 1) * size)) for r in range(kv_heads)]
    pairs = torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None
    owned = [range(j * heads // count, (j + 1) * heads // count) for j in range(count)]
    metric = torch.stack([align.output_gram(outputs, some) for some in owned])
    return partition(pair_costs(facts, pairs, sums.get("queries"), sums.get("values"), metric), kv_heads)


def _cuts(facts: Facts) -> list[int]:
    if not facts.keys or not facts.factors or facts.normed or not facts.pairs:
        return [facts.pairs]
    return sorted({round(share * facts.pairs) for share in CUTS})


def _merge_keys(
    facts: Facts,
    q: Tensor,
    k: Tensor,
    sums: dict[str, Tensor],
    pairs: Tensor | None,
    groups: list[list[int]],
    per: int,
    cut: int,
) -> tuple[Tensor, Tensor]:
    order, width = list(facts.order), len(facts.order)
    new_q, new_k = [], []
    for group in groups:
        heads = [h for j in group for h in range(j * per, (j + 1) * per)]
        owners = torch.arange(len(group)).repeat_interleave(per)
        joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
        some = pairs[heads][:, :, group][:, :, :, group] if pairs is not None else torch.empty(len(heads), 0, 1, 1)
        found = align.merge_keys(facts, sums["keys"][joint][:, joint], some, sums["queries"][heads], owners, cut)
        new_k.append(found.keys @ k[group][:, order].flatten(0, 1))
        new_q.append(found.queries @ q[heads][:, order])
    return torch.cat(new_q), torch.stack(new_k)


def _rows_of(view: View, facts: Facts, merged: Merged, attention: Attention, weight: Tensor) -> values.Mixed:
    """The sampled rows of one batch for the fit of values and outputs."""
    size, parts, targets, tokens = len(merged.heads) // len(merged.groups), [], [], []
    for target in view.targets:
        mixed = []
        for r, group in enumerate(merged.groups):
            weights = target.weights[:, merged.heads[r * size : (r + 1) * size]]
            mixed.append(weights @ view.values[:, None, : target.keys, group].flatten(3))  # [B, n, R, g·V]
        parts.append(torch.stack(mixed, 1).permute(0, 3, 1, 2, 4).flatten(0, 1))
        given = view.given[:, target.at]
        targets.append((given if attention.o_bias is None else given - attention.o_bias).flatten(0, 1))
        tokens.append(weight[:, target.at].flatten())
    return values.Mixed(torch.cat(parts), torch.cat(targets), torch.cat(tokens))


def _refine(
    facts: Facts, attention: Attention, merged: Merged, views: list[View], lanes: list[Lane], settings: Settings
) -> None:
    """Better shared values and outputs for what the teacher's attention gives out, on sampled rows."""

    def rows(held: bool) -> values.Mixed:
        some = []
        for view, lane in zip(views, lanes, strict=True):
            if lane.held == held:
                stream = lane.teacher + (facts.residual.attention * view.given if facts.residual else 0.0)
                some.append(_rows_of(view, facts, merged, attention, _token_weights(stream, settings.token_power)))
        return values.Mixed(*(torch.cat([getattr(one, name) for one in some]) for name in ("values", "target", "weight")))

    assert attention.v is not None
    stacked = _with_bias(attention.v, attention.v_bias)
    old = torch.stack([stacked[group].flatten(0, 1) for group in merged.groups])  # [G, g·V, E']
    size = len(merged.heads) // len(merged.groups)
    down, outputs = values.refine_values(rows(held=False), rows(held=True), merged.down, merged.o.unflatten(1, (-1, size)))
    merged.v, merged.o = down @ old, outputs.flatten(1, 2)


def _form(place: Place, facts: Facts, turns: Turns, attention: Attention, views: list[View]) -> scores.Form | None:
    """How the student's projections become scores. None when its norms cannot be applied to heads in another order."""
    student = place.student
    norms: dict[str, scores.Norm | None] = {"q_norm": None, "k_norm": None}
    for part in norms:
        try:
            module = student.get_submodule(place.path(part))
        except AttributeError:
            continue
        own = getattr(attention, part)
        if own is not None and own.ndim > 1:
            return None  # a scale for each head, or one over all heads: fitted by nothing but the drift
        norms[part] = _in_order(module, list(facts.order))
    shape = place.shape
    return scores.Form(turns, norms["q_norm"], norms["k_norm"], shape.heads, place.kv_heads, shape.head_dim, views[0].scaling)


def _in_order(module: nn.Module, order: list[int]) -> scores.Norm:
    """`module`, which norms heads as the model stores them, on heads whose dimensions are in `Facts.order`."""
    back = torch.tensor(order).argsort().tolist()

    def norm(heads: Tensor) -> Tensor:
        normed: Tensor = module(heads[..., back])
        return normed[..., order]

    return norm


def _student_inputs(place: Place, lane: Lane) -> Tensor:
    stop = place.student.get_submodule(place.path("q"))
    return run_until(place.student, stop, lane.student, lane.student_calls[place.index])


def _drift(inputs: list[Tensor], views: list[View], lanes: list[Lane]) -> Tensor:
    """M [E, E] that best takes what the student sees to what the teacher saw: W M x_student ≈ W x_teacher."""
    gap = sum(float((x - view.inputs).square().sum()) for x, view in zip(inputs, views, strict=True))
    if gap <= values.NEGLIGIBLE * sum(float(view.inputs.square().sum()) for view in views):
        return torch.eye(inputs[0].shape[-1], device=inputs[0].device)
    own = cross = torch.zeros((), dtype=torch.float64)
    for x, view, lane in zip(inputs, views, lanes, strict=True):
        if not lane.held:
            flat, wanted = x.flatten(0, 1), view.inputs.flatten(0, 1)
            own, cross = own + (flat.T @ flat).double(), cross + (wanted.T @ flat).double()
    ridge = DRIFT_RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own + ridge, (cross + ridge).T).T.float()


def _mapped(weight: Tensor, drift: Tensor) -> Tensor:
    """`weight` [heads, D, E'] on inputs that `drift` [E, E] brings back; a bias column stays."""
    width = len(drift)
    return torch.cat([weight[..., :width] @ drift, weight[..., width:]], -1)


def _fit_scores(
    choices: dict[int, Merged],
    merged: Merged,
    form: scores.Form,
    inputs: list[Tensor],
    views: list[View],
    lanes: list[Lane],
    drift: Tensor | None,
    settings: Settings,
    told: Told,
) -> None:
    """Choose the cut on held-back rows, then (with a drift, that is when refitting) fit q and k. Changes `merged`."""
    width = merged.q.shape[-1]
    fitted: list[scores.Batch] = []
    held: list[scores.Batch] = []
    for x, view, lane in zip(inputs, views, lanes, strict=True):
        batch = scores.Batch(_augmented(x, width), [_reordered(target, merged.heads) for target in view.targets])
        (held if lane.held else fitted).append(batch)
    q_moment, k_moment = torch.zeros(width, width), torch.zeros(width, width)
    for batch in fitted:
        flat = batch.inputs.flatten(0, 1)
        q_moment = q_moment + flat.T @ flat
        for target in batch.targets:
            looked = (target.weights * (1 - target.weights) * target.importance).sum((1, 2))  # [B, L]
            seen = batch.inputs[:, : target.keys]
            k_moment = k_moment + (seen * looked[..., None]).flatten(0, 1).T @ seen.flatten(0, 1)
    best: tuple[float, int, scores.Weights] | None = None
    for cut, choice in choices.items():
        q, k = (_mapped(w, drift) if drift is not None else w for w in (choice.q, choice.k))
        start = scores.Weights(q.flatten(0, 1), k.flatten(0, 1))
        error = scores.held_error(held, form, start)
        if best is None or error < best[0]:
            best = (error, cut, start)
    assert best is not None
    told.merged_error, told.cut, weights = best[0], best[1], best[2]
    if settings.refit:
        result = scores.fit_scores(fitted, held, form, weights, q_moment, k_moment, settings.effort)
        weights, told.fitted_error = result.weights, result.after[1]
    merged.q = weights.q.unflatten(0, (-1, form.width))
    merged.k = weights.k.unflatten(0, (-1, form.width))


def _reordered(target: scores.Target, heads: list[int]) -> scores.Target:
    if heads == sorted(heads):
        return target
    return scores.Target(target.at, target.keys, target.scores[:, heads], target.weights[:, heads], target.importance[:, heads])


def _packed(place: Place, facts: Facts, attention: Attention, merged: Merged) -> dict[str, Tensor]:
    """The layer's stored parts: dimensions and biases back where the model has them."""
    width = attention.q.shape[-1] if attention.q is not None else 0
    back = torch.tensor(facts.order).argsort() if facts.keys else torch.arange(merged.q.shape[1])
    norm = attention.k_norm
    new = Attention(
        q=merged.q[:, back, :width],
        k=merged.k[:, back, :width],
        v=merged.v[..., :width],
        o=merged.o,
        q_bias=merged.q[:, back, width] if attention.q_bias is not None else None,
        k_bias=merged.k[:, back, width] if attention.k_bias is not None else None,
        v_bias=merged.v[..., width] if attention.v_bias is not None else None,
        k_norm=mean(norm, place.kv_heads) if norm is not None and norm.ndim > 1 else None,
    )
    return LAYOUTS[place.layer.layout].pack(new, place.shape)


def _refit_stream(
    place: Place,
    facts: Facts,
    checkpoint: Checkpoint,
    stream: Stream,
    lanes: list[Lane],
    views: list[View],
    new: dict[str, Tensor],
    settings: Settings,
) -> None:
    """Ridges for the output projection and for the last matrix of the MLP; moves the student on. Adds to `new`."""
    projection = place.student.get_submodule(place.path("o"))
    assert isinstance(projection, nn.Linear)
    if not facts.values:  # something lies between: only carried on
        for lane in lanes:
            lane.student = run_block(place.student, lane.student, lane.student_calls[place.index])
        return
    share = facts.residual.attention if facts.residual else None
    z, sums = [], {False: values.Moments(), True: values.Moments()}
    for lane, view in zip(lanes, views, strict=True):
        z.append(run_until(place.student, projection, lane.student, lane.student_calls[place.index]))
        wanted, middle = view.given, lane.teacher
        if share is not None:
            middle = lane.teacher + share * view.given
            wanted = (middle - lane.student) / share
        _add_rows(sums[lane.held], z[-1], wanted, middle, projection, settings)
    weight = _solve(sums, projection)
    _put(place.student, place.path("o"), *weight)
    new[place.layer.names["o.weight"]] = weight[0]
    if weight[1] is not None:
        new[place.layer.names["o.bias"]] = weight[1]
    residual = facts.residual
    down = place.student.get_submodule(residual.down) if residual and residual.down else None
    names = [
        stream.weights.sources.get(f"{place.block.path}.{residual.down}.{kind}") if residual else None
        for kind in ("weight", "bias")
    ]
    if residual is None or not isinstance(down, nn.Linear) or not _plain(names, down, checkpoint):
        for lane in lanes:
            lane.student = run_block(place.student, lane.student, lane.student_calls[place.index])
        return
    sums, middles, inner = {False: values.Moments(), True: values.Moments()}, [], []
    for lane, view, part in zip(lanes, views, z, strict=True):
        inner.append(run_until(place.student, down, lane.student, lane.student_calls[place.index]))
        middles.append(lane.student + residual.attention * projection(part))
        wanted = (view.output - middles[-1]) / residual.mlp
        _add_rows(sums[lane.held], inner[-1], wanted, view.output, down, settings)
    weight = _solve(sums, down)
    assert residual.down is not None
    _put(place.student, residual.down, *weight)
    for name, tensor in zip(names, weight, strict=True):
        if name and tensor is not None:
            new[name[0]] = tensor
    for lane, middle, part in zip(lanes, middles, inner, strict=True):
        lane.student = middle + residual.mlp * down(part)


def _plain(names: list[list[str] | None], module: nn.Linear, checkpoint: Checkpoint) -> bool:
    """Each of the module's parameters is one tensor of the checkpoint, as it is."""
    for found, parameter in zip(names, (module.weight, module.bias), strict=True):
        if parameter is not None and (found is None or len(found) != 1):
            return False
        if parameter is not None and found and checkpoint.tensors[found[0]].shape != tuple(parameter.shape):
            return False
    return True


def _add_rows(sums: values.Moments, z: Tensor, wanted: Tensor, stream: Tensor, module: nn.Module, settings: Settings) -> None:
    rows = _augmented(z.flatten(0, 1), z.shape[-1] + (module.bias is not None))
    sums.add(rows, wanted.flatten(0, 1), _token_weights(stream, settings.token_power).flatten())


def _solve(sums: dict[bool, values.Moments], module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The ridge solution for a Linear, drawn to what it holds: weight and bias."""
    prior = module.weight if module.bias is None else torch.cat([module.weight, module.bias[:, None]], 1)
    found, _ = values.ridge(sums[False], sums[True], prior, RIDGES)
    return (found, None) if module.bias is None else (found[:, :-1], found[:, -1])


def _stream_error(lanes: list[Lane]) -> float:
    shares = [
        ((lane.student - lane.teacher).square().sum(-1) / lane.teacher.square().sum(-1).clamp_min(1e-12)).flatten()
        for lane in lanes
        if lane.held
    ]
    return float(torch.cat(shares).mean())

"""Watches one attention of a layer while the layer runs: what it is given, what it gives, what its projections see."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import Geometry
from upfit.architecture.table import Entry
from upfit.calibration.capture import Attended, Scored, find_scale, seen_in, softmax_inputs
from upfit.calibration.layerwise import Block
from upfit.calibration.observe import Call, Opaque, Seen, listening, run_block, tapped


@dataclass
class Watched:
    """One run of a layer over a batch. `taps` holds (input, output) of modules by their path in the layer."""

    seen: Seen
    taps: dict[str, tuple[Tensor, Tensor]]
    hidden: Tensor
    output: Tensor


@dataclass(frozen=True)
class Place:
    """Attention `at` (a path in the block) of a layer, and what its parts are called."""

    block: Block
    at: str
    entry: Entry
    shape: Geometry

    def path(self, part: str) -> str:
        """Where a part of the attention (`q`, `k_norm`) is in the layer."""
        return f"{self.at}.{getattr(self.entry, part)}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output projections of the layer's attentions, in the order in which these run."""
        return tuple(f"{path}.{self.entry.o}" for path in self.block.attentions)

    @property
    def earlier(self) -> tuple[str, ...]:
        """Those of the attentions that run before this one."""
        return self.outputs[: self.block.attentions.index(self.at)]


def watch(place: Place, hidden: Tensor, call: Call, taps: tuple[str, ...], copies: bool = False) -> Watched:
    """Run the layer and keep what `taps` (paths of modules in it) see; see `tapped`. Raises Opaque when its attention is not
    ours to see."""
    module, caught = place.block.module, list[Seen]()
    own = module.get_submodule(place.at)
    with listening(caught.append), tapped({path: module.get_submodule(path) for path in taps}, copies) as seen:
        output = run_block(module, hidden, call)
    events = [event for event in caught if event.module is own]
    if not events:
        return _without_copies(_watch_written_out(place, hidden, call, taps, copies), place)
    if len(events) > 1:
        raise Opaque("its attention runs more than once")
    return _without_copies(_by_example(Watched(events[0], dict(seen), hidden, output), place), place)


def _by_example(watched: Watched, place: Place) -> Watched:
    """What projections of another stream see as [B, S, ...], where the layer has it in other pieces (tiles of an image)."""
    batch, keys = watched.seen.k.shape[0], watched.seen.k.shape[2]

    def whole(tensor: Tensor) -> Tensor:
        pieces = tensor.ndim == 3 and len(tensor) != batch and tensor.shape[0] * tensor.shape[1] == batch * keys
        return tensor.reshape(batch, keys, -1) if pieces else tensor

    parts = {path: tap for path, tap in watched.taps.items() if path in (place.path("k"), place.path("v"))}
    return replace(watched, taps=watched.taps | {path: (whole(x), whole(y)) for path, (x, y) in parts.items()})


def _without_copies(watched: Watched, place: Place) -> Watched:
    """What a class shows that makes a copy of keys and values for each query head (Falcon's, and ours where a family's code is
    given them): one of each."""
    seen, count = watched.seen, place.shape.kv_heads
    heads = seen.k.shape[1]
    if heads == count or heads % count:
        return watched
    times = heads // count
    if not torch.equal(seen.k, seen.k[:, ::times].repeat_interleave(times, 1)):
        return watched
    widths = {place.path("k"): heads * seen.k.shape[-1], place.path("v"): heads * seen.v.shape[-1]}
    taps = {
        path: (inputs, output.unflatten(-1, (heads, -1))[..., ::times, :].flatten(-2))
        for path, (inputs, output) in watched.taps.items()
        if output.shape[-1] == widths.get(path)
    }
    return replace(watched, seen=replace(seen, k=seen.k[:, ::times], v=seen.v[:, ::times]), taps=watched.taps | taps)


def _watch_written_out(place: Place, hidden: Tensor, call: Call, taps: tuple[str, ...], copies: bool) -> Watched:
    """`watch` of an attention that does not go through transformers' interface: by its call of torch's own, or by its
    projections and its softmax."""
    own: Any = place.block.module.get_submodule(place.at)
    run, seen, output = _scored(place, hidden, call, taps, copies)
    if isinstance(run, Attended):
        return Watched(run.seen(own), seen, hidden, output)
    if not hasattr(own, "upfit_scale"):  # the same for every batch
        other = _scored(place, hidden.roll(1, 1), call, ())[0] if len(hidden) == 1 else None
        assert not isinstance(other, Attended)
        own.upfit_scale = find_scale(run, other)
    same = seen[place.path("q")][0].data_ptr() == seen[place.path("k")][0].data_ptr()
    return Watched(seen_in(own, run, own.upfit_scale, same), seen, hidden, output)


def _scored(
    place: Place, hidden: Tensor, call: Call, taps: tuple[str, ...], copies: bool = False
) -> tuple[Scored | Attended, dict[str, tuple[Tensor, Tensor]], Tensor]:
    """What one run of the layer shows of the attention; what `taps` and its projections see; the layer's output."""
    module, shape = place.block.module, place.shape
    paths = {part: place.path(part) for part in "qkvo"}
    if not all(has_module(module, path) for path in paths.values()):
        raise Opaque("its attention does not go through transformers' attention interface")
    inside = {path: module.get_submodule(path) for path in dict.fromkeys((*taps, *paths.values()))}
    with softmax_inputs(module.get_submodule(place.at)) as (scores, calls), tapped(inside, copies) as seen:
        output = run_block(module, hidden, call)
    if len(calls) == 1:
        return calls[0], dict(seen), output
    if len(scores) != 1 or not all(path in seen for path in paths.values()):
        raise Opaque("its attention does not go through transformers' attention interface")
    parts = {part: seen[path][0 if part == "o" else 1] for part, path in paths.items()}
    shown = parts["k"].shape[-1] / shape.head_dim
    if shown not in (shape.kv_heads, shape.heads):  # a copy for each query head, in a class of ours
        raise Opaque("its keys are not the output of k_proj")
    counts = {"q": shape.heads, "k": int(shown), "v": int(shown), "o": shape.heads}
    heads = [tensor.unflatten(-1, (counts[part], -1)) for part, tensor in parts.items()]
    return Scored(scores[0], *heads), dict(seen), output


def has_module(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_submodule(name), nn.Module)
    except AttributeError:
        return False

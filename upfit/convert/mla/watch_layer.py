"""What a layer of the teacher shows for its latent, and which closed form of it is closest on what is held back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.between import PLAIN
from upfit.calibration.observe import Opaque
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import Turns
from upfit.calibration.scores.problem import Target, Turn
from upfit.calibration.statistics import ROWS, add
from upfit.calibration.teacher_student import LayerPair
from upfit.calibration.teacher_view import View, watch_teacher
from upfit.calibration.traits import AttentionTraits
from upfit.convert.mla.latent import Metrics
from upfit.convert.mla.layer import Latent, Source, closed_form, metrics_of
from upfit.convert.mla.linear import projections, scale_sums, scaled
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.sums import observe

BALANCES = (0.25, 0.06, 1.0)  # of the keys' errors against the values', tried on what is held back
CUTS = (0.5, 0.75)  # shares of the pairs from which they count as slow, where all of them have one shared key


@dataclass(frozen=True)
class Shown:
    """What one layer showed: its views on every batch, the layer itself, the sums of the batches that are fitted."""

    views: list[View]
    source: Source
    sums: dict[str, Tensor]
    metrics: Metrics
    turns: Turns


@dataclass(frozen=True)
class Closest:
    """A closed form, its balance and cut, and the share of the attention's output that it loses on what is held back."""

    latent: Latent
    balance: float
    cut: int | None
    error: float


def check_projections(pair: LayerPair, traits: AttentionTraits) -> None:
    """Raise Opaque, with the reason, for a layer whose heads are not what its projections and o_proj alone make of them: the
    latent's class has nothing between the attention and o_proj, and its values are the latent's, not normed."""
    path = pair.layer.path
    if not traits.keys or not traits.values:
        raise Opaque(f"{path}: {'; '.join(traits.reasons) or 'its keys or values are not its projections'}")
    if traits.gated != PLAIN:
        raise Opaque(f"{path}: a gate or a norm lies between its attention and o_proj, which a latent does not have")
    if traits.value_unit:
        raise Opaque(f"{path}: its values are normed, which those of a latent are not")


def watch_layer(pair: LayerPair, traits: AttentionTraits, turns: Turns, attention: Attention) -> Shown:
    """The teacher's layer over every batch. `attention` is on the device of the batches."""
    q, k, v = projections(attention, list(traits.order))
    views, sums = list[View](), dict[str, Tensor]()
    for view, watched, _ in watch_teacher(pair, traits, attention.o, ROWS, 1.0):
        if not view.batch.held:
            add(sums, observe(view, watched.seen, traits, turns, v.shape[-1]))
            if traits.normed:
                add(sums, scale_sums(view, watched.seen, traits, turns, q, k))
        views.append(view)
    assert attention.o is not None
    wide = [part.double().cpu() for part in (q, k, v, attention.o)]
    if traits.normed:
        wide[0], wide[1] = scaled(wide[0], sums["scale_q"]), scaled(wide[1], sums["scale_k"])
    source = Source(wide[0], wide[1], wide[2], wide[3], traits.pairs, views[0].scaling * turns.scale)
    return Shown(views, source, sums, metrics_of(sums), turns)


def closest(shown: Shown, sizes: Sizes, balances: tuple[float, ...]) -> Closest:
    """The best of the `balances` on what is held back; of the cuts the one with the best scores, for what a fit of scores
    leaves depends more on these than on what the layer gives out before it."""
    held = [view for view in shown.views if view.batch.held]

    def tried(balance: float, cut: int | None) -> tuple[Closest, float]:
        latent = closed_form(shown.source, shown.sums, shown.metrics, sizes.counts, sizes.latent, balance, cut)
        latent = latent.to(held[0].inputs.device)
        error, of_scores = errors(latent, shown.source.scaling, shown.turns, held)
        return Closest(latent, balance, cut, error), of_scores

    first = min((tried(balances[0], cut) for cut in _cuts(shown.source, sizes)), key=lambda one: one[1])[0]
    if not sizes.unrotated:  # no key is in the latent, so nothing is to be balanced
        return first
    return min((first, *(tried(balance, first.cut)[0] for balance in balances[1:])), key=lambda one: one.error)


def _cuts(source: Source, sizes: Sizes) -> list[int | None]:
    """What is tried: none, and where every pair has one key for several heads, some of them."""
    if not sizes.counts or len(source.k) == 1 or any(count != 1 for count in sizes.counts):
        return [None]
    return [None, *sorted({round(share * source.pairs) for share in CUTS} - {source.pairs})]


def errors(latent: Latent, scaling: float, turns: Turns, views: list[View]) -> tuple[float, float]:
    """The squared error of what the attention gives out on the sampled rows of `views`, as a share of its energy, and that of
    the scores: Σ importance · variance under the teacher's weights."""
    lost, energy, of_scores, of_targets = 0.0, 0.0, 0.0, 0.0
    slots, width = list(latent.slots), latent.key.shape[-1]
    for view in views:
        inputs = augmented(view.inputs, width)
        keys = (inputs @ latent.key.T)[:, :, None]
        keys = Turn.of(turns.k[: keys.shape[1], slots], keys.shape[-1])(keys)[:, :, 0]
        for target in view.targets:
            queries = torch.einsum("bre,hde->brhd", inputs[:, target.at], latent.q)
            queries = latent.absorbed(Turn.of(turns.q[target.at][:, slots], queries.shape[-1])(queries))
            scores = torch.einsum("brhk,blk->bhrl", queries, keys[:, : target.keys]) * scaling
            of_scores, of_targets = (
                of_scores + _spread(scores - target.scores, target),
                of_targets + _spread(target.scores, target),
            )
            whole = target.weights.sum(-1, keepdim=True)  # less than 1 where sinks take a part
            weights = scores.masked_fill(target.weights == 0, float("-inf")).softmax(-1).nan_to_num() * whole
            mixed = torch.einsum("bhrl,blk->bhrk", weights, keys[:, : target.keys, latent.rotated :])
            wanted = attended(target.weights, view.values[:, : target.keys], latent.o)
            gap = torch.einsum("bhrk,hvk,ehv->bre", mixed, latent.of_heads(latent.up_v), latent.o) - wanted
            lost, energy = lost + float(gap.square().sum()), energy + float(wanted.square().sum())
    return lost / max(energy, 1e-30), of_scores / max(of_targets, 1e-30)


def _spread(scores: Tensor, target: Target) -> float:
    """Σ importance · variance of `scores` [B, H, R, L] under the target's weights."""
    mean = (target.weights * scores).sum(-1, keepdim=True)
    return float((target.weights * (scores - mean).square() * target.importance).sum())


def attended(weights: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """[B, R, E]: what the output projection makes of `values` [B, L, K, V] under `weights` [B, H, R, L]."""
    of_heads = values.repeat_interleave(weights.shape[1] // values.shape[2], 2)
    return torch.einsum("bhrl,blhv,ehv->bre", weights, of_heads, outputs)

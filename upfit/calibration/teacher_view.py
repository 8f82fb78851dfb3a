"""What a layer of the teacher shows on calibration text: its streams, and what its attention scores on sampled rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.calibration.rotation import Layout, Turns, turns_of
from upfit.calibration.scores.problem import Target
from upfit.calibration.statistics import Rows
from upfit.calibration.teacher_student import LayerPair, PairedBatch, stream_before, taps_before
from upfit.calibration.traits import AttentionTraits
from upfit.calibration.watch import Watched, has_module


@dataclass
class View:
    """What the teacher's layer showed on one batch: `inputs` [B, T, E] of queries and `key_inputs` [B, S, E] of keys and values
    (the same but in cross-attention), `before` [B, T, E] the stream that the attention adds to, `attended` [B, T, E] by o_proj,
    `total` [B, T, E] the stream with what the MLP adds, `output` [B, T, E] after the layer (the same but where that is normed),
    `values` [B, S, K, V]; `turns`: how queries and keys are turned in it, where that is not alike in all batches.
    `gates` [B, H, R, V] of each target, where the layer has any and they were asked for."""

    batch: PairedBatch
    inputs: Tensor
    key_inputs: Tensor
    before: Tensor
    attended: Tensor
    total: Tensor
    output: Tensor
    values: Tensor
    scaling: float
    targets: list[Target]
    turns: Turns | None = None
    gates: list[Tensor] | None = None

    @property
    def cross(self) -> bool:
        """Whether keys and values are made of another stream than queries."""
        return self.key_inputs is not self.inputs


def watch_teacher(
    pair: LayerPair, traits: AttentionTraits, outputs: Tensor | None, rows: int, importance: float
) -> Iterator[tuple[View, Watched, list[Rows]]]:
    """The teacher's layer on one batch after the other: its view, what was seen, and the query positions of the targets, `rows`
    of every SEGMENT.

    A row's importance is how much the output depends on its scores, to the power `importance`, with `outputs` [E, H, V] as
    the output projection (None: all rows alike).
    """
    q, k, o = pair.path("q"), pair.path("k"), pair.path("o")
    sum_path = None if traits.residual is None else traits.residual.mlp_sum
    extra = (*taps_before(pair.place, traits.residual), *([sum_path] if sum_path else []))
    own_turns = traits.keys and bool(traits.pairs) and any(batch.own_positions for batch in pair.batches)
    norms = [path for path in map(pair.path, ("q_norm", "k_norm")) if has_module(pair.block.module, path)] if own_turns else []
    for batch, watched, sampled in pair.watch((q, k, o, *extra, *norms), rows):
        inputs, of_keys, attended = watched.taps[q][0], watched.taps[k][0], watched.taps[o][1]
        of_keys = inputs if of_keys.data_ptr() == inputs.data_ptr() else of_keys
        before = stream_before(batch.teacher, pair.place, watched.taps, traits.residual)
        weight = batch.weights(batch.middle(attended, traits.residual, before), 2.0)
        targets = [_target(watched.seen, some_rows, outputs, weight, importance) for some_rows in sampled]
        values = watched.seen.v.transpose(1, 2)
        scaling, output = watched.seen.scaling, watched.output
        total = watched.taps[sum_path][0] if sum_path else output
        turns = _turns(pair, watched, traits) if own_turns else None
        view = View(batch, inputs, of_keys, before, attended, total, output, values, scaling, targets, turns)
        yield view, watched, sampled


def _turns(pair: LayerPair, watched: Watched, traits: AttentionTraits) -> Turns:
    parts = {part: watched.taps.get(pair.path(part)) for part in ("q", "k", "q_norm", "k_norm")}
    layout = Layout(traits.pairs, traits.order, traits.speeds, traits.norm_last, traits.unit)
    return turns_of(watched.seen, {part: tap for part, tap in parts.items() if tap}, layout, pair.layer.geometry)


def _target(seen: Seen, rows: Rows, outputs: Tensor | None, token_weight: Tensor, power: float) -> Target:
    at, keys, unit = rows.at, rows.keys, 1.0
    wanted, weights = seen.scores(at, keys)
    importance = rows.of_counted(torch.ones_like(weights[..., :1]))
    if power and outputs is not None and outputs.shape[1] == seen.q.shape[1]:
        importance = _spread(seen, weights, keys, outputs) * token_weight[:, at][:, None, :, None]
        unit = float(importance.mean())
        importance = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-4) ** power
        importance = rows.of_counted(importance / importance.mean())
    return Target(at, keys, wanted.masked_fill_(weights == 0, 0.0), weights, importance, unit)


def _spread(seen: Seen, weights: Tensor, keys: int, outputs: Tensor) -> Tensor:
    """[B, H, R, 1]: how much the output depends on a row's scores: the variance, under its weights p, of what the values give
    there, Σ p |O_h(v − v̄)|²."""
    gram = torch.einsum("ehv,ehw->hvw", outputs, outputs)
    heads = seen.v[:, :, :keys].repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)  # [B, H, L, V]
    length = ((heads @ gram) * heads).sum(-1)
    middle = weights @ heads
    spread = (weights @ length[..., None])[..., 0] - ((middle @ gram) * middle).sum(-1)
    return spread.clamp_min(0)[..., None]

"""The state of one layer during an aligned conversion, and what the same layer of the teacher shows."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.observe import Seen
from upfit.calibration.statistics import ROWS, Rows, add, observe
from upfit.calibration.teacher_student import LayerPair, PairedBatch, stream_before, taps_before
from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa.fit_scores import Effort
from upfit.convert.gqa.score_problem import Target


@dataclass(frozen=True)
class Settings:
    """`rows`: sampled query positions of every 512 of a window. `refit`: fit in the converted stream, not only merge."""

    kv_heads: int
    refit: bool = True
    rows: int = ROWS
    effort: Effort = Effort()
    importance: float = 1.0
    token_power: float = 2.0  # a token weighs 1 / rms of the teacher's stream to this power


@dataclass
class LayerRecord:
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
class View:
    """What the teacher's layer showed on one batch: `inputs` [B, T, E] of queries and `key_inputs` [B, S, E] of keys and values
    (the same but in cross-attention), `before` [B, T, E] the stream that the attention adds to, `attended` [B, T, E] by o_proj,
    `total` [B, T, E] the stream with what the MLP adds, `output` [B, T, E] after the layer (the same but where that is normed),
    `values` [B, S, K, V]. `gates` [B, H, R, V] of each target, where the layer has any."""

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
    gates: list[Tensor] | None = None

    @property
    def cross(self) -> bool:
        """Whether keys and values are made of another stream than queries."""
        return self.key_inputs is not self.inputs


@dataclass
class Merged:
    """The layer being changed. q [H, D, E'], k [G, D, E'] in `AttentionTraits.order`, v [G, V, E'] (= `down` [G, V, g·V] of the
    old ones), o [E, H, V]; E' is E, or one more where the projections have biases (the last column). Query heads stand in the
    order of their groups: `heads` lists the old ones. `lost`: what the closed forms expect to lose, as a share of the energy of
    scores or of values, whichever is more."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    down: Tensor
    heads: list[int]
    groups: list[list[int]]
    lost: float

    def to(self, device: torch.device) -> "Merged":
        q, k, v, o, down = (tensor.to(device) for tensor in (self.q, self.k, self.v, self.o, self.down))
        return Merged(q, k, v, o, down, self.heads, self.groups, self.lost)


def watch_teacher(
    pair: LayerPair, traits: AttentionTraits, attention: Attention, settings: Settings
) -> tuple[list[View], dict[str, Tensor]]:
    """The teacher's layer over every batch, and the statistics of the batches that are fitted."""
    views, sums, q, k, o = [], dict[str, Tensor](), pair.path("q"), pair.path("k"), pair.path("o")
    sum_path = None if traits.residual is None else traits.residual.mlp_sum
    extra = (*taps_before(pair.place, traits.residual), *([sum_path] if sum_path else []))
    for batch, watched, rows in pair.watch((q, k, o, *extra), settings.rows):
        gates = pair.gates(watched, traits)
        if not batch.held:
            add(sums, observe(watched.seen, traits, rows, gates))
        inputs, of_keys, attended = watched.taps[q][0], watched.taps[k][0], watched.taps[o][1]
        of_keys = inputs if of_keys.data_ptr() == inputs.data_ptr() else of_keys
        before = stream_before(batch.teacher, pair.place, watched.taps, traits.residual)
        weight = batch.weights(batch.middle(attended, traits.residual, before), 2.0)
        targets = [_target(watched.seen, sampled, attention, weight, settings) for sampled in rows]
        values = watched.seen.v.transpose(1, 2)
        scaling, output = watched.seen.scaling, watched.output
        total = watched.taps[sum_path][0] if sum_path else output
        sampled_gates = None if gates is None else [gates[:, sampled.at].transpose(1, 2) for sampled in rows]
        views.append(View(batch, inputs, of_keys, before, attended, total, output, values, scaling, targets, sampled_gates))
    return views, sums


def _target(seen: Seen, rows: Rows, attention: Attention, token_weight: Tensor, settings: Settings) -> Target:
    at, keys = rows.at, rows.keys
    wanted, weights = seen.scores(at, keys)
    importance = rows.of_counted(torch.ones_like(weights[..., :1]))
    if settings.importance and attention.o is not None and attention.o.shape[1] == seen.q.shape[1]:
        importance = _spread(seen, weights, keys, attention.o) * token_weight[:, at][:, None, :, None]
        importance = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-4) ** settings.importance
        importance = rows.of_counted(importance / importance.mean())
    return Target(at, keys, wanted.masked_fill_(weights == 0, 0.0), weights, importance)


def _spread(seen: Seen, weights: Tensor, keys: int, outputs: Tensor) -> Tensor:
    """[B, H, R, 1]: how much the output depends on a row's scores: the variance, under its weights p, of what the values give
    there, Σ p |O_h(v − v̄)|²."""
    gram = torch.einsum("ehv,ehw->hvw", outputs, outputs)
    heads = seen.v[:, :, :keys].repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)  # [B, H, L, V]
    length = ((heads @ gram) * heads).sum(-1)
    middle = weights @ heads
    spread = (weights @ length[..., None])[..., 0] - ((middle @ gram) * middle).sum(-1)
    return spread.clamp_min(0)[..., None]


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[..., None]], -1)

"""The state of one layer during an aligned conversion, and what the same layer of the teacher shows."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.observe import Seen
from upfit.calibration.statistics import ROWS, add, observe
from upfit.calibration.teacher_student import LayerPair, PairedBatch, token_weights
from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa import fit_scores


@dataclass(frozen=True)
class Settings:
    """`rows`: sampled query positions of every 512 of a window. `refit`: fit in the converted stream, not only merge."""

    kv_heads: int
    refit: bool = True
    rows: int = ROWS
    effort: fit_scores.Effort = fit_scores.Effort()
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
    """What the teacher's layer showed on one batch: `inputs` [B, T, E] of the projections, `attended` [B, T, E] by o_proj,
    `output` [B, T, E] after the layer, `values` [B, T, K, V]."""

    batch: PairedBatch
    inputs: Tensor
    attended: Tensor
    output: Tensor
    values: Tensor
    scaling: float
    targets: list[fit_scores.Target]


@dataclass
class Merged:
    """The layer being changed. q [H, D, E'], k [G, D, E'] in `AttentionTraits.order`, v [G, V, E'] (= `down` [G, V, g·V] of the
    old ones), o [E, H, V]; E' is E, or one more where the projections have biases (the last column). Query heads stand in the
    order of their groups: `heads` lists the old ones."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    down: Tensor
    heads: list[int]
    groups: list[list[int]]

    def to(self, device: torch.device) -> "Merged":
        q, k, v, o, down = (tensor.to(device) for tensor in (self.q, self.k, self.v, self.o, self.down))
        return Merged(q, k, v, o, down, self.heads, self.groups)


def watch_teacher(
    pair: LayerPair, traits: AttentionTraits, attention: Attention, settings: Settings
) -> tuple[list[View], dict[str, Tensor]]:
    """The teacher's layer over every batch, and the statistics of the batches that are fitted."""
    views, sums, q, o = [], dict[str, Tensor](), pair.path("q"), pair.path("o")
    for batch, watched, rows in pair.watch((q, o), settings.rows):
        if not batch.held:
            add(sums, observe(watched.seen, traits, rows))
        inputs, attended = watched.taps[q][0], watched.taps[o][1]
        weight = token_weights(batch.middle(attended, traits.residual), 2.0)
        targets = [_target(watched.seen, sampled.at, sampled.keys, attention, weight, settings) for sampled in rows]
        values = watched.seen.v.transpose(1, 2)
        views.append(View(batch, inputs, attended, watched.output, values, watched.seen.scaling, targets))
    return views, sums


def _target(
    seen: Seen, at: Tensor, keys: int, attention: Attention, token_weight: Tensor, settings: Settings
) -> fit_scores.Target:
    wanted, weights = seen.scores(at, keys)
    importance = torch.ones_like(weights[..., :1])
    if settings.importance and attention.o is not None and attention.o.shape[1] == seen.q.shape[1]:
        importance = _spread(seen, weights, keys, attention.o) * token_weight[:, at][:, None, :, None]
        importance = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-4) ** settings.importance
        importance = importance / importance.mean()
    return fit_scores.Target(at, keys, wanted.masked_fill_(weights == 0, 0.0), weights, importance)


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

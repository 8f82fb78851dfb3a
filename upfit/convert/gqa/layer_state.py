"""The state of one layer during an aligned conversion."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.scores.fit import Effort
from upfit.calibration.statistics import ROWS, add, observe
from upfit.calibration.teacher_student import LayerPair
from upfit.calibration.teacher_view import View, watch_teacher
from upfit.calibration.traits import AttentionTraits


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


def watch_layer(
    pair: LayerPair, traits: AttentionTraits, attention: Attention, settings: Settings
) -> tuple[list[View], dict[str, Tensor]]:
    """The teacher's layer over every batch, and the statistics of the batches that are fitted."""
    views, sums = list[View](), dict[str, Tensor]()
    for view, watched, rows in watch_teacher(pair, traits, attention.o, settings.rows, settings.importance):
        gates = pair.gates(watched, traits)
        if not view.batch.held:
            add(sums, observe(watched.seen, traits, rows, gates))
        if gates is not None:
            view.gates = [gates[:, sampled.at].transpose(1, 2) for sampled in rows]
        views.append(view)
    return views, sums


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[..., None]], -1)

"""The module that turns a batch into a loss, with a teacher or without.

Legend: B rows, T tokens a row, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.losses import Head, Objective, chunked_loss, dense_loss
from upfit.uptrain.model.model_traits import ModelTraits, full_logits, hidden_states, plain_head


@dataclass(frozen=True)
class Batch:
    """Rows of a step. ids and positions [B, T]; labels [B, T], IGNORE where nothing is learned. An encoder-decoder's ids have a
    length of their own."""

    ids: Tensor
    positions: Tensor
    labels: Tensor

    @cached_property
    def places(self) -> Tensor:
        """[P]: where the label of any row counts."""
        return (self.labels != IGNORE).any(0).nonzero()[:, 0]


class Distiller(nn.Module):
    """A student and, unseen by its parameters, a teacher: (ids, positions, labels), all [B, T] → (loss, CE, KL), summed.

    `objectives` by the name of what the rows are of; logits are made only where a label counts. The teacher is a distiller
    without one of its own. Weights are read in `forward`, `states` and `logits` only: sharded ones are whole nowhere else.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        traits: ModelTraits,
        teacher: "Distiller | None",
        objectives: dict[str, Objective],
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student, self.traits, self.objectives, self.autocast = student, traits, objectives, autocast
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule: neither trained, wrapped, nor saved
        self.whole_logits: bool = traits.head is None or (teacher is not None and teacher.whole_logits)

    @property
    def teacher(self) -> "Distiller | None":
        return self._teacher[0]

    values = 2

    def metrics(self, means: list[float]) -> dict[str, Any]:
        """What metrics.jsonl says of the mean CE and KL."""
        return {"ce": means[0], "kl": means[1]}

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
        objective, batch = self.objectives[name], Batch(ids, positions, labels)
        teacher = self.teacher if objective.kl_weight else None
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return (self._dense if self.whole_logits else self._chunked)(batch, teacher, objective)

    def states(self, batch: Batch, counted: Tensor) -> tuple[Tensor, Tensor, Head]:
        """Hidden states [N, H] at the places `counted` [N] of all B·T, and the plain head that makes logits of them."""
        hidden = hidden_states(self.student, batch.ids, batch.positions, self.traits).flatten(0, 1)[counted]
        return hidden, *plain_head(self.student, self.traits)

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B·P, V] at the places of every row."""
        return full_logits(self.student, batch.ids, batch.positions, self.traits, batch.places).flatten(0, 1)

    def labels(self, batch: Batch) -> Tensor:
        """What `logits` are held against [B·P]."""
        return batch.labels[:, batch.places].flatten()

    def _chunked(self, batch: Batch, teacher: "Distiller | None", objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        labels = batch.labels.flatten()
        counted = (labels != IGNORE).nonzero()[:, 0]
        target = None
        if teacher is not None:
            with torch.no_grad():
                target = teacher.states(batch, counted)
        hidden, weight, head = self.states(batch, counted)
        return chunked_loss(hidden, weight, labels[counted], head, target, objective)

    def _dense(self, batch: Batch, teacher: "Distiller | None", objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        target = None
        if teacher is not None:
            with torch.no_grad():
                target = teacher.logits(batch)
        return dense_loss(self.logits(batch), target, self.labels(batch), objective)

"""The module that turns a batch into a loss, with a teacher or without.

Legend: B rows, T tokens a row, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.losses import Head, Objective, chunked_loss, dense_loss
from upfit.uptrain.model.model_traits import ModelTraits, full_logits, hidden_states, plain_head


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

    def told(self, means: list[float]) -> dict[str, Any]:
        """What metrics.jsonl says of the mean CE and KL."""
        return {"ce": means[0], "kl": means[1]}

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
        objective = self.objectives[name]
        teacher = self.teacher if objective.kl_weight else None
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            compute = self._dense if self.whole_logits else self._chunked
            return compute(ids, positions, labels, teacher, objective)

    def states(self, ids: Tensor, positions: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Head]:
        """Hidden states [N, H] at the places `counted` [N] of all B·T, and the plain head that makes logits of them."""
        hidden = hidden_states(self.student, ids, positions, self.traits).flatten(0, 1)[counted]
        return hidden, *plain_head(self.student, self.traits)

    def logits(self, ids: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Logits [B·P, V] at the `places` [P] of every row."""
        return full_logits(self.student, ids, positions, self.traits, places).flatten(0, 1)

    def _chunked(
        self, ids: Tensor, positions: Tensor, labels: Tensor, teacher: "Distiller | None", objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        counted = (labels.flatten() != IGNORE).nonzero()[:, 0]
        learned = None
        if teacher is not None:
            with torch.no_grad():
                learned = teacher.states(ids, positions, counted)
        hidden, weight, head = self.states(ids, positions, counted)
        return chunked_loss(hidden, weight, labels.flatten()[counted], head, learned, objective)

    def _dense(
        self, ids: Tensor, positions: Tensor, labels: Tensor, teacher: "Distiller | None", objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        places = (labels != IGNORE).any(0).nonzero()[:, 0]
        learned = None
        if teacher is not None:
            with torch.no_grad():
                learned = teacher.logits(ids, positions, places)
        return dense_loss(self.logits(ids, positions, places), learned, labels[:, places].flatten(), objective)

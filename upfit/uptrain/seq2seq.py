"""The learner of encoder-decoders: what the encoder reads and what the decoder is to write, in; a loss, out.

Legend: B rows, S tokens of the input, T labels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upfit.uptrain.losses import Objective, dense_loss
from upfit.uptrain.models import Traits, Tutor


class Seq2Seq(nn.Module):
    """A student and, unseen by its parameters, a teacher: ids [B, S], nothing, labels [B, T] → (loss, CE, KL), summed.

    The decoder reads the labels shifted by one, as the class itself shifts them. Its logits [B, T, V] are made whole: T is a
    quarter of S.
    """

    values = 2

    def __init__(
        self,
        student: PreTrainedModel,
        traits: Traits,
        teacher: Tutor | None,
        objectives: dict[str, Objective],
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student, self.traits, self.objectives, self.autocast = student, traits, objectives, autocast
        self._teacher = teacher  # in a tuple, so that it is no submodule

    def told(self, means: list[float]) -> dict[str, Any]:
        return {"ce": means[0], "kl": means[1]}

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
        objective = self.objectives[name]
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            learned = None
            if self._teacher is not None and objective.kl_weight:
                with torch.no_grad():
                    learned = logits(self._teacher[0], ids, labels)
            return dense_loss(logits(self.student, ids, labels), learned, labels.flatten(), objective)


def logits(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The model's own logits [B · T, V] of what the decoder is to write. Labels that do not count are read as token 0."""
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels.clamp_min(0))
    return model(input_ids=ids, decoder_input_ids=shifted, use_cache=False).logits.flatten(0, 1)

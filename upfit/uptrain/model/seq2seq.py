"""The learner of encoder-decoders: takes the encoder's input and the decoder's labels, returns a loss.

Legend: B rows, S tokens of the input, T labels, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor

from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.losses import Objective, dense_loss


class Seq2Seq(Distiller):
    """A student and, unseen by its parameters, a teacher: ids [B, S], nothing, labels [B, T] → (loss, CE, KL), summed.

    The decoder reads the labels shifted by one, as the class itself shifts them. Its logits are made whole: T is a quarter
    of S.
    """

    def logits(self, ids: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Logits [B · T, V] of what the decoder is to write: the labels `places` [B, T], of which those that do not count are
        read as token 0."""
        student = cast(Any, self.student)
        shifted = student.prepare_decoder_input_ids_from_labels(labels=places.clamp_min(0))
        return student(input_ids=ids, decoder_input_ids=shifted, use_cache=False).logits.flatten(0, 1)

    def _dense(
        self, ids: Tensor, positions: Tensor, labels: Tensor, teacher: Distiller | None, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        learned = None
        if teacher is not None:
            with torch.no_grad():
                learned = teacher.logits(ids, positions, labels)
        return dense_loss(self.logits(ids, positions, labels), learned, labels.flatten(), objective)

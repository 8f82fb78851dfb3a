"""The learner of encoder-decoders: takes the encoder's input and the decoder's labels, returns a loss.

Legend: B rows, S tokens of the input, T labels, V vocabulary.
"""

from typing import Any, cast

from torch import Tensor

from upfit.uptrain.model.distiller import Batch, Distiller


class Seq2Seq(Distiller):
    """A student and, unseen by its parameters, a teacher: ids [B, S], nothing, labels [B, T] → (loss, CE, KL), summed.

    The decoder reads the labels shifted by one, as the class itself shifts them. Its logits are made whole: T is a quarter
    of S.
    """

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B · T, V] of what the decoder is to write; labels that do not count are read as token 0."""
        student = cast(Any, self.student)
        shifted = student.prepare_decoder_input_ids_from_labels(labels=batch.labels.clamp_min(0))
        return student(input_ids=batch.ids, decoder_input_ids=shifted, use_cache=False).logits.flatten(0, 1)

    def labels(self, batch: Batch) -> Tensor:
        return batch.labels.flatten()

"""The loss of each example: what the decoder's tokens cost, given the encoder, or the image before them. Legend: B examples, T
decoder positions."""

from typing import Any

import numpy as np
import torch

from upfit.bounded import reason
from upfit.errors import UpfitError
from upfit.evaluate.loss import PARTS, ROWS_AT_ONCE, Losses, by_position
from upfit.examples.model_inputs import IGNORE, Example, ModelInputs, alone, encoder_length, together
from upfit.output import Meter


def in_order(examples: list[Example], batch: int) -> list[list[int]]:
    """The numbers of the examples in batches, those of similar lengths together."""
    order = sorted(range(len(examples)), key=lambda index: (encoder_length(examples[index]), len(examples[index].labels)))
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def example_losses(
    model: Any, examples: list[Example], tokenizer: Any, pad: int, batch: int, name: str, meter: Meter
) -> Losses:
    """Run `model` (in eval mode) over the examples, `batch` at a time, each token given the true ones before it.

    Raises UpfitError when the class does not take them, a loss is not finite or the memory does not suffice.
    """
    nats, tokens = np.zeros((len(examples), PARTS)), np.zeros((len(examples), PARTS), dtype=np.int64)
    by_itself = not model.config.is_encoder_decoder
    for indices in in_order(examples, 1 if by_itself else batch):
        chosen = [examples[index] for index in indices]
        inputs = alone(chosen[0]) if by_itself else together(chosen, pad)
        try:
            losses = token_losses(model, inputs)
        except torch.OutOfMemoryError as error:
            raise UpfitError(f"{name} does not fit in memory with --batch {batch}; give a smaller one") from error
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:  # each class has its own
            raise UpfitError(f"{name} does not run on {', '.join(inputs.keywords)} ({reason(error)})") from error
        for index, row in zip(indices, losses, strict=True):
            sums, counts = by_position(row[None])
            nats[index], tokens[index] = sums[0], counts
        meter.advance(len(indices))
    bad = int((~np.isfinite(nats.sum(1))).sum())
    if bad:
        raise UpfitError(f"{name} gives a loss that is not finite in {bad} of {len(examples)} examples; try --dtype float32")
    return Losses(nats, tokens, np.array([written_bytes(example, tokenizer) for example in examples]))


def on_device(model: Any, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """The keywords where the model is, sound in its type."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.keywords.items()
    }


@torch.inference_mode()
def token_losses(model: Any, inputs: ModelInputs) -> list[np.ndarray]:
    """Of each example the nats of its tokens that count, [tokens] float64; computed in float32, some rows at a time."""
    assert inputs.labels is not None
    logits_BTV = model(**on_device(model, inputs), use_cache=False).logits
    labels_BT = inputs.labels.to(logits_BTV.device)
    rows, targets = logits_BTV.flatten(0, 1), labels_BT.flatten()
    parts = [
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none", ignore_index=IGNORE)
        for part, wanted in zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    ]
    losses_BT = torch.cat(parts).reshape(labels_BT.shape).cpu().double()
    return [row[labels != IGNORE].numpy() for row, labels in zip(losses_BT, inputs.labels, strict=True)]


def written_bytes(example: Example, tokenizer: Any) -> int:
    """The length of what is written, as text in UTF-8; 1 at least."""
    ids = example.labels[example.labels != IGNORE].tolist()
    return max(1, len(tokenizer.decode(ids, skip_special_tokens=True).strip().encode("utf-8")))

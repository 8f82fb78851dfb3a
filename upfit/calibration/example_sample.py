"""What a model is calibrated on that takes more than text: examples of what it reads and writes, some of them held back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.calibration.sample import HELD_SHARE
from upfit.examples.model_inputs import IGNORE, Example, Examples, ModelInputs, batches, encoder_length, grouped

DECODER, LABELS = "decoder_ids", "labels"
BATCH_TOKENS = 16_384  # positions of encoder and decoder together; attention maps of one batch fit into memory


@dataclass(frozen=True)
class ExampleSample:
    """`fitted` and `held` examples of one model; `kind` and `text` are what `Examples` tells of them, `config` is the model's,
    `tokenizer` what made ids of the text (`upfit.text.tokenizer.identity`)."""

    kind: str
    fitted: list[Example]
    held: list[Example]
    text: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]

    @property
    def tokens(self) -> int:
        """That the decoder was to give; with images all that it read, for these are most of it."""
        if self.kind == "images":
            return sum(len(example.decoder_ids) for example in (*self.fitted, *self.held))
        return sum(int((example.labels != IGNORE).sum()) for example in (*self.fitted, *self.held))

    def record(self) -> dict[str, Any]:
        """What was shown, for recipe.json."""
        return {"tokens": self.tokens, "examples": len(self.fitted) + len(self.held), **self.text}

    def identity(self) -> dict[str, Any]:
        """All of it that the bytes of a fit depend on."""
        return {"examples": self.text["sha256"], "fitted": len(self.fitted), "held": len(self.held)}

    def batches(self) -> tuple[list[ModelInputs], list[bool]]:
        """Examples of one purpose together; and which batches are held back."""
        held = batches(self.held, self.config, BATCH_TOKENS)
        fitted = batches(self.fitted, self.config, BATCH_TOKENS)
        return [*held, *fitted], [True] * len(held) + [False] * len(fitted)

    def sizes(self) -> list[tuple[int, int, int]]:
        """(examples, tokens of the decoder, positions of the encoder) of each batch, padded."""
        sizes = []
        for part in (self.held, self.fitted):
            for batch in ([part[index] for index in indices] for indices in grouped(part, BATCH_TOKENS)):
                sizes.append((len(batch), max(len(e.decoder_ids) for e in batch), max(map(encoder_length, batch))))
        return sizes


PREFIX = "examples."  # of the names under which a file keeps them


def stored_examples(sample: ExampleSample) -> dict[str, Tensor]:
    """The examples as named tensors, in the types of their inputs; those that are held back first."""
    tensors: dict[str, Tensor] = {}
    for number, example in enumerate((*sample.held, *sample.fitted)):
        parts = {**example.keywords, DECODER: example.decoder_ids, LABELS: example.labels}
        tensors |= {f"{PREFIX}{number}.{name}": tensor for name, tensor in parts.items()}
    return tensors


def examples_stored(
    tensors: Mapping[str, Tensor], held: int, kind: str, text: dict[str, Any], config: dict[str, Any], tokenizer: dict[str, Any]
) -> ExampleSample:
    """The inverse of `stored_examples`, without the examples' text. Raises ValueError for tensors that are no examples."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.removeprefix(PREFIX).partition(".")
        parts.setdefault(int(number), {})[part] = tensor
    if sorted(parts) != list(range(len(parts))) or not 0 < held < len(parts):
        raise ValueError("its examples are not all there")
    if not isinstance(text.get("sha256"), str):
        raise ValueError("it does not tell which examples they are")
    examples = [_example(dict(parts[number])) for number in range(len(parts))]
    return ExampleSample(kind, examples[held:], examples[:held], text, config, tokenizer)


def _example(parts: dict[str, Tensor]) -> Example:
    ids, labels = (parts.pop(name, torch.empty(0)) for name in (DECODER, LABELS))
    if ids.ndim != 1 or ids.dtype != torch.int64 or ids.shape != labels.shape or not len(ids) or not parts:
        raise ValueError("an example has no ids")
    return Example(parts, ids, labels, "", "")


def hold_back(examples: Examples, config: dict[str, Any], tokenizer: dict[str, Any]) -> ExampleSample:
    """One example of HELD_SHARE is held back: whole documents, the smallest first, as far as they fit, then a part of the next
    one."""
    of_documents: dict[str, list[Example]] = {}
    for example in examples.examples:
        of_documents.setdefault(example.document, []).append(example)
    wanted = max(1, len(examples.examples) // HELD_SHARE)
    by_document = [example for document in sorted(of_documents.values(), key=len) for example in document]
    held = by_document[:wanted]
    chosen = set(map(id, held))
    fitted = [example for example in examples.examples if id(example) not in chosen]
    return ExampleSample(examples.kind, fitted, held, examples.record, config, tokenizer)

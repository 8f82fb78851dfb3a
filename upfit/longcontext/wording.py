"""The words around a context: the beginning of the prompt, the question, and the beginning of the answer."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from upfit.errors import UpfitError
from upfit.longcontext.items import Item
from upfit.longcontext.segments import JOIN
from upfit.text.tokenizer import begin_token, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["plain", "chat"]
BEFORE = "Read the text. A question about it follows.\n\n### Text\n\n"
CONTEXT, QUESTION = "<|upfit context|>", "<|upfit question|>"  # stand for them
AFTER = f"\n### Question\n\n{QUESTION}\n\n### Answer\n\n"
EXAMPLE = "{question}\n\n### Answer\n\n{answer}\n\n### Question\n\n"  # in front of a question, to show how one is answered
CHAT_AFTER = f"\n### Question\n\n{QUESTION}"
ASKED, ANSWERED = "\0asked", "\0answered"  # keys of an item's tokens; no text holds a zero byte


class Wording:
    """Prompts in plain words, or by the tokenizer's chat template. Raises UpfitError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", form: Format) -> None:
        self.tokenizer = tokenizer
        begin = begin_token(tokenizer)
        if form == "chat":
            before, self.after = _chat_parts(tokenizer)
            begin = None  # the template puts it
        else:
            before, self.after = BEFORE, AFTER
        self.text_before = before
        self.before = np.array([*([] if begin is None else [begin]), *self._ids([before])[0]], dtype=np.uint32)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return encode_texts(self.tokenizer, texts, return_attention_mask=False)["input_ids"]

    def tokens(self, item: Item) -> dict[str, np.ndarray]:
        """Tokens (uint32) of the item's texts, each with the line's end, of the question as it is put (ASKED) and of the answer
        with the end token (ANSWERED)."""
        texts = [part for part in (*item.pieces, *item.decoys) if isinstance(part, str)]
        asked = self.after.replace(QUESTION, item.question)
        *own, question, answer = self._ids([*(text + JOIN for text in texts), asked, item.answer])
        keys = [*texts, ASKED, ANSWERED]
        ended = [*answer, self.tokenizer.eos_token_id]
        return {key: np.array(ids, dtype=np.uint32) for key, ids in zip(keys, [*own, question, ended], strict=True)}

    def prompt(self, context: str, question: str) -> str:
        """The prompt as text, without a begin token."""
        return self.text_before + context + JOIN + self.after.replace(QUESTION, question)


def _chat_parts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise UpfitError("the chat format needs a tokenizer with a chat template; this one has none, use plain")
    message = BEFORE + CONTEXT + CHAT_AFTER
    text = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)
    before, _, after = str(text).partition(CONTEXT)
    if QUESTION not in after:
        raise UpfitError("the tokenizer's chat template drops what the user says; use the plain format")
    return before, after

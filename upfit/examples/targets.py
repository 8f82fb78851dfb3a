"""What the decoder reads and what it is to write, from the token ids of a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upfit.architecture.meta_model import read_as_class
from upfit.bounded import RECORD_BYTES, read_json
from upfit.errors import UpfitError
from upfit.examples.kinds import of_family
from upfit.examples.model_inputs import IGNORE, Example
from upfit.text.tokenizer import encode_texts

LONGEST = 1024  # tokens that are read or written, where the model sets no limit, or a higher one
WHISPER = ("<|startoftranscript|>", "<|notimestamps|>")
TRANSCRIBE = "<|transcribe|>"
MULTILINGUAL_VOCABULARY = 51865  # of Whisper, at least; its models for English alone have a token less


@dataclass(frozen=True)
class Decoder:
    """What is to be known of a model to make its decoder's ids: the token it `start`s with (None: the one that ends a text),
    the `end` of a text, and how many tokens it reads and writes at most."""

    start: int | None
    end: int
    reads: int
    writes: int
    vocabulary: int | None
    multilingual: bool


def decoder_of(folder: Path, config: dict[str, Any], tokenizer: Any) -> Decoder:
    parsed = read_as_class(of_family(config))
    path = folder / "generation_config.json"
    generation = read_json(path, RECORD_BYTES) if path.is_file() else {}
    generation = generation if isinstance(generation, dict) else {}
    text = parsed.get_text_config(decoder=True)
    size = getattr(text, "vocab_size", None)
    return Decoder(
        start=start_of(parsed, generation, tokenizer),
        end=int(tokenizer.eos_token_id),
        reads=limit(
            parsed, "max_encoder_position_embeddings", "max_source_positions", "max_position_embeddings", "n_positions"
        ),
        writes=most_written(parsed),
        vocabulary=size if isinstance(size, int) else None,
        multilingual=bool(generation.get("is_multilingual", isinstance(size, int) and size >= MULTILINGUAL_VOCABULARY)),
    )


def start_of(parsed: Any, generation: dict[str, Any], tokenizer: Any) -> int | None:
    """The token that the decoder begins with, as the config, the generation's or a decoder's config inside tells it, else
    padding, which T5 begins with; None where only the text's last token tells it (mBART's language)."""
    inner = getattr(getattr(parsed, "decoder", None), "bos_token_id", None)
    known = (getattr(parsed, "decoder_start_token_id", None), generation.get("decoder_start_token_id"), inner)
    start = next((value for value in known if isinstance(value, int)), None)
    if start is None and ends_with_language(tokenizer):
        return None
    return start if start is not None else tokenizer.pad_token_id or 0


def ends_with_language(tokenizer: Any) -> bool:
    ids = encode_texts(tokenizer, ["a"], add_special_tokens=True)["input_ids"][0]
    return tokenizer.eos_token_id in ids and ids[-1] != tokenizer.eos_token_id


def most_written(parsed: Any) -> int:
    """How many tokens the decoder takes, LONGEST at most."""
    text = parsed.get_text_config(decoder=True)
    return limit(text, "max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings", "n_positions")


def limit(parsed: Any, *names: str) -> int:
    values = (getattr(parsed, name, None) for name in names)
    return min(next((value for value in values if isinstance(value, int) and value > 0), LONGEST), LONGEST)


def target_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that are to be written, with what the tokenizer itself puts around such a text."""

    def as_target(texts: list[str], **options: Any) -> Any:
        return tokenizer(text_target=texts, **options)

    return encode_texts(as_target, texts, add_special_tokens=True)["input_ids"]


def shifted(ids: list[int], decoder: Decoder) -> tuple[list[int], list[int]]:
    """(what the decoder reads, its labels) of a text of these ids: it begins with its start and reads each token after writing
    it. A start that the tokenizer put before the text already is not written; the end always is."""
    if decoder.start is not None and ids[:1] == [decoder.start] and len(ids) > 1:
        ids = ids[1:]
    if decoder.end not in ids:
        ids = [*ids, decoder.end]
    ids = ids[: decoder.writes]
    return [ids[-1] if decoder.start is None else decoder.start, *ids[:-1]], ids


def transcribed(
    text: str, ids: list[int], decoder: Decoder, tokenizer: Any, language: str | None
) -> tuple[list[int], list[int]]:
    """As `shifted`, of a transcript: Whisper's begins with tokens that say what is to be written, which count as read.

    `ids` are those of the text by itself. Raises UpfitError for a language that the tokenizer has no token of.
    """
    prefix = whisper_prefix(decoder, tokenizer, language)
    if not prefix:
        return shifted(target_ids(tokenizer, [text])[0], decoder)
    ids = ids[: decoder.writes - len(prefix)]
    return prefix + ids, [IGNORE] * (len(prefix) - 1) + [*ids, decoder.end]


def is_whispers(tokenizer: Any) -> bool:
    return set(WHISPER) <= tokenizer.get_vocab().keys()


def whisper_prefix(decoder: Decoder, tokenizer: Any, language: str | None) -> list[int]:
    """The start of a transcript, its language and task where the model knows several, and that no times are wanted; [] for
    a tokenizer that is not Whisper's."""
    known = tokenizer.get_vocab()
    if not is_whispers(tokenizer):
        return []
    middle = [f"<|{language or 'en'}|>", TRANSCRIBE] if decoder.multilingual else []
    for token in middle:
        if token not in known:
            raise UpfitError(f"the tokenizer has no token {token}; give the language of a transcript by its code, such as en")
    return [known[token] for token in (WHISPER[0], *middle, WHISPER[1])]


def make(keywords: dict[str, torch.Tensor], decoder_ids: list[int], labels: list[int], text: str, document: str) -> Example:
    return Example(keywords, torch.tensor(decoder_ids), torch.tensor(labels), text, document)

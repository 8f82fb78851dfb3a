"""Pairs of texts: what the encoder reads and what the decoder is to write, from the fields of records."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upfit.errors import UpfitError
from upfit.examples.choose import draw
from upfit.examples.model_inputs import Example
from upfit.examples.records import Record, read_records
from upfit.examples.targets import Decoder, make, shifted, target_ids
from upfit.output import Output
from upfit.text.files import FIELD
from upfit.text.tokenizer import encode_texts

NAMES = (
    ("source", "target"),
    ("input", "output"),
    ("inputs", "targets"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
)
TRANSLATION = "translation"  # the field in which datasets of translations have a text by language
TOGETHER = 64  # texts tokenised in one call

Pair = tuple[str, str]


@dataclass(frozen=True)
class Fields:
    """The names of the two fields, in the record itself or `inside` a field of it."""

    source: str
    target: str
    inside: str = ""

    def pair(self, record: Record) -> Pair | None:
        """The two texts; None where one of them is null or empty. Raises UpfitError where there is no such field or no text."""
        fields = record.fields.get(self.inside) if self.inside else record.fields
        inner = Record(record.where, fields if isinstance(fields, dict) else {})
        texts = []
        for name in (self.source, self.target):
            text = inner.text(name)
            if text is None and inner.fields.get(name, "") is not None:
                raise UpfitError(f"{record.where} has no text in {name!r} (found: {inner.shown()}); name both with --field A,B")
            texts.append((text or "").strip())
        return (texts[0], texts[1]) if all(texts) else None

    @property
    def said(self) -> str:
        return f"{self.source},{self.target}"


def fields_of(record: Record, field: str, flag: str) -> Fields | None:
    """The pair of fields that this record has, by `field` ("A,B") or by names in use; None where it has a text alone.

    Raises UpfitError where several pairs would do, or none.
    """
    if "," in field:
        source, target = (name.strip() for name in field.split(",", 1))
        translations = record.fields.get(TRANSLATION)
        inside = TRANSLATION if isinstance(translations, dict) and not {source, target} & record.fields.keys() else ""
        return Fields(source, target, inside)
    pairs = [Fields(*names) for names in NAMES if set(names) <= record.fields.keys()]
    translations = record.fields.get(TRANSLATION)
    if isinstance(translations, dict) and len(translations) == 2:
        source, target = map(str, translations)
        pairs.append(Fields(source, target, TRANSLATION))
    if len(pairs) == 1:
        return pairs[0]
    if pairs or isinstance(translations, dict):
        choices = " or ".join(pair.said for pair in pairs) or ", ".join(map(str, translations or {}))
        raise UpfitError(f"{flag}: {record.where} has several pairs of texts ({choices}); name one with --field A,B")
    if record.text(field) is not None:
        return None
    raise UpfitError(
        f"{flag}: {record.where} has no pair of texts that is known by its names (found: {record.shown()}); name the field "
        "that is read and the one that is to be written with --field A,B"
    )


def first_fields(files: list[Path], field: str, flag: str) -> Fields | None:
    """`fields_of` the first record there is. Raises UpfitError where there is none."""
    for file in files:
        for record in read_records(file):
            return fields_of(record, field, flag)
    raise UpfitError(f"{flag} {files[0]} holds nothing; give records with two texts each")


def read_pairs(files: list[Path], fields: Fields, count: int, flag: str, output: Output) -> list[tuple[Pair, str]]:
    """`count` pairs, spread over all files, each with where it stands. What is left out is noted on `output`."""
    empty = 0

    def whole() -> Iterator[tuple[Pair, str]]:
        nonlocal empty
        for file in files:
            for record in read_records(file):
                pair = fields.pair(record)
                if pair is None:
                    empty += 1
                else:
                    yield pair, record.where

    pairs, _ = draw(whole(), count)
    if empty:
        output.note(
            f"left out: {empty} pair{'s' * (empty > 1)} of {flag} without a text in {fields.source!r} or {fields.target!r}"
        )
    if not pairs:
        raise UpfitError(f"{flag} {files[0]} holds no pair of texts in {fields.said}; give some that are not empty")
    if fields.inside:
        output.note(
            f"{flag}: {fields.source} is read, {fields.target} is written; --field {fields.target},{fields.source} turns it"
        )
    return pairs


def set_languages(tokenizer: Any, source: str, target: str, output: Output) -> None:
    """Tell a tokenizer of many languages which ones a pair's texts are in, where the fields' names are its codes; else both
    are taken to be in the one that it reads by default."""
    if not hasattr(tokenizer, "tgt_lang"):
        return
    known = known_languages(tokenizer)
    if {source, target} <= known:
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
    elif tokenizer.tgt_lang is None:
        tokenizer.tgt_lang = tokenizer.src_lang
        output.note(
            f"both texts are taken to be {tokenizer.src_lang}; name fields by the tokenizer's codes for other languages"
        )


def known_languages(tokenizer: Any) -> set[str]:
    """The codes that the tokenizer may know languages by: each family keeps them elsewhere."""
    tables = [getattr(tokenizer, name, None) for name in ("lang_code_to_id", "lang_code_to_token")]
    return {*tokenizer.all_special_tokens, *(code for table in tables if isinstance(table, dict) for code in table)}


def pair_examples(
    pairs: list[tuple[Pair, str]], tokenizer: Any, decoder: Decoder, longer: Callable[[int], None] = lambda count: None
) -> list[Example]:
    """Examples of the pairs, whatever the model cannot read or write of their ends left off. `longer` is told how many are."""
    examples, cut = [], 0
    for at in range(0, len(pairs), TOGETHER):
        part = pairs[at : at + TOGETHER]
        sources = encode_texts(tokenizer, [source for (source, _), _ in part], add_special_tokens=True)["input_ids"]
        targets = target_ids(tokenizer, [target for (_, target), _ in part])
        for ((_, text), where), source, target in zip(part, sources, targets, strict=True):
            cut += len(source) > decoder.reads or len(target) > decoder.writes
            examples.append(
                make({"input_ids": torch.tensor(fitted(source, decoder.reads))}, *shifted(target, decoder), text, where)
            )
    longer(cut)
    return examples


def fitted(ids: list[int], most: int) -> list[int]:
    """At most so many ids; one that is too long keeps its last one, which most encoders expect."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def is_pair_field(field: str) -> bool:
    return field != FIELD and "," in field

"""Reads what the user gives, by what the model takes, into examples."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upfit.errors import UpfitError
from upfit.examples.from_text import BYTES_A_TOKEN, LENGTH, examples_of_text
from upfit.examples.kinds import kind_of
from upfit.examples.model_inputs import Example, Examples
from upfit.examples.pairs import Fields, first_fields, is_pair_field, pair_examples, read_pairs, set_languages
from upfit.examples.records import record_files
from upfit.examples.sound import read_recordings, sound_examples
from upfit.examples.targets import Decoder, decoder_of
from upfit.model_files import quiet_transformers
from upfit.output import Output
from upfit.text import Document, file_documents, library_documents
from upfit.text.files import FIELD
from upfit.text.tokenizer import load_tokenizer

COUNT = 512  # examples, unless another number is asked for
OWN_TEXT = "the standard library of Python"


def read_examples(
    folder: Path,
    config: dict[str, Any],
    paths: list[str] | None,
    flag: str,
    field: str,
    count: int | None,
    output: Output,
    own_text: Callable[[], list[Document]] = library_documents,
) -> Examples:
    """At most `count` examples (COUNT without) for the encoder-decoder in `folder`, spread over the files and folders `paths`.

    `flag` is what the paths were given by; `field` names the text of records, or two of them ("A,B"): the one that is read and
    the one that is to be written. Without paths, models of text get `own_text`, of the running Python. What is left out, and
    what stands in for something better, is noted on `output`.

    Raises UpfitError for what cannot be read, and for a model that hears where there is no sound.
    """
    kind, count = kind_of(config), count or COUNT
    if kind == "text":
        raise ValueError("a decoder is shown windows of text")
    if kind == "sound":
        recordings = read_recordings(paths, flag, field, count, output)
    with quiet_transformers():
        tokenizer = load_tokenizer(str(folder))
    decoder = decoder_of(folder, config, tokenizer)
    record: dict[str, Any] = {"files": paths or OWN_TEXT} | ({} if field == FIELD else {"field": field})
    if kind == "sound":
        examples = sound_examples(recordings, folder, config, tokenizer, decoder, output)
        return _whole("sound", examples, decoder, record)
    files = record_files(paths, flag) if paths else []
    fields = first_fields(files, field, flag) if files else None
    if fields is None and is_pair_field(field):
        raise UpfitError(f"--field {field} is for files of records, and {flag} has none; leave it out")
    if fields is not None:
        examples = _pairs(files, fields, tokenizer, decoder, count, flag, output)
        return _whole("text pairs", examples, decoder, record | {"fields": fields.said})
    budget = count * LENGTH * BYTES_A_TOKEN * 2
    documents = file_documents(paths, budget, flag, output, field) if paths else own_text()
    examples, way = examples_of_text(documents, tokenizer, decoder, count, flag, output)
    return _whole("text pairs" if way == "copying" else "spans", examples, decoder, record | {"made": way})


def _pairs(
    files: list[Path], fields: Fields, tokenizer: Any, decoder: Decoder, count: int, flag: str, output: Output
) -> list[Example]:
    set_languages(tokenizer, fields.source, fields.target, output)
    pairs = read_pairs(files, fields, count, flag, output)

    def longer(cut: int) -> None:
        if cut:
            most = f"{decoder.reads} tokens to read, or {decoder.writes} to write"
            output.note(f"cut short: {cut} of {len(pairs)} pairs have more than {most}")

    return pair_examples(pairs, tokenizer, decoder, longer)


def _whole(kind: str, examples: list[Example], decoder: Decoder, record: dict[str, Any]) -> Examples:
    """Raises UpfitError where the tokenizer knows more ids than the model."""
    highest = max(int(example.decoder_ids.max()) for example in examples)
    highest = max([highest, *(int(e.keywords["input_ids"].max()) for e in examples if "input_ids" in e.keywords)])
    if decoder.vocabulary is not None and highest >= decoder.vocabulary:
        raise UpfitError(
            f"the tokenizer gives the id {highest}, and the model knows {decoder.vocabulary}: it belongs to another model; "
            "fetch the model's own"
        )
    return Examples(kind, examples, {"kind": kind, **record, "count": len(examples), "sha256": digest(examples)})


def digest(examples: list[Example]) -> str:
    """SHA-256 of all that the model is shown: two runs had the same examples."""
    hasher = hashlib.sha256()
    for example in examples:
        tensors = [tensor for _, tensor in sorted(example.keywords.items())]
        for tensor in (*tensors, example.decoder_ids, example.labels):
            hasher.update(repr(tuple(tensor.shape)).encode())
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()

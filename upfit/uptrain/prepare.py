"""Text in, token shards out: the verb `prepare`. Knows nothing of models or training."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit import history
from upfit.convert.folders import check_output, staged
from upfit.corpus import documents, files_of, local_inputs
from upfit.errors import UpfitError
from upfit.options import parse_count
from upfit.output import Meter, Output, human_count
from upfit.tokenizer import begin_token, identity, load_tokenizer
from upfit.uptrain.shards import ShardWriter, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 2_000_000


def prepare(
    inputs: list[str],
    out: Path,
    tokenizer: str,
    field: str,
    output: Output,
    overwrite: bool = False,
    tokens: str | None = None,
) -> dict[str, Any]:
    """Tokenise `inputs` into the folder `out` with the tokenizer of the model `tokenizer`; the manifest written there.

    `inputs` are files, folders, or hub data sets (`org/name`, or `org/name:config`); `field` names the text in JSON lines,
    parquet and hub data sets. Every document ends with the tokenizer's end token, and begins with its begin token where the
    tokenizer puts one. With `tokens` ("100M"), stops after the document that reaches them.

    Raises UpfitError for an input that is missing, empty or unreadable, or a tokenizer without an end token.
    """
    limit = parse_count(tokens, "--tokens") if tokens is not None else None
    local = local_inputs(inputs)
    size = sum(path.stat().st_size for source in local for path in files_of(source))
    for source in local or [Path(os.devnull)]:  # a hub data set lies nowhere that `out` could overlap
        check_output(out, source, size, overwrite)
    encoder = load_tokenizer(tokenizer)
    about = {"tokenizer": {"name": tokenizer, **identity(encoder)}, "inputs": inputs, "field": field}
    with staged(out) as folder:
        writer = ShardWriter(folder, token_dtype(len(encoder)))
        with output.progress("prepare", limit or size) as meter:
            write_documents(writer, encoder, documents(inputs, field, output), limit, meter)
        if writer.tokens == 0:
            raise UpfitError(f"no text in {', '.join(inputs)}; give files with text")
        manifest = writer.finish(about)
        origin = {"name": ", ".join(inputs), "revision": None, "path": None}
        options = {"tokenizer": tokenizer, "field": field, "tokens": tokens}
        counts = {"tokens": writer.tokens, "documents": writer.documents}
        history.write(folder, [history.step("prepare", origin, options, counts)])
    return manifest


def write_documents(
    writer: ShardWriter, tokenizer: "PreTrainedTokenizerBase", texts: Iterator[tuple[str, int]], limit: int | None, meter: Meter
) -> None:
    """Tokenise in batches of about two million characters; `texts` yields each document and the bytes of input it took."""
    begin = begin_token(tokenizer)
    before = [] if begin is None else [begin]
    for batch, nbytes in batches(texts):
        known = writer.tokens
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            if limit is not None and writer.tokens >= limit:
                break
            writer.add([*before, *ids, tokenizer.eos_token_id])
        meter.advance(writer.tokens - known if limit else nbytes, f"{human_count(writer.tokens)} tokens")
        if limit is not None and writer.tokens >= limit:
            return


def batches(texts: Iterator[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Non-empty documents in lists of at least BATCH_CHARACTERS characters, and the bytes of input each list took."""
    batch: list[str] = []
    characters = nbytes = 0
    for text, size in texts:
        nbytes += size
        if not text.strip():
            continue
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch, nbytes
            batch, characters, nbytes = [], 0, 0
    if batch:
        yield batch, nbytes

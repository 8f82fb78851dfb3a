"""`upfit prepare`: text in, token shards out. Knows nothing of models or training.

OUT's work folder holds the shards until they are whole; then they become OUT. The bytes are the same for every number of
workers and however often the work was interrupted: documents are written in the order in which they are read.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from upfit import provenance
from upfit.checkpoint.output_folder import check_output, local_folder
from upfit.checkpoint.work_folder import work_folder
from upfit.durable import write_whole
from upfit.errors import UpfitError
from upfit.options import parse_count
from upfit.output import Meter, Output, human_count
from upfit.text import content_stamp
from upfit.text.corpus import documents
from upfit.text.files import files_of, local_inputs
from upfit.text.tokenizer import identity, load_tokenizer
from upfit.uptrain.data.result import Preparation
from upfit.uptrain.data.shard_writer import ShardWriter, token_dtype
from upfit.uptrain.data.tokenise import batches, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE, SHARDS = "state.json", "shards"  # in the work folder
SAVE_SECONDS = 10.0  # of work are lost at most when the process is killed
BYTES_A_WORKER = 2**22  # of text, before one more worker is worth its start


def prepare(
    inputs: list[str],
    out: Path,
    tokenizer: str,
    field: str,
    output: Output,
    overwrite: bool = False,
    tokens: str | None = None,
    workers: int | None = None,
) -> Preparation:
    """Tokenise `inputs` into the folder `out` with the tokenizer of the model `tokenizer`; the manifest written there.

    `inputs` are files, folders, or hub data sets (`org/name`, or `org/name:config`); `field` names the text in JSON lines,
    parquet and hub data sets. Every document ends with the tokenizer's end token, and begins with its begin token where the
    tokenizer puts one. With `tokens` ("100M"), stops after the document that reaches them. `workers` tokenise at a time (None:
    as many as there are cores and text for).

    Raises UpfitError for an input that is missing, empty or unreadable, a tokenizer without an end token, or an `out` that is
    taken. Work that has been saved stays then, too, for the same command to go on with.
    """
    limit = parse_count(tokens, "--tokens") if tokens is not None else None
    if workers is not None and workers < 1:
        raise UpfitError(f"--workers got {workers}; it takes 1 or more")
    local = local_inputs(inputs, field)
    files = [path for source in local for path in files_of(source)]
    size = sum(path.stat().st_size for path in files)
    check_output(out, [*local, *local_folder(tokenizer)], size, overwrite)
    encoder = load_tokenizer(tokenizer)
    about = {"tokenizer": {"name": tokenizer, **identity(encoder)}, "inputs": inputs, "field": field}
    settings = {**about, "tokens": limit, "text": content_stamp(files)}
    with work_folder(out, "prepare", overwrite) as work:
        work.claim(settings, overwrite)
        work.keep = (work.path / STATE).exists()
        folder = work.folder(SHARDS, clear=not work.keep)
        try:
            writer = _written(folder, inputs, field, encoder, limit, size, workers or _enough_workers(local, size), output)
        finally:
            work.keep = (work.path / STATE).exists()
        if writer.tokens == 0:
            raise UpfitError(f"no text in {', '.join(inputs)}; give files with text")
        manifest = writer.finish(about)
        origin = {"name": ", ".join(inputs), "revision": None, "path": None}
        options = {"tokenizer": tokenizer, "field": field, "tokens": tokens}
        counts = {"tokens": writer.tokens, "documents": writer.documents}
        provenance.write(writer.folder, [provenance.step("prepare", origin, options, counts)])
        work.publish(writer.folder, overwrite)
    return Preparation.read(manifest, out=str(out))


def _enough_workers(local: list[Path], size: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 1 + size // BYTES_A_WORKER) if local else cores


def _written(
    folder: Path,
    inputs: list[str],
    field: str,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    size: int,
    workers: int,
    output: Output,
) -> ShardWriter:
    """The writer of all shards; goes on from the work that was saved. Tells how fast it was."""
    writer, read = _begun(folder, token_dtype(len(tokenizer)))
    work = folder.parent
    texts = documents(inputs, field, output)
    with output.progress("prepare", limit or size) as meter:
        if read:
            output.note(f"going on from {human_count(writer.tokens)} tokens of {read} documents in {work}")
        passed = sum(nbytes for _, nbytes in islice(texts, read))
        meter.start_at(writer.tokens if limit else passed)
        known, start = writer.tokens, time.monotonic()
        _write(work, writer, texts, read, tokenizer, limit, workers, meter)
    written, seconds = writer.tokens - known, max(time.monotonic() - start, 1e-9)
    output.note(f"tokenised {human_count(written)} tokens in {seconds:.1f} s, {human_count(written / seconds)} tokens/s")
    return writer


def _begun(folder: Path, dtype: str) -> tuple[ShardWriter, int]:
    """A writer with what was saved, and how many documents of the input were read for it."""
    writer, saved = ShardWriter(folder, dtype), folder.parent / STATE
    if not saved.exists():
        return writer, 0
    state = json.loads(saved.read_text(encoding="utf-8"))
    writer.go_on(state["writer"])
    return writer, state["read"]


def _write(
    work: Path,
    writer: ShardWriter,
    texts: Iterator[tuple[str, int]],
    read: int,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    workers: int,
    meter: Meter,
) -> None:
    """Write the tokens of `texts` up to `limit`, and every few seconds down how far it is: `read` documents so far."""
    saved = start = time.monotonic()
    known = writer.tokens
    with closing(tokenised(batches(texts), tokenizer, writer.dtype, workers)) as token_batches:
        for batch, ids, lengths in token_batches:
            before = writer.tokens
            if limit is not None:
                lengths = lengths[before + lengths.cumsum() - lengths < limit]
                ids = ids[: lengths.sum()]
            writer.extend(ids, lengths)
            read += batch.read
            rate = (writer.tokens - known) / max(time.monotonic() - start, 1e-9)
            note = f"{human_count(writer.tokens)} tokens, {human_count(rate)} tokens/s"
            meter.advance(writer.tokens - before if limit else batch.nbytes, note)
            if limit is not None and writer.tokens >= limit:
                return
            if time.monotonic() - saved >= SAVE_SECONDS:
                write_whole(work / STATE, json.dumps({"read": read, "writer": writer.state()}))
                saved = time.monotonic()

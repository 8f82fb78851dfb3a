"""Text in, token shards out: the verb `prepare`. Knows nothing of models or training.

Text comes from files (a document each), folders of them, JSON lines, parquet, or a data set of the hub. The packages that
read parquet and the hub are imported only here, and only when such an input is given.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit import history
from upfit.convert.folders import check_output, staged
from upfit.errors import UpfitError
from upfit.options import parse_count
from upfit.output import Meter, Output, human_count
from upfit.uptrain.shards import ShardWriter, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
HUB_DATA = re.compile(r"\w[\w.\-]*/\w[\w.\-]*(:[\w.\-]+)?")
BATCH_CHARACTERS = 2_000_000
PROBE = "def f(x):\n    return  x + 1  # Größe, 東京, 🙂\n<|endoftext|></s>"


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
    local = [Path(name) for name in inputs if Path(name).exists()]
    for name in inputs:
        if Path(name) not in local and not HUB_DATA.fullmatch(name):
            raise UpfitError(f"no file or folder at {name}; give a path, or a hub data set such as org/name")
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


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id (`id@revision`). Raises UpfitError when there is none, or no end token."""
    from transformers import AutoTokenizer

    hub_id, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_id, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UpfitError(f"no tokenizer at {name}: {reason}; give a model folder or a hub id") from error
    if tokenizer.eos_token_id is None:
        raise UpfitError(f"the tokenizer of {name} has no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


def identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What must agree between data and model: a hash of the vocabulary and of how a probe text is cut, and special tokens."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids], ensure_ascii=True)
    return {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": begin_token(tokenizer),
    }


def begin_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that this tokenizer puts before a text by itself, if any: its model has always seen it there."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


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


def documents(inputs: list[str], field: str, output: Output) -> Iterator[tuple[str, int]]:
    """Every document of every input in order, with the number of input bytes it stands for (0 for the hub)."""
    for name in inputs:
        path = Path(name)
        if path.is_file():
            try:
                yield from file_documents(path, field)
            except UnicodeDecodeError as error:
                raise UpfitError(f"{path} is not UTF-8 text ({error.reason}); convert it or leave it out") from error
        elif path.is_dir():
            yield from folder_documents(path, field, output)
        else:
            yield from hub_documents(name, field)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below a folder, sorted; hidden ones are left out."""
    if path.is_file():
        return [path]
    found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    return sorted(p for p in found if p.is_file())


def folder_documents(folder: Path, field: str, output: Output) -> Iterator[tuple[str, int]]:
    skipped = []
    for path in files_of(folder):
        try:
            yield from file_documents(path, field)
        except UnicodeDecodeError:
            skipped.append(path)
    if skipped:
        output.note(f"{folder}: {len(skipped)} files are not UTF-8 text and were left out, e.g. {skipped[0]}")


def file_documents(path: Path, field: str) -> Iterator[tuple[str, int]]:
    if path.name.endswith(JSON_LINES):
        yield from json_documents(path, field)
    elif path.suffix == ".parquet":
        yield from parquet_documents(path, field)
    else:
        yield _decoded(path), path.stat().st_size


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if b"\0" in content:
        raise UnicodeDecodeError("utf-8", content[:1], 0, 1, "a zero byte, as in binary files")
    return content.decode("utf-8")


def json_documents(path: Path, field: str) -> Iterator[tuple[str, int]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UpfitError(f"{path} line {number} is not JSON ({error}); give one JSON object a line") from error
            yield _text(entry, field, f"{path} line {number}"), len(line)


def _text(entry: Any, field: str, where: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise UpfitError(f"{where} has no text in {field!r} (found: {found}); name the field with --field")
    return entry[field]


def parquet_documents(path: Path, field: str) -> Iterator[tuple[str, int]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UpfitError(f"reading {path} needs the package datasets; install it with: pip install 'upfit[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UpfitError(f"{path} is not a parquet file ({error}); fetch it again") from error
    if field not in file.schema_arrow.names:
        raise UpfitError(f"{path} has no column {field!r} (found: {', '.join(file.schema_arrow.names)}); name it with --field")
    share = path.stat().st_size // max(1, file.metadata.num_rows)
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for entry in batch.to_pylist():
            if entry[field] is not None:
                yield _text(entry, field, str(path)), share


def hub_documents(name: str, field: str) -> Iterator[tuple[str, int]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UpfitError(f"reading {name} from the hub needs datasets; install it with: pip install 'upfit[data]'") from error
    hub_id, _, config = name.partition(":")
    try:
        stream = load_dataset(hub_id, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UpfitError(f"no file or folder {name} here, and the hub does not give that data set: {reason}") from error
    for entry in stream:
        yield _text(entry, field, name), 0

"""Documents one after the other, of any amount of text: files (a document each), folders, JSON lines, parquet, hub data sets.

The packages that read parquet and the hub are imported only here, and only when such an input is given.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upfit.errors import UpfitError
from upfit.output import Output

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
HUB_DATA = re.compile(r"\w[\w.\-]*/\w[\w.\-]*(:[\w.\-]+)?")


def local_inputs(inputs: list[str]) -> list[Path]:
    """Those of `inputs` that lie here. Raises UpfitError for one that is neither here nor named like a data set of the hub."""
    local = [Path(name) for name in inputs if Path(name).exists()]
    for name in inputs:
        if Path(name) not in local and not HUB_DATA.fullmatch(name):
            raise UpfitError(f"no file or folder at {name}; give a path, or a hub data set such as org/name")
    return local


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

"""Parquet files and data sets of the hub. The packages that read them are imported only here, and only when one is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upfit.bounded import check_ordinary
from upfit.errors import UpfitError
from upfit.text.entries import Ahead, Entry
from upfit.text.packed import Growth

ROWS = 64  # at a time: a few bytes of a file can stand for as many copies of a long text


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeError, ValueError) as error:
        if isinstance(error, UpfitError):
            raise
        raise UpfitError(f"{path} is no parquet file, or damaged ({_first_line(error)}); fetch it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parquet(path: Path, field: str | None, hint: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UpfitError(f"reading {path} needs the package datasets; install it with: pip install 'upfit[data]'") from error
    check_ordinary(path)
    with _damage(path):
        file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if field is not None and field not in names:
        raise UpfitError(f"{path} has no column {field!r} (found: {', '.join(names)[:300]}); {hint}")
    return file


def parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    """Each row, with all of its columns."""
    file = _parquet(path, None, "")
    growth, packed = Growth(path), path.stat().st_size
    with _damage(path):
        for batch in file.iter_batches(batch_size=ROWS):
            growth.add(batch.nbytes, packed)
            yield from batch.to_pylist()


def parquet_rows(path: Path, field: str, hint: str) -> int:
    return _parquet(path, field, hint).metadata.num_rows


def parquet_sizes(path: Path, field: str, hint: str) -> list[int]:
    """Bytes of text in each row group, which is read for it: the file tells how large it is packed, which may be far less."""
    from pyarrow import compute, types

    file, sizes = _parquet(path, field, hint), []
    kind = file.schema_arrow.field(field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise UpfitError(f"{path} has no text in the column {field!r} (found: {kind}); {hint}")
    growth, packed = Growth(path), path.stat().st_size
    with _damage(path):
        for group in range(file.num_row_groups):
            before = growth.bytes
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[field]):
                growth.add(compute.sum(compute.binary_length(batch.column(0))).as_py() or 0, packed)
            sizes.append(growth.bytes - before)
    return sizes


def parquet_entries(path: Path, field: str, hint: str, sizes: list[int], ahead: Ahead | None = None) -> Iterator[Entry]:
    """Each row. Its place is that among the bytes of text, of which `sizes` ([] for not known) tells how many a group has."""
    file, begin, row = _parquet(path, field, hint), 0, 1
    with _damage(path):
        for group in range(file.num_row_groups):
            rows, last = file.metadata.row_group(group).num_rows, begin + sizes[group] if sizes else None
            offset = begin if ahead is None or last is None else ahead(begin)
            if offset is None:
                return
            if last is not None and offset >= last > begin:
                begin, row = last, row + rows
                continue
            for value in _values(file, group, field):
                nbytes = len(value.encode("utf-8")) if isinstance(value, str) else 0
                yield Entry(path, row, begin, begin + nbytes, {field: value})
                begin, row = begin + nbytes, row + 1


def _values(file: Any, group: int, field: str) -> Iterator[Any]:
    for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[field]):
        yield from batch.column(0).to_pylist()


def hub_rows(name: str) -> Iterator[Any]:
    """The rows of the train split of a data set of the hub, streamed. Raises UpfitError when the hub does not give it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UpfitError(f"reading {name} from the hub needs datasets; install it with: pip install 'upfit[data]'") from error
    hub_id, _, config = name.partition(":")
    try:
        yield from load_dataset(hub_id, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UpfitError):
            raise
        raise UpfitError(
            f"no file or folder {name} here, and the hub does not give that data set: {_first_line(error)}"
        ) from error

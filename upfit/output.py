"""Prints: data on stdout, progress and notes on stderr. Nothing else in Upfit prints.

Imports neither torch nor transformers, so that `upfit --help` stays fast.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from upfit.addresses import redacted

PLAIN_LINE_SECONDS = 30.0  # between lines of progress where there is no terminal
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal obeys them
NUMBERS = re.compile(r"\[\n\s+(-?\d[^\[\]{}\"]*?)\n\s+\]")  # JSON has no line break inside a string


def to_json(value: Any) -> str:
    """JSON to read: one thing a line, but a list of numbers, such as a row of a map, on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate is no UTF-8, its escape is JSON
    return NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)


def printable(text: str) -> str:
    """`text` with what a terminal would obey spelled out."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class Meter:
    """Progress of one task: a bar on a terminal, a plain line every 30 s elsewhere, nothing when quiet."""

    def __init__(self, label: str, total: float, quiet: bool, bar: Progress | None) -> None:
        self.label, self.total, self.quiet, self.bar = label, total, quiet, bar
        self.done, self.start, self.note, self.began = 0.0, 0.0, "", time.monotonic()
        self.last = self.began
        self.lock = threading.Lock()
        self.task = bar.add_task(escape(label), total=total, note="") if bar else None

    def start_at(self, done: float) -> None:
        """Count `done` as done by an earlier run: it says nothing of the time that is left."""
        self.done = self.start = done
        if self.bar is not None and self.task is not None:
            self.bar.reset(self.task, completed=int(done))

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more as done; `note` (a loss, a rate) is shown beside it."""
        with self.lock:  # the converter copies and computes in two threads
            self.done, self.note = self.done + amount, note
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, note=escape(note))
        elif not self.quiet and time.monotonic() - self.last >= PLAIN_LINE_SECONDS:
            self.last = time.monotonic()
            share = self.done / self.total if self.total else 1.0
            done, total = self.done - self.start, self.total - self.start
            left = "" if "left" in note else time_left(done, total, self.last - self.began)
            print(f"{self.label}: {share:.0%}{left} {note}".rstrip(), file=sys.stderr, flush=True)


class Output:
    """Where one command writes. `as_json` puts one JSON document on stdout, `quiet` silences notes and progress. With `file`,
    lines and tables go there instead of stdout, as plain text."""

    def __init__(self, as_json: bool = False, quiet: bool = False, file: TextIO | None = None) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.stdout, self.stderr = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
        if file is not None:
            self.stdout = Console(soft_wrap=True, file=file, force_terminal=False, force_jupyter=False, color_system=None)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.stderr.print(escape(printable(redacted(text))), highlight=False)

    def line(self, text: str) -> None:
        """One line of data (not shown with `--json`)."""
        if not self.as_json:
            self.stdout.print(escape(printable(text)), highlight=False)

    def json(self, value: Any) -> None:
        """The answer of the command as JSON; does nothing without `--json`."""
        if self.as_json:
            sys.stdout.write(to_json(value) + "\n")
            sys.stdout.flush()

    def table(self, columns: list[str], rows: list[list[str]], title: str = "") -> None:
        """A table on stdout; the first column is text, the others are numbers."""
        if self.as_json:
            return
        table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self.stdout.print(table)

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        if self.quiet or not self.stderr.is_terminal:
            yield Meter(label, total, self.quiet, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.stderr, transient=True) as bar:
            yield Meter(label, total, False, bar)


def time_left(done: float, total: float, seconds: float) -> str:
    """`, 4 min left`, at the rate so far; empty where nothing is done or nothing is left."""
    if not 0 < done < total:
        return ""
    rest = seconds * (total - done) / done
    return (
        f", {rest:.0f} s left" if rest < 90 else f", {rest / 60:.0f} min left" if rest < 5400 else f", {rest / 3600:.1f} h left"
    )


def human_bytes(count: float) -> str:
    """`1536` → `1.5 kB`: powers of 1000, as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(least: float, most: float) -> str:
    """A stretch of time, as `20 to 60 s`, `3 to 9 min` or `1.5 to 4 h`, in the unit of its upper end."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if most < 120 * length or unit == "h":
            ends = [f"{end / length:.1g}" if end < 10 * length else f"{end / length:.0f}" for end in (least, most)]
            return f"{ends[0]} to {ends[1]} {unit}" if ends[0] != ends[1] else f"{ends[0]} {unit}"
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    """`134515008` → `134.5 M`: parameters and tokens."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000 or unit == " B":
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def cache_change(before: int, after: int, cross: Sequence[int] | None = None) -> str:
    """What became of the bytes that a token's keys and values take, in words; the same ones wherever it is told. `cross`: of an
    encoder-decoder, bytes of a position that was read, before and after."""
    if cross is not None:
        return f"KV cache {_change(before, after, 'a token written')} and {_change(cross[0], cross[1], 'a position read')}"
    return f"KV cache {_change(before, after, 'a token')}"


def _change(before: int, after: int, of: str) -> str:
    if before == after:
        return f"{human_bytes(before)} {of}, as before"
    factor = cache_factor(before, after)
    return f"{human_bytes(before)} → {human_bytes(after)} {of}" + (f" ({factor})" if factor else "")


def cache_size(per_token: float, per_position: float | None = None) -> str:
    """`1.0 kB a token`; of an encoder-decoder `1.0 kB a token written, 1.0 kB a position read`."""
    if per_position is None:
        return f"{human_bytes(per_token)} a token"
    return f"{human_bytes(per_token)} a token written, {human_bytes(per_position)} a position read"


def cache_factor(before: float, after: float) -> str:
    """How much smaller or larger a cache became, as `4.00x smaller`; empty where it did not change, or was or is nothing."""
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"

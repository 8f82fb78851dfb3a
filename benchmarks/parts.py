"""Text in three parts, split by document: what models train on, what choices are made on, and what is reported.

A learning rate chosen on the rows that are reported makes them look better than other text would. Rows of a document that was
trained on are no held-out text either. So each document belongs to one part, decided by a hash of its text and by nothing else:
two copies of a document never stand in two parts. Runs of 16 words that the reported text shares with the text trained on are
counted, and stand in the results.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from upfit.output import Output
from upfit.text import Document
from upfit.text.corpus import documents
from upfit.text.windows import Window, make_windows
from upfit.uptrain.data.rows import TextRows
from upfit.uptrain.data.shard_writer import ShardWriter
from upfit.uptrain.data.shards import Shards

TENTHS = {"choose": 1, "report": 1}  # of the documents; the others are trained on
RUN = 16  # words
QUIET = Output(quiet=True)


@dataclass(frozen=True)
class Parts:
    train: list[Document]
    choose: list[Document]
    report: list[Document]

    def record(self) -> dict[str, Any]:
        """What a results file says of them."""
        sizes = {name: {"documents": len(part), "characters": sum(len(d.text) for d in part)} for name, part in self.items()}
        return sizes | {"shared_with_train": {name: shared_runs(part, self.train) for name, part in self.items()[1:]}}

    def items(self) -> list[tuple[str, list[Document]]]:
        return [("train", self.train), ("choose", self.choose), ("report", self.report)]

    def write(self, folder: Path) -> dict[str, Path]:
        """One file of JSON lines a part, which every verb of Upfit reads."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.jsonl" for name, _ in self.items()}
        for name, part in self.items():
            paths[name].write_text("".join(json.dumps({"text": d.text}) + "\n" for d in part), encoding="utf-8")
        return paths


def read_documents(inputs: list[str]) -> list[Document]:
    """The documents of files and folders in any form that `upfit prepare` reads."""
    return [Document(text, str(number)) for number, (text, _) in enumerate(documents(inputs, "text", QUIET)) if text.strip()]


def part_of(document: Document) -> str:
    tenth = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()[0] % 10
    for name, tenths in TENTHS.items():
        if tenth < tenths:
            return name
        tenth -= tenths
    return "train"


def split(text: Iterable[Document]) -> Parts:
    """Raises SystemExit when a part is empty."""
    parts: dict[str, list[Document]] = {"train": [], "choose": [], "report": []}
    for document in text:
        parts[part_of(document)].append(document)
    if empty := [name for name, part in parts.items() if not part]:
        raise SystemExit(f"no document falls into the part {', '.join(empty)}; give text of more documents")
    return Parts(**parts)


def runs(document: Document) -> list[int]:
    words = document.text.split()
    return [hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1)]


def shared_runs(part: list[Document], train: list[Document]) -> float:
    """The share of the runs of 16 words in `part` that stand somewhere in `train`."""
    known = {run for document in train for run in runs(document)}
    own = [run for document in part for run in runs(document)]
    return sum(run in known for run in own) / max(1, len(own))


def windows_record(windows: list[Window], length: int) -> dict[str, int]:
    """How many windows, how many of them full, of how many documents and scored tokens: what an interval is over."""
    full = sum(len(window.ids) == length for window in windows)
    scored = sum(len(window.ids) - 1 for window in windows)
    return {"windows": len(windows), "full": full, "documents": len({w.document for w in windows}), "tokens": scored}


def full_windows(part: list[Document], model: str, length: int, count: int) -> list[Window]:
    """At most `count` windows of exactly `length` tokens."""
    windows = make_windows(part, AutoTokenizer.from_pretrained(model), length, count)
    if not (whole := [window for window in windows if len(window.ids) == length]):
        raise SystemExit(f"no document of a held-out part has {length} tokens; give a smaller --length or more text")
    return whole


def weave(train: Path, held_out: list[Window], length: int, out: Path) -> None:
    """Token shards `out` of the rows of the shards `train`, with `held_out` at the places that `upfit uptrain` keeps back.

    With `holdout` = len(held_out) and the same `length`, a run trains on `train` alone and measures on `held_out` alone, also
    on its way. Runs woven with equally many windows train on the same rows in the same order.
    """
    shards = Shards(train)
    rows = (shards.tokens - 1) // length
    total = rows + len(held_out)
    places = [(2 * index + 1) * total // (2 * len(held_out)) for index in range(len(held_out))]
    if len(held_out) > total // 10:
        raise SystemExit(f"{rows} rows to train on are too few beside {len(held_out)} held-out ones; give a smaller --holdout")
    held, trained = dict(zip(places, held_out, strict=True)), iter(range(rows))
    pieces, starts, after_held = list[np.ndarray](), list[np.ndarray](), True
    for number in range(total):
        begin = number * length
        if number in held:
            pieces.append(held[number].ids)
            starts.append(np.array([begin]))
        else:
            first = next(trained) * length
            inside = begin + shards.document_starts(first, first + length)
            pieces.append(shards.read(first, first + length))
            starts.append(np.union1d(inside, [begin] if after_held else []))
        after_held = number in held
    pieces.append(np.zeros(1, dtype=np.int64))  # the label of the last row's end, a document of its own
    starts.append(np.array([total * length]))
    _write(out, shards, np.concatenate(pieces), np.concatenate(starts).astype(np.int64))
    assert TextRows(Shards(out), length, len(held_out), 0).holdout == places, "upfit uptrain keeps other rows back"


def _write(out: Path, like: Shards, ids: np.ndarray, starts: np.ndarray) -> None:
    out.mkdir(parents=True)
    writer = ShardWriter(out, like.manifest["dtype"])
    writer.extend(ids, np.diff(np.append(starts, len(ids))))
    writer.finish({key: like.manifest[key] for key in ("tokenizer", "inputs", "field") if key in like.manifest})

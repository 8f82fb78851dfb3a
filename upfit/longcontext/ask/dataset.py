"""Questions from existing question sets: files in the form of SQuAD or of HotpotQA.

SQuAD: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}. HotpotQA: a list of {"question",
"answer", "context": [[title, [sentences]]], "supporting_facts": [[title, number]]}; paragraphs with supporting facts are the
pieces, the others decoys.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upfit.bounded import DATA_BYTES, MISSHAPEN, read_json, reason
from upfit.errors import UpfitError
from upfit.longcontext.items import Item

MOST_DECOYS = 8  # as many as HotpotQA has beside its two pieces


def read(names: list[str]) -> list[Item]:
    """All questions of the files, in order. Raises UpfitError for a file of another shape, or when there is no question."""
    entries = [entry for name in names for entry in _entries(Path(name).expanduser())]
    if not entries:
        raise UpfitError(f"{', '.join(names)} hold no question with an answer; give SQuAD or HotpotQA files")
    return [
        Item(index, "dataset", pattern, question, answer, pieces, keys, decoys, generator=f"dataset/{name}")
        for index, (name, pattern, question, answer, pieces, keys, decoys) in enumerate(entries)
    ]


Entry = tuple[str, str, str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def _entries(path: Path) -> Iterator[Entry]:
    try:
        content = read_json(path, DATA_BYTES)
        yield from (_squad(path.name, content) if isinstance(content, dict) else _hotpot(path.name, content))
    except UpfitError:
        raise
    except MISSHAPEN as error:
        raise UpfitError(f"{path} is not shaped like SQuAD or HotpotQA ({reason(error)}); see docs/synth.md") from error


def _squad(name: str, content: dict[str, Any]) -> Iterator[Entry]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            context = " ".join(paragraph["context"].split())
            for asked in paragraph["qas"]:
                if asked.get("answers"):  # SQuAD 2 has questions without one
                    yield name, "question on text", asked["question"], asked["answers"][0]["text"], (context,), (context,), ()


def _hotpot(name: str, rows: list[Any]) -> Iterator[Entry]:
    for row in rows:
        wanted = {title for title, _ in row["supporting_facts"]}
        texts = {title: " ".join([f"{title}:", *(part.strip() for part in parts)]) for title, parts in row["context"]}
        pieces = tuple(text for title, text in texts.items() if title in wanted)
        decoys = tuple(text for title, text in texts.items() if title not in wanted)[:MOST_DECOYS]
        if pieces:
            yield name, "question on several texts", row["question"], row["answer"], pieces, pieces, decoys

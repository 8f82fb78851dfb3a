"""What an interval on Upfit's default evaluation text is over: windows, how many of them full, documents, tokens.

    python -m benchmarks.default_text smollm2=FOLDER embedded=upfit/demo/model --results benchmarks/results/NAME.json

FOLDER needs a tokenizer and no weights. Results that keep `sha256` of their windows were measured on these very windows where
the hashes are equal; the text is that of the running Python.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.parts import windows_record
from upfit.environment import environment
from upfit.text import python_documents
from upfit.text.windows import digest, make_windows

CASES = {512: (16, 32, 48, 64), 1024: (8, 24), 2048: (12,)}  # windows asked for, by length: those of the tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tokenizers", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    documents = python_documents()
    rows = {}
    for name, folder in (word.split("=", 1) for word in args.tokenizers):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        cases = [(length, count) for length, counts in CASES.items() for count in counts]
        rows[name] = {f"{length} x {count}": row(documents, tokenizer, length, count) for length, count in cases}
    result = {"documents": len(documents), "windows": rows, "environment": environment()}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def row(documents: list[Any], tokenizer: Any, length: int, count: int) -> dict[str, Any]:
    windows = make_windows(documents, tokenizer, length, count)
    kinds = {kind: windows_record([w for w in windows if w.kind == kind], length) for kind in ("code", "prose")}
    return windows_record(windows, length) | kinds | {"sha256": digest(windows)}


if __name__ == "__main__":
    main()

"""`upfit report`: gather, tell, write the page and, where asked, each plot as a PNG."""

import os
from pathlib import Path
from typing import Any

from upfit.errors import UpfitError
from upfit.report.page import render
from upfit.report.sections import tell
from upfit.report.story import gather


def report(model: str, out: Path | None, results: list[Path], png: Path | None, overwrite: bool) -> dict[str, Any]:
    """Write the story of `model` to `out` (default: the model's name with .html, here) and each plot as `png`/NAME.png.

    Returns what was written. Raises UpfitError for a model or a file that cannot be read, and, unless `overwrite`, before it
    would replace a file.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1]
    out = out or Path(f"{name}.html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UpfitError(f"OUT is {out}; give a name that ends in .html")
    sections = tell(gather(model, results))
    plots = [plot for section in sections for plot in section.plots]
    pictures = {} if png is None else {png / f"{plot.name}.png": plot for plot in plots}
    for path in (out, *pictures):
        if path.exists() and not overwrite:
            raise UpfitError(f"{path} exists; choose another name or pass --overwrite")
    for path, plot in pictures.items():
        _write(path, plot.png())
    _write(out, render(f"{name}: the story of a model", sections, [str(path) for path in results]).encode())
    return {"out": str(out), "sections": [section.title for section in sections], "plots": [str(path) for path in pictures]}


def _write(path: Path, content: bytes) -> None:
    """All of the file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)

"""`upfit report`: gather, tell, write the page and, where asked, each plot as a PNG."""

import os
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from upfit.convert.folders import find_source, staged
from upfit.errors import UpfitError
from upfit.portable import known_places, name_of
from upfit.report.page import elsewhere, render
from upfit.report.sections import tell
from upfit.report.story import gather, misshapen


def report(model: str, out: Path | None, results: list[Path], png: Path | None, overwrite: bool) -> dict[str, Any]:
    """Write the story of `model` to `out` (default: the model's name with .html, here) and each plot as `png`/NAME.png.

    Returns what was written. The folder `png` is whole or absent. Raises UpfitError, before anything is written, for a model or
    a file that cannot be read and for an output that is taken (with `overwrite`: by anything but a page, or pictures).
    """
    name = name_of(model) or Path(model).resolve().name
    out = out or Path(f"{name}.html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UpfitError(f"OUT is {out}; give a name that ends in .html")
    _check_free(out, overwrite)
    if png is not None:
        _check_pictures(png, out, find_source(model).path, overwrite)
    story, folder = gather(model, results), find_source(model).path
    with misshapen(folder, results), rc_context({"text.parse_math": False}):  # a name with dollars is no formula
        known = [story.steps, [answer for _, answer in story.evaluations], str(folder)]
        sections = elsewhere(tell(story), known_places(known, [str(path.absolute()) for path in results]))
        plots = [plot for section in sections for plot in section.plots]
        page = render(f"{name}: the story of a model", sections, [path.name for path in results]).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_bytes(page)
        if png is not None:
            with staged(png) as folder:
                for plot in plots:
                    (folder / f"{plot.name}.png").write_bytes(plot.png())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    pictures = [] if png is None else [str(png / f"{plot.name}.png") for plot in plots]
    return {"out": str(out), "sections": [section.title for section in sections], "plots": pictures}


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise UpfitError(f"OUT {out} is a folder; give the name of a file that ends in .html")
    if out.exists() and not overwrite:
        raise UpfitError(f"{out} exists; choose another name or pass --overwrite")


def _check_pictures(png: Path, out: Path, model: Path, overwrite: bool) -> None:
    """The folder for pictures is replaced as a whole, so nothing but pictures may be in it."""
    place = png.expanduser().resolve()
    if place in (*out.resolve().parents, model) or model in place.parents:
        raise UpfitError(f"--png {png} would hold the page or lie in the model; choose a folder for the pictures alone")
    if place.exists() and not place.is_dir():
        raise UpfitError(f"--png {png} is a file; choose a folder")
    held = sorted(place.iterdir()) if place.is_dir() else []
    if held and not overwrite:
        raise UpfitError(f"--png {png} exists and is not empty; choose another folder or pass --overwrite")
    other = next((path.name for path in held if path.is_dir() or path.suffix != ".png"), None)
    if other is not None:
        raise UpfitError(f"--png {png} holds {other}, which is no picture of a report; choose another folder")

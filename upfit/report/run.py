"""`upfit report`: collects the data, writes the page and, where asked, each plot as a PNG."""

from contextlib import ExitStack
from pathlib import Path

from matplotlib import rc_context

from upfit.checkpoint.output_folder import check_place, resolved
from upfit.checkpoint.source import find_source
from upfit.checkpoint.work_folder import RESULT, work_folder
from upfit.errors import UpfitError
from upfit.portable import known_places, name_of
from upfit.report.page import elsewhere, is_page, is_picture, render
from upfit.report.result import Report
from upfit.report.sections import tell
from upfit.report.story import gather, misshapen
from upfit.report.subjects import called


def report(model: str, out: Path | None, results: list[Path], png: Path | None, overwrite: bool) -> Report:
    """Write the story of `model` to `out` (default: the model's name with .html, here) and each plot as `png`/NAME.png.

    Returns what was written. The folder `png` is whole or absent. Raises UpfitError, before anything is written, for a model or
    a file that cannot be read and for an output that is taken (with `overwrite`: by anything but a page, or pictures).
    """
    name = name_of(model) or Path(model).expanduser().resolve().name
    out = (out or Path(f"{name}.html")).expanduser()
    results, png = [path.expanduser() for path in results], png.expanduser() if png is not None else None
    if out.suffix.lower() not in (".html", ".htm"):
        raise UpfitError(f"OUT is {out}; give a name that ends in .html")
    _check_free(out, overwrite)
    if png is not None:
        _check_png(png, out, find_source(model).path, overwrite)
    story, folder = gather(model, results), find_source(model).path
    with misshapen(folder, results), rc_context({"text.parse_math": False}):  # a name with dollars is no formula
        known = [story.steps, [answer for _, answer in story.evaluations], str(folder)]
        sections = elsewhere(tell(story), known_places(known, [str(path.absolute()) for path in results]))
        plots = [plot for section in sections for plot in section.plots]
        page = render(
            f"{called(find_source(model).record())}: the story of a model", sections, [path.name for path in results]
        ).encode()
        pictures = {f"{plot.name}.png": plot.png() for plot in plots} if png is not None else {}
    with ExitStack() as stack:
        work = stack.enter_context(work_folder(out, "report", overwrite, check=check_page))
        written = work.path / RESULT
        written.write_bytes(page)
        if png is not None:
            beside = stack.enter_context(work_folder(png, "report", overwrite, check=check_pictures))
            folder = beside.folder(RESULT, clear=True)
            for file, content in pictures.items():
                (folder / file).write_bytes(content)
            beside.publish(folder, overwrite)
        work.publish(written, overwrite)
    names = [str(Path(png or "", file)) for file in pictures]
    return Report(str(out), [section.title for section in sections], names, png=None if png is None else str(png))


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise UpfitError(f"OUT {out} is a folder; give the name of a file that ends in .html")
    check_place(resolved(out), [], 0)
    if out.exists():
        if not overwrite:
            raise UpfitError(f"{out} exists; choose another name or pass --overwrite")
        check_page(out)


def check_page(out: Path) -> None:
    """Raise UpfitError when `out` is not a page of `upfit report`."""
    if not (out.is_file() and is_page(out)):
        raise UpfitError(f"{out} is no page of upfit report, and stays; choose another name")


def check_pictures(png: Path) -> None:
    """Raise UpfitError when the folder `png` holds anything but pictures of a report: it is replaced as a whole."""
    other = next((path.name for path in sorted(png.iterdir()) if not (path.is_file() and is_picture(path))), None)
    if other is not None:
        raise UpfitError(f"--png {png} holds {other}, which is no picture of a report; choose another folder")


def _check_png(png: Path, out: Path, model: Path, overwrite: bool) -> None:
    place = resolved(png)
    if place in resolved(out).parents:
        raise UpfitError(f"--png {png} would hold the page; choose a folder for the pictures alone")
    check_place(place, [model], 0)
    if place.exists() and not place.is_dir():
        raise UpfitError(f"--png {png} is a file; choose a folder")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise UpfitError(f"--png {png} exists and is not empty; choose another folder or pass --overwrite")
        check_pictures(place)

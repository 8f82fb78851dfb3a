"""Makes one HTML file of sections. It loads nothing from outside: styles and plots (SVG) are inside."""

import base64
import io
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from upfit import __version__
from upfit.portable import portable

PNG_DPI = 150
WIDE_INCHES = 6.0
COLUMNS_OF_A_TELEPHONE = 3
MADE_BY = "Upfit report"  # by which pages and pictures are known again
HEAD_BYTES = 4096  # it stands in the first of them
TOGETHER = re.compile(r"\[[^\[\]]*\]|\d ± \d|\d [kMGT]?B\b|\dx (?:smaller|larger)")


def file_name(label: str) -> str:
    """A label as a part of a file's name, on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")


@dataclass(frozen=True)
class Table:
    """`columns` and `rows` of text; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @property
    def cards(self) -> bool:
        """Whether a narrow page shows a card for each row, since it has no room for the columns."""
        return len(self.columns) > COLUMNS_OF_A_TELEPHONE


@dataclass(frozen=True)
class Plot:
    """A figure under a file name (without ending) and with a sentence that says what it shows."""

    name: str
    caption: str
    figure: Figure

    @property
    def wide(self) -> bool:
        """Whether its text would be too small to read where the page is as narrow as a telephone."""
        return float(self.figure.get_figwidth()) > WIDE_INCHES

    @property
    def data_uri(self) -> str:
        written = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "upfit", "svg.fonttype": "none"}):  # same bytes each time; text stays text
            self.figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"

    def png(self) -> bytes:
        written = io.BytesIO()
        self.figure.savefig(written, format="png", dpi=PNG_DPI, metadata={"Software": MADE_BY})
        return written.getvalue()


@dataclass(frozen=True)
class Section:
    """`lead`: a sentence that stands for all of it, in large type; `notes`: what explains the rest, at the end."""

    title: str
    texts: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    lead: str = ""
    notes: list[str] = field(default_factory=list)


def elsewhere(sections: list[Section], places: list[str]) -> list[Section]:
    """The same for a reader on another machine: files and folders by their names. `places`: absolute paths that are known."""
    return [
        replace(
            section,
            title=portable(section.title, places),
            texts=portable(section.texts, places),
            commands=[portable({"command": command}, places)["command"] for command in section.commands],
            tables=[
                replace(
                    table,
                    title=portable(table.title, places),
                    columns=portable(table.columns, places),
                    rows=portable(table.rows, places),
                )
                for table in section.tables
            ],
            lead=portable(section.lead, places),
            notes=portable(section.notes, places),
            plots=[replace(plot, caption=portable(plot.caption, places)) for plot in section.plots],
        )
        for section in sections
    ]


def unbroken(cell: str) -> str:
    """No line break inside `1.5 ± 0.1`, `[1.4, 1.6]` or `8.2 kB`."""
    return TOGETHER.sub(lambda match: match[0].replace(" ", "\u00a0"), cell)


def is_page(path: Path) -> bool:
    """Whether the file is a page of `render`."""
    return f'<meta name="generator" content="{MADE_BY}">'.encode() in _head(path)


def is_picture(path: Path) -> bool:
    """Whether the file is a picture of `Plot.png`."""
    return (head := _head(path)).startswith(b"\x89PNG") and MADE_BY.encode() in head


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def render(title: str, sections: list[Section], results: list[str]) -> str:
    """The page. Whatever comes from a folder is escaped: a model's name cannot become markup."""
    template = (files("upfit.report") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["unbroken"] = unbroken
    return environment.from_string(template).render(
        title=title, sections=sections, results=results, version=__version__, made_by=MADE_BY
    )

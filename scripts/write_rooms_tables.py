"""Write the tables of rooms in CONTRIBUTING.md and README.md: what each room does, from its docstring, and what it may import,
from tests/test_doors.py. A test compares the pages with this."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_doors import ROOMS  # noqa: E402

BEGIN, END = "<!-- rooms: written by scripts/write_rooms_tables.py -->\n", "<!-- end of rooms -->\n"


def purpose(room: str) -> str:
    """The first paragraph of a room's docstring, in one line."""
    doc = ast.get_docstring(ast.parse((ROOT / "upfit" / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def table_of_doors() -> str:
    rows = ["| room | what it is | may import |", "|---|---|---|"]
    for room, others in ROOMS.items():
        allowed = ", ".join(f"`{other}`" for other in ROOMS if other in others)
        rows.append(f"| `upfit/{room}/` | {purpose(room)} | {allowed or 'no other room'} |")
    above = f"| `upfit/cli/` | {purpose('cli')} | every room |\n"
    return "\n".join(
        [*rows, "| `upfit/api.py` | Every command as a function, for notebooks and scripts. | every room but `cli` |", above]
    )


def list_of_rooms() -> str:
    rows = [f"| [`upfit/{room}/`](upfit/{room}) | {purpose(room)} |" for room in [*ROOMS, "cli"]]
    return "\n".join(["| room | what it is |", "|---|---|", *rows]) + "\n"


PAGES: dict[Path, Callable[[], str]] = {ROOT / "CONTRIBUTING.md": table_of_doors, ROOT / "README.md": list_of_rooms}


def page(path: Path) -> str:
    """The page with its table as it should be."""
    marked = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return marked.sub(lambda _: f"{BEGIN}\n{PAGES[path]()}\n{END}", path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")

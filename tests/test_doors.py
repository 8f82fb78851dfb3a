"""Which room may import which: cli → publish, evaluate, uptrain → convert; no attention imports another."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "upfit"
GROUND = {
    "errors",
    "bounded",
    "durable",
    "portable",
    "addresses",
    "model_files",
    "output",
    "provenance",
    "options",
    "environment",
    "",
}
ALLOWED = {
    "text": {"text"},
    "modeling": {"modeling"},
    "checkpoint": {"text", "modeling", "checkpoint"},
    "architecture": {"text", "modeling", "checkpoint", "architecture"},
    "calibration": {"text", "modeling", "checkpoint", "architecture", "calibration"},
    "convert": {"text", "modeling", "checkpoint", "architecture", "calibration", "convert"},
    "longcontext": {"text", "modeling", "checkpoint", "architecture", "longcontext"},
    "uptrain": {"text", "modeling", "checkpoint", "architecture", "longcontext", "convert", "uptrain"},
    "evaluate": {"text", "modeling", "checkpoint", "architecture", "calibration", "longcontext", "evaluate"},
    "plan": {"text", "modeling", "checkpoint", "architecture", "uptrain", "plan"},
    "report": {"text", "modeling", "checkpoint", "convert", "evaluate", "report"},
    "publish": {"text", "modeling", "checkpoint", "architecture", "convert", "evaluate", "report", "publish"},
    "demo": {"text", "checkpoint", "calibration", "convert", "uptrain", "evaluate", "demo"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("test_"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "upfit")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    names = imported(path)
    rooms = {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "upfit"} - {"__version__"}
    if parts[0] in ALLOWED:
        assert rooms <= GROUND | ALLOWED[parts[0]]
    elif parts[0] not in ("cli", "__main__.py"):
        assert rooms <= GROUND | ({"modeling"} if parts == ("__init__.py",) else set())  # its model types are made known
    if parts[0] == "convert":
        assert not any(name.split(".")[0] == "accelerate" for name in names)
        attentions = {p.name for p in (PACKAGE / "convert").iterdir() if p.is_dir()}
        others = attentions - ({parts[1]} if len(parts) > 2 else set())
        used = {name.split(".")[2] for name in names if name.startswith("upfit.convert.") and name.count(".") >= 2}
        assert not used & others

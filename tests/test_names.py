"""A variable's name says what it holds: there are none that any value could have."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "upfit"
EMPTY = {"told", "found", "given", "some", "said", "kept", "made"}


def bound(tree: ast.AST) -> Iterator[str]:
    """Names that the code binds: variables, fields and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def empty_names() -> Counter[str]:
    """How many each room of the package has; its tests are not counted, nor are those beside an attention."""
    counts = Counter[str]()
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("test_"):
            room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""
            counts[room] += sum(name in EMPTY for name in bound(ast.parse(path.read_text("utf-8"))))
    return +counts


def test_names_say_what_a_thing_is() -> None:
    counts = empty_names()
    assert not counts, f"give the thing its name (record, config, rows, ...) instead of one of {sorted(EMPTY)}: {dict(counts)}"


def test_all_kinds_of_names_are_seen() -> None:
    code = "def f(told):\n    found: int = 1\n    return [made for made in told if (kept := made)], lambda some: some\n"
    assert sorted(name for name in bound(ast.parse(code)) if name in EMPTY) == ["found", "kept", "made", "some", "told"]

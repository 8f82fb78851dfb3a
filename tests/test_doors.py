"""Which room may import which, that no files import each other in a circle, and that no room becomes a house.

Every import counts, also those inside functions and those for types alone.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

from upfit.convert.recipe import find_recipes

PACKAGE = Path(__file__).parent.parent / "upfit"
GROUND = {"errors", "bounded", "durable", "portable", "addresses", "model_files", "output", "provenance", "options", "results"}
GROUND |= {"environment", ""}
MODEL = {"text", "modeling", "checkpoint", "architecture"}
ROOMS = {  # what a room may import beside the ground and itself
    "text": set(),
    "modeling": set(),
    "checkpoint": {"text", "modeling"},
    "architecture": {"text", "modeling", "checkpoint"},
    "examples": MODEL,
    "calibration": MODEL | {"examples"},
    "convert": MODEL | {"examples", "calibration"},
    "longcontext": MODEL,
    "uptrain": MODEL | {"longcontext"},
    "evaluate": MODEL | {"longcontext", "examples", "calibration"},
    "plan": MODEL | {"uptrain"},
    "report": MODEL | {"convert", "evaluate"},
    "publish": MODEL | {"convert", "evaluate", "report"},
    "demo": MODEL | {"calibration", "convert", "uptrain", "evaluate"},
}
ATTENTIONS = {path.parent.name for path in PACKAGE.glob("convert/*/recipe.py")}
MAY_NAME_AN_ATTENTION = {  # with the reason
    "architecture/grouped_class.py": "the class that some families need to have fewer heads",
    "architecture/latent.py": "where the config of a class of ours says what its modules are called",
    "architecture/table.py": "the same class: where its config counts heads",
    "cli/conversions.py": "the next command to type",
    "demo/run.py": "the conversions that the demo shows",
    "provenance.py": "folders of versions whose recipes did not say it themselves",
    "uptrain/model/layerwise.py": "the next command to type",
    "uptrain/model/packed.py": "an argument of torch's function",
}
LATE = {  # files whose imports inside functions are late for another reason than the time of starting up
    "upfit.convert.describe": "torch, which is not needed to tell that a model is not there",
    "upfit.evaluate.harness.harness": "lm-evaluation-harness is an extra",
    "upfit.longcontext.ask.backends": "torch, which one backend of several needs",
}
LARGEST_SHARE = 0.2  # of the package's lines
FLAT_FILES = {"convert": 8, "uptrain": 6}
GRAPH = grimp.build_graph("upfit", cache_dir=None)
FILES = sorted(name for name in GRAPH.modules if not name.rpartition(".")[2].startswith("test_"))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name: str) -> None:
    rooms = {room(other) for other in GRAPH.find_modules_directly_imported_by(name)} - {room(name)}
    if room(name) in ROOMS:
        assert rooms <= GROUND | ROOMS[room(name)]
    elif name == "upfit":
        assert rooms <= {"modeling"}  # whose model types it makes known
    elif room(name) not in ("api", "cli", "__main__"):
        assert rooms <= GROUND


def test_of_calibration_evaluate_sees_what_observes_alone() -> None:
    seen = {other for name in FILES if room(name) == "evaluate" for other in GRAPH.find_modules_directly_imported_by(name)}
    assert {name for name in seen if room(name) == "calibration"} <= {"upfit.calibration.observe"}


def test_of_convert_what_shows_results_sees_what_describes_them_alone() -> None:
    seen = {o for name in FILES if room(name) in ("report", "publish") for o in GRAPH.find_modules_directly_imported_by(name)}
    assert {name for name in seen if room(name) == "convert"} <= {
        f"upfit.convert.{name}" for name in ("describe", "recipe", "result")
    }


def test_nothing_but_the_command_line_imports_the_api() -> None:
    assert {room(name) for name in GRAPH.find_modules_that_directly_import("upfit.api")} == {"cli"}


def test_no_attention_imports_another() -> None:
    for name in (name for name in FILES if room(name) == "convert"):
        own = name.split(".")[2:3]
        others = {other.split(".")[2] for other in GRAPH.find_modules_directly_imported_by(name) if other.count(".") > 2}
        assert not others & ATTENTIONS - set(own), name


def test_rooms_that_all_attentions_share_name_none() -> None:
    """What such a room needs to know, the recipe says: in a field of Recipe, or in the measurements in recipe.json."""
    shared = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("test_")]
    shared = [path for path in shared if path.parts[0] != "modeling" and not set(path.parts) & ATTENTIONS]
    found = {path.as_posix(): named(path) for path in shared}
    assert {name for name, lines in found.items() if lines} == set(MAY_NAME_AN_ATTENTION), found


def named(path: Path) -> list[int]:
    """The lines of a file with an attention's name in a text that the program uses; docstrings may tell of papers."""
    words = re.compile(rf"(?<![a-z])({'|'.join(ATTENTIONS | set(find_recipes()))})(?![a-z])", re.IGNORECASE)
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text.lineno for text in texts if id(text) not in docs and words.search(str(text.value))]


def test_no_files_import_each_other_in_a_circle() -> None:
    tuple(TopologicalSorter({name: GRAPH.find_modules_directly_imported_by(name) for name in FILES}).static_order())


def test_imports_stand_inside_functions_only_where_starting_up_needs_them_late() -> None:
    """In what `upfit --help` and `import upfit.api` load; elsewhere they hide what a file needs."""
    code = "import sys, upfit.cli, upfit.api; print(*(name for name in sys.modules if name.startswith('upfit')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent).stdout
    late = set[str]()
    for path in (path for path in PACKAGE.rglob("*.py") if not path.name.startswith("test_")):
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        inside = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
        if any((node.module or "").startswith("upfit") for node in inside):
            late.add(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"))
    assert late - set(loaded.split()) == LATE.keys()


def test_accelerate_is_for_training() -> None:
    graph = grimp.build_graph("upfit", include_external_packages=True, cache_dir=None)
    assert {room(name) for name in graph.find_modules_that_directly_import("accelerate")} <= {"uptrain", "plan", "environment"}


def test_no_room_is_a_house() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("test_")]
    lines = Counter[str]()
    for path in paths:
        lines[path.relative_to(PACKAGE).parts[0]] += len(path.read_text(encoding="utf-8").splitlines())
    assert max(lines.values()) < LARGEST_SHARE * sum(lines.values())
    flat = Counter(path.parent.name for path in paths if path.parent.parent == PACKAGE)
    assert all(flat[name] <= most for name, most in FLAT_FILES.items())

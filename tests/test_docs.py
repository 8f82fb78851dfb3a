"""The documentation tells the truth: its commands run, its pages exist, its flags are the program's."""

import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.warm_python import warm_python
from upfit.convert.recipe import find_recipes

ROOT = Path(__file__).parent.parent
WORTH_TELLING = 0.02  # nats a token: what CPUs and patch versions of the library may change of the tutorial's figures
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "upfit").rglob("README.md"))]


@lru_cache
def help_of(*words: str) -> str:
    environment = {"COLUMNS": "200", "TERM": "dumb", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "upfit", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    """Every command works, and uptraining wins: by what the page says, where it says it of this Python."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", tutorial, re.DOTALL)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = "1"  # another worker has the other core
    with warm_python(environment) as python:
        shims = f'set -euo pipefail\nupfit() {{ "{python}" -m upfit "$@"; }}\npython() {{ "{python}" "$@"; }}\n'
        script = shims + "\n".join(blocks)
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 key/value heads" in done.stdout
    measured = [tuple(map(float, pair)) for pair in re.findall(r"Difference \(paired\): +(-?[\d.]+) ± ([\d.]+)", done.stdout)]
    (lost, _), (won, interval), (left, _) = measured
    assert left < lost and won + interval < 0, "it is better than it was, and not by chance"
    told = [tuple(map(float, pair)) for pair in re.findall(r"\| ([+-][\d.]+) ± ([\d.]+) \|", tutorial)]
    python_version = re.findall(r"Python (3\.\d+)'s library", tutorial)
    if python_version == ["{}.{}".format(*sys.version_info)]:
        assert sum(told, ()) == pytest.approx(sum(measured, ()), abs=WORTH_TELLING)


def run_all(pieces: list[str]) -> dict[str, Any]:
    """Run pieces of Python one after the other, in one namespace; which is returned."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, piece in enumerate(pieces):
        exec(compile(piece, f"piece {number}", "exec"), names)
    return names


@pytest.mark.slow
def test_the_notebook_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the steps of the tutorial, and uptraining wins."""
    monkeypatch.chdir(tmp_path)
    names = run_all(notebook())
    lost, won, left = (names[name].difference.nats_per_token for name in ("lost", "won", "left"))
    assert left.mean < lost.mean and won.high < 0, "it is better than it was, and not by chance"


def notebook() -> list[str]:
    """The code of the tutorial's notebook, a cell each."""
    content = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5) and len({cell["id"] for cell in content["cells"]}) > 1
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "what a machine answered is not kept"
    return ["".join(cell["source"]) for cell in cells]


def test_the_notebook_takes_the_steps_of_the_tutorial() -> None:
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?m)^upfit (\w+)", "".join(re.findall(r"```bash\n(.*?)```", tutorial, re.DOTALL)))
    assert re.findall(r"api\.(\w+)\(", "\n".join(notebook())) == ["describe" if name == "show" else name for name in commands]


@pytest.mark.slow
def test_the_page_of_functions_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    run_all(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    from upfit import api

    assert set(re.findall(r"(?m)^\| `(\w+)\(", page)) == set(api.__all__)


def prose(text: str) -> str:
    """A page without its blocks of code, whose comments look like headings."""
    return re.sub(r"(?ms)^```.*?^```", "", text)


def anchors(text: str) -> set[str]:
    """What GitHub lets links to a page end with: its headings in small letters, no punctuation, numbered where they repeat."""
    taken: dict[str, int] = {}
    for heading in re.findall(r"(?m)^#{1,6} +(.+?) *#*$", prose(text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        taken[slug] = taken.get(slug, -1) + 1
        if taken[slug]:
            taken[f"{slug}-{taken[slug]}"] = 0
    return set(taken)


def dead_links(page: Path) -> list[str]:
    """The links of a page to files that are not there, or to headings that a page does not have."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# The *first*, one\n## `upfit show`: 2 words\n## Twice\n## Twice\n```\n# no heading\n[no](link)\n```\n"
        "[a](#the-first-one) [b](page.md#upfit-show-2-words) [c](#twice-1) [d](https://example.org/#x) [e](page.md)\n"
        "[f](#no-heading) [g](other.md) [h](page.md#twice-2)\n"
    )
    assert dead_links(page) == ["#no-heading", "other.md", "page.md#twice-2"]


def test_rows_of_tables_stand_once() -> None:
    """No flag has two rows in a page's table."""
    for page in LINKED_PAGES:
        for table in re.findall(r"(?m)(?:^\|.*\n)+", page.read_text(encoding="utf-8")):
            flags = re.findall(r"(?m)^\| `(--[^`]+)`", table)
            assert len(flags) == len(set(flags)), f"{page.name}: {[flag for flag in flags if flags.count(flag) > 1]}"


def test_the_page_of_architectures_is_up_to_date() -> None:
    from scripts.write_architectures_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_tables_of_rooms_are_up_to_date(name: str) -> None:
    """What a room is stands in its docstring, what it may import in the test that holds it; pages repeat both."""
    from scripts.write_rooms_tables import page

    assert (ROOT / name).read_text(encoding="utf-8") == page(ROOT / name), "run: python scripts/write_rooms_tables.py"


def test_the_tree_in_the_design_is_the_house() -> None:
    """Every folder of the package stands in the tree, and nothing else."""
    tree = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("\n## The tree\n")[1].split("```")[1]
    told, room = set(), ""
    for indent, name in re.findall(r"^(  |    )(\w+)/ ", tree, re.MULTILINE):
        room = name if indent == "  " else room
        told.add(name if name == room else f"{room}/{name}")
    package = ROOT / "upfit"
    folders = [path for path in package.rglob("*") if path.is_dir() and "__pycache__" not in path.parts]
    assert told == {path.relative_to(package).as_posix() for path in folders}


@pytest.mark.slow
def test_every_verb_has_its_goal() -> None:
    """The page of goals names every verb, and only flags that the verb has."""
    page = (ROOT / "docs" / "which-command.md").read_text(encoding="utf-8")
    commands = [command.split() for command in re.findall(r"`upfit ([^`]+)`", page)]
    assert {words[0] for words in commands} == set(re.findall(r"^│ (\w+) ", help_of(), re.MULTILINE))
    for words in commands:
        flags = {word for word in words if word.startswith("--")}
        asked = words[:2] if words[0] == "convert" else words[:1]
        assert not flags or flags <= set(re.findall(r"--[a-z][a-z-]+", help_of(*asked))), words


def test_the_page_of_settings_is_up_to_date() -> None:
    from scripts.write_settings_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_verb_has_a_page() -> None:
    verbs = set(re.findall(r"^│ (\w+) ", help_of(), re.MULTILINE))
    told = " ".join(page.read_text(encoding="utf-8").splitlines()[0] for page in PAGES)
    assert verbs >= {"convert", "uptrain", "evaluate"}
    assert all(verb in told for verb in verbs), f"no page's title names one of {verbs}"


@pytest.mark.parametrize(
    "verb", ["convert gqa", "calibrate", "merge", "prepare", "plan", "uptrain", "evaluate", "report", "push", "synth", "demo"]
)
def test_flags_in_a_page_exist(verb: str) -> None:
    """Every --flag that a verb's page mentions is one of the verb's (or named as another program's)."""
    page = (ROOT / "docs" / f"{verb.split()[0]}.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    others = {"--nproc-per-node", "--nproc_per_node", "--standalone", "--shutdown-timeout", "--signals-to-handle"}
    others |= {"--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    attentions = [help_of("convert", name) for name in find_recipes()]
    known = set(
        re.findall(
            r"--[a-z][a-z-]+",
            " ".join([*(help_of(*words.split()) for words in (verb, "uptrain", "evaluate", "synth")), *attentions]),
        )
    )
    assert mentioned - others <= known

"""An attention is one folder: the one that docs/add-an-attention.md builds is found and works with no other file touched.

Its files and the commands that are run are those of the page, word for word.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.folders import save_tiny
from tests.warm_python import warm_python

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "add-an-attention.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(upfit/[\w./]+)`[^\n]*:\n\n```\w+\n(.*?)```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```bash\n(.*?)```$", PAGE, re.MULTILINE | re.DOTALL)[-1]
FOLDER = "upfit/convert/temperature"
pytestmark = pytest.mark.xdist_group("one_folder")  # one copy for all
COPIED = ("upfit", "tests", "conftest.py", "pyproject.toml")


@dataclass(frozen=True)
class Checkout:
    """A copy of Upfit in which the attention has been committed, and a program that runs it."""

    folder: Path
    python: str
    environment: dict[str, str]

    def run(self, *words: str) -> str:
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, env=self.environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def upfit(self, command: str) -> str:
        return self.run(self.python, "-m", *shlex.split(command))


def commit(folder: Path, message: str) -> None:
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message], check=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    commit(folder, "Upfit as it is")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    commit(folder, "An attention")
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    environment = {"PATH": path, "HF_HUB_OFFLINE": "1", "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", "TERM": "dumb"}
    save_tiny(folder / "home" / "model")
    words = [f"{number} and {number + 1} make {2 * number + 1}." for number in range(2000)]
    (folder / "home" / "text.txt").write_text("\n".join(words), encoding="utf-8")
    with warm_python(environment, folder) as python:
        yield Checkout(folder, python, environment)


def test_the_commit_touches_one_folder(checkout: Checkout) -> None:
    stat = checkout.run("git", "show", "--stat=200", "--format=", "HEAD").splitlines()
    touched = [line.split("|")[0].strip() for line in stat if "|" in line]
    assert sorted(touched) == sorted(FILES) and f"{len(FILES)} files changed" in stat[-1]
    assert {name.rpartition("/")[0] for name in touched} == {FOLDER}
    assert {"__init__.py", "recipe.py", "README.md"} <= {name.rpartition("/")[2] for name in touched}


def test_its_code_is_as_clean_as_the_rest(checkout: Checkout) -> None:
    for words in (("check",), ("format", "--check")):
        checkout.run(sys.executable, "-m", "ruff", *words, "--no-cache", FOLDER)


def commands(program: str) -> list[str]:
    return [line for line in COMMANDS.splitlines() if line.startswith(program + " ")]


@pytest.mark.slow
def test_the_commands_of_the_page_run(checkout: Checkout) -> None:
    """It is listed, offered, planned, converted, verified, uptrained and evaluated."""
    places = {"$MODEL": str(checkout.folder / "home" / "model"), "$TEXT": str(checkout.folder / "home" / "text.txt")}
    said: dict[str, str] = {}
    for line in commands("upfit"):
        command = re.sub(r"\$[A-Z]+", lambda name: places[name[0]], line)
        said[line] = checkout.upfit(command)
        assert (checkout.folder / "sharper").exists() != (len(said) < 4), "a dry run writes nothing"
    listed, shown, planned, converted, *_, evaluated, _ = said.values()
    assert re.search(r"\btemperature\b", listed) and "temperature --temperature T" in shown
    assert "queries / 0.8" in planned and "Would write" in planned
    assert "Wrote sharper" in converted and "Verified" in converted
    assert "Difference (paired)" in evaluated
    assert "Conversion: convert temperature" in (checkout.folder / "better.html").read_text(encoding="utf-8")
    steps = json.loads((checkout.folder / "better" / "recipe.json").read_text())["steps"]
    assert [step["verb"] for step in steps] == ["convert temperature", "uptrain"]
    assert steps[0]["options"]["temperature"] == 0.8 and steps[0]["measurements"]["leaves"] == "fitted"
    assert steps[1]["stage"] == "lm", "it goes by the state that the recipe wrote"


@pytest.mark.slow
def test_its_own_test_and_the_laws_hold(checkout: Checkout) -> None:
    said = ""
    for line in commands("pytest"):
        said += checkout.run(sys.executable, "-m", *shlex.split(line, comments=True), "-n", "0", "-rA")
    for name in ("test_scores_are_divided", "test_identity", "test_dry_is_real", "test_the_cache_is_as_told"):
        assert re.search(rf"^PASSED .*{name}", said, re.MULTILINE), said
    assert not re.search(r"^(FAILED|SKIPPED)", said, re.MULTILINE)


@pytest.mark.slow
def test_it_is_what_it_says(checkout: Checkout) -> None:
    """Python knows it, at temperature 1 nothing changes, and a setting that cannot be is one line that says what can."""
    model, script = checkout.folder / "home" / "model", checkout.folder / "home" / "notebook.py"
    script.write_text(f"from upfit import api\nprint(api.convert({str(model)!r}, 'flat', to='temperature', temperature=2.0))\n")
    assert "Wrote flat" in checkout.run(checkout.python, str(script))
    assert "equal" in checkout.upfit(f"upfit convert temperature {model} same --temperature 1")
    command = [checkout.python, "-m", *f"upfit convert temperature {model} none --temperature 0".split()]
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, env=checkout.environment)
    assert done.returncode == 1 and "--temperature got 0.0; give a number from 0.1 to 10" in done.stderr

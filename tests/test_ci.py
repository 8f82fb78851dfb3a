"""What CI runs besides the newest versions is what pyproject.toml says is the oldest."""

import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
NOT_THERE = {"torch"}  # .ci/oldest.txt says why


def lower_bounds() -> dict[str, Version]:
    """The oldest version of each dependency that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [Requirement(line) for line in project["dependencies"]]
    return {one.name: Version(next(part.version for part in one.specifier if part.operator == ">=")) for one in required}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: Version(pin) for name, pin in pins.items()} == {
        name: version for name, version in lower_bounds().items() if name not in NOT_THERE
    }


def test_the_oldest_part_is_of_files_that_are_there() -> None:
    """A file that was renamed would stop the run, but one that was taken out with its last test would not be missed."""
    files = [line for line in (ROOT / ".ci" / "oldest-tests.txt").read_text(encoding="utf-8").split() if line]
    assert files and all((ROOT / name.partition("::")[0]).exists() for name in files)


def test_nothing_that_was_fetched_is_committed() -> None:
    """Packages and archives come from where they are published."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in files if name.endswith((".whl", ".gz", ".zip", ".pt", ".bin"))]

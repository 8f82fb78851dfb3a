"""A pytest plugin that writes how long each test that passes took, to the file named in MUTANT_DURATIONS."""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

seconds: dict[str, float] = defaultdict(float)
failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("@")[0]  # xdist adds the group
    seconds[name] += report.duration
    if report.outcome != "passed":
        failed.add(name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        known = {name: round(time, 3) for name, time in seconds.items() if name not in failed}
        Path(os.environ["MUTANT_DURATIONS"]).write_text(json.dumps(known))

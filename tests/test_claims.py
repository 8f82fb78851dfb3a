"""The README's figures are those of dated results.

A comment before a table or paragraph names files of benchmarks/results, and under each, in the order of the page, a format and
where in the file the figure stands: `.3f` a number, `.3f±` a mean and half of its interval, `.2f/1e3` a number divided.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- figures\n(.*?)\n-->\n(.*?)(?=\n\n|\n- |\n<!--|\Z)", re.DOTALL)
# What looks measured: a decimal, an interval, thousands with a comma, per cent.
MEASURED = re.compile(r"[+−-]?\d+\.\d+|± ?\d+|\b\d{1,3},\d{3}\b|\d+ ?%")
NOT_MEASURED = ("95 %", "Python 3.11", "Apache-2.0", "arXiv 2404.16811")


def at(result: Any, path: str) -> Any:
    for key in path.split("."):
        result = result[int(key)] if isinstance(result, list) else result[key]
    return result


def written(form: str, value: Any) -> str:
    """A figure as the page has it: `value` is a number, or an interval with `mean` and `low`."""
    form, _, divisor = form.partition("/")
    with_interval = form.endswith("±")
    form = form.rstrip("±")
    mean = value["mean"] if isinstance(value, dict) else value
    text = format(mean / float(divisor or 1), form)
    if with_interval:
        text += " ± " + format(value["mean"] - value["low"], form.lstrip("+"))
    return text.replace("-", "−")


def figures(comment: str, results: Path = RESULTS) -> Iterator[tuple[str, str]]:
    """(the figure, where it stands) for each line of a comment."""
    name, result = "", None
    for line in comment.splitlines():
        if line.endswith(".json"):
            name, result = line, json.loads((results / line).read_text(encoding="utf-8"))
        else:
            form, path = line.split(" ", 1)
            yield written(form, at(result, path)), f"{name}: {path}"


def unmatched(page: str, results: Path = RESULTS) -> list[str]:
    """Figures of results that do not stand where the page should have them, and figures of the page that no result has."""
    wrong, rest = [], page
    for comment, block in BLOCK.findall(page):
        position = 0
        left = block
        for figure, where in figures(comment, results):
            match = re.compile(rf"(?<![\d.,+−]){re.escape(figure)}(?![\d]|[.,]\d)").search(left, position)
            if match is None:
                wrong.append(f"{figure} ({where}) is not in: {block[:60]}")
            else:
                left, position = left[: match.start()] + left[match.end() :], match.start()
        rest = rest.replace(block, left)
    rest = re.sub(r"(?ms)<!--.*?-->|^```.*?^```|`[^`\n]*`|\]\([^)]*\)", "", rest)
    for words in NOT_MEASURED:
        rest = rest.replace(words, "")
    return wrong + [f"{match[0]} has no result" for match in MEASURED.finditer(rest)]


def test_the_readme_has_the_figures_of_the_results() -> None:
    assert len(BLOCK.findall(README)) >= 6
    assert unmatched(README) == []


def test_every_result_of_the_readme_stands_with_its_script_and_date() -> None:
    section = README.split("\n## Where the figures come from\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if "benchmarks/results/" in row]
    linked = set()
    for row in rows:
        date, name = re.findall(r"\[([\d-]+)\]\(benchmarks/results/([^)]+)\)", row)[0]
        scripts = re.findall(r"\]\(([^)]+\.py)\)", row)
        assert name.startswith(date) and scripts and all((ROOT / script).exists() for script in scripts), row
        linked.add(name)
    used = set(re.findall(r"(?m)^(\S+\.json)$", "\n".join(comment for comment, _ in BLOCK.findall(README))))
    assert used == linked


@pytest.mark.parametrize(
    "other", ["+0.301 ± 0.02", "+0.30 ± 0.021", "+0.30 ± 0.02 and 3.1", "+0.30", "-0.30 ± 0.02", "12 % of +0.30 ± 0.02"]
)
def test_another_figure_is_seen(other: str, tmp_path: Path) -> None:
    (tmp_path / "2026-01-01-x.json").write_text(json.dumps({"rows": [{"loss": {"mean": 0.3, "low": 0.28, "high": 0.32}}]}))
    page = "Words.\n\n<!-- figures\n2026-01-01-x.json\n+.2f± rows.0.loss\n-->\nIt loses {} nats.\n\nMore.\n"
    assert unmatched(page.format("+0.30 ± 0.02"), tmp_path) == []
    assert unmatched(page.format(other), tmp_path) != []


def test_the_numbers_of_architectures_are_those_of_their_page() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    sections = {words.split(" (")[0]: text for words, text in re.findall(r"(?ms)^## (.*?)$(.*?)(?=^## |\Z)", page)}
    counts = {name: int(count) for name, count in re.findall(r"(?m)^## (.*?) \((\d+)\)$", page)}
    tested = counts["Tested"] + counts["Tested, as a class of ours"]
    untested = counts["Supported by the same rule, not tested"]
    others = [n for n in re.findall(r"(?m)^\| (\w\S*) \| [a-z_ ]+ \|$", sections["Converted as another type"]) if n != "model"]
    listed = set(re.findall(r"[\w-]+", sections["Tested"] + sections["Tested, as a class of ours"]))
    supported = tested + untested + len(set(others) - listed)
    assert f"the laws, on {tested} architectures" in README
    assert f"**{supported} of transformers' model types**, all but {untested} of them tested" in README

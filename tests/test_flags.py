"""The flags of every command: a list that grows by decision, early refusals, and those that became keys of the config file."""

import dataclasses
import difflib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.test_docs import PAGES
from tests.uptraining import Workshop, make_workshop, one_thread, weights
from upfit import provenance
from upfit.cli import app
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import PROBES
from upfit.evaluate.options import Options as Measure
from upfit.longcontext.options import Options as Ask
from upfit.options import as_flags, as_keys, check, choices, help_of, option, range_words, same_option, shown
from upfit.provenance import config_lines
from upfit.uptrain.config import Config, resolve

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests" / "flags.txt"
KEYS = [field for field in dataclasses.fields(Config) if not field.metadata["flag"]]
DECIDE = (
    "The flags of the commands are not those of tests/flags.txt. One more is one more thing that every user reads: decide in "
    "an issue whether it is a flag, a key of a config file (`option(..., flag=False)`), or a default that is right. Then "
    "change the list with the code, in one commit, and tell it in CHANGELOG.md."
)


def commands(group: Any, name: str = "upfit") -> Iterator[tuple[str, Any]]:
    for word, command in sorted(getattr(group, "commands", {}).items()):
        yield from commands(command, f"{name} {word}")
    yield name, group


def listed() -> str:
    """A line for each flag of each command that its help shows."""
    lines = []
    for name, command in commands(get_command(app)):
        seen = [parameter for parameter in command.params if not getattr(parameter, "hidden", True)]
        spelled = {word for one in seen for word in (*one.opts, *one.secondary_opts) if word.startswith("--")}
        lines += [f"{name} {word}" for word in sorted(spelled - {"--help"})]
    return "\n".join(lines) + "\n"


def test_a_flag_is_a_decision() -> None:
    frozen, now = FROZEN.read_text(encoding="utf-8"), listed()
    lines = difflib.unified_diff(frozen.splitlines(), now.splitlines(), "tests/flags.txt", "the commands", lineterm="", n=0)
    assert frozen == now, "\n".join([DECIDE, *lines])


def test_what_most_runs_need_are_flags_and_no_more() -> None:
    assert sum(field.metadata["flag"] for field in dataclasses.fields(Config)) <= 15


def run(*words: Any) -> tuple[int, str]:
    """Exit status and stderr of `upfit`, which must not have imported torch."""
    code = (
        "import sys\nimport upfit.cli\ntry:\n    upfit.cli.main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n    assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stderr


EARLY = {
    "a flag of uptrain": (["uptrain", "M", "D", "O", "--length", 1], "--length got 1; it takes 2 or more"),
    "a key": (["uptrain", "M", "D", "O", "--config", "FILE"], "clip got 0; it takes a number above 0"),
    "a stage's table": (["uptrain", "M", "D", "O", "--config", "TABLE"], "keep got 0; it takes 1 or more"),
    "plan": (["plan", "M", "--tokens", "1M", "--mfu", "1.5"], "--mfu got 1.5; it takes a number above 0 and at most 1"),
    "plan, as uptrain": (["plan", "M", "--length", 1], "--length got 1; it takes 2 or more"),
    "evaluate": (["evaluate", "M", "--windows", 0], "--windows got 0; it takes 1 or more"),
    "a list": (
        ["evaluate", "M", "--probe-length", 512, "--probe-length", 8],
        "--probe-length got [512, 8]; it takes 64 or more",
    ),
    "synth": (
        ["synth", "T", "O", "--tokenizer", "M", "--short-share", 2],
        "--short-share got 2.0; it takes a number from 0 to 1",
    ),
    "convert": (["convert", "cope", "A", "B", "--positions", 1], "--positions got 1; it takes 2 or more"),
    "company": (
        ["convert", "diff", "A", "B", "--variant", "dex", "--noise", "0.1"],
        "--noise goes with --variant v2 or v2-static, not dex; leave it out",
    ),
    "a choice": (["convert", "diff", "A", "B", "--variant", "v9"], "--variant 'v9' is not known; choose one of v2"),
}


@pytest.mark.parametrize(("words", "line"), EARLY.values(), ids=EARLY)
def test_a_value_out_of_range_is_refused_before_torch_is_imported(tmp_path: Path, words: list[Any], line: str) -> None:
    (tmp_path / "FILE").write_text('tokens = "1M"\nclip = 0\n')
    (tmp_path / "TABLE").write_text('tokens = "1M"\nstages = "lm"\n[lm]\nkeep = 0\n')
    status, told = run(*(tmp_path / word if word in ("FILE", "TABLE") else word for word in words))
    assert status == 1 and told.startswith(f"upfit: {line}") and told.count("\n") == 1


WORDS = {"share": "5%", "original_tokens": "2T", "trainable": "attention", "questions": 'a "folder"', "mix_share": "0.5"}


@pytest.mark.parametrize("field", KEYS, ids=lambda field: field.name)
def test_a_flag_that_became_a_key_says_where_to_write_it(tmp_path: Path, field: dataclasses.Field) -> None:
    """What it tells to write is a line that the file may have, and means what the flag meant."""
    word, value = "--" + field.name.replace("_", "-"), WORDS.get(field.name, "1")
    if isinstance(field.default, bool):
        word, value = (word, "true") if not field.default else (word.replace("--", "--no-"), "false")
    done = CliRunner().invoke(app, ["uptrain", "M", "D", "O", word, *[value] * (not isinstance(field.default, bool))])
    assert isinstance(done.exception, UpfitError)
    told = str(done.exception)
    line = f"{field.name} = {json.dumps(value) if field.name in WORDS and field.name != 'mix_share' else value}"
    assert told == f"{word} is a key of the config file now: write {line} into a TOML file and give --config FILE"
    (tmp_path / "config.toml").write_text(line)
    assert str(getattr(resolve(tmp_path / "config.toml", {}), field.name)).lower().removesuffix(".0") == value.lower()


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "upfit").rglob("README.md")], ids=lambda page: page.parent.name + page.name)
def test_no_page_gives_a_key_as_a_flag(page: Path) -> None:
    """The log tells what was done when it was done."""
    flags = {line.split()[-1] for line in listed().splitlines()}
    keys = {prefix + field.name.replace("_", "-") for field in KEYS for prefix in ("--", "--no-")} - flags
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8"))) & keys
    assert page.name == "log.md" or not named


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_thread():
        yield make_workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"clip": 0.01, "document_mask": False}], ids=["flags alone", "keys"])
def test_the_command_that_a_run_records_gives_it_again(shop: Workshop, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where flags cannot say it: then by the settings that lie beside the result."""
    shop.run(tmp_path / "out", **{"tokens": "256", "holdout": Config().holdout, **changes})
    step, before = provenance.read(tmp_path / "out")[-1], weights(tmp_path / "out")
    words = shlex.split(step["command"])
    assert ("--config" in words) == bool(changes) and step.get("config", {}) == changes
    assert "\n".join(config_lines(step)) == ("clip = 0.01\ndocument_mask = false" if changes else "")
    done = CliRunner().invoke(app, [*words[1:], "--overwrite", "--quiet"])
    assert done.exception is None, done.exception
    again = provenance.read(tmp_path / "out")[-1]
    assert weights(tmp_path / "out") == before and again["options"] == step["options"] and again["command"] == step["command"]


def test_report_and_card_tell_what_the_config_file_said() -> None:
    from upfit.publish import card
    from upfit.report import sections

    told = {"command": "upfit uptrain m d o --config o/uptrain.toml", "config": {"clip": 0.1, "lm": {"teacher": "a_b"}}}
    step = {"verb": "convert gqa", "source": {}, "date": "2026-11-30", "versions": {}, "measurements": {}, **told}
    said = 'Its config file says `clip = 0.1`, <code>[lm]</code>, <code>teacher = "a_b"</code>.'
    assert str(card._step(step, 1)["texts"][1]) == said
    (line,) = sections._history([step, step]).texts
    assert line == 'In the config file of convert gqa: clip = 0.1, [lm], teacher = "a_b".'
    assert sections._history([{**step, "config": {}}]).texts == []


@dataclasses.dataclass(frozen=True)
class Ranges:
    """One option of each kind of range."""

    count: int = option(1, at_least=1, help="a count")
    rate: float | None = option(None, above=0, help="a rate")
    share: float = option(0.5, at_least=0, at_most=1, help="a share")
    part: float = option(0.5, above=0, below=1, help="a part")
    most: int = option(3, at_most=7, help="a number")
    lengths: list[int] | None = option(None, at_least=8, help="lengths")
    mode: Literal["a", "b"] = option("a", flag=False, help="a key")
    depth: int = option(1, flag=False, at_least=1, help="a key with a range")


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("count", [1, 5], [0, -1], "1 or more"),
        ("rate", [1e-9, None], [0, -1.0], "a number above 0"),
        ("share", [0, 1, 0.3], [-0.1, 1.1], "a number from 0 to 1"),
        ("part", [0.1, 0.9], [0, 1, 2.0], "a number above 0 and below 1"),
        ("most", [7, -9], [8], "a number at most 7"),
        ("lengths", [[8], [9, 10], None], [[], [8, 7]], "8 or more"),
        ("depth", [1], [0], "1 or more"),
    ],
)
def test_ranges(name: str, good: list[Any], bad: list[Any], words: str) -> None:
    for value in good:
        check(dataclasses.replace(Ranges(), **{name: value}))
    for value in bad:
        with pytest.raises(UpfitError) as caught:
            check(dataclasses.replace(Ranges(), **{name: value}))
        assert str(caught.value) == f"{shown(Ranges, name)} got {value}; it takes {words}"


@dataclasses.dataclass(frozen=True)
class Companions:
    """Options that go with others."""

    mode: Literal["a", "b", "c"] = option("a", help="a mode")
    names: list[str] | None = option(None, help="names")
    noise: float = option(0.0, goes_with=("mode", "b", "c"), help="noise")
    refit: bool = option(True, goes_with=("mode", "c"), help="refit")
    depth: int | None = option(None, goes_with=("names", "x", "y"), help="depth")
    most: int | None = option(None, goes_with=("names",), help="most")


COMPANY = {
    "a value": ({"noise": 0.5}, "--noise goes with --mode b or c, not a; leave it out", {"mode": "c"}),
    "a switch": ({"refit": False}, "--no-refit goes with --mode c, not a; leave it out", {"mode": "c"}),
    "one of a list": (
        {"depth": 2, "names": ["z", "w"]},
        "--depth goes with --names x or y, not z and w; leave it out",
        {"names": ["z", "y"]},
    ),
    "nothing there": ({"depth": 2}, "--depth goes with --names x or y; add --names x or y, or leave it out", {"names": ["x"]}),
    "anything": ({"most": 2}, "--most goes with --names; add --names, or leave it out", {"names": ["w"]}),
}


@pytest.mark.parametrize(("given", "line", "mended"), COMPANY.values(), ids=COMPANY)
def test_an_option_that_does_nothing_is_refused(given: dict[str, Any], line: str, mended: dict[str, Any]) -> None:
    with pytest.raises(UpfitError) as caught:
        check(Companions(**given))
    assert str(caught.value) == line
    check(Companions(**{**given, **mended}))


def test_the_help_tells_with_what_an_option_goes() -> None:
    texts = [help_of(Companions, field) for field in dataclasses.fields(Companions)]
    assert texts[1:4] == ["names", "with --mode b or c: noise", "with --mode c: refit"] and texts[5] == "with --names: most"


@pytest.mark.parametrize("settings", [*(recipe.options for recipe in find_recipes().values()), Ask, Measure, Config])
def test_company_is_there(settings: type) -> None:
    """What an option goes with is an option, and the values are some of its own."""
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.metadata["goes_with"]:
            other, *values = field.metadata["goes_with"]
            known = PROBES if other == "probe" else choices(hints[other]) or ()
            assert set(values) <= set(known)


def test_keys_are_no_flags() -> None:
    assert shown(Ranges, "count") == "--count" and shown(Ranges, "depth") == "depth"
    assert as_flags(Ranges(count=2, depth=3)) == ["--count", "2"]
    assert as_keys(Ranges(count=2, depth=3, mode="b")) == {"depth": 3, "mode": "b"} and as_keys(Ranges(count=2)) == {}


def test_an_option_of_another_verb_is_the_same_and_a_flag() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other:
        depth: int = same_option(Ranges, "depth", help="other words")

    (field,) = dataclasses.fields(Other)
    assert field.default == 1 and field.metadata["help"] == "other words" and shown(Other, "depth") == "--depth"
    assert range_words(field.metadata) == "1 or more"

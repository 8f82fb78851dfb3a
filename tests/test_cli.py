"""The command line: fast help, one-line errors, data on stdout and the rest on stderr."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny
from upfit import provenance
from upfit.architecture.listing import NOT_LOOKED_AT
from upfit.cli.training import source_of
from upfit.convert.result import Change, Verification, cache_words, change_rows, sanity_words
from upfit.errors import UpfitError
from upfit.options import as_flags, parse_count, parse_share, parse_size

ROOT = Path(__file__).parent.parent


def upfit(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "upfit", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_a_recorded_command_can_be_given_again() -> None:
    from typer.main import get_command

    from upfit.cli import app
    from upfit.convert.recipe import find_recipes
    from upfit.uptrain.config import Config

    for settings, words in (
        (find_recipes()["gqa"].options(kv_heads=2, calibration=["a b", "c"], refit=False), ["convert", "gqa", "A", "B"]),
        (find_recipes()["diff"].options(variant="split", naive=True), ["convert", "diff", "A", "B"]),
        (Config(tokens="2M", document_mask=False, learning_rate=3e-5), ["uptrain", "A", "B", "C"]),
    ):
        command: Any = get_command(app)
        given = [*words, *as_flags(settings)]
        while hasattr(command, "commands"):
            command = command.commands[given.pop(0)]
        parsed = command.make_context("x", given).params
        parsed = {field.name: parsed[field.name] for field in dataclasses.fields(settings) if parsed[field.name] is not None}
        assert as_flags(type(settings)(**parsed)) == as_flags(settings) != []


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['upfit', 'convert', 'gqa', '--help']\nimport upfit.cli\n" + (
        "try:\n    upfit.cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--kv-heads" in done.stdout


def test_layers_that_change_alike_share_a_row_of_a_dry_run() -> None:
    odd = {3: [2, 8]}
    changes = [Change("embed", None, [1], "new")]
    changes += [Change(f"layers.{n}.experts.7.k", [8, 8], odd.get(n, [4, 8]), "mean") for n in (0, 1, 2, 3, 4, 6, 10)]
    assert change_rows(changes) == [
        ["embed", "[]", "[1]", "new"],
        ["layers.0-2,4,6,10.experts.7.k", "[8, 8]", "[4, 8]", "mean"],
        ["layers.3.experts.7.k", "[8, 8]", "[2, 8]", "mean"],
    ]


def test_convert_and_show_as_json(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    done = upfit("convert", "gqa", str(source), str(tmp_path / "out"), "--kv-heads", "2", "--method", "mean", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["kv_heads"] == [4, 2] and answer["kv_bytes_per_token"] == [512, 256]
    told = json.loads(upfit("show", str(tmp_path / "out"), "--json").stdout)
    assert told["kv_heads"] == [2] and told["heads"] == [4] and told["kv_bytes_per_token"] == 256
    assert [step["verb"] for step in told["history"]] == ["convert gqa"]


def test_a_mistake_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = upfit("convert", "gqa", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--kv-heads", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("upfit: no model folder at ") and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = upfit("--debug", "show", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("words", [["convert", "gqa", "a", "b"], ["nonsense"], ["show", "a", "--nonsense"]])
def test_usage_errors_exit_2(words: list[str]) -> None:
    assert upfit(*words).returncode == 2


def test_list_and_env() -> None:
    told = json.loads(upfit("list", "--json").stdout)
    assert {"gqa", "mqa"} <= {recipe["name"] for recipe in told["recipes"]}
    types = told["model_types"]
    assert (
        types["llama"]["how"] == "supported"
        and types["t5"]["how"] == "own class"
        and "latent" in types["deepseek_v3"]["why"]
        and types["vit"]["why"]
    )
    assert not [name for name, one in types.items() if one.get("why") == NOT_LOOKED_AT], "the table lacks types"
    assert json.loads(upfit("env", "--json").stdout)["upfit"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("300kb", 300_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "5 parsecs", "1e999GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UpfitError, match="500MB or 5GB"):
        parse_size(text, "--max-shard-size")


@pytest.mark.parametrize(("text", "count"), [("50k", 50_000), ("1.5M", 1_500_000), ("2T", 2 * 10**12), ("12_000", 12_000)])
def test_counts(text: str, count: int) -> None:
    assert parse_count(text, "--tokens") == count


@pytest.mark.parametrize("text", ["", "k", "-5", "0", "many", "1e400"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(UpfitError, match="--tokens got"):
        parse_count(text, "--tokens")


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, "--share") == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "101%", "5", "nan", "x"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UpfitError, match="--share got"):
        parse_share(text, "--share")


def test_a_cache_is_said_to_grow_where_it_grows() -> None:
    """Gate keys of contextual positions are cached too, with no head more."""
    grown = cache_words([3, 3], [46080, 69120])
    assert grown == "KV cache 46.1 kB → 69.1 kB a token (1.50x larger)"
    shrunk = cache_words([3, 1], [46080, 15360])
    assert shrunk == "3 → 1 key/value heads, KV cache 46.1 kB → 15.4 kB a token (3.00x smaller)"


def test_the_loss_on_the_sample_is_told_as_a_sanity_check() -> None:
    report = Verification("", "", 512, False, 0.1, source_loss=2.0, loss=2.004, loss_interval=0.05)
    told = sanity_words(report)
    assert told.startswith("Sanity check on 512 tokens") and "2.000 → 2.004 (+0.004 ± 0.050)" in told and "evaluate" in told
    assert "±" not in sanity_words(dataclasses.replace(report, loss_interval=None))


@pytest.mark.parametrize(("before", "after"), [(96, 32), (32, 96), (64, 64), (100, 50), (50, 100), (0, 8), (8, 0)])
def test_one_phrase_tells_what_became_of_a_cache(before: int, after: int) -> None:
    """On the command line, in the report and in the card; and it never says that what has grown is smaller."""
    from upfit.output import cache_change
    from upfit.publish import card
    from upfit.report import sections

    phrase = cache_change(before, after)
    assert ("smaller" in phrase) == (0 < after < before) and ("larger" in phrase) == (after > before > 0)
    told = {"kv_bytes_per_token": [before, after]}
    step = {"verb": "convert gqa", "date": "2026-11-29", "versions": {}, "measurements": told}
    assert cache_words([2, 2], [before, after]) == phrase
    if before != after:
        assert card._step(step, 1)["texts"] == [f"{phrase}."] == sections._conversion(step, 1)[0].texts


def test_the_source_of_an_uptrained_model_is_named_for_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that was given where it still leads there, else by its place; a hub model with its revision."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()

    def named(**source: object) -> str:
        steps = [provenance.step("convert gqa", {"revision": None, "path": None, **source}, {})]
        provenance.write(tmp_path, steps)
        return source_of(tmp_path)

    assert source_of(tmp_path / "source") == "SOURCE"
    assert named(name="source", path=str(tmp_path / "source")) == "source"
    assert named(name="../elsewhere/source", path=str(tmp_path / "source")) == str(tmp_path / "source")
    assert named(name="org/model", path=str(tmp_path / "source"), revision="abc") == "org/model@abc"
    assert named(name="org/model") == "org/model"

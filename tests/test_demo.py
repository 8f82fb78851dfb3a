"""The embedded model is what its card says, and the demo runs on it without a network."""

import json
from pathlib import Path

import pytest

from benchmarks.parts import shared_runs
from tests.records import evaluate
from upfit import provenance
from upfit.convert.describe import describe
from upfit.demo import embedded_model, run
from upfit.demo.run import CONVERSIONS, check_free, run_demo
from upfit.demo.show import show
from upfit.demo.text import standard_library
from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.output import Output
from upfit.text import Document

QUIET = Output(quiet=True)


def test_the_embedded_model_is_small_and_multi_head() -> None:
    told = describe(str(embedded_model()))
    assert told.heads == told.kv_heads == [8]
    assert told.dtypes == ["BF16"] and told.bytes < 8e6
    card = (embedded_model() / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and f"{told.parameters / 1e6:.2f} M" in card


@pytest.mark.slow
def test_the_embedded_model_knows_some_python() -> None:
    """An untrained model has log 2048 = 7.6 nats a token."""
    held_out = [str(path) for path in standard_library()[1]]
    told = evaluate(str(embedded_model()), Options(data=held_out, windows=8), QUIET)
    assert told["model"]["loss"]["nats_per_token"]["mean"] < 3.5


def test_training_and_held_out_files_are_apart() -> None:
    training, held_out = standard_library()
    assert not set(training) & set(held_out)
    assert len(training) > 5 * len(held_out) > 50


def test_held_out_files_repeat_little_of_the_training_files() -> None:
    """Files that repeat another one are left out: 2.1 % of the runs of 16 words were shared before, and 0.8 % are now."""
    training, held_out = ([Document(path.read_text("utf-8"), path.name) for path in files] for files in standard_library())
    assert shared_runs(held_out, training) < 0.012


@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(run, "CALIBRATION_TOKENS", "3k")
    monkeypatch.setattr(run, "WINDOWS", 8)
    monkeypatch.setattr(run, "CONVERSIONS", CONVERSIONS[:2])  # aligned and mean; the others take as long and differ in a flag
    result = run_demo(tmp_path / "demo", "20k", False, QUIET)
    show(result, QUIET)
    source = result["source"]
    held_out = [str(path) for path in standard_library()[1]]
    folder = tmp_path / "demo" / "gqa-2-mean"
    measured = evaluate(str(folder), Options(against=str(embedded_model()), data=held_out, length=512, windows=8), QUIET)
    assert measured["difference"]["nats_per_token"] == result["conversions"][1]["converted"]["difference"]
    assert measured["against"]["loss"]["nats_per_token"] == source["loss"]
    assert measured["against"]["cache"]["bytes_per_token"] == source["kv_bytes_per_token"]
    assert [row["name"] for row in result["conversions"]] == ["gqa-2-aligned", "gqa-2-mean"]
    for row in result["conversions"]:
        assert row["converted"]["difference"]["low"] > 0, "merging heads costs something"
        assert row["uptrained"]["loss"]["mean"] < row["converted"]["loss"]["mean"], "uptraining wins some of it back"
        assert row["converted"]["kv_bytes_per_token"] < source["kv_bytes_per_token"]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["source"] == source
    with pytest.raises(UpfitError, match="--overwrite"):
        run_demo(tmp_path / "demo", "20k", False, QUIET)


def test_what_a_demo_did_not_write_is_left_alone(tmp_path: Path) -> None:
    """A finished demo may be replaced; with a file of the user in it or in its models, or a false mark, not."""
    out = tmp_path / "demo"
    model = out / "gqa-2-mean"
    model.mkdir(parents=True)
    step = provenance.step("convert gqa", {"name": "embedded"}, {})
    provenance.write(model, [step])
    (out / "demo.json").write_text(json.dumps({"versions": provenance.versions(), "conversions": []}))
    check_free(out, overwrite=True)
    for path in (out / "thesis.txt", model / "notes.txt"):
        path.write_text("mine")
        with pytest.raises(UpfitError, match=path.name):
            check_free(out, overwrite=True)
        path.unlink()
    (out / "demo.json").write_text('{"pancakes": 3}')
    with pytest.raises(UpfitError, match="no demo.json of a finished demo"):
        check_free(out, overwrite=True)


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UpfitError, match="remove it yourself"):
        run_demo(tmp_path, "20k", True, QUIET)
    assert (tmp_path / "mine.txt").exists()

"""The report tells what the folder says, all of it inside one file, and recording changes nothing but recipe.json."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.records import evaluate, report
from tests.uptraining import QUIET, Workshop, config, make_workshop
from upfit import provenance
from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.report import figures
from upfit.report.sections import tell
from upfit.report.story import Story, gather
from upfit.uptrain.train import uptrain

PREDICTED: dict[str, Any] = {
    "kv_heads": [1, 2],
    "layers": [
        {
            "layer": f"model.layers.{index}.self_attn",
            "kv_heads": 2,
            "choices": [
                {"kv_heads": 1, "attention_error": 0.25 + index, "output_error": None, "kv_bytes_per_token": 64},
                {"kv_heads": 2, "attention_error": 0.0, "output_error": 0.0, "kv_bytes_per_token": 128},
            ],
        }
        for index in range(2)
    ],
    "totals": [
        {"kv_heads": count, "kv_bytes_per_token": 64 * count, **dict.fromkeys(("attention_error", "output_error"), 2.0 - count)}
        | {"largest_attention_error": 1.2345, "largest_output_error": None}
        for count in (1, 2)
    ],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A converted model that was measured, then uptrained and measured again."""
    made = make_workshop(tmp_path_factory.mktemp("shop"))
    text = made.student.parent / "text.txt"
    text.write_text("so many words and more of them. " * 40, encoding="utf-8")
    options = Options(against=str(made.teacher), data=[str(text)], length=32, windows=4, record=True, dtype="float32")
    evaluate(str(made.student), options, QUIET)
    out = made.student.parent / "better"
    made.run(out, tokens="512")
    evaluate(str(out), options, QUIET)
    return made


@pytest.mark.slow
def test_the_home_folder_is_known(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(shop.student.parent / "better")
    (tmp_path / "dry.json").write_text(json.dumps({"sensitivity": PREDICTED}), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))

    def write(overwrite: bool) -> None:
        report("~/model", Path("~/page.html"), [Path("~/dry.json")], Path("~/png"), overwrite)

    write(False)
    assert "1.234" in (tmp_path / "page.html").read_text(encoding="utf-8") and list((tmp_path / "png").iterdir())
    with pytest.raises(UpfitError, match="--overwrite"):
        write(False)
    write(True)


@pytest.mark.slow
def test_it_tells_what_was_done_and_measured(shop: Workshop, tmp_path: Path) -> None:
    better = shop.student.parent / "better"
    results = tmp_path / "dry.json"
    results.write_text(json.dumps({"sensitivity": PREDICTED}), encoding="utf-8")
    answer = report(str(better), tmp_path / "page.html", [results], tmp_path / "png", False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    steps = provenance.read(better)
    assert [step["verb"] for step in steps] == ["convert gqa", "evaluate", "uptrain", "evaluate"]
    losses = [step["measurements"]["model"]["loss"]["nats_per_token"]["mean"] for step in steps if step["verb"] == "evaluate"]
    after = steps[2]["measurements"]["holdout"]["after"]["kl"]
    for value in (*(f"{loss:.4f}" for loss in losses), f"{after:.4f}", "after convert gqa", "after uptrain", "1.234"):
        assert value in page
    sections = ["What was saved, and what it cost", "What it is", "What was done", "What was measured"]
    assert answer["sections"] == [*sections, "What fewer heads would cost", "Uptraining"]
    assert len(answer["plots"]) == 6 and all(Path(path).read_bytes().startswith(b"\x89PNG") for path in answer["plots"])


@pytest.mark.slow
def test_a_run_of_several_stages_is_told_stage_by_stage(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "out", stages="layerwise=50%,distill", tokens="1024")
    story = gather(str(tmp_path / "out"), [])
    first, second = tell(story)[-2:]
    assert (first.title, second.title) == ("Uptraining, layer by layer", "Uptraining")
    assert [plot.name for plot in first.plots] == ["training-layerwise", "watched-layerwise"]
    assert [plot.name for plot in second.plots] == ["training"]
    assert [row[0][:9] for row in first.tables[0].rows] == ["attention"]
    provenance.append(tmp_path / "out", {**provenance.step("evaluate", {}, {}), "measurements": {"model": {"loss": {}}}})
    assert [label for label, _ in gather(str(tmp_path / "out"), []).evaluations] == ["after convert gqa", "after uptrain"]


@pytest.mark.slow
def test_several_sources_are_told_each_by_itself(shop: Workshop, tmp_path: Path) -> None:
    for name in ("code", "prose"):
        shutil.copytree(shop.data, tmp_path / name)
    both = f"{tmp_path}/code=0.5,{tmp_path}/prose=0.5"
    uptrain(str(shop.student), both, tmp_path / "out", config(tokens="1024", measure_every=4), False, False, QUIET)
    story = gather(str(tmp_path / "out"), [])
    kinds = ["cross-entropy to the text", "divergence from the teacher"]
    expected = [f"{kind}{of}" for kind in kinds for of in ("", ", code alone", ", prose alone")]
    assert [row[0] for row in tell(story)[-1].tables[0].rows] == expected
    drawn = figures.training(story.training, None, None)
    assert drawn is not None and drawn.axes[0].get_title() == figures.STEPS["ce"]
    told = [line.get_label() for line in drawn.axes[0].lines[1:]]
    assert told == ["held-out rows", "held-out rows of code", "held-out rows of prose"]


def test_a_conversion_tells_what_it_measured_and_what_it_left_out() -> None:
    layers = [{"layer": str(index), "reasons": ["no turning"] * index, "merged_error": 0.1 + index} for index in range(2)]
    told = {"kv_bytes_per_token": [96, 32], "layers": layers, "verify": {"structure": "loads", "numbers": "as near as that"}}
    step = {"verb": "convert gqa", "source": {}, "date": "2026-11-21", "versions": {}, "measurements": told}
    facts: dict[str, Any] = dict.fromkeys(("model_type", "class"), "llama") | dict.fromkeys(
        ("parameters", "bytes", "layers"), 1
    )
    facts |= {name: [1] for name in ("heads", "kv_heads", "head_dim")} | {"dtypes": [], "kv_bytes_per_token": 1}
    section = tell(Story(facts, [step], []))[-1]
    assert section.texts == ["KV cache 96 B → 32 B a token (3.00x smaller).", "Verified: loads; as near as that."]
    assert section.tables[0].rows == [["1", "no turning"]] and len(section.plots) == 1


@pytest.mark.slow
def test_the_page_asks_for_nothing_and_every_plot_is_a_picture(shop: Workshop, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words and more of them, again and again. " * 40, encoding="utf-8")
    options = Options(against=str(shop.teacher), data=[str(text)], length=32, windows=2, probe=["needle"], attention_maps=2)
    told = evaluate(str(shop.student), Options(**{**vars(options), "probe_length": [80], "probe_samples": 2}), QUIET)
    results = tmp_path / "heads.json"
    results.write_text(json.dumps(told), encoding="utf-8")
    for name in ("one.html", "two.html"):
        report(str(shop.student.parent / "better"), tmp_path / name, [results], None, False)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8"), "the same folder, the same page"
    wanted = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)|@import""", page)
    assert wanted and all(source.startswith("data:image/svg+xml;base64,") for source, _ in wanted)
    assert len(wanted) == len(re.findall(r"""<img alt="[^"]{10,}" """, page)) >= 7
    for source, _ in wanted:
        picture = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        assert picture.tag.endswith("svg")
        asked = [value for part in picture.iter() for name, value in part.attrib.items() if name.endswith(("href", "src"))]
        asked += re.findall(r"url\(([^)]*)", ElementTree.tostring(picture, encoding="unicode"))
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in asked)


def test_a_name_is_no_markup(shop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (shop.student.parent / "better").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    steps = provenance.read(folder)
    steps[0]["source"]["name"] = "<script>alert(1)</script>"
    provenance.write(folder, steps)
    report(str(folder), tmp_path / "page.html", [], None, False)
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_plain_model_has_a_page_too(shop: Workshop, tmp_path: Path) -> None:
    assert report(str(shop.teacher), tmp_path / "page.html", [], None, False)["sections"] == ["What it is"]


def test_what_cannot_be_told_is_refused_before_anything_is_written(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"recipes": []}', encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    kept = tmp_path / "kept.html"
    kept.write_text("mine", encoding="utf-8")
    for out, results, message in (
        (kept, [], "exists"),
        (tmp_path / "page.md", [], "ends in .html"),
        (tmp_path / "page.html", [tmp_path / "other.json"], "neither losses nor predicted errors"),
        (tmp_path / "page.html", [tmp_path / "broken.json"], "not JSON"),
        (tmp_path / "page.html", [tmp_path / "none.json"], "cannot be read"),
    ):
        with pytest.raises(UpfitError, match=message):
            report(str(shop.student), out, results, None, False)
    assert kept.read_text(encoding="utf-8") == "mine" and not (tmp_path / "page.html").exists()


def test_a_recorded_evaluation_adds_a_step_and_touches_nothing_else(shop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in shop.student.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    text = tmp_path / "text.txt"
    text.write_text("some words. " * 60, encoding="utf-8")
    told = evaluate(str(folder), Options(data=[str(text)], length=32, windows=2, record=True), QUIET)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps = provenance.read(folder)
    assert steps[-1]["measurements"]["model"] == told["model"] and steps[:-1] == provenance.read(shop.student)
    assert {n: b for n, b in after.items() if n != provenance.FILE} == {n: b for n, b in before.items() if n != provenance.FILE}
    with pytest.raises(UpfitError, match="Upfit did not write it"):
        evaluate(str(shop.teacher), Options(data=[str(text)], length=32, windows=2, record=True), QUIET)
    assert not (shop.teacher / provenance.FILE).exists()


def test_predicted_errors_stand_where_they_belong() -> None:
    drawn = figures.sensitivity(PREDICTED).axes[0].images[0].get_array()
    assert drawn is not None and drawn.tolist() == [[0.25], [1.25]]


def test_a_measure_that_never_varies_is_not_drawn() -> None:
    rows = [{"layer": "a", "pairs": 4, "error": 0.5, "lambda": [0.1, 0.2]}, {"layer": "b", "pairs": 4, "error": 0.7}]
    figure = figures.layers(rows)
    assert figure is not None and [axes.get_legend_handles_labels()[1] for axes in figure.axes] == [["error"], ["lambda"]]
    assert figures.layers([{"layer": "a", "pairs": 4}]) is None

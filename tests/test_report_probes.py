"""The chain in one report: every model once beside the source, probes and heads drawn as they were told, nothing made up."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.folders import save_tiny
from tests.records import report
from upfit import provenance
from upfit.errors import UpfitError
from upfit.report import attention, depths, probes
from upfit.report.measured import measured, summary
from upfit.report.page import Section, unbroken
from upfit.report.sections import tell
from upfit.report.story import Story, gather
from upfit.report.subjects import Measured, texts

SOURCE = "/models/source"


def estimate(mean: float, half: float = 0.1) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row(scores: list[float]) -> dict[str, Any]:
    """One length of a probe, as `upfit evaluate` tells it."""
    at = [(index + 0.5) / len(scores) for index in range(len(scores))]
    told: dict[str, Any] = {"depths": at, "scores": scores, "nats": [2 - score for score in scores], "floor": 0.125}
    told |= {"average": estimate(float(np.mean(scores))), "gap": estimate(max(scores) - min(scores)), "p_value": 0.0325}
    return told | {"null_gap": {"mean": 0.1, "p95": 0.234}}


def probe(trained_on: bool, **lengths: list[float]) -> dict[str, Any]:
    rows = {name.removeprefix("n"): row(scores) for name, scores in lengths.items()}
    return {"pattern": "val", "trained_on": trained_on, "lengths": rows}


def subject(name: str, loss: float, cache: int = 96, **probes: Any) -> dict[str, Any]:
    kinds = (("nats_per_token", loss), ("perplexity", 9.0), ("bits_per_byte", 1.0))
    losses: dict[str, Any] = {key: estimate(value) for key, value in kinds} | {"nats_per_token_by_position": [loss] * 4}
    told = {"name": name, "revision": None, "path": name, "dtype": "float32", "loss": losses}
    return told | {"cache": {"bytes_per_token": cache}, "probes": probes or None}


def answer(model: dict[str, Any], against: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What `upfit evaluate` says of `model` alone, or beside another on the same text."""
    data = {"sha256": "a", "windows": 4, "length": 32, "documents": 2, "source": "python"}
    means = [one["loss"]["nats_per_token"]["mean"] for one in (model, against) if one]
    difference = {"nats_per_token": estimate(means[0] - means[1], 0.01)} if against else None
    told = {"model": model, "against": against, "difference": difference, "data": data, "speed": None, "ablation": None}
    return told | {"hardware": {"device": "cpu"}} | more


def rows_of(section: Section, table: int = 0) -> list[dict[str, str]]:
    told = section.tables[table]
    return [dict(zip(told.columns, cells, strict=True)) for cells in told.rows]


CHAIN = [
    ("source", answer(subject(SOURCE, 3.0, 96, needle={"accuracy": estimate(0.75), "answer_nats_per_token": estimate(1.0)}))),
    ("converted", answer(subject("/models/gqa", 3.5, 32), subject(SOURCE, 3.0, 96))),
    ("uptrained", answer(subject("/models/up", 3.25, 32), subject(SOURCE, 3.0, 96, val=probe(False, n1024=[0.5, 0.25])))),
    ("IN2", answer(subject("/models/in2", 3.125, 32, val=probe(True, n1024=[1.0, 0.5])))),
    ("control", answer(subject("/models/control", 3.375, 32, val=probe(False, n1024=[0.5, 0.5])), subject("/models/up", 3.25))),
]


def test_the_source_stands_once_and_first_with_all_that_was_told_of_it() -> None:
    [text] = texts(CHAIN)
    assert text.labels == ["source", "converted", "uptrained", "IN2", "control"]
    assert set(text.models[0].subject["probes"]) == {"needle", "val"}
    backwards = texts(CHAIN[::-1])[0].labels
    assert backwards == ["source", "control", "IN2", "uptrained", "converted"]
    assert texts(CHAIN[1:3])[0].labels == ["source: source", "converted", "uptrained"]


def test_the_summary_says_what_was_lost_and_won() -> None:
    rows = rows_of(summary(CHAIN))
    apart = {told["model"]: told["from the source"] for told in rows}
    assert apart == {
        "source": "",
        "converted": "0.5000 ± 0.0100",
        "uptrained": "0.2500 ± 0.0100",
        "IN2": "0.1250, not paired",
        "control": "0.1250 ± 0.0100 (from uptrained)",
    }
    assert [told["cache a token"] for told in rows] == ["96 B", *["32 B"] * 4]
    assert [told["needle"] for told in rows] == ["0.75 ± 0.10", "", "", "", ""]
    val = [told["val, 1,024 tokens"] for told in rows]
    assert val[0] == "0.38 [0.28, 0.47], gap 0.25" and val[1:3] == ["", ""]
    assert val[3] == "0.75 [0.65, 0.85], gap 0.50, trained on"


def test_the_history_names_the_source_of_models_that_were_measured_alone() -> None:
    alone = [("a", answer(subject("/models/up", 3.5))), ("b", answer(subject(SOURCE, 3.0)))]
    assert texts(alone)[0].labels == ["a", "b"] and texts(alone)[0].source is None
    assert [told["from the source"] for told in rows_of(summary(alone))] == ["", ""]
    told = rows_of(summary(alone, {"name": "source", "path": SOURCE}))
    assert [(one["model"], one["from the source"]) for one in told] == [("b", ""), ("a", "0.5000, not paired")]


def test_models_on_other_tokens_are_not_compared_in_nats() -> None:
    chain = copy.deepcopy(CHAIN[:2] + CHAIN[3:4])
    chain[1][1]["difference"] = {"bits_per_byte": estimate(0.5, 0.01)}
    assert [told["from the source"] for told in rows_of(summary(chain))] == ["", "0.5000 ± 0.0100 bits a byte", ""]


def test_a_probe_is_told_with_what_chance_would_give_and_whether_it_was_taught() -> None:
    section = next(one for one in measured(CHAIN) if one.title == "Probe: val")
    told = {one["model"]: one for one in rows_of(section)}
    assert list(told) == [f"{label}, 1,024 tokens" for label in ("source", "IN2", "control")]
    in2 = section.tables[0].rows[1]
    assert in2[1:6] == ["0.750 [0.650, 0.850]", "0.125", "0.500 [0.400, 0.600]", "0.234", "0.033"] and in2[-1] == "yes"
    assert section.texts == ["Pattern: val. Trained on by: IN2."]
    assert [plot.name for plot in section.plots] == ["val-scores-1", "val-nats-1"]


def test_what_is_missing_stays_empty() -> None:
    bare = {"lengths": {"64": {"average": estimate(0.5)}, "128": {}}}
    [section] = probes.sections([Measured("m", subject("/m", 3.0, bare=bare))], 1)
    assert section.texts == [] and section.plots == []
    assert [[cell for cell in cells[1:] if cell] for cells in section.tables[0].rows] == [["0.500 [0.400, 0.600]"], []]
    assert probes.columns([Measured("m", subject("/m", 3.0, bare=bare))]) == [("bare, 128 tokens", [""])]


def test_heat_maps_have_lengths_by_depths_and_one_scale() -> None:
    one, two = probe(False, n64=[0.2, 0.4], n1024=[0.6, 0.8, 1.0]), probe(False, n1024=[0.0, 0.1, 0.3])
    models = [("one", one["lengths"]), ("two", two["lengths"])]
    for kind, scale in (("scores", (0.0, 1.0)), ("nats", (1.0, 2.0))):
        figure: Any = depths.heat_maps(models, ["64", "1024"], kind, kind)
        first, second, _ = figure.axes
        cells = [[mesh.get_array().tolist() for mesh in axes.collections] for axes in (first, second)]
        assert cells == [[[one["lengths"][n][kind]] for n in ("64", "1024")], [[two["lengths"]["1024"][kind]]]]
        assert {mesh.get_clim() for axes in (first, second) for mesh in axes.collections} == {scale}
        assert [label.get_text() for label in first.get_yticklabels()] == ["64", "1,024"]
        assert [text.get_text() for text in second.texts] == [f"{value:.2f}" for value in two["lengths"]["1024"][kind]]
    assert figure.axes[0].collections[0].get_coordinates()[0, :, 0].tolist() == [0.0, 0.5, 1.0]


def test_several_lengths_are_a_map_one_is_a_curve_and_a_position_is_always_one() -> None:
    several = [Measured("m", subject("/m", 3.0, val=probe(False, n64=[0.1, 0.2], n128=[0.3, 0.4])))]
    assert "one colour scale" in probes.sections(several, 1)[0].plots[0].caption
    loss = {"nats_per_token": estimate(3.0), "windows": 5, "depths": [0.25, 0.75], "nats": [3.0, 2.0]}
    told = {"lengths": {"64": loss, "128": {**loss, "intervals": [estimate(3.0), estimate(2.0)]}}}
    [section] = probes.sections([Measured("m", subject("/m", 3.0, position=told))], 1)
    [plot] = section.plots
    lines: list[Any] = [axes.lines[0].get_ydata() for axes in plot.figure.axes]
    assert section.tables[0].columns == ["model", "nats a token", "windows"]
    assert [list(line) for line in lines] == [[3.0, 2.0], [3.0, 2.0]] and section.tables[0].rows[0][1:3] == [
        "3.0000 ± 0.1000",
        "5",
    ]


def needle(by_head: list[list[float]], *heads: tuple[int, int, list[list[float]]]) -> dict[str, Any]:
    kept = [{"layer": layer, "head": head, "own_head": 1, "weights": weights} for layer, head, weights in heads]
    maps = {"tokens": ["a", "b", " <b>"], "needle": [1, 2], "asks": 2, "heads": kept}
    told = {"accuracy": estimate(0.5), "answer_nats_per_token": estimate(1.0), "accuracy_by_depth": {"0.0": 1.0, "1.0": 0.0}}
    return told | {"attention_by_head": by_head, "maps": maps}


def test_heads_are_drawn_before_and_after_on_one_scale() -> None:
    before = needle([[0.1, 0.9], [0.3, 0.4]], (0, 1, [[1.0], [0.5, 0.5]]), (1, 0, [[1.0], [0.0, 1.0]]))
    after = needle([[0.2, 0.1], [0.3, 0.0]], (0, 1, [[0.5], [0.25, -0.25]]))
    models = [Measured(label, subject(label, 3.0, needle=told)) for label, told in (("before", before), ("after", after))]
    [section] = attention.sections(models, 1)
    drawn_as: list[Any] = [plot.figure for plot in section.plots]
    shares, maps = drawn_as
    assert shares.axes[0].collections[0].get_array().tolist() == before["attention_by_head"]
    assert shares.axes[1].collections[0].get_array().tolist() == after["attention_by_head"]
    assert {axes.collections[0].get_clim() for axes in shares.axes[:2]} == {(0.0, 0.9)}
    drawn = [axes.images[0].get_array().tolist()[1] if axes.images else axes.texts[0].get_text() for axes in maps.axes[:4]]
    assert drawn == [[0.5, 0.5], [0.5, -0.5], [0.0, 1.0], "not kept"], "rows are shares of their absolute sums"
    assert {axes.images[0].get_clim() for axes in maps.axes[:3]} == {(-1.0, 1.0)} and "below 0" in section.plots[1].caption
    assert "head 1" in maps.axes[0].get_title() and "(here 1)" in maps.axes[2].get_title()
    assert "ab <b>" in section.texts[0]


def test_speed_and_cache_of_all_stand_together() -> None:
    rates = {"prefill_tokens_per_s": {"median": 900, "low": 800, "high": 990}, "cache_bytes": 2048}
    rates["decode_tokens_per_s"] = {"median": 50, "low": 40, "high": 60}
    ratio = {phase: {"median": 1.25, "low": 1.0, "high": 1.5} for phase in ("prefill", "decode")}
    speed = {"batch": 1, "rows": [{"context": 64, "model": rates, "against": rates, "ratio": ratio}]}
    chain = [(label, answer(told["model"], told["against"], speed=speed)) for label, told in CHAIN[1:3]]
    [section, *_] = measured(chain)
    table = next(one for one in section.tables if one.title == "Speed on cpu")
    assert [cells[0] for cells in table.rows][:2] == ["converted, 64 tokens", "source, beside converted, 64 tokens"]
    assert [cells[3] for cells in table.rows] == ["1.25", "", "1.25", ""]
    figures: dict[str, Any] = {plot.name: plot.figure for plot in section.plots}
    labels = [axes.get_legend_handles_labels()[1] for axes in figures["speed-1"].axes]
    assert labels == [["converted", "source: source", "uptrained"]] * 2 + [["converted", "uptrained"]] * 2
    assert [bar.get_width() for bar in figures["cache-1"].axes[0].patches] == [96, 32, 32]


def step(verb: str, **more: Any) -> dict[str, Any]:
    told = {"verb": verb, "date": "2026-11-21", "source": {"name": "s"}, "versions": {}, "options": {}, "measurements": {}}
    return told | more


def trained(**more: Any) -> dict[str, Any]:
    counts = {"tokens": 1000, "steps": 2, "seconds": 1.0, "tokens_per_second": 1000.0, "skipped": 0, "holdout_rows": 0}
    return step("uptrain", measurements=counts | {"holdout": {"before": None, "after": None}}, **more)


def test_a_figure_and_its_interval_are_not_torn_apart() -> None:
    assert unbroken("0.62 [0.5, 0.7], gap 0.31").split(" ") == ["0.62", "[0.5,\u00a00.7],", "gap", "0.31"]
    words = ["1.5\u00a0±\u00a00.1", "(from", "a", "b),", "8.2\u00a0kB", "a", "token"]
    assert unbroken("1.5 ± 0.1 (from a b), 8.2 kB a token").split(" ") == words


def test_training_on_answers_is_told_with_its_patterns() -> None:
    data = {"folder": "in2", "fingerprint": "f", "patterns": ["cloze", "key-value"], "items": 20000}
    facts: dict[str, Any] = dict.fromkeys(("model_type", "class"), "llama")
    facts |= dict.fromkeys(("parameters", "bytes", "layers", "kv_bytes_per_token"), 1)
    facts |= {name: [1] for name in ("heads", "kv_heads", "head_dim")} | {"dtypes": []}
    steps = [trained(), trained(stage="answers", data=data), trained(stage="answers", data={"folder": "in2"})]
    plain, told, bare = tell(Story(facts, steps, [{"tokens": 1, "other": 1.0}]))[-3:]
    assert [one.title for one in (plain, told, bare)] == ["Uptraining", *["Uptraining on answers"] * 2]
    assert "Answers of 20,000 examples from in2." in told.texts and "cloze, key-value" in told.texts[-1]
    assert len(plain.texts) == len(bare.texts) == 1 and not bare.plots


def test_results_are_told_once_under_the_names_that_they_were_given(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    mine, other = answer(subject("/models/in2", 3.0)), answer(subject("/models/up", 4.0))
    recorded = [trained(), step("evaluate", measurements=other), trained(), step("evaluate", measurements=other)]
    steps = [*recorded, trained(stage="answers"), step("evaluate", measurements=mine)]
    provenance.write(model, steps)
    paths = [tmp_path / folder / "result.json" for folder in ("a", "b")]
    for path, told in zip(paths, (mine, answer(subject("/models/control", 5.0))), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps(told), encoding="utf-8")
    labels = [label for label, _ in gather(str(model), paths).evaluations]
    assert labels == ["after uptrain", "after uptrain 2", "a/result", "b/result"]
    assert gather(str(model), paths[1:]).evaluations[2][0] == "after uptrain on answers"
    with pytest.raises(UpfitError, match="given twice"):
        gather(str(model), [paths[0], paths[0]])


@pytest.mark.slow
def test_pictures_are_a_folder_of_their_own_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, out, png = save_tiny(tmp_path / "model"), tmp_path / "r.json", tmp_path / "page.html", tmp_path / "png"
    result.write_text(json.dumps(CHAIN[2][1]), encoding="utf-8")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine", encoding="utf-8")
    for folder, overwrite, message in (
        (taken, False, "not empty"),
        (taken, True, "holds mine.txt"),
        (result, False, "is a file"),
        (model / "png", False, "overlaps the source"),
        (tmp_path, False, "would hold the page"),
    ):
        with pytest.raises(UpfitError, match=message):
            report(str(model), out, [result], folder, overwrite)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr("upfit.report.page.Plot.png", lambda plot: (_ for _ in ()).throw(OSError("full")))
        report(str(model), out, [result], png, False)
    assert not out.exists() and not png.exists() and not list(tmp_path.glob("*.upfit-work"))
    told = report(str(model), out, [result], png, False)
    assert sorted(told["plots"]) == sorted(str(path) for path in png.iterdir()) and len(told["plots"]) >= 3
    assert report(str(model), out, [result], png, True) == told

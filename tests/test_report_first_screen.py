"""The head of a report says what was saved and what it cost, out of the records alone, as the card and `--json` say it."""

import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny, tiny_llama
from tests.records import compare, evaluate, report
from tests.test_report_probes import answer, estimate, step, subject
from upfit import api
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.evaluate.options import Options
from upfit.output import Output, cache_factor, human_bytes, to_json
from upfit.publish.options import Options as PushOptions
from upfit.publish.push import pack
from upfit.report import wording
from upfit.report.first_screen import UNKNOWN, first_screen
from upfit.report.outcome import Cache, Lost, Outcome
from upfit.report.page import render
from upfit.report.stages import outcome
from upfit.report.story import Story

QUIET = Output(quiet=True)
FOLDERS: list[dict[str, Any]] = [{"name": n, "revision": None, "path": f"/models/{n}"} for n in ("big", "small", "better")]
SOURCE, SMALL, BETTER = FOLDERS
CONVERTED = step("convert gqa", source=SOURCE, measurements={"kv_bytes_per_token": [96, 32]})


def measured(model: dict[str, Any], loss: float, cache: int, against: float | None = None, **more: Any) -> dict[str, Any]:
    """An evaluation of `model`, against a source with the loss `against`."""
    told = subject(model["path"], loss, cache)
    return answer(told, subject(SOURCE["path"], against, 96) if against is not None else None, **more)


def trained(**holdout: float) -> dict[str, Any]:
    when = {"before": holdout and {"kl": holdout["before"]}, "after": holdout and {"kl": holdout["after"]}}
    return step("uptrain", source=SMALL, teacher=SOURCE if holdout else None, measurements={"holdout": when, "holdout_rows": 8})


def recorded(told: dict[str, Any]) -> dict[str, Any]:
    return step("evaluate", source=SOURCE, measurements=told)


def story(*steps: dict[str, Any], model: dict[str, Any] = BETTER, **more: Any) -> Story:
    """Of a folder with these steps, as the report reads it: whatever was recorded is among the evaluations too."""
    facts = {"model": model, "kv_bytes_per_token": 32}
    evaluations = [(f"at {index}", one["measurements"]) for index, one in enumerate(steps) if one["verb"] == "evaluate"]
    files = more.pop("files", [])
    return Story(facts, list(steps), [], evaluations + files, **{"context": 1000} | more)


def of(*steps: dict[str, Any], **more: Any) -> Outcome:
    result = outcome(story(*steps, **more))
    assert result is not None
    return result


def rows(result: Outcome) -> dict[str, dict[str, str]]:
    [table] = first_screen(result).tables
    return {cells[0]: dict(zip(table.columns[1:], cells[1:], strict=True)) for cells in table.rows}


WHOLE = (CONVERTED, recorded(measured(SMALL, 3.5, 32, 3.0)), trained(), recorded(measured(BETTER, 3.25, 32, 3.0)))


def test_one_sentence_and_three_rows_say_what_was_saved_and_lost() -> None:
    result = of(*WHOLE)
    assert result.sentence("better", "its source big") == (
        "better keeps 32 B of KV cache a token where its source big keeps 96 B (3.00x smaller), 32.0 kB instead of 96.0 kB at "
        "1,000 tokens, and its loss is 0.2500 ± 0.0100 nats a token higher."
    )
    told = rows(result)
    assert list(told) == ["source: big", "converted: small", "uptrained: better"]
    assert [row["KV cache at 1,000 tokens"] for row in told.values()] == ["96.0 kB", "32.0 kB", "32.0 kB"]
    assert [row["above the source"] for row in told.values()] == ["–", "0.5000 ± 0.0100", "0.2500 ± 0.0100"]
    assert "agreement with the source" not in told["source: big"], "no column of what nobody measured"
    [plot] = first_screen(result).plots
    bars, losses = plot.figure.axes
    widths: list[Any] = [patch.get_width() for patch in bars.patches]  # type: ignore[attr-defined]
    assert widths == [96, 32, 32]
    assert [line.get_xdata()[0] for line in losses.lines if line.get_marker() == "o"] == [0, 0.5, 0.25]  # type: ignore[index]


def test_weights_that_changed_since_are_not_told_by_older_figures() -> None:
    result = of(*WHOLE, trained())
    assert result.last.loss is None and result.last.lost is None
    assert result.sentence("m", "s").endswith(", and its loss was not measured.")
    assert rows(result)["uptrained: better"]["above the source"] == UNKNOWN
    old, new = (measured(BETTER, 3.25, 32, 3.0, date=f"2026-11-{day}") for day in (20, 22))
    assert of(CONVERTED, trained(), files=[("file", old)]).last.lost is None
    assert of(CONVERTED, trained(), files=[("file", new)]).last.lost is not None


def test_nothing_is_guessed() -> None:
    bare = of(CONVERTED, model=SMALL)
    assert list(rows(bare)["converted: small"]) == ["KV cache a token", "KV cache at 1,000 tokens"]
    assert "upfit evaluate small --against big" in first_screen(bare).notes[0]
    assert "KV cache at 1,000 tokens" not in rows(of(CONVERTED, sliding=True))["source: big"], "windows are not in the shapes"
    other = recorded(answer(subject(SMALL["path"], 3.5, 32), subject("/models/other", 3.0, 96)))
    assert of(CONVERTED, other, model=SMALL).last.lost is None, "another model is not the source"
    assert of(CONVERTED, recorded(measured(SMALL, 3.5, 32))).stages[1].lost is None
    assert outcome(story(trained())) is None
    nameless = of(CONVERTED, trained() | {"source": {}})
    assert list(rows(nameless)) == ["source: big", "converted", "uptrained: better"]


def test_losses_that_are_not_paired_or_of_other_tokens_are_told_so() -> None:
    alone = of(CONVERTED, recorded(measured(SMALL, 3.5, 32)), model=SMALL, files=[("file", measured(SOURCE, 3.0, 96))])
    assert rows(alone)["converted: small"]["above the source"] == "0.5000, not paired"
    in_bits = measured(SMALL, 3.5, 32, 3.0) | {"difference": {"unit": "bits per byte", "bits_per_byte": estimate(0.5)}}
    lost = of(CONVERTED, recorded(in_bits), model=SMALL).last.lost
    assert lost is not None and lost.cell() == "0.5000 ± 0.1000 bits a byte"


@pytest.mark.parametrize(
    ("mean", "half", "words"),
    [
        (0.5, 0.1, "0.5000 ± 0.1000 nats a token higher"),
        (-0.5, 0.1, "0.5000 ± 0.1000 nats a token lower"),
        (-0.05, 0.1, "0.0500 ± 0.1000 nats a token lower, which may be chance"),
        (0.0, 0.0, "the same"),
    ],
)
def test_a_difference_has_a_side_and_a_doubt(mean: float, half: float, words: str) -> None:
    assert Lost(estimate(mean, half)).words() == words


def test_caches_of_two_types_do_not_stand_beside_each_other() -> None:
    told = measured(SMALL, 3.5, 64, 3.0)
    told["model"]["cache"]["dtypes"], told["against"]["cache"]["dtypes"] = ["float32"], ["bfloat16"]
    caches = [stage.cache for stage in of(CONVERTED, recorded(told), model=SMALL).stages]
    assert caches == [Cache(96), Cache(32)], "as the shapes tell of both"
    told["against"]["cache"] = {"bytes_per_token": 192, "dtypes": ["float32"]}
    caches = [stage.cache for stage in of(CONVERTED, recorded(told), model=SMALL).stages]
    assert caches == [Cache(192, types=("float32",)), Cache(64, types=("float32",))]


def test_a_window_ends_the_growth_of_a_cache() -> None:
    assert [Cache(10, 5, 100, 2).at(tokens) for tokens in (50, 100, 200)] == [505, 1005, 1205]
    assert [Cache(10, 0, 100).at(tokens) for tokens in (100, 101)] == [1000, None]


def test_agreement_is_what_a_distillation_measured_of_the_source() -> None:
    result = of(CONVERTED, trained(before=1.5, after=0.25))
    told = rows(result)
    assert [row["agreement with the source"] for row in told.values()] == [
        "–",
        "1.5000 nats a token apart",
        "0.2500 nats a token apart",
    ]
    assert result.sentence("m", "s").endswith("; its predictions diverge by 0.2500 nats a token from the source's.")
    zero = of(CONVERTED, trained(before=0.0, after=0.0))
    assert zero.last.agreement is None, "a divergence that is 0 throughout was not measured"
    other = trained(before=1.5, after=0.25) | {"teacher": {**SOURCE, "path": "/models/other"}}
    assert of(CONVERTED, other).last.agreement is None
    verified = step("convert diff", source=SOURCE, measurements={"verify": {"equal": True, "tokens": 64}})
    assert "logits equal" in of(verified, model=SMALL).sentence("m", "s")


def test_every_caption_is_a_sentence() -> None:
    captions = {name: text for name, text in vars(wording).items() if name.isupper() and name != "LOSS"}
    assert len(captions) > 10
    for name, text in captions.items():
        assert text.endswith(".") and text.count(". ") == 0 and len(text.split()) > 10, name


def test_a_hub_model_is_called_by_its_id_and_a_narrow_page_has_cards() -> None:
    hub = {"name": "org/big", "revision": None, "path": "/cache/models--org--big/snapshots/abc"}
    result = of(step("convert gqa", source=hub, measurements={"kv_bytes_per_token": [96, 32]}), model=SMALL)
    assert result.stages[0].name == "org/big"
    page = render("t", [first_screen(of(*WHOLE))], [])
    assert '<td data-column="KV cache a token">96\u00a0B</td>' in page


@pytest.fixture(scope="module", params=[(4, 2), (2, 4)], ids=["smaller", "larger"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A converted and measured folder, and what `upfit convert` and `evaluate` said of it with --json."""
    before, after = request.param
    root = tmp_path_factory.mktemp("outcome")
    source = save_tiny(root / "source", tiny_llama(num_key_value_heads=before))
    recipe = find_recipes()["gqa"]
    converted = convert(recipe, str(source), root / "made", recipe.options(kv_heads=after, method="mean"), Settings(), QUIET)
    text = root / "text.txt"
    text.write_text("so many words and more of them. " * 40, encoding="utf-8")
    options = Options(against=str(source), data=[str(text)], length=32, windows=4, record=True, dtype="float32")
    told = evaluate(str(root / "made"), options, QUIET)
    yield root / "made", {"convert": converted.record(), "evaluate": told}


def test_json_report_card_and_comparison_say_the_same_of_sizes_and_losses(
    pair: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, told = pair
    before, after = told["convert"]["kv_bytes_per_token"]
    assert api.describe(folder).kv_bytes_per_token == after == told["evaluate"]["model"]["cache"]["bytes_per_token"]
    report(str(folder), tmp_path / "page.html", [], None, False)
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8")).replace("\u00a0", " ")
    written = pack(folder, "a/made", PushOptions()).files["README.md"]
    assert isinstance(written, bytes)
    card = html.unescape(written.decode())
    lost = told["evaluate"]["difference"]["nats_per_token"]
    [group] = compare([str(folder)])
    assert group["rows"][0][3] == human_bytes(after)
    apart = f"{lost['mean']:.4f} ± {lost['mean'] - lost['low']:.4f}"
    assert group["rows"][0][-1] == apart
    factor = f"{max(before, after) / min(before, after):.2f}x {'smaller' if after < before else 'larger'}"
    side = "higher" if lost["mean"] > 0 else "lower"
    loss = f"{apart.removeprefix('-')} nats a token {side}" if lost["mean"] or lost["low"] else "the same"
    for words in (page, card):
        changes = re.findall(r"[\d.]+x (?:smaller|larger)", words)
        assert len(changes) >= 2 and set(changes) == {factor} == {cache_factor(before, after)}
        assert f"{human_bytes(before)} ({factor})" in words and f"{human_bytes(before)} → {human_bytes(after)}" in words
        assert f"its loss is {loss}" in words
        assert f"{told['evaluate']['model']['loss']['nats_per_token']['mean']:.4f}" in words


def test_no_path_is_in_the_page_nor_in_its_pictures(pair: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, told = pair
    (tmp_path / "results").mkdir()
    for name in ("a", "b"):  # two files of one name are told apart by their folders
        (tmp_path / "results" / name).mkdir()
    files = [tmp_path / "results" / name / "result.json" for name in ("a", "b")]
    for file in files:
        file.write_text(to_json(told["evaluate"] | {"date": "2030-01-01"}), encoding="utf-8")
    assert str(folder.parent) in files[0].read_text(encoding="utf-8")
    report(str(folder), tmp_path / "page.html", files, None, False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(pictures) > 2
    words = re.sub(r"base64,[^\"]+", "", page)
    for text in (words, *pictures):
        for place in {tmp_path, folder.parent, *tmp_path.parents, *folder.parents, Path.home()} - {Path("/")}:
            assert not re.search(rf"{re.escape(str(place))}(?![\w-])", text), place
        bare = re.sub(r"</?[^<>]*>", " ", text)
        assert not re.findall(r"(?<![\w.:/])/[A-Za-z][\w.-]*/[\w.-]+", bare)
    assert "source: source" in words and "converted: made" in words

"""What report, card and comparison say of encoder-decoders: both caches, the loss given what was read, and wrong words."""

import html
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.records import compare
from tests.test_examples import PAIRS, save_t5, write
from tests.test_report_first_screen import BETTER, CONVERTED, SMALL, SOURCE, of, recorded, rows, story, trained
from tests.test_report_probes import answer, estimate, subject
from upfit import api
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options
from upfit.output import Output, cache_change, human_bytes
from upfit.publish.options import Options as PushOptions
from upfit.publish.push import pack
from upfit.report import stages
from upfit.report.first_screen import first_screen
from upfit.report.outcome import Outcome
from upfit.report.wording import calibrated

QUIET = Output(quiet=True)
BOTH = {"kv_bytes_per_token": [96, 32], "cross_bytes_per_position": [64, 16]}
STEP = CONVERTED | {"measurements": BOTH}
HEARD = {"rate": estimate(0.25, 0.02), "words": 80, "substituted": 12, "missing": 5, "added": 3}


def of_model(path: str, loss: float, own: int, cross: int, **more: Any) -> dict[str, Any]:
    read = {"bytes_per_position": cross, "positions": 10, "bytes": 10 * cross}
    return subject(path, loss, own) | {"cross_cache": read, **more}


def measured(**more: Any) -> dict[str, Any]:
    """An evaluation of the converted model against its source, on examples."""
    told = answer(of_model(SMALL["path"], 3.5, 32, 16, **more), of_model(SOURCE["path"], 3.0, 96, 64, **more))
    told["data"] |= {"examples": "sound" if more else "text pairs"}
    return told | ({"word_error_difference": estimate(0.03, 0.01)} if more else {})


def outcome(**more: Any) -> Outcome:
    return of(STEP, recorded(measured(**more)), model=SMALL)


def test_the_sentence_and_the_table_have_both_caches() -> None:
    result = outcome()
    assert result.sentence("small", "its source big") == (
        "small keeps 32 B of KV cache a token written where its source big keeps 96 B (3.00x smaller), and 16 B a position "
        "read instead of 64 B (4.00x smaller), and its loss given what is read is 0.5000 ± 0.0100 nats a token higher."
    )
    told = rows(result)
    assert [row["KV cache a token written"] for row in told.values()] == ["96 B", "32 B"]
    assert [row["KV cache a position read"] for row in told.values()] == ["64 B", "16 B"]
    assert not any("at 1,000" in name or "error" in name for name in told["source: big"])
    screen = first_screen(result)
    own, read, lost = screen.plots[0].figure.axes
    assert [[patch.get_width() for patch in axes.patches] for axes in (own, read)] == [[96, 32], [64, 16]]  # type: ignore[attr-defined]
    assert "position read" in read.get_title(loc="left") and "lost" in lost.get_title(loc="left")
    assert "given what the encoder has read" in screen.notes[0]


def test_shapes_tell_both_where_nothing_was_measured() -> None:
    bare = of(STEP, model=SMALL)
    assert [(stage.cache.per_token, stage.cache.per_position) for stage in bare.stages[:1] if stage.cache] == [(96, 64)]
    decoder = of(CONVERTED, model=SMALL)
    assert "KV cache a token" in rows(decoder)["source: big"] and "a position" not in decoder.sentence("a", "b")


@pytest.mark.parametrize(("measured", "between"), [(16, (32, 16)), (8, None)])
def test_shapes_stand_in_between_where_they_agree_with_what_was_measured(
    measured: int, between: tuple[int, int] | None
) -> None:
    """Of the converted model between source and uptrained one, which alone were measured."""
    told = answer(of_model(BETTER["path"], 3.25, 32, measured), of_model(SOURCE["path"], 3.0, 96, 64))
    whole = story(STEP, trained(), recorded(told))
    result = stages.outcome(replace(whole, facts=whole.facts | {"cross_bytes_per_position": 16}))
    assert result is not None
    cache = result.stages[1].cache
    assert (cache and (cache.per_token, cache.per_position)) == between


def test_wrong_words_are_told_with_their_difference() -> None:
    result = outcome(word_errors=HEARD)
    assert "; its word error rate is 25.00 ± 2.00 % (3.00 ± 1.00 points against the source's)." in result.sentence("m", "s")
    told = rows(result)
    assert [row["word error rate"] for row in told.values()] == ["25.00 ± 2.00 %"] * 2
    assert [row["points more"] for row in told.values()] == ["–", "3.00 ± 1.00"]
    alone = measured(word_errors=HEARD) | {"against": None, "difference": None, "word_error_difference": None}
    assert of(STEP, recorded(alone), model=SMALL).sentence("m", "s").endswith("; its word error rate is 25.00 ± 2.00 %.")


def test_what_was_shown_to_a_conversion_is_named() -> None:
    assert calibrated({"tokens": 1200, "length": 64}) == "Calibrated on 1,200 tokens, windows of 64."
    shown = {"tokens": 1200, "examples": 40, "kind": "text pairs"}
    assert calibrated(shown) == "Calibrated on 40 examples (text pairs), 1,200 tokens to be written."
    assert (
        cache_change(96, 96, [64, 16])
        == "KV cache 96 B a token written, as before and 64 B → 16 B a position read (4.00x smaller)"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A T5 that was aligned on pairs and measured."""
    root = tmp_path_factory.mktemp("made")
    source, pairs = save_t5(root / "source"), write(root / "pairs.jsonl", PAIRS)
    recipe, out = get_recipe("gqa"), root / "out"
    convert(recipe, str(source), out, recipe.options(kv_heads=1, calibration=[str(pairs)]), Settings(verify=False), QUIET)
    told = evaluate(str(out), Options(data=[str(pairs)], device="cpu", against=str(source), record=True), QUIET)
    return out, told.record()


def test_report_card_show_and_comparison_agree_with_what_was_measured(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, told = made
    own, read = told["model"]["cache"]["bytes_per_token"], told["model"]["cross_cache"]
    facts = api.describe(folder)
    assert (facts.kv_bytes_per_token, facts.cross_bytes_per_position) == (own, read["bytes_per_position"])
    assert facts.reads == "text" and "64 bytes a token written, 64 bytes a position read" in str(facts)
    api.report(str(folder), tmp_path / "page.html")
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8")).replace("\u00a0", " ")
    written = pack(folder, "a/made", PushOptions()).files["README.md"]
    assert isinstance(written, bytes)
    card = html.unescape(written.decode())
    for words in (page, card):
        assert f"keeps {human_bytes(own)} of KV cache a token written" in words and "its loss given what is read is" in words
        assert human_bytes(read["bytes"]) in words and "all that was read" in words
        assert "Calibrated on 5 examples (text pairs)" in words
        assert "128 B → 64 B a token written (2.00x smaller) and 128 B → 64 B a position read (2.00x smaller)" in words
    assert "AutoModelForSeq2SeqLM" in card and "CausalLM.from" not in card and "text2text-generation" in card
    [group] = compare([str(folder)])
    row = dict(zip(group["columns"], group["rows"][0], strict=True))
    assert (row["KV a token"], row["KV a position read"]) == (human_bytes(own), human_bytes(read["bytes_per_position"]))
    assert "word errors" not in row


def test_models_that_hear_have_their_words_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    from tests.test_examples_sound import audio_folder, save_whisper

    source, speech, recipe = save_whisper(tmp_path / "source"), audio_folder(tmp_path / "speech"), get_recipe("gqa")
    out = tmp_path / "out"
    answer = convert(recipe, str(source), out, recipe.options(kv_heads=1, method="mean"), Settings(verify=False), QUIET)
    assert answer.reads == "sound"
    evaluate(str(out), Options(data=[str(speech)], device="cpu", against=str(source), record=True), QUIET)
    api.report(str(out), tmp_path / "page.html")
    written = pack(out, "a/made", PushOptions()).files["README.md"]
    assert isinstance(written, bytes)
    for words in ((tmp_path / "page.html").read_text(encoding="utf-8"), written.decode()):
        assert "word error rate" in words and "substituted" in words and "its word error rate is" in words
    assert "AutoModelForSpeechSeq2Seq" in written.decode() and "automatic-speech-recognition" in written.decode()
    assert "type: wer" in written.decode()
    [group] = compare([str(out)])
    row = dict(zip(group["columns"], group["rows"][0], strict=True))
    assert row["word errors"].endswith(" %") and row["points more"]

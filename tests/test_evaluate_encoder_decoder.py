"""Laws of `upfit evaluate` of encoder-decoders: losses are the classes' own, pairs cancel, caches are what they weigh."""

import builtins
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration, WhisperForConditionalGeneration

from tests.folders import save_tiny
from tests.test_examples import PAIRS, save_t5, write
from tests.test_examples_sound import LINES, audio_folder, save_whisper
from upfit import api, provenance
from upfit.checkpoint.reader import read_config
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.evaluate.encoder_decoder.words import count_errors, difference, normalised, transcribe
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options, check_data
from upfit.evaluate.result import Evaluation
from upfit.examples import read_examples
from upfit.output import Meter, Output

QUIET = Output(quiet=True)
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "evaluate.json").read_text())
METER = Meter("", 1, True, None)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("soundfile")
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audio_folder(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def run(folder: Path, data: Path | None, **changes: Any) -> Evaluation:
    options = Options(data=None if data is None else [str(data)], device="cpu", **changes)
    result = evaluate(str(folder), options, QUIET)
    record = json.loads(json.dumps(result.record()))
    jsonschema.validate(record, SCHEMA)
    assert Evaluation.read(record).record() == record
    return result


def own_losses(folder: Path, data: Path, model_class: Any) -> list[tuple[float, int]]:
    """Of each example, what the class itself says of the loss of its labels, and how many there are."""
    model, config = model_class.from_pretrained(folder).eval(), read_config(folder)
    losses = []
    for example in read_examples(folder, config, [str(data)], "--data", "text", None, QUIET).examples:
        keywords = {name: value[None] for name, value in example.keywords.items()}
        with torch.no_grad():
            loss = model(**keywords, decoder_input_ids=example.decoder_ids[None], labels=example.labels[None]).loss
        losses.append((loss.item(), int((example.labels != -100).sum())))
    return losses


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_the_loss_is_the_classs_own(
    t5: Path, whisper: Path, pairs: Path, speech: Path, family: str, request: pytest.FixtureRequest
) -> None:
    folder, data, model_class = (
        (t5, pairs, T5ForConditionalGeneration) if family == "t5" else (whisper, speech, WhisperForConditionalGeneration)
    )
    losses = own_losses(folder, data, model_class)
    tokens = sum(count for _, count in losses)
    for batch in (1, 4):
        loss = run(folder, data, batch=batch).model.loss
        assert loss.scored_tokens == tokens
        assert loss.nats_per_token.mean == pytest.approx(sum(loss * count for loss, count in losses) / tokens, rel=1e-5)


def test_pairs_cancel_and_differ(t5: Path, pairs: Path, tmp_path: Path) -> None:
    same = run(t5, pairs, against=str(t5)).difference
    assert same is not None and same.nats_per_token is not None
    assert (same.nats_per_token.mean, same.nats_per_token.low, same.nats_per_token.high) == (0, 0, 0)
    other = save_t5(tmp_path / "other", seed=1)
    answer = run(t5, pairs, against=str(other))
    assert answer.against is not None and answer.difference is not None and answer.difference.nats_per_token is not None
    means = [subject.loss.nats_per_token.mean for subject in (answer.model, answer.against)]
    assert answer.difference.nats_per_token.mean == pytest.approx(means[0] - means[1])
    assert answer.difference.nats_per_token.mean != 0


def test_both_caches_are_what_they_weigh(t5: Path, pairs: Path, tmp_path: Path) -> None:
    """A layer, keys and values, two heads of 8 float32: the same bytes for a token as for a position of the encoder."""
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=1, method="mean")
    convert(recipe, str(t5), tmp_path / "one", options, Settings(verify=False), QUIET)
    for folder, heads in ((t5, 2), (tmp_path / "one", 1)):
        subject = run(folder, pairs).model
        assert subject.cache is not None and subject.cross_cache is not None
        size = 2 * heads * 8 * 4
        assert (subject.cache.bytes_per_token, subject.cache.fixed_bytes) == (size, 0)
        cross = subject.cross_cache
        assert (cross.bytes_per_position, cross.bytes) == (size, size * cross.positions)
        assert cross.positions == len("one two " * 5) - 1


def test_data_tells_what_was_shown(t5: Path, pairs: Path) -> None:
    data = run(t5, pairs, windows=3).data
    assert (data.examples, data.windows, data.documents) == ("text pairs", 3, 3)
    assert run(t5, pairs, windows=3).data.sha256 == data.sha256 != run(t5, pairs).data.sha256


def test_words_are_those_that_a_greedy_loop_writes(whisper: Path, tmp_path: Path) -> None:
    """Up to twice the true one's tokens and 16 more, whatever the others in the batch are."""
    texts = [line | {"text": text} for line, text in zip(LINES, ("a", "bcdefg", "h"), strict=True)]
    speech = audio_folder(tmp_path / "speech", texts)
    model: Any = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    shown = read_examples(whisper, read_config(whisper), [str(speech)], "--data", "text", None, QUIET).examples
    from upfit.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(whisper))
    for example, text in zip(shown, transcribe(model, shown, tokenizer, 1, 3, METER), strict=True):
        ids = example.decoder_ids[None, :2]
        features = {name: value[None] for name, value in example.keywords.items()}
        for _ in range(2 * len(example.labels) + 16):
            with torch.no_grad():
                following = model(**features, decoder_input_ids=ids).logits[0, -1].argmax()
            if following == 1 or ids.shape[1] == 40:
                break
            ids = torch.cat([ids, following[None, None]], 1)
        assert text == tokenizer.decode(ids[0, 2:].tolist(), skip_special_tokens=True)


def test_a_word_error_rate_is_counted_without_case_and_punctuation() -> None:
    heard = count_errors(
        ["It's a royalty-free licence.", "Two words"], ["its a ROYALTY free license", "two more words, and more"]
    )
    assert heard.words.tolist() == [5, 2]
    assert (heard.substituted.tolist(), heard.missing.tolist(), heard.added.tolist()) == ([1, 0], [0, 0], [0, 3])
    summary = heard.summary()
    assert summary.rate.mean == pytest.approx(4 / 7) and (summary.words, summary.recordings) == (7, 2)
    assert normalised("  Don't — stop, now/then!") == "dont stop now then"
    empty = count_errors(["a b", "c"], ["", "c"])
    assert empty.missing.tolist() == [2, 0] and difference(empty, empty).mean == 0
    assert difference(heard, empty).mean == pytest.approx(4 / 7 - 2 / 3)
    both = count_errors(["a b", "a b c"], ["c b d", "x y"])
    assert (both.substituted.tolist(), both.missing.tolist(), both.added.tolist()) == ([1, 2], [0, 1], [1, 0])
    assert both.errors.tolist() == [2, 3]
    with pytest.raises(UpfitError, match="no transcript has a word"):
        count_errors(["..."], [""])


def test_recordings_give_words_and_their_difference(whisper: Path, speech: Path, tmp_path: Path) -> None:
    other = save_whisper(tmp_path / "other", seed=1)
    answer = run(whisper, speech, against=str(other))
    assert answer.model.word_errors is not None and answer.against is not None and answer.against.word_errors is not None
    assert answer.model.word_errors.words == 9 and answer.word_error_difference is not None
    rates = [subject.word_errors.rate.mean for subject in (answer.model, answer.against) if subject.word_errors]
    assert answer.word_error_difference.mean == pytest.approx(rates[0] - rates[1])
    assert answer.model.cross_cache is not None and answer.model.cross_cache.positions == 100
    text = str(answer)
    assert "3 recordings from 3 documents" in text and "word error rate" in text and "and 100 of them" in text


def test_without_data_text_of_this_python_is_taken(t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = evaluate(str(t5), Options(windows=4, device="cpu"), Output())
    assert (answer.data.source, answer.data.examples, answer.data.windows) == ("python", "spans", 4)
    assert "--data: no pairs of texts, so spans of text are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": True}, "--speed is for decoders, and .* is an encoder-decoder; leave it out"),
        ({"probe": ["needle"]}, "--probe is for decoders"),
        ({"tasks": ["hellaswag"]}, "--tasks is for decoders"),
        ({"ablate": "diff"}, "--ablate is for decoders"),
        ({"length": 64}, "--length is for decoders"),
        ({"record": True}, "has no recipe.json"),
    ],
)
def test_what_has_no_meaning_here_is_refused(t5: Path, pairs: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message):
        run(t5, pairs, **changes)


def test_models_that_take_something_else_are_not_compared(t5: Path, whisper: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="takes sound, and the model pairs of texts"):
        run(t5, pairs, against=str(whisper))
    with pytest.raises(UpfitError, match="takes text alone, and the model pairs of texts"):
        run(t5, pairs, against=str(save_tiny(tmp_path / "llama")))
    with pytest.raises(UpfitError, match="t5.* is an encoder-decoder, and .*llama a decoder"):
        run(tmp_path / "llama", None, against=str(t5))
    with pytest.raises(UpfitError, match="there is no --data: noise and tones are no substitute"):
        run(whisper, None)


def test_data_is_looked_for_before_a_model_is(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    with pytest.raises(UpfitError, match="holds no text files"):
        check_data(Options(data=[str(tmp_path / "speech")]))
    (tmp_path / "speech" / "metadata.csv").write_text("file_name,said")
    check_data(Options(data=[str(tmp_path / "speech")], field="said"))
    with pytest.raises(UpfitError, match="nowhere is not here"):
        check_data(Options(data=[str(tmp_path / "nowhere")]))


def test_without_jiwer_the_extra_is_named(whisper: Path, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jiwer":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UpfitError, match=r"jiwer; install it with: pip install 'upfit\[audio\]'"):
        run(whisper, speech)


def test_a_loss_that_is_not_finite_is_refused(t5: Path, pairs: Path, tmp_path: Path) -> None:
    model: Any = T5ForConditionalGeneration.from_pretrained(t5)
    with torch.no_grad():
        model.shared.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((t5 / name).read_bytes())
    with pytest.raises(UpfitError, match="gives a loss that is not finite in 5 of 5 examples"):
        run(tmp_path / "broken", pairs)


def test_a_recorded_result_is_shown_by_report_and_compare(t5: Path, pairs: Path, tmp_path: Path) -> None:
    recipe, out = get_recipe("gqa"), tmp_path / "out"
    convert(recipe, str(t5), out, recipe.options(kv_heads=1, method="mean"), Settings(verify=False), QUIET)
    answer = run(out, pairs, against=str(t5), record=True)
    kept = provenance.read(out)[-1]["measurements"]
    assert kept["model"]["cross_cache"]["bytes"] == answer.model.cross_cache.bytes  # type: ignore[union-attr]
    api.report(str(out), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "5 examples (text pairs)" in page
    assert "5 examples (text pairs)" in str(api.compare([str(out)]))


def test_sound_is_heard_in_the_models_type(whisper: Path, speech: Path) -> None:
    subject = run(whisper, speech, dtype="bfloat16").model
    assert subject.dtype == "bfloat16" and subject.cache is not None and subject.cache.dtypes == ["bfloat16"]


def test_losses_by_position_begin_at_the_first(t5: Path, tmp_path: Path) -> None:
    """Of one example with four tokens, each quarter is a token."""
    data = write(tmp_path / "one.jsonl", [{"source": "abc", "target": "def"}])
    model: Any = T5ForConditionalGeneration.from_pretrained(t5).eval()
    example = read_examples(t5, read_config(t5), [str(data)], "--data", "text", None, QUIET).examples[0]
    with torch.no_grad():
        logits = model(**{k: v[None] for k, v in example.keywords.items()}, decoder_input_ids=example.decoder_ids[None]).logits[
            0
        ]
    losses = torch.nn.functional.cross_entropy(logits, example.labels, reduction="none").tolist()
    assert run(t5, data).model.loss.nats_per_token_by_position == pytest.approx(losses, rel=1e-4)


def test_the_counts_of_a_position_are_of_all_examples(t5: Path, pairs: Path) -> None:
    loss = run(t5, pairs).model.loss
    assert np.isfinite(loss.nats_per_token_by_position).all() and len(loss.nats_per_token_by_position) == 4
    assert loss.scored_bytes > sum(len(pair["target"]) for pair in PAIRS)

"""A text read once and asked about many times gives what reading it each time gives; who cannot look back shows a gap."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from tests.folders import letter_tokenizer, save_tiny, tiny_llama
from tests.records import evaluate
from upfit import provenance
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.loss import window_losses
from upfit.evaluate.options import Options
from upfit.evaluate.probes import position, retrieval
from upfit.evaluate.probes import reader as reader_room
from upfit.evaluate.result import Evaluation
from upfit.longcontext.probes import contexts
from upfit.output import Meter, Output
from upfit.report.measured import measured
from upfit.text import python_documents
from upfit.text.windows import make_windows

QUIET = Output(quiet=True)
# float32 through two layers, in other chunks: sums of a few hundred terms in another order
FLOAT32 = 2e-4


def meter() -> Meter:
    return Meter("", 1, True, None)


# Reading once


def windowed() -> Any:
    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=24, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["llama", "window", "diff", "cope"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stock class, a window that is full long before the question, and our own classes with all their parameters random."""
    if request.param == "window":
        return windowed()
    plain = tiny_llama(initializer_range=0.2, max_position_embeddings=256)
    if request.param == "llama":
        return plain
    place = tmp_path_factory.mktemp(request.param)
    recipe = find_recipes()[request.param]
    convert(recipe, str(save_tiny(place / "source", plain)), place / "out", recipe.options(), Settings(verify=False), QUIET)
    made = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def plainly(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy without a cache."""
    for _ in range(count):
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


def test_asked_after_the_cache_is_asked_of_the_whole_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_room, "CHUNK", 16)
    draw, tokenizer = np.random.default_rng(0), letter_tokenizer()
    text = draw.integers(3, 64, 75)
    reader = reader_room.Reader(model, tokenizer, text)
    reader.ends = set()
    cache = reader.read(text)
    newline = tokenizer.convert_tokens_to_ids("\n")
    for _ in range(3):  # the same cache each time: a question must leave nothing in it
        asks, answer = draw.integers(3, 64, 9), draw.integers(3, 64, 5)
        whole = [*text.tolist(), *asks.tolist()]
        true = plainly(model, whole, len(answer) + reader_room.SPARE)
        assert newline not in true
        half_right, right = np.array([*true[:2], *answer[2:]]), np.array(true[:5])
        for wanted in (answer, half_right, right):
            reply = reader.answer(cache, asks, wanted)
            assert reply.generated == true
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*whole, *wanted]]), use_cache=False).logits[0]
            rows = logits[len(whole) - 1 : -1]
            assert reply.nats == pytest.approx(float(nn.functional.cross_entropy(rows, torch.tensor(wanted))), abs=FLOAT32)


def test_answers_end_at_a_line_or_an_end_token() -> None:
    model = tiny_llama(initializer_range=0.2)
    tokenizer, text = letter_tokenizer(), np.arange(3, 60)
    reader = reader_room.Reader(model, tokenizer, text)
    asks = np.array([5, 6, 7])
    free = reader.answer(reader.read(text), asks, np.array([4] * 6)).generated
    assert len(free) > 3
    reader.ends = {free[2]}
    assert reader.answer(reader.read(text), asks, np.array([4] * 6)).generated == free[: free.index(free[2])]


def test_a_model_that_forgets_its_cache_is_refused() -> None:
    config = MambaConfig(vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4, expand=2)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(UpfitError, match="does not go on from its cache"):
        reader_room.Reader(model, letter_tokenizer(), np.arange(3, 60))


def test_the_curve_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "CHUNK", 24)
    model, tokenizer = windowed(), letter_tokenizer()
    ((samples),) = position.make_samples([tokenizer], python_documents()[:40], 3, [64, 100])
    told = position.summary(position.probe(model, samples, meter()), samples).record()["lengths"]
    for length in (64, 100):
        windows = [w for w in make_windows(python_documents()[:40], tokenizer, length, 10**9) if len(w.ids) == length]
        chosen = [w for w in windows if any(np.array_equal(w.ids, sample.ids) for sample in samples)]
        plain = window_losses(model, chosen, 1, "m", meter()).per_token()
        assert len(chosen) == told[str(length)]["windows"] == 3
        assert told[str(length)]["nats_per_token"]["mean"] == pytest.approx(plain.mean, abs=FLOAT32)
        assert len(told[str(length)]["nats"]) == len(told[str(length)]["depths"]) == position.PARTS
    with pytest.raises(UpfitError, match="no text is 10000000 tokens long"):
        position.make_samples([tokenizer], python_documents()[:2], 3, [10_000_000])


def test_each_tokenizer_reads_the_same_texts_in_its_own_tokens() -> None:
    """And one that splits them as the first does has the first's."""
    first, same, other = letter_tokenizer(), letter_tokenizer(), AutoTokenizer.from_pretrained(embedded_model())
    samples, again, others = position.make_samples([first, same, other], python_documents()[:9], 3, [64])
    assert len(samples) == len(again) == len(others) == 3
    for mine, alike, its in zip(samples, again, others, strict=True):
        assert np.array_equal(mine.ids, alike.ids) and mine.digest == alike.digest != its.digest
        texts = [str(first.decode(mine.ids)), str(other.decode(its.ids, skip_special_tokens=True))]
        assert len(its.ids) < 64 and texts[0].replace(" ", "") == texts[1].replace(" ", "")


# Gaps of models whose reach is known


class Copier(nn.Module):
    """Goes on as the text did after the latest place, among its last `reach` tokens, that reads like the last few tokens."""

    def __init__(self, reach: int, vocabulary: int) -> None:
        super().__init__()
        self.reach, self.vocabulary = reach, vocabulary
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True, logits_to_keep: int = 0
    ) -> Any:
        ids: list[int] = [] if past_key_values is None else past_key_values
        ids += input_ids[0].tolist()
        logits = torch.zeros(1, logits_to_keep, self.vocabulary)
        for row in range(logits_to_keep):
            end = len(ids) - logits_to_keep + row + 1
            logits[0, row, self._next(ids[max(0, end - self.reach) : end])] = 9.0
        return Told(logits=logits, past_key_values=ids)

    @staticmethod
    def _next(ids: list[int]) -> int:
        longest = (0, 0)
        for at in range(len(ids) - 1, 0, -1):
            same = 0
            while same < min(at, 12) and ids[at - 1 - same] == ids[len(ids) - 1 - same]:
                same += 1
            longest = max(longest, (same, at))
        return ids[longest[1]] if longest[0] else 0


class Told(dict[str, Any]):
    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def test_who_cannot_look_back_shows_the_gap_it_must(tokenizer: Any) -> None:
    """A window of 250 tokens reaches the last part of 700; one of 10,000 reaches all of it."""
    (samples,) = contexts.make_contexts("key-value", [tokenizer], [], [700], 8, contexts.Settings(4))
    told = {}
    for reach in (250, 10_000):
        found = retrieval.probe(Copier(reach, len(tokenizer)), samples, meter())
        told[reach] = retrieval.summary(found, samples).record()["lengths"]["700"]
    near, all_of_it = told[250], told[10_000]
    assert all_of_it["scores"] == [1.0] * 4 and all_of_it["gap"]["mean"] == 0.0 and all_of_it["p_value"] == 1.0
    assert all_of_it["average"] == {"mean": 1.0, "low": 1.0, "high": 1.0} == all_of_it["strict"]
    assert near["scores"][:2] == [0.0, 0.0] and near["scores"][-1] >= 0.75
    for prefix in ("", "nats_"):
        assert near[f"{prefix}p_value"] < 0.02 and near[f"{prefix}gap"]["mean"] > near[f"{prefix}null_gap"]["p95"]
    assert near["nats"][0] > near["nats"][-1] + 1 and near["normalised"] == pytest.approx(near["average"]["mean"])


def test_what_is_told_of_a_depth_is_the_mean_over_contexts(tokenizer: Any) -> None:
    (samples,) = contexts.make_contexts("key-value", [tokenizer], [], [300], 6, contexts.Settings(4))
    draw, names = np.random.default_rng(0), ("relaxed", "strict", "nats")
    replies = [retrieval.Answered(300, ("",) * 4, *draw.random((3, 4))) for _ in samples]
    row = retrieval.summary(replies, samples).record()["lengths"]["300"]
    for key, name in zip(("scores", "strict_scores", "nats"), names, strict=True):
        wanted = [fmean(getattr(reply, name)[depth] for reply in replies) for depth in range(4)]
        assert row[key] == pytest.approx(wanted)
    for key, name in zip(("average", "strict", "answer_nats_per_token"), names, strict=True):
        assert row[key]["mean"] == pytest.approx(fmean(value for reply in replies for value in getattr(reply, name)))
    assert row["gap"]["mean"] == pytest.approx(max(row["scores"]) - min(row["scores"]))
    assert row["nats_gap"]["mean"] == pytest.approx(max(row["nats"]) - min(row["nats"]))
    assert row["depths"] == pytest.approx([fmean(laid.questions[depth].depth for laid in samples) for depth in range(4)])
    assert row["contexts"] == len(samples) and row["tokens"] == fmean(len(laid.ids) for laid in samples)


# The verb

NAMES = ["val-code", "key-value", "variable-tracking", "position"]


@pytest.mark.slow
def test_the_verb_tells_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model against itself, one of them with a recipe that tells of training."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(embedded_model(), model)
    step = provenance.step("uptrain", {}, {}) | {"data": {"patterns": ["key and value, both ways"]}}
    provenance.write(model, [provenance.step("convert cope", {"name": "source"}, {}), step])
    text.write_text("\n".join(f"Line {i} says that there are {i * i} of them." for i in range(300)))
    asked: dict[str, Any] = {"probe": NAMES, "probe_samples": 4, "probe_depths": 2, "probe_length": [500, 450]}
    options = Options(against=str(embedded_model()), data=[str(text)], windows=1, length=64, **asked)
    result = evaluate(str(model), options, QUIET)
    told = json.loads(json.dumps(result))["model"]["probes"]
    assert list(told) == NAMES
    for name in NAMES[:-1]:
        assert list(told[name]["lengths"]) == ["450", "500"]
        for row in told[name]["lengths"].values():
            assert len(row["depths"]) == len(row["scores"]) == len(row["strict_scores"]) == len(row["nats"]) == 2
            assert row["contexts"] == 2 and ("film" in row) == (name == "val-code")
            assert set(row["null_gap"]) == {"mean", "p95"} and 0 < row["nats_p_value"] <= 1
        assert told[name]["trained_on"] is (name == "key-value")
        assert result["against"]["probes"][name]["trained_on"] is False
        same = result["probe_differences"][name]["lengths"]["500"]
        assert same["score"]["average"]["mean"] == same["answer_nats_per_token"]["gap"]["mean"] == 0.0
    curve = told["position"]["lengths"]["450"]
    assert len(curve["depths"]) == len(curve["nats"]) == len(curve["intervals"]) == position.PARTS
    assert result["probe_differences"]["position"]["lengths"]["500"]["nats_per_token"]["mean"] == 0.0
    monkeypatch.setenv("COLUMNS", "250")
    Evaluation.read(result).show(Output())
    shown = capsys.readouterr().out
    assert all(name.capitalize() in shown for name in NAMES[:-1])
    assert "Loss by position" in shown and "trained on" in shown and "yes" in shown
    assert {section.title for section in measured([("it", result)])} >= {f"Probe: {name}" for name in NAMES}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probe": ["val-code"], "probe_length": [2000]}, "--probe-length 2000 is more than the 1024 positions"),
        ({"probe": ["needle"], "probe_length": [100, 200]}, "--probe needle takes one --probe-length, not 2"),
        ({"probe": ["key-value"], "probe_length": [63]}, r"--probe-length got \[63\]; it takes 64 or more"),
        ({"probe": ["key-value"], "probe_length": [80]}, "larger --probe-length or fewer --probe-depths"),
        (
            {"probe": ["needle"], "probe_depths": 3},
            "--probe-depths goes with --probe val-document, .* or variable-tracking, not needle; leave it out",
        ),
        (
            {"probe": ["key-value"], "probe_asked": 2},
            "--probe-asked goes with --probe multi-needle, not key-value; leave it out",
        ),
        ({"probe": ["multi-needle"], "probe_asked": 9}, "--probe-asked 9 is more than the needles"),
        (
            {"probe": ["key-value"], "probe_pieces": "here"},
            "--probe-pieces goes with --probe val-document, val-code or val-database, not key-value",
        ),
        ({"probe": ["val-code"], "probe_pieces": "nowhere", "probe_length": [900]}, "code_functions.jsonl cannot be read"),
        ({"probe": ["val-database"], "probe_format": "chat"}, "needs a tokenizer with a chat template"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message) as raised:
        evaluate(str(embedded_model()), Options(windows=1, length=64, **given), QUIET)
    assert "\n" not in str(raised.value)

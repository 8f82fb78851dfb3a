"""Laws of `upfit.evaluate`: losses equal a plain reference, pairs cancel, caches are what they weigh, intervals cover."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from tests.records import evaluate
from upfit.errors import UpfitError
from upfit.evaluate.cache import measure_cache
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.loss import by_position, token_losses, window_losses
from upfit.evaluate.measures import Spread
from upfit.evaluate.options import Options
from upfit.evaluate.result import Evaluation
from upfit.evaluate.speed import _row, settle_lengths
from upfit.output import Meter, Output
from upfit.text import Document, python_documents
from upfit.text.windows import make_windows

LAYERS, HEADS, HEAD_DIM, POSITIONS = 2, 4, 8, 128
# float32 cross entropy over a few hundred words against float64: rounding of a handful of units in the last place
FLOAT32 = 2e-5

PROSE = "Grüße, wörld: naïve cafés sell 12 crêpes – and a 🦊 reads them all. "


def tiny_tokenizer(merges: int = 60, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE * 3, "def window(size): return [token for token in range(size)]\n" * 3], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_llama(kv_heads: int = HEADS, noise: float = 0.0) -> Any:
    config = LlamaConfig(
        vocab_size=330, hidden_size=HEADS * HEAD_DIM, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def documents() -> list[Document]:
    return [Document(f"{i} " + PROSE[: 60 if i == 0 else None] * (1 + 7 * i) + str(i * 12345), f"d{i}") for i in range(6)]


def meter() -> Meter:
    return Meter("", 1, True, None)


def quiet() -> Output:
    return Output(as_json=True, quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models and a data file, by name."""
    root = tmp_path_factory.mktemp("models")
    for name, model in {"a": tiny_llama(), "near": tiny_llama(noise=0.01), "grouped": tiny_llama(kv_heads=2)}.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    tiny_llama().save_pretrained(root / "other tokens")
    tiny_tokenizer(merges=5, bos=True).save_pretrained(root / "other tokens")
    tiny_llama().save_pretrained(root / "no tokenizer")
    (root / "text.txt").write_text("\n".join(document.text for document in documents()))
    (root / "short.txt").write_text("Too short.")
    return {path.name: str(path) for path in root.iterdir()}


def settings(folders: dict[str, str], **changes: Any) -> Options:
    return replace(Options(data=[folders["text.txt"]], length=48, windows=12, device="cpu"), **changes)


# Loss


def test_loss_equals_float64_reference() -> None:
    model, windows = tiny_llama(), make_windows(documents()[:3], tiny_tokenizer(), 48, 100)
    assert len({len(window.ids) for window in windows}) > 1, "a short window must be among them"
    found = window_losses(model, windows, 3, "m", meter())
    model = model.double()
    for index, window in enumerate(windows):
        ids = torch.from_numpy(window.ids)
        log_p = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)
        wanted = -log_p[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        assert found.tokens[index].sum() == len(ids) - 1
        assert found.nats[index].sum() == pytest.approx(wanted, rel=FLOAT32)
    assert found.per_token().mean == pytest.approx(found.nats.sum() / sum(len(w.ids) - 1 for w in windows), rel=1e-12)


def test_loss_does_not_depend_on_the_batch_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), torch.randint(0, 330, (3, 40))
    whole = token_losses(model, ids)
    monkeypatch.setattr("upfit.evaluate.loss.ROWS_AT_ONCE", 7)
    assert whole.shape == (3, 39)
    np.testing.assert_array_equal(token_losses(model, ids), whole)


def test_loss_by_position_keeps_order_and_sum() -> None:
    sums, counts = by_position(np.arange(10.0)[None])
    assert counts.tolist() == [3, 2, 3, 2]
    assert sums.tolist() == [[0 + 1 + 2, 3 + 4, 5 + 6 + 7, 8 + 9]]


def test_bits_per_byte_and_perplexity_follow_from_the_loss(folders: dict[str, str]) -> None:
    loss = evaluate(folders["a"], settings(folders), quiet())["model"]["loss"]
    nats = loss["nats_per_token"]
    assert loss["perplexity"]["high"] == pytest.approx(math.exp(nats["high"]), rel=1e-12)
    bits = nats["mean"] * loss["scored_tokens"] / math.log(2) / loss["scored_bytes"]
    assert loss["bits_per_byte"]["mean"] == pytest.approx(bits, rel=1e-12)


# Differences


def test_a_model_differs_from_itself_by_exactly_nothing(folders: dict[str, str]) -> None:
    difference = evaluate(folders["a"], settings(folders, against=folders["a"]), quiet())["difference"]
    assert difference["unit"] == "nats per token"
    assert difference["nats_per_token"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert difference["perplexity_ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_pairing_narrows_the_interval(folders: dict[str, str]) -> None:
    result = evaluate(folders["near"], settings(folders, against=folders["a"]), quiet())
    pair, alone = result["difference"]["nats_per_token"], result["against"]["loss"]["nats_per_token"]
    assert pair["high"] - pair["low"] < 0.5 * (alone["high"] - alone["low"])
    means = [result[key]["loss"]["nats_per_token"]["mean"] for key in ("model", "against")]
    assert pair["mean"] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert pair["mean"] != 0
    assert result["task_differences"] is result["probe_differences"] is None, "nothing of that was asked for"


def test_other_tokens_are_compared_in_bits_per_byte(folders: dict[str, str]) -> None:
    result = evaluate(folders["a"], settings(folders, against=folders["other tokens"]), quiet())
    difference = result["difference"]
    assert difference["unit"] == "bits per byte" and "nats_per_token" not in difference
    means = [result[key]["loss"]["bits_per_byte"]["mean"] for key in ("model", "against")]
    assert difference["bits_per_byte"]["mean"] == pytest.approx(means[0] - means[1], abs=1e-12)


# Intervals


def test_intervals_of_equal_weights_are_the_textbook_ones() -> None:
    draw = np.random.default_rng(0)
    first = draw.normal(3, 0.4, 20)
    second = first + draw.normal(0.1, 0.05, 20)
    weights = np.full(20, 511)
    alone, pair = (
        mean_interval(first * weights, weights),
        difference_interval(second * weights, weights, first * weights, weights),
    )
    wanted = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert (alone.low, alone.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    wanted = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (pair.low, pair.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_interval_covers_the_token_weighted_mean() -> None:
    """Windows of very unequal length whose loss depends on their length: 95 % of the intervals hold the true mean."""
    draw = np.random.default_rng(1)
    weights = draw.integers(32, 512, (2000, 40))
    costs = weights * (3 + 50 / weights + draw.normal(0, 0.5, weights.shape))
    true = 3 + 50 / np.arange(32, 512).mean()
    found = [mean_interval(c, w) for c, w in zip(costs, weights, strict=True)]
    covered = np.mean([e.low is not None and e.high is not None and e.low < true < e.high for e in found])
    assert 0.93 < covered < 0.97  # 2000 draws: standard error 0.005, and the ratio's own small bias


def test_one_window_gives_no_interval(folders: dict[str, str]) -> None:
    loss = evaluate(folders["a"], settings(folders, windows=1), quiet())["model"]["loss"]["nats_per_token"]
    assert loss["low"] is None and loss["high"] is None and loss["mean"] > 0


# Windows


# Text


# Cache


def test_cache_bytes_are_those_of_keys_and_values() -> None:
    ids = torch.arange(20)
    found = [measure_cache(tiny_llama(kv_heads).to(dtype), ids, POSITIONS) for kv_heads, dtype in
             [(4, torch.float32), (2, torch.float32), (1, torch.bfloat16)]]  # fmt: skip
    assert [growth and growth.bytes_per_token for growth in found] == [
        LAYERS * 2 * kv_heads * HEAD_DIM * itemsize for kv_heads, itemsize in [(4, 4), (2, 4), (1, 2)]
    ]
    assert all(growth and growth.fixed_bytes == 0 and growth.window is None for growth in found)
    assert found[2] and found[2].dtypes == ["bfloat16"]


def test_cache_stops_growing_beyond_a_sliding_window() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    growth = measure_cache(MistralForCausalLM(config).eval(), torch.arange(30), 256)
    assert growth and (growth.bytes_per_token, growth.bytes_per_token_beyond, growth.window) == (2 * 2 * 2 * 8 * 4, 0, 16)
    assert growth.fixed_bytes == 0, "the counters of the layers are no cache"
    config.sliding_window = 512  # never full in 256 positions
    growth = measure_cache(MistralForCausalLM(config).eval(), torch.arange(30), 256)
    assert growth and (growth.window, growth.bytes_per_token_beyond) == (None, None)


def test_beyond_the_window_only_the_full_layers_grow() -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=256,
    )  # fmt: skip
    growth = measure_cache(Qwen2ForCausalLM(config).eval(), torch.arange(30), 256)
    layer = 2 * 2 * 8 * 4  # keys and values x heads x width x float32
    assert growth and (growth.bytes_per_token, growth.bytes_per_token_beyond) == (3 * layer, 2 * layer)


@pytest.mark.parametrize(("window", "longest"), [(16_000, 16_048), (16_382, 16_384), (16_383, 48), (20_000, 48)])
def test_windows_are_filled_up_to_a_length(monkeypatch: pytest.MonkeyPatch, window: int, longest: int) -> None:
    """Of 16384 tokens: what is read beyond the window goes no further either."""
    lengths: list[int] = []

    def run(ids: torch.Tensor) -> tuple[None, DynamicCache]:
        lengths.append(ids.shape[1])
        layer = DynamicSlidingWindowLayer(sliding_window=window)
        layer.keys = torch.empty(1, 1, min(ids.shape[1], window - 1), 1)
        cache = DynamicCache()
        cache.layers = [layer]
        return None, cache

    monkeypatch.setattr("upfit.evaluate.cache.CachedModel", lambda model: run)
    growth = measure_cache(None, torch.arange(30), None)
    assert growth and growth.window == window and growth.bytes_per_token == 4
    assert max(lengths) == longest and growth.bytes_per_token_beyond == (0 if longest > 48 else None)


def test_states_are_fixed_bytes() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4, expand=2)
    growth = measure_cache(MambaForCausalLM(config).eval(), torch.arange(30), None)
    assert growth and growth.bytes_per_token == 0
    assert growth.fixed_bytes == 2 * (32 * 4 + 32 * 4) * 4  # layers x (convolution + state) x float32


# Speed and the whole


def test_speed_tells_rates_and_cache_growth(folders: dict[str, str]) -> None:
    options = settings(
        folders, against=folders["a"], speed=True, speed_lengths=[40, 16], speed_steps=3, speed_repeats=3, speed_batch=2
    )
    result = evaluate(folders["grouped"], options, quiet())
    rows = result["speed"]["rows"]
    assert [row["context"] for row in rows] == [16, 40]
    for row in rows:
        for key, kv_heads in (("model", 2), ("against", 4)):
            assert row[key]["cache_bytes"] == 2 * row["context"] * LAYERS * 2 * kv_heads * HEAD_DIM * 4
            rate = row[key]["decode_tokens_per_s"]
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["ratio"]["decode"]["low"] <= row["ratio"]["decode"]["median"]
    assert result["model"]["cache"]["bytes_per_token"] * 2 == result["against"]["cache"]["bytes_per_token"]


def test_rates_and_ratios_are_those_of_the_times() -> None:
    """Two rows of 100 tokens, 10 steps each; a ratio is of the two times of a repetition, above 1 where the model is faster."""
    ours, theirs = [(2.0, 1.0, 7), (4.0, 5.0, 7), (1.0, 2.0, 7)], [(3.0, 4.0, 9), (2.0, 5.0, 9), (2.0, 1.0, 9)]
    row = _row(100, 2, 10, {"model": ours, "against": theirs})
    assert row.model.prefill_tokens_per_s == Spread(100.0, 50.0, 200.0) and row.model.cache_bytes == 7
    assert row.model.decode_tokens_per_s == Spread(10.0, 4.0, 20.0)
    assert row.against is not None and row.against.prefill_tokens_per_s == Spread(100.0, 200 / 3, 100.0)
    assert row.against.decode_tokens_per_s == Spread(5.0, 4.0, 20.0) and row.against.cache_bytes == 9
    assert row.ratio is not None and row.ratio.prefill == Spread(1.5, 0.5, 2.0) and row.ratio.decode == Spread(1.0, 0.5, 4.0)
    alone = _row(100, 2, 10, {"model": ours})
    assert alone.model == row.model and alone.against is alone.ratio is None


def test_speed_lengths_leave_room_to_decode() -> None:
    assert settle_lengths(None, 32, 1024) == [128, 512, 992]
    assert settle_lengths(None, 32, None) == [128, 512, 2048]
    with pytest.raises(UpfitError, match="give at most 992"):
        settle_lengths([1000], 32, 1024)


def test_result_is_json_and_shows_as_tables(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [*python_documents()[:9], python_documents()[-1]]  # all of it takes seconds to tokenise
    monkeypatch.setattr("upfit.evaluate.evaluate.python_documents", lambda: some)
    options = settings(
        folders, data=None, length=None, windows=4, against=folders["near"], speed=True, speed_steps=1, speed_repeats=3
    )
    result = evaluate(folders["a"], options, Output())
    assert "half prose and half code" in capsys.readouterr().err
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["data"]["length"] == POSITIONS and result["data"]["source"] == "python"
    Evaluation.read(result).show(Output())
    printed = capsys.readouterr().out
    for wanted in ("perplexity", "Difference (paired)", "cache per token", "512 B", "decode tokens/s", "ratio"):
        assert wanted in printed
    Evaluation.read(result).show(quiet())
    assert capsys.readouterr().out == ""


def test_the_same_run_gives_the_same_numbers(folders: dict[str, str]) -> None:
    first, again = (evaluate(folders["a"], settings(folders), quiet()) for _ in range(2))
    assert first["data"] == again["data"] and first["model"] == again["model"]


# Errors

"""What stands between the parts of an attention, as it is watched: gates, norms without scales, keys that later layers use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.aligning import inputs_of
from tests.folders import letter_tokenizer
from tests.test_aligned_laws import TEXT
from tests.tiny import tiny_model
from tests.watching import watch_type
from upfit.architecture.attention import LAYOUTS, Geometry
from upfit.architecture.layers import open_model
from upfit.calibration.between import OF_DIMENSIONS, OF_HEADS, PLAIN, gates_of
from upfit.calibration.rotation import Layout, find_unit, turns_of, unit_norm
from upfit.calibration.statistics import observe
from upfit.calibration.teacher_student import open_pair
from upfit.calibration.traits import AttentionTraits
from upfit.calibration.watch import has_module
from upfit.checkpoint.reader import open_checkpoint
from upfit.cli import app

LENT: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def traits_of(model_type: str, **changes: Any) -> list[AttentionTraits]:
    return [traits for _, traits, _ in watch_type(model_type, **changes) if traits is not None]


@pytest.mark.parametrize(
    ("model_type", "gated"),
    [
        ("llama", PLAIN),
        ("laguna", OF_HEADS),
        ("afmoe", OF_DIMENSIONS),
        ("qwen3_next", OF_DIMENSIONS),
        ("bitnet", OF_DIMENSIONS),
    ],
)
def test_what_multiplies_the_output_of_attention_is_seen(model_type: str, gated: str) -> None:
    every = traits_of(model_type)
    assert every and all(traits.values and traits.gated == gated for traits in every)


def test_gates_are_those_of_the_queries_projection() -> None:
    """Of Qwen3-Next: the rows behind each head's queries, through a sigmoid."""
    for pair, traits, _ in watch_type("qwen3_next"):
        assert traits is not None
        for _, watched, _ in pair.watch((pair.path("q"), pair.path("o"))):
            shape = pair.layer.geometry
            stored = watched.taps[pair.path("q")][1].unflatten(-1, (shape.heads, 2, shape.head_dim))
            assert torch.allclose(gates_of(watched, pair.place), stored[..., 1, :].sigmoid(), atol=1e-5)


def test_sums_are_of_what_the_output_projection_sees() -> None:
    """Of gates of heads the moment of the gated values; of gates of dimensions that of each, for each query head."""
    for model_type, name in (("laguna", "values"), ("qwen3_next", "value_dimensions")):
        pair, traits, _ = next(watch_type(model_type))
        assert traits is not None
        for _, watched, rows in pair.watch((pair.path("o"),), 8):
            gates = pair.gates(watched, traits)
            assert gates is not None
            whole, plain = (observe(watched.seen, traits, rows, each)[name] for each in (gates, torch.ones_like(gates)))
            twice = observe(watched.seen, traits, rows, 2 * gates)[name]
            torch.testing.assert_close(twice, 4 * whole)
            assert (whole - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("bias", [False, True])
def test_queries_and_gates_come_apart_and_together(bias: bool) -> None:
    shape, layout = Geometry(4, 2, 3, 3), LAYOUTS["gated-queries"]
    stored = {"q.weight": torch.randn(24, 5), "k.weight": torch.randn(6, 5), "o.weight": torch.randn(5, 12)}
    stored |= {"q.bias": torch.randn(24)} if bias else {}
    attention = layout.unpack(stored, shape)
    assert attention.q is not None and attention.gate is not None
    assert torch.equal(attention.q[1], stored["q.weight"][6:9]) and torch.equal(attention.gate[1], stored["q.weight"][9:12])
    packed = layout.pack(attention, shape)
    assert packed.keys() == stored.keys() and all(torch.equal(packed[name], stored[name]) for name in stored)


@pytest.mark.parametrize("model_type", ["llama4_text", "muse_glimmer"])
def test_norms_without_scales_are_seen(model_type: str) -> None:
    """They are no modules of the queries or of the keys alone, and lie behind the rotation or before it; turns pass."""
    for traits in traits_of(model_type):
        assert len(traits.unit) == 4 and traits.normed and traits.keys and traits.factors


@pytest.mark.parametrize("model_type", ["qwen3", "hunyuan_v1_dense", "qwen3_next", "llama4_text", "muse_glimmer"])
def test_the_rotation_of_one_run_is_that_of_the_layer(model_type: str) -> None:
    """Behind norms and before them, those without scales too, and with gates in the queries' projection."""
    for pair, traits, turns in watch_type(model_type):
        assert traits is not None and traits.keys and turns is not None
        layout = Layout(traits.pairs, traits.order, traits.speeds, traits.norm_last, traits.unit)
        paths = {part: pair.path(part) for part in ("q", "k", "q_norm", "k_norm")}
        paths = {part: path for part, path in paths.items() if has_module(pair.block.module, path)}
        for _, watched, _ in pair.watch(tuple(paths.values())):
            again = turns_of(
                watched.seen, {part: watched.taps[path] for part, path in paths.items()}, layout, pair.layer.geometry
            )
            torch.testing.assert_close(again.q, turns.q, rtol=0, atol=1e-4)
            torch.testing.assert_close(again.k, turns.k, rtol=0, atol=1e-4)


def test_the_norm_is_found_from_lengths_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = 0.01 * torch.randn(2, 9, 3, 8, generator=generator, dtype=torch.float64)
    turned = unit_norm(heads, 1.7, 1e-5) @ torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    assert find_unit(heads, turned) == pytest.approx((1.7, 1e-5), rel=1e-6)
    assert find_unit(heads, 3 * heads) is None, "a number is no norm"
    assert find_unit(heads, torch.randn(heads.shape, generator=generator, dtype=torch.float64)) is None


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])
def test_values_behind_a_norm_are_seen(model_type: str) -> None:
    for traits in traits_of(model_type):
        assert traits.values and traits.value_unit[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])
def test_keys_and_values_that_later_layers_use_stay_in_their_basis(model_type: str, tmp_path: Any) -> None:
    """Else those would meet them with queries and outputs that know nothing of it; and each stream has its own."""
    every = traits_of(model_type, **LENT)
    assert len(every) == 2 and not any(traits.keys or traits.values for traits in every)
    assert all(any("later layers use" in reason for reason in traits.reasons) for traits in every)
    model = tiny_model(model_type, **LENT)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as stored:
        checkpoint, architecture = open_model(stored)
        _, (batch,) = open_pair(checkpoint, architecture, _Sample([inputs_of(model, 0)]))  # type: ignore[arg-type]
        theirs, ours = (calls[0].keywords["shared_kv_states"] for calls in (batch.calls, batch.student_calls))
        assert theirs is not ours and ours is batch.student_calls[-1].keywords["shared_kv_states"]
        theirs["full_attention"] = (torch.ones(1),)
        assert "full_attention" not in ours
        batch.follow(0)
        assert ours["full_attention"] is theirs["full_attention"] and batch.student is batch.teacher


class _Sample:
    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs

    def batches(self) -> tuple[list[Any], list[bool]]:
        return self.inputs, [False] * len(self.inputs)


def test_sums_in_place_hide_nothing() -> None:
    """Falcon's layer adds the attention's output to the MLP's where that lies."""
    for traits in traits_of("falcon"):
        assert traits.residual is not None and traits.residual.down == "mlp.dense_4h_to_h"
        assert traits.residual.attention == pytest.approx(1, abs=1e-6) and traits.residual.mlp == pytest.approx(1, abs=1e-6)


def test_a_layer_that_text_passes_by_is_left_alone() -> None:
    """Mllama's layers that attend to images: the others are aligned all the same."""
    every = {pair.layer.path: traits for pair, traits, _ in watch_type("mllama")}
    assert [traits is None for traits in every.values()].count(True) == 1 and len(every) == 3
    assert all("cross_attn" in path for path, traits in every.items() if traits is None)


def test_a_dry_run_tells_which_layers_are_averaged_and_why(tmp_path: Path) -> None:
    """Those that could be watched, and those that could not."""
    (tmp_path / "text.txt").write_text(TEXT)
    changes = {"mllama": {}, "gemma4_text": LENT}
    wanted = {
        "mllama": "model.language_model.layers.1.cross_attn: what the model is calibrated on does not go through this layer",
        "gemma4_text": "model.layers.0-1.self_attn: later layers use its keys and values too, so heads are averaged",
    }
    for model_type, words in wanted.items():
        source = tmp_path / model_type
        tiny_model(model_type, **changes[model_type]).save_pretrained(source)
        letter_tokenizer().save_pretrained(source)
        arguments = ["convert", "gqa", str(source), str(tmp_path / "out"), "--kv-heads", "2", "--dry-run"]
        calibration = ["--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "1k", "--calibration-length", "32"]
        done = CliRunner().invoke(app, [*arguments, *calibration], catch_exceptions=False)
        assert words in " ".join(done.stdout.split()), done.stdout

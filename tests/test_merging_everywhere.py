"""Aligned merging where nothing turns the keys: encoder-decoders, learned positions, biases by position, keys in one tensor."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.folders import letter_tokenizer
from tests.test_aligned_laws import TEXT, Nothing, equal_heads
from tests.test_laws import sample
from tests.tiny import BUILDABLE, tiny_inputs, tiny_model
from tests.watching import bands_of, watch_type
from upfit.architecture.attention import Attention
from upfit.architecture.layers import Architecture
from upfit.architecture.listing import watched_bands
from upfit.architecture.loading import load_strictly
from upfit.architecture.table import table
from upfit.calibration.calibrate import calibrate
from upfit.checkpoint.plan import Plan
from upfit.checkpoint.reader import read_config
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.recipe import PARTS
from upfit.convert.gqa.reparametrise import rebase_values, scale_pairs
from upfit.convert.recipe import Recipe, get_recipe
from upfit.errors import UpfitError
from upfit.examples import read_examples
from upfit.output import Output

# Post-norm and pre-norm, cross-attention, biases by position that are shared between layers, ALiBi in classes of their own.
FREE = ("bart", "bloom", "gpt_neo", "m2m_100", "marian", "mpt", "t5")
OFTEN = ("bart", "bloom", "t5")
OWN = {name for name, entry in table().entries.items() if entry.own}


def sampled(name: str) -> Any:
    return name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)


def saved(model_type: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny model with a tokenizer in `folder`/source; what it is calibrated on, as options."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder / "source")
    letter_tokenizer().save_pretrained(folder / "source")
    if model.config.is_encoder_decoder:
        pairs = [{"source": TEXT[at : at + 40], "target": TEXT[at + 9 : at + 40]} for at in range(0, 2000, 20)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return {"calibration": [str(folder / "pairs.jsonl")]}
    (folder / "text.txt").write_text(TEXT)
    return {"calibration": [str(folder / "text.txt")], "calibration_tokens": "2k", "calibration_length": 32}


def convert_to(folder: Path, source: str, out: str, **options: Any) -> None:
    recipe = get_recipe("gqa")
    convert(recipe, str(folder / source), folder / out, recipe.options(**options), Settings(verify=False), Output(quiet=True))


def logits(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = load_strictly(folder, dtype=torch.float32).eval()(**inputs).logits
    return result


def convert_with(change: Callable[[Attention], Attention], source: Path, out: Path) -> None:
    """A conversion like any, of every layer's projections."""

    def plan(architecture: Architecture, options: Nothing) -> Plan:
        wanted = (*PARTS, "q", "o", "q_bias")
        return Plan(architecture.config, tuple(layer.rule(wanted, change, "changed") for layer in architecture.layers))

    recipe = Recipe("changed", "changed heads", "none", Nothing, plan, lambda _: None, lambda _: [])
    convert(recipe, str(source), out, Nothing(), Settings(verify=False), Output(quiet=True))


def disguise(folder: Path, source: str, out: str) -> None:
    """The same function, every head of it in another basis: any linear map of keys and values is free where nothing turns. The
    maps are far from singular: a direction that one makes tiny is below what float32 sums hold, and merged on one CPU alone."""
    generator = torch.Generator().manual_seed(0)

    def maps(count: int, width: int) -> Tensor:
        return torch.eye(width) + 0.2 * torch.randn(count, width, width, generator=generator)

    def change(attention: Attention) -> Attention:
        assert attention.q is not None and attention.k is not None and attention.v is not None
        of_keys = maps(*attention.k.shape[:2])
        of_queries = torch.linalg.inv(of_keys).mT
        changed: dict[str, Any] = {name: _through(getattr(attention, name), of_keys) for name in ("k", "k_bias")}
        changed |= {name: _through(getattr(attention, name), of_queries) for name in ("q", "q_bias")}
        return rebase_values(replace(attention, **changed), maps(*attention.v.shape[:2]))

    convert_with(change, folder / source, folder / out)


def _through(tensor: Tensor | None, maps: Tensor) -> Tensor | None:
    return None if tensor is None else torch.einsum("hde,he...->hd...", maps, tensor)


@pytest.mark.parametrize("model_type", map(sampled, FREE))
def test_disguised_heads_are_found_again(model_type: str, tmp_path: Path) -> None:
    """Heads that are one, each in a basis of its own, merge without loss, and the refit leaves them alone. Their mean is
    nothing like it."""
    text = saved(model_type, tmp_path)
    equal_heads(tmp_path / "source", tmp_path / "equal", 2)
    disguise(tmp_path, "equal", "disguised")
    convert_to(tmp_path, "disguised", "aligned", kv_heads=2, method="aligned", **text)
    convert_to(tmp_path, "disguised", "mean", kv_heads=2, method="mean")
    inputs = tiny_inputs(tiny_model(model_type))
    source, aligned, mean = (logits(tmp_path / name, inputs) for name in ("equal", "aligned", "mean"))
    assert (aligned - source).square().mean() < 1e-6 * source.var()
    assert (mean - source).square().mean() > 1e-3 * source.var()


@pytest.mark.parametrize("model_type", map(sampled, (*FREE, "gpt2")))
def test_heads_that_differ_lose_less_than_their_mean(model_type: str, tmp_path: Path) -> None:
    """Of random weights, whose heads have nothing in common: what is calibrated is nearer to the source."""
    text = saved(model_type, tmp_path)
    convert_to(tmp_path, "source", "aligned", kv_heads=2, method="aligned", refit=False, **text)
    convert_to(tmp_path, "source", "mean", kv_heads=2, method="mean")
    inputs = tiny_inputs(tiny_model(model_type))
    source, aligned, mean = (logits(tmp_path / name, inputs) for name in ("source", "aligned", "mean"))
    assert (aligned - source).square().mean() < 0.7 * (mean - source).square().mean()


@pytest.mark.parametrize(
    ("model_type", "paths", "movable", "normed", "scale"),
    [
        ("whisper", ["self_attn", "encoder_attn"], [True, True], False, 8**-0.5),  # queries are scaled before the scores
        ("t5", ["layer.0.SelfAttention", "layer.1.EncDecAttention"], [False, True], False, 1.0),
        ("bart", ["self_attn", "encoder_attn"], [True, True], True, 1.0),
        ("marian", ["self_attn", "encoder_attn"], [True, True], True, 1.0),
        ("mbart", ["self_attn", "encoder_attn"], [True, True], False, 1.0),
        ("bloom", ["self_attention"], [False], False, 1.0),  # ALiBi adds to each head another slope
        ("gpt_neo", ["attn.attention"], [True], False, 1.0),
        ("gpt2", ["attn"], [True], False, 1.0),
        ("opt", ["self_attn"], [True], False, 8**-0.5),  # whose MLP sees all tokens of a batch one after the other
    ],
)
def test_every_attention_is_watched(model_type: str, paths: list[str], movable: list[bool], normed: bool, scale: float) -> None:
    """What may be changed in a layer, how it adds to its stream, and by what it multiplies queries."""
    layer = [(pair.place.at, traits, turns) for pair, traits, turns in watch_type(model_type, own=True) if pair.index == 0]
    assert [path for path, _, _ in layer] == paths
    for number, (_, traits, turns) in enumerate(layer):
        assert traits is not None and turns is not None and traits.movable == movable[number]
        assert traits.values and traits.keys and traits.factors and not traits.pairs and not traits.reasons
        residual = traits.residual
        assert residual is not None and residual.normed == normed and residual.down is not None
        assert residual.attention == pytest.approx(1, abs=1e-6) and residual.mlp == pytest.approx(1, abs=1e-6)
        assert len(residual.earlier) == (0 if normed else number)
        assert turns.scale == pytest.approx(scale, rel=1e-5)


# Every class of ours and every fifth other type: the script watches all of them.
WATCHED = [name for number, name in enumerate(sorted(watched_bands())) if name in OWN or number % 5 == 0]


@pytest.mark.parametrize("model_type", map(sample, WATCHED))
def test_bands_are_those_that_are_watched(model_type: str) -> None:
    if model_type not in BUILDABLE:
        pytest.skip(f"the installed transformers has no {model_type}")
    assert bands_of(model_type) == watched_bands()[model_type], "run scripts/write_bands.py"


@pytest.mark.parametrize("model_type", ["t5"])
def test_statistics_of_examples_give_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    """Converting with pairs equals calibrating first and converting with the file."""
    options = saved(model_type, tmp_path)
    convert_to(tmp_path, "source", "at-once", kv_heads=2, **options)
    stats, quiet = tmp_path / "stats.safetensors", Output(quiet=True)
    record = calibrate(str(tmp_path / "source"), options["calibration"], stats, "64k", None, None, False, quiet)
    assert record.layers == 4 and not record.not_watched
    convert_to(tmp_path, "source", "reused", kv_heads=2, calibration=[str(stats)])
    at_once, reused = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at-once", "reused"))
    assert at_once == reused
    step = json.loads((tmp_path / "reused" / "recipe.json").read_text())["steps"][-1]["measurements"]
    assert (
        step["calibration"]["examples"] == 100
        and [layer["layer"].split(".")[-1] for layer in step["layers"]]
        == [
            "SelfAttention",
            "EncDecAttention",
        ]
        * 2
    )


def test_without_sound_a_model_that_hears_is_averaged_and_told_so(tmp_path: Path) -> None:
    tiny_model("whisper").save_pretrained(tmp_path / "source")
    with pytest.raises(UpfitError, match="this model hears, and there is no --calibration"):
        convert_to(tmp_path, "source", "out", kv_heads=2, method="aligned")
    convert_to(tmp_path, "source", "out", kv_heads=2)
    step = json.loads((tmp_path / "out" / "recipe.json").read_text())["steps"][-1]["measurements"]
    assert "this model hears" in step["not_aligned"]


def test_a_model_that_hears_is_aligned_on_recordings(tmp_path: Path) -> None:
    """Its queries have biases and its keys none, in each of its three kinds of attention."""
    pytest.importorskip("soundfile")
    from tests.test_examples_sound import audio_folder, save_whisper

    save_whisper(tmp_path / "source")
    speech = [str(audio_folder(tmp_path / "speech"))]
    convert_to(tmp_path, "source", "aligned", kv_heads=1, method="aligned", calibration=speech)
    convert_to(tmp_path, "source", "mean", kv_heads=1, method="mean")
    heard = read_examples(tmp_path / "source", read_config(tmp_path / "source"), speech, "", "text", None, Output(quiet=True))
    for example in heard.examples:
        keywords = example.keywords | {"decoder_input_ids": example.decoder_ids}
        inputs = {name: value[None] for name, value in keywords.items()}
        source, aligned, mean = (logits(tmp_path / name, inputs) for name in ("source", "aligned", "mean"))
        assert (aligned - source).square().mean() < 0.05 * (mean - source).square().mean()


AGAIN = ["opt", "bloom", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bart", "mpt", "led"))]


@pytest.mark.parametrize("model_type", AGAIN)
def test_a_grouped_model_is_aligned_again(model_type: str, tmp_path: Path) -> None:
    """Of a class of ours too, which may give its family's code copies of keys and values."""
    options = saved(model_type, tmp_path)
    convert_to(tmp_path, "source", "grouped", kv_heads=2, method="mean")
    convert_to(tmp_path, "grouped", "once", kv_heads=1, method="aligned", refit=False, **options)
    convert_to(tmp_path, "grouped", "mean", kv_heads=1, method="mean")
    inputs = tiny_inputs(tiny_model(model_type))
    source, aligned, mean = (logits(tmp_path / name, inputs) for name in ("grouped", "once", "mean"))
    assert (aligned - source).square().mean() < 0.7 * (mean - source).square().mean()


@pytest.mark.parametrize("model_type", ["qwen3", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_turned_keys_are_found_behind_a_norm(model_type: str, tmp_path: Path) -> None:
    """Heads that are one, but for an angle on each pair and their length: what a norm with nearly equal scales hardly sees."""
    model = tiny_model(model_type, num_attention_heads=4, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.copy_(parameter.mean() + 0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "source")
    letter_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    equal_heads(tmp_path / "source", tmp_path / "equal", 2)

    def change(attention: Attention) -> Attention:
        assert attention.k is not None
        if attention.k.device.type == "meta":  # the shapes stay
            return attention
        heads, half = attention.k.shape[0], attention.k.shape[1] // 2
        turns = torch.polar(torch.ones(heads, half), 6.3 * torch.rand(heads, half, generator=generator))
        return scale_pairs(
            attention, turns * (0.3 + torch.rand(heads, 1, generator=generator)), range(half), range(half, 2 * half)
        )

    convert_with(change, tmp_path / "equal", tmp_path / "turned")
    text: dict[str, Any] = {"calibration": [str(tmp_path / "text.txt")], "calibration_tokens": "2k", "calibration_length": 32}
    convert_to(tmp_path, "turned", "aligned", kv_heads=2, method="aligned", refit=False, **text)
    convert_to(tmp_path, "turned", "mean", kv_heads=2, method="mean")
    source, aligned, mean = (logits(tmp_path / name, tiny_inputs(model)) for name in ("turned", "aligned", "mean"))
    assert (aligned - source).square().mean() < 0.1 * (mean - source).square().mean()

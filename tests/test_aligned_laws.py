"""Aligned merging over every architecture: what is free stays free, whatever lies between projections and attention.

The heads of every group are made equal, so merging them must change nothing; the refit, which is on, must then leave them
alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.folders import letter_tokenizer
from tests.test_laws import CASES, EVERYDAY, VARIANTS, sample
from tests.tiny import BUILDABLE, auto_class, tiny_inputs, tiny_model
from upfit.architecture.attention import Attention
from upfit.architecture.layers import Architecture, bind
from upfit.architecture.table import table
from upfit.calibration import sample as sample_room
from upfit.checkpoint.plan import Plan
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.recipe import PARTS
from upfit.convert.recipe import Recipe, get_recipe
from upfit.demo import embedded_model
from upfit.examples import read as read_room
from upfit.output import Output
from upfit.text import Document, python_documents

TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 40


@dataclass(frozen=True)
class Nothing:
    """No options."""


def architecture_of(folder: Path) -> Architecture:
    with open_checkpoint(folder) as checkpoint:
        return bind(checkpoint.config, checkpoint.tensors)


def equal_heads(source: Path, out: Path, kv_heads: int) -> None:
    """A copy of the model in which all key/value heads of a contiguous group are the group's first: a conversion like any."""

    def alike(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.shape[0] % kv_heads or tensor.ndim == 1:  # a norm that all heads share
            return tensor
        heads = tensor.unflatten(0, (kv_heads, -1))
        return heads[:, :1].expand_as(heads).flatten(0, 1)

    def change(attention: Attention) -> Attention:
        parts: dict[str, Any] = {name: alike(getattr(attention, name)) for name in PARTS}
        return replace(attention, **parts)

    def plan(architecture: Architecture, options: Nothing) -> Plan:
        changed = [layer for layer in architecture.layers if layer.geometry.kv_heads > kv_heads]
        return Plan(architecture.config, tuple(layer.rule(PARTS, change, "equal heads") for layer in changed))

    recipe = Recipe("equal", "equal heads", "none", Nothing, plan, lambda _: None, lambda _: [])
    convert(recipe, str(source), out, Nothing(), Settings(verify=False), Output(quiet=True))


# Of the types that become our own class the decoders; encoder-decoders have laws of their own (test_merging_everywhere.py).
WATCHED = ("bloom", "ctrl", "gpt_neo", "modernbert-decoder", "mpt", "opt", "persimmon", "xglm")
ALIGNED = [name for name in CASES if name in VARIANTS or not table().entries[name].own or name in WATCHED]


@pytest.mark.parametrize("name", [sample(name) for name in ALIGNED])
def test_equal_heads_merge_for_free(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, changes = VARIANTS.get(name, (name, {}))
    if model_type not in BUILDABLE:
        pytest.skip(f"the installed transformers has no {model_type}")
    model = tiny_model(model_type, **changes)
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path / "source")
    letter_tokenizer().save_pretrained(tmp_path / "source")
    fewer = architecture_of(tmp_path / "source").allowed_kv_heads()[:-1]
    if not fewer:
        pytest.skip("its tiny model has one key/value head already")
    equal_heads(tmp_path / "source", tmp_path / "equal", fewer[-1])
    for room in (sample_room, read_room):
        monkeypatch.setattr(room, "library_documents", lambda: [Document(TEXT, "text")])
    recipe = get_recipe("gqa")
    # A model that cannot run on text is averaged by auto.
    method = "aligned" if name in EVERYDAY and not model.config.is_encoder_decoder else "auto"
    length = {} if model.config.is_encoder_decoder else {"calibration_length": 16}
    options = recipe.options(kv_heads=fewer[-1], method=method, calibration_tokens="256", **length)
    convert(recipe, str(tmp_path / "equal"), tmp_path / "out", options, Settings(verify=False), Output(quiet=True))
    before, after = (
        auto_class(model_type).from_pretrained(tmp_path / folder, dtype=torch.float32).eval() for folder in ("equal", "out")
    )
    with torch.no_grad():
        expected, found = before(**inputs).logits, after(**inputs).logits
    assert (expected - found).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.slow
def test_aligned_beats_merging_alone_beats_the_mean(tmp_path: Path) -> None:
    """On a trained model, measured on text that the calibration did not see: 8 heads into 2, nats a token above the source.

    What is fitted and what is held back, and each part of the refit, must be in its place for this: with the two swapped in the
    fit of scores 0.308 are lost, without the refit of the output projection 0.324.
    """
    source = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = sample_room.make_sample(python_documents(), tokenizer, 8192, 512, {}).windows[512]
    recipe, lost = get_recipe("gqa"), dict[str, float]()
    text: dict[str, Any] = {"calibration_tokens": "6k", "calibration_length": 512}
    before = loss_on(source, ids)
    for name, options in {"aligned": text, "merged": text | {"refit": False}, "mean": {"method": "mean"}}.items():
        settings = Settings(verify=False)
        convert(recipe, str(source), tmp_path / name, recipe.options(kv_heads=2, **options), settings, Output(quiet=True))
        lost[name] = loss_on(tmp_path / name, ids) - before
    assert lost["aligned"] < 0.95 * lost["merged"] and lost["merged"] < lost["mean"] / 3
    assert lost["aligned"] == pytest.approx(0.283, rel=0.2) and lost["merged"] == pytest.approx(0.315, rel=0.2)


def loss_on(folder: Path, ids: torch.Tensor) -> float:
    model = auto_class("llama").from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)

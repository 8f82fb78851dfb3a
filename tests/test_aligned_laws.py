"""Aligned merging over every architecture: what is free stays free, whatever lies between projections and attention.

The heads of every group are made equal, so merging them must change nothing; the refit, which is on, must then leave them
alone.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import letter_tokenizer
from tests.test_laws import EVERYDAY, VARIANTS, sample
from tests.tiny import BUILDABLE, UNGROUPABLE, auto_class, tiny_inputs, tiny_model
from upfit.convert import calibration
from upfit.convert.architectures import Architecture, bind
from upfit.convert.checkpoint import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.output import Output
from upfit.text import Document

TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 40


def architecture_of(folder: Path) -> Architecture:
    with open_checkpoint(folder) as checkpoint:
        return bind(checkpoint.config, checkpoint.tensors)


def equal_heads(folder: Path, kv_heads: int) -> None:
    """Make the key/value heads of every contiguous group equal to its first, on disk."""
    layers = architecture_of(folder).layers
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for layer in layers:
            shape = layer.geometry
            for part, name in layer.names.items():
                shared = part.startswith("k_norm") and weights[name].numel() == shape.head_dim
                if part.split(".")[0] in ("k", "v", "k_norm") and not shared and shape.kv_heads > kv_heads:
                    heads = weights[name].reshape(kv_heads, shape.kv_heads // kv_heads, -1)
                    weights[name] = heads[:, :1].expand_as(heads).reshape(weights[name].shape).contiguous()
        save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [sample(name) for name in (*BUILDABLE, *VARIANTS) if name not in UNGROUPABLE])
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
    equal_heads(tmp_path / "source", fewer[-1])
    monkeypatch.setattr(calibration, "library_documents", lambda: [Document(TEXT, "text")])
    recipe = get_recipe("gqa")
    method = "aligned" if name in EVERYDAY else "auto"  # a model that cannot run on text is averaged by auto
    options = recipe.options(kv_heads=fewer[-1], method=method, calibration_tokens="256", calibration_length=16)
    convert(recipe, str(tmp_path / "source"), tmp_path / "out", options, Settings(verify=False), Output(quiet=True))
    before, after = (
        auto_class(model_type).from_pretrained(tmp_path / folder, dtype=torch.float32).eval() for folder in ("source", "out")
    )
    with torch.no_grad():
        expected, found = before(**inputs).logits, after(**inputs).logits
    assert (expected - found).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))

"""Re-bases leave the function alone; aligned merging finds what they hide."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import logits, save_tiny, tiny_llama
from upfit.architecture.attention import LAYOUTS, Attention
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.reparametrise import expand_heads, permute_heads, rebase_values, scale_pairs
from upfit.convert.recipe import get_recipe
from upfit.output import Output

QUIET = Output(quiet=True)
Change = Callable[[Attention], Attention]
TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 60


def rewrite(folder: Path, change: Change) -> None:
    """Apply `change` to every attention layer of the folder, computed in float64."""
    with open_checkpoint(folder) as checkpoint:
        layers = bind(checkpoint.config, checkpoint.tensors).layers
    weights = load_file(folder / "model.safetensors")
    for layer in layers:
        stored = {part: weights[name].double() for part, name in layer.names.items()}
        packed = LAYOUTS[layer.layout].pack(change(LAYOUTS[layer.layout].unpack(stored, layer.geometry)), layer.geometry)
        weights |= {
            layer.names[part]: tensor.to(weights[layer.names[part]].dtype).contiguous() for part, tensor in packed.items()
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def halves(attention: Attention) -> tuple[list[int], list[int]]:
    assert attention.k is not None
    width = attention.k.shape[1]
    return list(range(width // 2)), list(range(width // 2, width))


def permuted(attention: Attention) -> Attention:
    return permute_heads(attention, [2, 0, 3, 1])


def turned(attention: Attention) -> Attention:
    first, second = halves(attention)
    assert attention.k is not None
    angles = torch.rand(attention.k.shape[0], len(first), dtype=torch.float64) * 6.28
    return scale_pairs(attention, torch.polar(0.5 + angles / 6, angles), first, second)


def rebased(attention: Attention) -> Attention:
    assert attention.v is not None
    maps = torch.linalg.qr(torch.randn(attention.v.shape[0], *[attention.v.shape[1]] * 2, dtype=torch.float64)).Q
    return rebase_values(attention, maps * (0.5 + torch.rand(attention.v.shape[0], 1, 1, dtype=torch.float64)))


@pytest.mark.parametrize("change", [permuted, turned, rebased])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_function_stays(change: Change, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_llama(attention_bias=True)
    torch.nn.Module.to(model, dtype)
    model.config.dtype = dtype
    save_tiny(tmp_path / "model", model)
    before, stored = logits(tmp_path / "model"), (tmp_path / "model/model.safetensors").read_bytes()
    rewrite(tmp_path / "model", change)
    after = logits(tmp_path / "model")
    assert before.dtype == dtype and stored != (tmp_path / "model/model.safetensors").read_bytes()
    assert float((after - before).abs().max()) < tolerance


def test_merging_finds_heads_that_are_one_in_disguise(tmp_path: Path) -> None:
    """Two heads each repeated, then permuted, turned and re-based: the mean is lost, aligned merging is exact."""
    torch.manual_seed(0)
    source, text = save_tiny(tmp_path / "source", tiny_llama(num_hidden_layers=2)), tmp_path / "text.txt"
    text.write_text(TEXT)

    def disguise(attention: Attention) -> Attention:
        assert attention.k is not None and attention.v is not None
        pairs = replace(attention, k=attention.k[:2], v=attention.v[:2])
        return permuted(rebased(turned(expand_heads(pairs, 4))))

    rewrite(source, disguise)
    recipe, errors = get_recipe("gqa"), {}
    for method in ("mean", "aligned"):
        sizes = (
            {"calibration": [str(text)], "calibration_tokens": "1k", "calibration_length": 32} if method == "aligned" else {}
        )
        options = recipe.options(kv_heads=2, method=method, **sizes)
        convert(recipe, str(source), tmp_path / method, options, Settings(verify=False), QUIET)
        errors[method] = float((logits(tmp_path / method) - logits(source)).abs().max())
    assert errors["aligned"] < 1e-4 < 0.1 < errors["mean"]

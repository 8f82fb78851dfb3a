"""Grouped-query attention: what the merges compute, and that merging equal heads loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache

from tests.folders import logits, save_tiny, tiny_llama
from tests.tiny import auto_class, tiny_inputs, tiny_model
from upfit.architecture.attention import Attention
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.pooling import first, mean, pool_heads
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion
from upfit.errors import UpfitError
from upfit.modeling.modeling_upfit_gqa import Lean
from upfit.output import Output

QUIET = Output(quiet=True)


def run(recipe: str, source: Path, out: Path, **options: object) -> Conversion:
    chosen = get_recipe(recipe)
    return convert(chosen, str(source), out, chosen.options(**{"method": "mean", **options}), Settings(), QUIET)


def test_mean_is_the_papers() -> None:
    """[K, ...] heads; the group of output g is the contiguous run g * r .. g * r + r - 1, as repeat_kv serves it."""
    heads = torch.randn(6, 5, 7, dtype=torch.float64)
    expected = torch.stack([(heads[0] + heads[1] + heads[2]) / 3, (heads[3] + heads[4] + heads[5]) / 3])
    torch.testing.assert_close(mean(heads, 2), expected, rtol=0, atol=1e-15)
    assert torch.equal(first(heads, 2), heads[[0, 3]])


def test_scales_of_the_keys_are_merged_where_every_head_has_its_own() -> None:
    own, shared = torch.randn(4, 8), torch.randn(8)
    merged = pool_heads(Attention(k_norm=own), 2, "mean", 0, 0.02).k_norm
    assert merged is not None and torch.equal(merged, torch.stack([own[:2].mean(0), own[2:].mean(0)]))
    assert pool_heads(Attention(k_norm=shared), 2, "mean", 0, 0.02).k_norm is shared


def test_mean_is_taken_in_float32() -> None:
    """A mean in bfloat16 would lose the small addend: 256 + 1 is 256 there."""
    heads = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert mean(heads, 1).item() == torch.tensor(259 / 4).to(torch.bfloat16).item()
    assert mean(heads, 1).dtype == torch.bfloat16


def test_random_is_drawn_anew_and_repeatable() -> None:
    layer = Attention(k=torch.ones(4, 64, 64), v=torch.ones(4, 64, 64), k_bias=torch.ones(4, 64))
    one, two, other = (pool_heads(layer, 2, "random", seed, 0.02) for seed in (1, 1, 2))
    assert one.k is not None and two.k is not None and other.k is not None and one.k_bias is not None
    assert torch.equal(one.k, two.k) and not torch.equal(one.k, other.k)
    assert abs(one.k.std().item() - 0.02) < 0.001
    assert not one.k_bias.any()


def test_a_scale_of_each_head_is_merged_and_one_that_all_share_stays() -> None:
    heads, scales = torch.randn(4, 3, 5), torch.randn(4, 3)
    own = pool_heads(Attention(k=heads, v=heads, k_norm=scales), 2, "mean", 0, 0.02)
    assert own.k_norm is not None and torch.equal(own.k_norm, mean(scales, 2))
    shared = pool_heads(Attention(k=heads, v=heads, k_norm=scales[0]), 2, "mean", 0, 0.02)
    assert shared.k_norm is not None and torch.equal(shared.k_norm, scales[0])


def duplicate_heads(folder: Path, kv_heads: int) -> None:
    """Make the key/value heads of every contiguous group equal to the group's first, on disk."""
    with open_checkpoint(folder) as checkpoint:
        layers = bind(checkpoint.config, checkpoint.tensors).layers
    weights = load_file(folder / "model.safetensors")
    for layer in layers:
        for part, name in layer.names.items():
            if part.split(".")[0] in ("k", "v"):
                heads = weights[name].unflatten(0, (kv_heads, layer.geometry.kv_heads // kv_heads, -1))
                weights[name] = heads[:, :1].expand_as(heads).flatten(0, 2).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_heads_merge_without_loss(tmp_path: Path, method: str, bias: bool) -> None:
    source = save_tiny(tmp_path / "source", tiny_llama(attention_bias=bias))
    duplicate_heads(source, 2)
    run("gqa", source, tmp_path / "out", kv_heads=2, method=method)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_grouped_to_fewer(tmp_path: Path) -> None:
    """8 query heads on 4 KV heads to 2, in one step and from 4 by way of the same heads."""
    source = save_tiny(tmp_path / "source", tiny_llama(num_attention_heads=8, num_key_value_heads=4))
    run("gqa", source, tmp_path / "two", kv_heads=2)
    run("gqa", tmp_path / "two", tmp_path / "one", kv_heads=1)
    run("mqa", source, tmp_path / "straight")
    name = "model.layers.0.self_attn.v_proj.weight"
    one, straight = (load_file(tmp_path / out / "model.safetensors")[name] for out in ("one", "straight"))
    torch.testing.assert_close(one, straight, rtol=0, atol=1e-6)


def test_a_lean_cache_passes_for_the_real_one() -> None:
    """In `isinstance`, with which stock classes look what they were handed, and in what they read off it."""
    real = EncoderDecoderCache(DynamicCache(), DynamicCache())
    lean: Any = Lean(real, 2, False)
    assert isinstance(lean, EncoderDecoderCache) and isinstance(lean.self_attention_cache, DynamicCache)
    heads = torch.randn(1, 2, 3, 8).repeat_interleave(2, 1)
    keys, _ = lean.self_attention_cache.update(heads, heads, 0)
    assert torch.equal(keys, heads[:, ::2]) and lean.get_seq_length() == real.get_seq_length() == 3


def test_everything_else_keeps_its_bytes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", shards=3)
    config = json.loads((source / "config.json").read_text())
    config["made_by"] = {"someone": [1, 2]}  # an unknown key
    (source / "config.json").write_text(json.dumps(config))
    run("gqa", source, tmp_path / "out", kv_heads=2)
    with open_checkpoint(source) as old, open_checkpoint(tmp_path / "out") as new:
        assert [len(old.files), len(new.files)] == [len(old.files)] * 2
        for name in old.tensors:
            if "k_proj" not in name and "v_proj" not in name:
                assert torch.equal(old.read(name), new.read(name))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_key_value_heads": 2}
    copied = {path.name for path in source.iterdir() if "tokenizer" in path.name or "generation" in path.name}
    assert copied <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_config_without_the_key_gets_it(tmp_path: Path) -> None:
    """Llama-1 configs name no KV heads; the class then takes as many as query heads."""
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(config))
    run("gqa", source, tmp_path / "out", kv_heads=2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("qwen2", {}), ("olmo2", {}), ("phi3", {}), ("cohere", {"use_qk_norm": True}), ("gpt_bigcode", {"multi_query": True})],
)
def test_more_heads_compute_the_same(model_type: str, changes: dict, tmp_path: Path) -> None:
    """Back to multi-head attention: biases, a norm over all heads, fused, a norm for each head, a flag instead of a count."""
    settings = changes if "multi_query" in changes else {"num_key_value_heads": 2, **changes}
    model = tiny_model(model_type, **settings)
    model.save_pretrained(tmp_path / "source")
    answer = run("gqa", tmp_path / "source", tmp_path / "out", kv_heads=4)
    assert answer.kv_heads[1] == 4 and answer.record()["verify"]["max_difference"] < 1e-5
    inputs = tiny_inputs(model)
    with torch.no_grad():
        again = auto_class(model_type).from_pretrained(tmp_path / "out").eval()(**inputs).logits
        torch.testing.assert_close(again, model(**inputs).logits, rtol=0, atol=1e-5)


def test_more_heads_must_be_a_multiple_that_divides_the_queries(tmp_path: Path) -> None:
    tiny_model("llama", num_attention_heads=8, num_key_value_heads=2).save_pretrained(tmp_path / "source")
    with pytest.raises(UpfitError, match="choose one of 1, 2, 4, 8"):
        run("gqa", tmp_path / "source", tmp_path / "out", kv_heads=6)

"""Latent attention in stock families: exact at full rank, decoded from latents as from keys and values, and as small in the
cache as its settings say."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from tests.latent import FAMILIES, HEADS, NEW, attentions, exact, ours, rough, source_of
from tests.tiny import tiny_model
from upfit.architecture.forwards import cache_name, cache_of
from upfit.checkpoint.side_files import copy_code
from upfit.modeling.modeling_upfit_mla import swap
from upfit.uptrain.model.packed import NAME as PACKED

FEW = ("llama", "mistral", "phi3", "gemma2", "gpt_oss", "opt", "gpt2")
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest logit, between two ways of the same model
every_family = pytest.mark.parametrize("model_type", FAMILIES)
few_families = pytest.mark.parametrize("model_type", FEW)


@pytest.fixture(autouse=True)
def _softmax_in_the_models_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager functions round their weights to float32; here they are as exact as sdpa's."""
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: torch.softmax(scores, dim))


def ids_of(rows: int = 2, tokens: int = 14) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def in_pieces(model: Any, sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Logits of all tokens, so many at a time after the cache of those before; and the cache."""
    cache, parts = None, []
    for piece in ids_of().split(list(sizes), 1):
        output = model(piece, use_cache=True, **{cache_name(model.forward): cache})
        cache = cache_of(output)
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


@every_family
def test_full_rank_is_the_source(model_type: str) -> None:
    source = source_of(model_type)
    model = exact(source)
    for name in ("eager",) if FAMILIES[model_type].eager else ("eager", "sdpa"):
        source.config._attn_implementation = model.config._attn_implementation = name
        with torch.no_grad():
            whole, expected = model(ids_of()).logits, source(ids_of()).logits
            decoded, _ = in_pieces(model, (9, 3, 1, 1))
        assert error(whole, expected) < FAMILIES[model_type].tolerance
        assert error(decoded, expected) < FAMILIES[model_type].tolerance


@every_family
def test_generation_with_a_cache_is_generation_without(model_type: str) -> None:
    """Greedy, several lengths in a batch; and beams, whose rows change places, and a cache of fixed size."""
    model, ids = rough(model_type), ids_of()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    asked = [{}] if model_type in ("gemma2", "gpt_oss") else [{}, {"num_beams": 3}]  # their float32 parts decide between beams
    for more in asked:
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings, **more)
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings, **more), plain)
    if model_type not in ("opt", "gpt2"):
        static = model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
        assert torch.equal(static, model.generate(ids, attention_mask=mask, use_cache=False, **settings))


class Adapted(nn.Linear):
    """A matrix that is not applied as it stands, as one with an adapter."""


@every_family
def test_absorbed_is_expanded(model_type: str) -> None:
    model = rough(model_type)
    calls: list[Tensor] = []
    for attention in attentions(model):
        attention.kv_b_proj.register_forward_hook(lambda _, inputs, output: calls.append(output))
    with torch.no_grad():
        absorbed, _ = in_pieces(model, (9, *[1] * 5))
        assert len(calls) == len(attentions(model))  # of the first piece alone
        for attention in attentions(model):
            attention.kv_b_proj.__class__ = Adapted
        expanded, _ = in_pieces(model, (9, *[1] * 5))
        assert len(calls) == 7 * len(attentions(model))
        whole = model(ids_of()).logits
    assert error(absorbed, expanded) < CLOSE[model.dtype]
    assert error(absorbed, whole) < CLOSE[model.dtype]


def test_offloaded_weights_are_waited_for() -> None:
    """Of a module whose weights are elsewhere until it is called, nothing but calls is asked."""
    model = rough("llama")
    with torch.no_grad():
        expected, _ = in_pieces(model, (9, 3, 1, 1))
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert attentions(model)[0].kv_b_proj.weight.is_meta
        assert error(in_pieces(model, (9, 3, 1, 1))[0], expected) < 1e-9


@few_families
def test_the_cache_holds_the_latents(model_type: str) -> None:
    model = rough(model_type)
    with torch.no_grad():
        _, cache = in_pieces(model, (9, 3, 1, 1))
    for attention, layer in zip(attentions(model), cache.layers, strict=True):
        width = 2 * len(attention.columns) + attention.latent
        tokens = min(14, getattr(layer, "sliding_window", 15) - 1)
        assert layer.keys.numel() + layer.values.numel() == 2 * tokens * width
        assert width == attention.get_submodule(attention.upfit_cached[0].removesuffix(".weight")).out_features


def test_no_head_gets_a_copy_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, plain = rough("llama"), [], nn.functional.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((key.shape[:2], value.data_ptr()))
        return plain(query, key, value, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
    with torch.no_grad():
        _, cache = in_pieces(model, (9, 3, 1, 1))
    assert seen[-2:] == [((2, 1), layer.keys.data_ptr()) for layer in cache.layers]


@every_family
def test_padding_is_not_seen(model_type: str) -> None:
    """A short row beside a longer one gets the logits that it gets alone."""
    model, ids, pad = rough(model_type), ids_of(), 5
    rows = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), ids[:1, pad:]], 1), ids[1:]])
    mask = torch.ones_like(rows)
    mask[0, :pad] = 0
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    beside = model.generate(rows, attention_mask=mask, **settings)
    alone = model.generate(ids[:1, pad:], attention_mask=mask[:1, pad:], **settings)
    for logits, expected in zip(beside.logits, alone.logits, strict=True):
        assert error(logits[:1], expected) < CLOSE[model.dtype]


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3", "smollm3", "gpt_neox"])
def test_packed_rows_are_separate_rows(model_type: str, attention: str) -> None:
    model, (first, second) = rough(model_type), ids_of().split(1)
    model.config._attn_implementation = attention
    row, places = torch.cat([first[:, :6], second], 1), torch.cat([torch.arange(6), torch.arange(14)])[None]
    with torch.no_grad():
        packed = model(row, position_ids=places, use_cache=False).logits
        model.config._attn_implementation = "sdpa"
        expected = torch.cat([model(first[:, :6]).logits, model(second).logits], 1)
    assert error(packed, expected) < CLOSE[model.dtype]


@every_family
def test_eager_is_sdpa(model_type: str) -> None:
    if FAMILIES[model_type].eager:
        pytest.skip("it has no sdpa")
    model, logits = rough(model_type), []
    for name in ("eager", "sdpa"):
        model.config._attn_implementation = name
        with torch.no_grad():
            logits.append(in_pieces(model, (9, 3, 1, 1))[0])
    assert error(*logits) < CLOSE[model.dtype]


@few_families
def test_eager_gives_the_weights(model_type: str) -> None:
    model = rough(model_type)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        whole = model(ids_of(), output_attentions=True).attentions
        start = model(ids_of()[:, :13], use_cache=True)
        last = model(ids_of()[:, 13:], output_attentions=True, **{cache_name(model.forward): cache_of(start)}).attentions
    for every, absorbed in zip(whole, last, strict=True):
        assert every.shape == (2, HEADS, 14, 14) and absorbed.shape[:3] == (2, HEADS, 1)
        assert error(absorbed, every[:, :, -1:, -absorbed.shape[-1] :]) < CLOSE[model.dtype]


@every_family
def test_everything_new_learns(model_type: str) -> None:
    """Also with checkpointed activations, which computes the same."""
    gradients = []
    for checkpointing in (False, True):
        model = rough(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # of dropout
        model(ids_of(), labels=ids_of(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if any(f".{part}" in name for part in NEW)})
    assert len(gradients[0]) == len(attentions(model)) * (5 if attentions(model)[0].mla["bias"] else 3)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any() and error(gradients[1][name], gradient) < 1e-6


@every_family
def test_round_trip(model_type: str, tmp_path: Path) -> None:
    model = rough(model_type)
    model.save_pretrained(tmp_path)
    result: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype, output_loading_info=True)
    loaded, report = result
    assert not any(report.values()) and type(loaded).__name__ == "UpfitMlaForCausalLM"
    loaded.config._attn_implementation = model.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids_of()).logits, model(ids_of()).logits)


def test_it_loads_where_upfit_is_not(tmp_path: Path) -> None:
    """The folder brings its code; what that saves brings it too."""
    model = rough("llama")
    model.save_pretrained(tmp_path / "folder")
    copy_code({"model_type": "upfit_mla"}, tmp_path / "folder")
    code = f"""
import sys
sys.modules["upfit"] = None
from transformers import AutoModel, AutoModelForCausalLM
folder = {str(tmp_path / "folder")!r}
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert type(model).__name__ == "UpfitMlaForCausalLM" and not any(report.values()), (type(model), report)
model.save_pretrained({str(tmp_path / "saved")!r})
model = AutoModel.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(model).__name__ == "UpfitMlaModel" and model.layers[1].self_attn.kv_b_proj.in_features == 6
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_flash_attention_gets_one_width(model_type: str) -> None:
    """Its kernels take queries, keys and values of one width, and none as wide as a latent; sinks beside them."""
    model = rough(model_type)

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == max(8, module.unrotated + 2 * len(module.columns))
        assert options.get("s_aux") is getattr(module, "sinks", None)
        return sys.modules[module.stock_module].eager_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("flash_stand_in", flash)
    AttentionMaskInterface.register("flash_stand_in", eager_mask)
    with torch.no_grad():
        expected, _ = in_pieces(model, (9, 3, 1, 1))
        model.config._attn_implementation = "flash_stand_in"
        assert error(in_pieces(model, (9, 3, 1, 1))[0], expected) < CLOSE[model.dtype]


def test_arguments_by_place_are_those_by_name() -> None:
    for model_type in ("llama", "gpt_neox"):
        attention, hidden = attentions(rough(model_type))[0], torch.randn(2, 5, 32, dtype=torch.float64)
        angles, mask = torch.randn(1, 5, 3, dtype=torch.float64), torch.rand(2, 1, 5, 5) > 0.3
        named = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask | torch.eye(5).bool()}
        by_place = [named.get(name) for name in attention.arguments[1:] if name not in ("kwargs", "cache", "past_key_values")]
        assert torch.equal(attention(hidden, *by_place)[0], attention(hidden, **named)[0])
        assert not torch.allclose(attention(hidden, *by_place)[0], attention(hidden, **named | {"attention_mask": None})[0])


def test_dropout_is_the_familys() -> None:
    attention = attentions(rough("gpt2", attn_pdrop=0.25, resid_pdrop=0.5))[0].train()
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    assert attention.dropouts == (0.25, 0.5) and attentions(rough("opt", attention_dropout=0.5))[0].dropouts == (0.5, 0)
    attention.dropouts = (1.0, 0.0)
    assert torch.equal(attention(hidden)[0], attention.c_proj.bias.expand(2, 5, 32))
    attention.dropouts = (0.0, 1.0)
    assert not attention(hidden)[0].any() and attention.eval()(hidden)[0].any()


def test_what_it_would_not_compute_is_refused() -> None:
    source = source_of("llama")
    layer = {"latent": 4, "unrotated": 4, "columns": [0]}
    with pytest.raises(ValueError, match="describes 1 attentions, the model has 2 of the classes LlamaAttention"):
        ours(source, [layer])
    for model_type, name, message in (
        ("bitnet", "BitNet", "attn_sub_norm, which is not dropped"),
        ("falcon", "Falcon", "interface"),
    ):
        output = "dense" if model_type == "falcon" else "o_proj"
        dropped = ["q_proj", "k_proj", "v_proj", "query_key_value"]
        settings = {"classes": [f"{name}Attention"], "output": output, "dropped": dropped, "layers": [layer, layer]}
        with pytest.raises(ValueError, match=message):
            swap(tiny_model(model_type), SimpleNamespace(mla=settings))
    with pytest.raises(ValueError, match="attention none; its `columns` in config.json must be empty"):
        ours(source_of("opt"), [layer, layer])(ids_of())
    settings = ours(source, [layer, layer]).config.mla | {"output": "dense"}
    with pytest.raises(ValueError, match="it has o_proj, which is not dropped"):
        swap(source, SimpleNamespace(mla=settings))

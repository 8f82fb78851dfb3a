"""Packed documents attended to one by one: the same numbers as under a mask and as apart, in values and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.folders import save_tiny, tiny_llama
from tests.tiny import tiny_model
from tests.uptraining import QUIET, Workshop, make_workshop, metrics
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.uptrain.model import model_traits, packed
from upfit.uptrain.model.model_traits import ModelTraits, examine, hidden_states, pack
from upfit.uptrain.model.packed import documents

LENGTHS = {"several": [[9, 15], [24]], "one": [[24], [24]], "many": [[1, 2, 1, 3, 2, 1, 2, 1, 3, 2, 1, 5], [2] * 12]}
# Repeated key/value heads, windows, norms, biases, partial rotary.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "olmo2": {},
    "phi": {},
    "gpt_neox": {},
}


def positions(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", LENGTHS)
def test_one_by_one_is_as_under_a_mask(model_type: str, name: str) -> None:
    model, places = tiny_model(model_type, **FAMILIES[model_type]).eval(), positions(LENGTHS[name])
    ids = torch.randint(3, 90, places.shape, generator=torch.Generator().manual_seed(0))
    traits, found = examine(model), {}
    for packing in (False, True):
        if packing:
            assert pack(model, traits) is not None
        model.zero_grad()
        states = hidden_states(model, ids, places, traits)
        states.square().sum().backward()
        found[packing] = [states, *(p.grad for p in model.base_model.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_where_documents_begin() -> None:
    found = documents(positions([[3, 2], [5]]))
    assert (found.ends, found.longest, found.bounds.dtype) == ([0, 3, 5, 10], 5, torch.int32)


@pytest.mark.parametrize("repeats", [True, False])
def test_what_flash_attention_is_given(monkeypatch: pytest.MonkeyPatch, repeats: bool) -> None:
    """Its arguments as torch documents them (2.11 knows no groups of heads), computed by plain products; it needs CUDA."""
    generator, given = torch.Generator().manual_seed(0), []

    def varlen(q: Any, k: Any, v: Any, bounds: Any, *_: Any, scale: Any, window_size: Any, **more: Any) -> torch.Tensor:
        given.append((window_size, more))
        outputs = []
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            queries, keys, values = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
            place = torch.arange(end - start)
            near = place[:, None] - place
            mask = (near >= 0) & ((near <= window_size[0]) | (window_size[0] < 0))
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, **more))
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    monkeypatch.setattr(packed, "varlen_attn", varlen)
    monkeypatch.setattr(packed, "REPEATS", repeats)
    q, k, v = (torch.randn(2, heads, 24, 8, generator=generator) for heads in (4, 2, 2))
    found = documents(positions(LENGTHS["several"]))
    for window in (None, 4):
        wanted = packed._one_by_one(q, k, v, found, 0.3, window, positions(LENGTHS["several"]))
        torch.testing.assert_close(packed._varlen(q, k, v, found, 0.3, window), wanted)
    assert given == [((-1, 0), more := {} if repeats else {"enable_gqa": True}), ((3, 0), more)]


def test_what_the_package_flash_attn_is_given() -> None:
    """Its arguments as it documents them, computed by plain products; its kernels need CUDA."""
    generator, given = torch.Generator().manual_seed(0), []

    def flash(q: Any, k: Any, v: Any, bounds_q: Any, bounds_k: Any, most_q: int, most_k: int, **more: Any) -> torch.Tensor:
        given.append((most_q, most_k, more))
        assert bounds_q is bounds_k and bounds_q.dtype == torch.int32 and more["causal"]
        outputs = []
        for start, end in zip(bounds_q.tolist(), bounds_q.tolist()[1:], strict=False):
            queries, keys, values = (t[start:end].transpose(0, 1) for t in (q, k, v))
            keys, values = (t.repeat_interleave(len(queries) // len(t), 0) for t in (keys, values))
            logits = queries @ keys.mT * more["softmax_scale"]
            logits = more["softcap"] * torch.tanh(logits / more["softcap"]) if more["softcap"] else logits
            near = torch.ones(end - start, end - start).tril() > 0
            if more["window_size"][0] >= 0:
                near &= torch.ones(end - start, end - start).triu(-more["window_size"][0]) > 0
            outputs.append(logits.masked_fill(~near, float("-inf")).softmax(-1) @ values)
        return torch.cat(outputs, 1).transpose(0, 1)

    q, k, v = (torch.randn(2, heads, 24, 8, generator=generator) for heads in (4, 2, 2))
    places = positions(LENGTHS["several"])
    found = documents(places)
    for window in (None, 4):
        plain = packed._flash(flash, q, k, v, found, 0.3, window, {"softcap": 0.0, "dropout_p": 0.0})
        torch.testing.assert_close(plain, packed._one_by_one(q, k, v, found, 0.3, window, places))
    capped = packed._flash(flash, q, k, v, found, 0.3, None, {"softcap": 0.5, "dropout_p": 0.0})
    assert capped.shape == plain.shape and (capped - plain).abs().max() > 0.01
    assert [more["window_size"] for *_, more in given] == [(-1, 0), (3, 0), (-1, 0)] and given[0][:2] == (24, 24)


def test_what_is_more_than_causal_keeps_its_mask() -> None:
    """Soft caps, sinks, no positions; the model is left as it was."""
    for name in ("gemma2", "gpt_oss", "bloom"):
        model = tiny_model(name)
        before = model.config._attn_implementation
        assert pack(model, examine(model)) is None
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_class_is_tried_as_it_will_be_run(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    """Under autocast where products will be in another type, and only there."""
    tried, plain = list[torch.dtype | None](), model_traits.hidden_states

    def noted(*arguments: Any) -> torch.Tensor:
        tried.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return plain(*arguments)

    monkeypatch.setattr(model_traits, "hidden_states", noted)
    model = tiny_model("llama")
    traits = examine(model)
    tried.clear()
    assert pack(model, traits, dtype) is not None and tried == [dtype] * 4


def test_a_class_that_says_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(packed, "documents", lambda _: packed.Documents(torch.tensor([0, 16]), [0, 16], 16))
    assert pack(model, ModelTraits(True, True, None)) is None


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"stages": "layerwise=50%,distill"}, {"gradient_checkpointing": True}])
def test_a_run_learns_the_same(shop: Workshop, tmp_path: Path, changes: dict[str, Any]) -> None:
    losses = []
    for packing in (True, False):
        shop.run(tmp_path / str(packing), packed=packing, **changes)
        losses.append([line["loss"] for line in metrics(tmp_path / str(packing))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "contextual positions": ("cope", {"gates": "constant", "positions": 6}),
    "pairs, nothing lost": ("diff", {"variant": "v2"}),
    "pairs, split": ("diff", {"variant": "split", "naive": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_new_attention_learns_as_under_a_mask(shop: Workshop, tmp_path: Path, name: str) -> None:
    recipe, options = find_recipes()[STARTS[name][0]], STARTS[name][1]
    start = tmp_path / "start"
    convert(recipe, str(shop.teacher), start, recipe.options(**options), Settings(verify=False), QUIET)
    _learns_as_under_a_mask(Workshop(shop.teacher, start, shop.data), tmp_path)


@pytest.mark.slow
def test_dropout_of_attention_weights_keeps_its_mask(shop: Workshop, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", tiny_llama(attention_dropout=0.1))
    _learns_as_under_a_mask(Workshop(shop.teacher, tmp_path / "start", shop.data), tmp_path)


def _learns_as_under_a_mask(shop: Workshop, tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        shop.run(tmp_path / str(packing), packed=packing, kl_weight=0.0, ce_weight=1.0, tokens="512")
        losses.append([line["loss"] for line in metrics(tmp_path / str(packing))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"stages": "layerwise=50%,distill"}, {"gradient_checkpointing": True}])
def test_compiled_it_learns_the_same(shop: Workshop, tmp_path: Path, changes: dict[str, Any]) -> None:
    losses = []
    for compiled in (True, False):
        shop.run(tmp_path / str(compiled), compile=compiled, **changes)
        losses.append([line["loss"] for line in metrics(tmp_path / str(compiled))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

"""What servers rely on, for want of one in the tests: docs/serving.md tells what was tried with real ones.

A server of transformers models puts its own attention function in: one call a layer, with the head counts that the config
tells, one slot of its cache a layer, and no mask where nothing is padded. Results of a stock class must keep to that.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from tests.folders import save_tiny
from tests.uptraining import QUIET
from upfit.architecture.forwards import cache_name
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes

IDS = torch.arange(3, 35)[None]
CLOSE = 1e-5  # float32, another order of the same sums
RESULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("gqa", {"kv_heads": 2, "method": "mean"}),
    "v2-static": ("diff", {"variant": "v2-static"}),
    "v2": ("diff", {"variant": "v2"}),
    "cope": ("cope", {"gates": "constant", "positions": 8}),
    "cope-keys": ("cope", {"gates": "keys", "positions": 8, "calibration_tokens": "2k"}),
    "diffllama": ("diff", {"variant": "diffllama", "exact": True}),
}
STOCK = ("gqa", "v2-static")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serving")
    save_tiny(place / "source")
    for name, (recipe_name, options) in RESULTS.items():
        recipe = find_recipes()[recipe_name]
        convert(recipe, str(place / "source"), place / name, recipe.options(**options), Settings(verify=False), QUIET)
    return place


class Server:
    """An attention function of somebody else's, which keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
        self.calls.append({"q": q.shape[1], "k": k.shape[1], "mask": mask, "scaling": scaling, "layer": module.layer_idx})
        attend: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention
        causal = mask is None
        return attend(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True).transpose(1, 2), None


def served(folder: Path) -> tuple[Any, Server, torch.Tensor]:
    """The model under a server's attention, what that was given, and the logits."""
    server = Server()
    AttentionInterface.register("somebody_elses", server)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="somebody_elses").eval()
    with torch.no_grad():
        return model, server, model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", [*STOCK, "v2"])
def test_a_servers_attention_is_called_once_a_layer(folders: Path, name: str) -> None:
    model, server, logits = served(folders / name)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert [call["layer"] for call in server.calls] == list(range(model.config.num_hidden_layers))
    assert all((call["q"], call["k"]) == (heads, kv_heads) for call in server.calls)
    assert all(call["mask"] is None and call["scaling"] is not None for call in server.calls)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folders / name).eval()(IDS).logits
    assert (logits - plain).abs().max() < CLOSE * plain.abs().max()


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_result_is_nothing_but_stock(folders: Path, name: str) -> None:
    assert not list((folders / name).glob("*.py")) and "auto_map" not in (folders / name / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    assert type(model).__module__.startswith("transformers.models.")
    attention = model.model.layers[0].self_attn
    source = inspect.getsource(type(attention).forward)
    assert source.count("ALL_ATTENTION_FUNCTIONS") == 1, "vLLM looks for the one call in the source"
    assert attention.config._attn_implementation == model.config._attn_implementation


def test_what_keeps_other_results_from_vllm_is_still_so(folders: Path) -> None:
    """Not wishes but facts that docs/serving.md tells: whoever changes one changes the page."""
    model, server, _ = served(folders / "cope")
    server.calls.clear()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.cope_embeddings.fill_(0.1)
        model(IDS, use_cache=False)
    assert server.calls and all(call["mask"] is not None and call["mask"].is_floating_point() for call in server.calls), (
        "cope needs a bias"
    )
    model, server, _ = served(folders / "diffllama")
    assert len(server.calls) in (0, 2 * model.config.num_hidden_layers), "the stock DiffLlama attends twice, or by itself"
    for name in ("v2", "cope"):
        attention = AutoModelForCausalLM.from_pretrained(folders / name).model.layers[0].self_attn
        assert "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(type(attention).forward)


@pytest.mark.parametrize(("name", "slots"), [("gqa", 1), ("v2-static", 1), ("v2", 1), ("cope", 1), ("cope-keys", 2)])
def test_cache_slots_of_a_layer(folders: Path, name: str, slots: int) -> None:
    model, cache = AutoModelForCausalLM.from_pretrained(folders / name).eval(), DynamicCache()
    with torch.no_grad():
        model(IDS, **{cache_name(model.forward): cache})
    assert len(cache.layers) == slots * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["v2", "cope"])
def test_our_classes_bear_what_others_do_to_them(folders: Path, name: str) -> None:
    """transformers before 5.20 writes a config made without arguments; vLLM asks isinstance() of annotations."""
    config = AutoConfig.from_pretrained(folders / name)
    assert type(config)().to_dict()["base_model_type"] == "llama" and config.to_diff_dict() and str(config)
    model = AutoModelForCausalLM.from_config(config)
    assert not inspect.get_annotations(type(model).__init__)

"""Our latent attention of low rank, with heads of their own, and the stock class that it is rewritten as: the same logits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.full_rank import own_checkpoint, source
from upfit.architecture.retarget.draft import Draft
from upfit.convert.mla.deepseek import latent_shape, to_deepseek
from upfit.convert.mla.deepseek_tensors import from_stock
from upfit.convert.mla.test_deepseek import CASES, SINGLE, apart, loaded

HEADS, KV_HEADS, UNROTATED, LATENT, WIDTH, HIDDEN = 4, 2, 3, 5, 8, 32
ALL_PAIRS = ("llama-llama3", "llama-yarn", "phi3")  # whose angles are no powers beyond, or that rotate few


@dataclass(frozen=True)
class Described:
    shape: tuple[int, ...]
    dtype: str = "F32"


def low_rank(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint of our class whose heads differ, with all but the slowest of the family's pairs rotated."""
    model_type, settings = CASES[case]
    config, tensors = own_checkpoint(source(model_type, torch.float32, **{**settings, "num_key_value_heads": 1}))
    pairs = len(config["mla"]["layers"][0]["columns"]) - (case not in ALL_PAIRS)
    layer = {"latent": LATENT, "unrotated": UNROTATED, "columns": list(range(pairs))}
    config["num_key_value_heads"] = KV_HEADS
    config["mla"] |= {"kv_heads": KV_HEADS, "layers": [layer] * 2}
    for index in range(2):
        module = f"model.layers.{index}.self_attn."
        tensors[module + "q_proj.weight"] = 0.3 * torch.randn(HEADS * (UNROTATED + 2 * pairs), HIDDEN)
        tensors[module + "kv_a_proj_with_mqa.weight"] = 0.3 * torch.randn(LATENT + 2 * pairs, HIDDEN)
        tensors[module + "kv_b_proj.weight"] = 0.3 * torch.randn(KV_HEADS * (UNROTATED + WIDTH), LATENT)
    return config, tensors


def own(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    parsed = CONFIG_MAPPING["upfit_mla"].from_dict(config)
    model: Any = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    report = model.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model.eval()


def rewritten(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    draft = Draft(config, {name: Described(tuple(tensor.shape)) for name, tensor in tensors.items()})
    settings = to_deepseek(draft)
    state = {new: tensors[old] for new, old in draft.renames.items()}
    for rule in draft.rules:
        state |= rule.apply({name: tensors[name] for name in rule.reads})
    return settings, state


@pytest.mark.parametrize("case", CASES)
def test_low_rank_is_the_stock_class(case: str) -> None:
    config, tensors = low_rank(case)
    assert apart(own(config, tensors), loaded(*rewritten(config, tensors), torch.float32)) < SINGLE


def test_what_is_taken_back_computes_the_same() -> None:
    config, tensors = low_rank("llama")
    _, state = rewritten(config, tensors)
    again = dict(tensors)
    for index in range(2):
        module = f"model.layers.{index}.self_attn."
        stock = {name.removeprefix(module): tensor for name, tensor in state.items() if name.startswith(module)}
        again |= {module + part: tensor for part, tensor in from_stock(stock, latent_shape(config)).items()}
    assert apart(own(config, tensors), own(config, again)) < 1e-5

"""Tiny models with latent attention: random ones of low rank, and stock models rewritten at full rank, which is exact."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.tiny import tiny_model
from upfit.architecture.decoder_check import auto_map
from upfit.modeling.modeling_upfit_mla import UpfitMlaConfig, UpfitMlaForCausalLM

HEADS, KV_HEADS, WIDTH = 4, 2, 8
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
NEW = ("q_proj.", "kv_a_proj_with_mqa.", "kv_b_proj.")


@dataclass(frozen=True)
class Family:
    """How a stock attention is written. `pairs`: a rotated dimension's partner is `half` of the rotary
    width away, or `next`."""

    changes: dict[str, Any] = field(default_factory=dict)
    kv_heads: int = KV_HEADS
    output: str = "o_proj"
    fused: str = ""  # the one projection of queries, keys and values
    pairs: str | None = "half"
    rotary: int = WIDTH
    tolerance: float = 1e-9  # of the largest logit, to which it is the same at full rank
    eager: bool = False  # there is no sdpa of it


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),  # sliding windows
    "qwen2": Family(),  # biases
    "qwen3": Family(),  # norms of heads, left out
    "olmo2": Family(),  # norms of all heads together, left out
    "granite": Family(),  # scores scaled by a setting
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "phi3": Family(HALF_ROTARY, fused="qkv_proj", rotary=WIDTH // 2),
    "gemma2": Family(eager=True),  # soft caps, a sliding window in every other layer
    "cohere": Family(pairs="next", tolerance=1e-6),  # which rotates in float32
    "gpt_oss": Family(eager=True, tolerance=1e-5),  # sinks; its experts have no float64
    "opt": Family(kv_heads=HEADS, output="out_proj", pairs=None),
    "gpt2": Family(kv_heads=HEADS, output="c_proj", fused="c_attn", pairs=None),
    "gpt_neox": Family(HALF_ROTARY, HEADS, "dense", "query_key_value", rotary=WIDTH // 2),
}


def source_of(model_type: str, **changes: Any) -> Any:
    """A stock model in float64, without norms of queries and keys."""
    family = FAMILIES[model_type]
    heads = {"num_key_value_heads": family.kv_heads} if family.kv_heads != HEADS else {}
    tiny = tiny_model(model_type, **family.changes | heads | changes)
    settings = {"attn_implementation": "eager"} if family.eager else {}
    dtype = torch.float32 if model_type == "gpt_oss" else torch.float64
    model: Any = AutoModelForCausalLM.from_config(tiny.config, dtype=dtype, **settings).eval()
    model.load_state_dict(tiny.state_dict())
    for attention in attentions(model):
        for name in {"q_norm", "k_norm"} & attention._modules.keys():
            setattr(attention, name, nn.Identity())
    return model


def attentions(model: Any) -> list[Any]:
    outputs = {family.output for family in FAMILIES.values()}
    return [
        module for name, module in model.named_modules() if "ttention" in type(module).__name__ and outputs & {*module._modules}
    ]


def ours(source: Any, layers: list[dict[str, Any]]) -> Any:
    """The source's config with latent attention, as a model whose other weights are the source's; random ones are new."""
    family, attention = FAMILIES[source.config.model_type], attentions(source)[0]
    names = [family.fused] if family.fused else ["q_proj", "k_proj", "v_proj", "q_norm", "k_norm"]
    settings = {
        "classes": [type(attention).__name__],
        "output": family.output,
        "dropped": names,
        "heads": HEADS,
        "kv_heads": family.kv_heads,
        "v_head_dim": WIDTH,
        "scaling": attention.scaling,
        "bias": attention.get_submodule(names[0]).bias is not None,
        "layers": layers,
    }
    kind = source.config.model_type
    record = {"model_type": "upfit_mla", "base_model_type": kind, "auto_map": auto_map("modeling_upfit_mla.UpfitMla")}
    torch.manual_seed(1)
    config = UpfitMlaConfig.from_dict(source.config.to_dict() | record | {"mla": settings})
    model = UpfitMlaForCausalLM._from_config(config, attn_implementation=source.config._attn_implementation, dtype=source.dtype)
    state = {name: tensor for name, tensor in source.state_dict().items() if not any(f".{part}" in name for part in NEW)}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert {*missing} == model.state_dict().keys() - state.keys()
    return model.eval()


def rough(model_type: str, **changes: Any) -> Any:
    """Latent attention of low rank with random weights: repeated, unordered and left out columns, unlike in every layer."""
    columns = [[2, 0, 0], [1, 2, 1]] if FAMILIES[model_type].pairs else [[], []]
    if model_type in ("phi3", "gpt_neox"):
        columns = [[1, 0, 0], [1, 1, 1]]
    layers = [{"latent": 5 + n, "unrotated": 3 - n, "columns": row} for n, row in enumerate(columns)]
    if model_type == "smollm3":
        layers[1]["columns"] = []
    return ours(source_of(model_type, **changes), layers)


def projected(module: Any) -> Tensor:
    """[rows, E + 1]: weights, and the bias as what a last input of one is multiplied with."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return torch.cat([weight, weight.new_zeros(len(weight), 1) if module.bias is None else module.bias[:, None]], 1)


def heads_of(attention: Any, family: Family) -> list[Tensor]:
    """Queries, keys, values of a stock attention, each [heads, D, E + 1]."""
    if not family.fused:
        return [projected(getattr(attention, f"{part}_proj")).unflatten(0, (-1, WIDTH)) for part in "qkv"]
    rows = projected(getattr(attention, family.fused)).unflatten(0, (-1, WIDTH))
    if family.fused == "query_key_value":
        return list(rows.unflatten(0, (HEADS, 3)).unbind(1))
    return list(rows.split([HEADS, family.kv_heads, family.kv_heads]))


def at_full_rank(attention: Any, family: Family, rotates: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, weights) of latent attention that is the stock one: a slot for every key head on every pair, a latent that is
    the values of all heads and what of their keys is not rotated."""
    q, k, v = heads_of(attention, family)
    first, step = torch.arange(family.rotary // 2 if rotates else 0), family.rotary // 2
    columns = first
    if family.pairs == "next":
        first, step = 2 * first, 1
        columns = first
    second = first + step
    rest = torch.tensor([n for n in range(WIDTH) if n not in {*first.tolist(), *second.tolist()}], dtype=torch.long)
    own = torch.eye(len(k), dtype=q.dtype).repeat_interleave(HEADS // len(k), 0)  # [H, K]
    pairs_q = [torch.einsum("hpe,hk->hpke", q[:, part], own).flatten(1, 2) for part in (first, second)]
    pairs_k = [k[:, part].transpose(0, 1).flatten(0, 1) for part in (first, second)]
    latent = torch.cat([k[:, rest].flatten(0, 1), v.flatten(0, 1)])
    up_key, up_value = torch.eye(len(latent), dtype=q.dtype).split([len(k) * len(rest), len(k) * WIDTH])
    up = torch.cat([up_key.unflatten(0, (len(k), -1)), up_value.unflatten(0, (len(k), -1))], 1).flatten(0, 1)
    a, b = torch.cat([q[:, rest], *pairs_q], 1).flatten(0, 1), torch.cat([latent, *pairs_k])
    weights = {"q_proj.weight": a[:, :-1], "q_proj.bias": a[:, -1], "kv_b_proj.weight": up}
    weights |= {"kv_a_proj_with_mqa.weight": b[:, :-1], "kv_a_proj_with_mqa.bias": b[:, -1]}
    slots = columns.repeat_interleave(len(k)).tolist()
    return {"latent": len(latent), "unrotated": len(rest), "columns": slots}, weights


def exact(source: Any) -> Any:
    """The source with latent attention of full rank."""
    family = FAMILIES[source.config.model_type]
    turns = [family.pairs is not None and bool(getattr(attention, "use_rope", True)) for attention in attentions(source)]
    with torch.no_grad():
        layers, weights = zip(
            *(at_full_rank(attention, family, turn) for attention, turn in zip(attentions(source), turns, strict=True)),
            strict=True,
        )
    model = ours(source, list(layers))
    for attention, tensors in zip(attentions(model), weights, strict=True):
        present = {name: tensor for name, tensor in tensors.items() if name in attention.state_dict()}
        left = attention.load_state_dict(present, strict=False)
        assert not left.unexpected_keys and not any(name.startswith(NEW) for name in left.missing_keys)
    return model

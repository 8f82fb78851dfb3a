"""Tiny stock models whose heads share their keys, as `upfit_mla` checkpoints of full rank: the same function, exactly."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

NEIGHBOURS = ("ernie4_5", "glm", "helium")  # their pairs are neighbouring dimensions; elsewhere the two halves
STAYS = ("o_proj",)
SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "hidden_act": "silu"},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 5], "sliding_window": None, "tie_word_embeddings": False},
}


def source(model_type: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A tiny model of a family, norms of queries and keys taken out, biases of its projections zero."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("bias"):
                parameter.zero_()
    for layer in model.model.layers:
        attention = layer.self_attn
        for norm in [name for name, _ in attention.named_children() if name.endswith("norm")]:
            setattr(attention, norm, torch.nn.Identity())
        if config.num_key_value_heads > 1:
            keys = attention.k_proj.weight.data.unflatten(0, (config.num_key_value_heads, -1))
            keys.copy_(keys[:1].clone().expand_as(keys))
    return model


def own_config(model: Any, dropped: list[str], **changes: Any) -> dict[str, Any]:
    """`config.json` of the checkpoint; `changes` are of `mla`."""
    config, attention = model.config, model.model.layers[0].self_attn
    width, rotated = attention.head_dim, rotated_width(model)
    kv_heads = config.num_key_value_heads
    latent = {"latent": width - rotated + kv_heads * width, "unrotated": width - rotated, "columns": list(range(rotated // 2))}
    mla = {
        "classes": [type(attention).__name__],
        "output": "o_proj",
        "dropped": dropped,
        "heads": config.num_attention_heads,
        "kv_heads": kv_heads,
        "v_head_dim": width,
        "scaling": attention.scaling,
        "bias": False,
        "layers": [latent] * config.num_hidden_layers,
    }
    written = {key: value for key, value in config.to_dict().items() if key != "architectures"}
    return written | {"model_type": "upfit_mla", "base_model_type": config.model_type, "mla": mla | changes}


def rotated_width(model: Any) -> int:
    return 2 * len(model.model.rotary_emb.inv_freq)


def own_checkpoint(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of our class, by the names of its parameters."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    dropped: set[str] = {"q_norm", "k_norm", "query_layernorm", "key_layernorm"}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.self_attn."
        for name in [name for name in tensors if name.startswith(prefix)]:
            if name.removeprefix(prefix).split(".")[0] not in STAYS:
                dropped.add(name.removeprefix(prefix).split(".")[0])
                del tensors[name]
        tensors |= {prefix + part: tensor for part, tensor in _latent(model, layer.self_attn).items()}
    return own_config(model, sorted(dropped)), tensors


def _latent(model: Any, attention: Any) -> dict[str, Tensor]:
    config, width, rotated = model.config, attention.head_dim, rotated_width(model)
    heads, kv_heads, plain = config.num_attention_heads, config.num_key_value_heads, width - rotated
    if hasattr(attention, "qkv_proj"):
        q, k, v = attention.qkv_proj.weight.data.split([heads * width, kv_heads * width, kv_heads * width])
    else:
        q, k, v = (getattr(attention, f"{part}_proj").weight.data for part in "qkv")
    if config.model_type in NEIGHBOURS:
        order = [*range(rotated, width), *range(0, rotated, 2), *range(1, rotated, 2)]
    else:
        order = [*range(rotated, width), *range(rotated)]
    key = k[:width][order]  # N unrotated rows, F first and F second of the pairs
    up = torch.zeros(kv_heads, plain + width, plain + kv_heads * width, dtype=q.dtype)
    for head, rows in enumerate(up):
        rows[:plain, :plain] = torch.eye(plain)
        rows[plain:, plain + head * width : plain + (head + 1) * width] = torch.eye(width)
    return {
        "q_proj.weight": q.unflatten(0, (heads, width))[:, order].flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([key[:plain], v, key[plain:]]),
        "kv_b_proj.weight": up.flatten(0, 1),
    }

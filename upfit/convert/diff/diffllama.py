"""Plans for transformers' own DiffLlama: lossy at the same size, or exact to rounding at twice the attention's.

DiffLlama norms what a pair gives out, which no linear layer can undo, and its pairs share values; so at the same size something
is always lost. At twice the size a pair is one head twice, and constants in the second half of its values ("ballast") are so
large that the norm no longer depends on the token.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.checkpoint.plan import Rule, Tensors
from upfit.convert.diff.paper import lambda_vectors
from upfit.errors import UpfitError
from upfit.modeling.modeling_upfit_diff import lambda_init

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.attention import Layer
    from upfit.architecture.layers import Architecture

# Config keys of the source that DiffLlama has as well, and those with which its layers would be something else.
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
SOURCES = ("llama", "mistral", "qwen2")
BALLAST = 1024.0  # in units of the values' size: the norm then varies by about its square's inverse
NEW = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def check(architecture: "Architecture", exact: bool) -> None:
    """Raise UpfitError for a model that DiffLlama's layers cannot be."""
    config, name = architecture.config, architecture.entry.model_type
    if name not in SOURCES:
        raise UpfitError(
            f"{name} has layers that DiffLlama does not have ({', '.join(SOURCES)} can become it); choose --variant v2 or split"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UpfitError(f"this {name} has sliding windows, which DiffLlama does not have; choose --variant v2 or split")
    if config.get("mlp_bias"):
        raise UpfitError("this model has biases in its MLP, which DiffLlama does not have; choose --variant v2 or split")
    kv_heads = architecture.kv_heads
    if kv_heads % 2 and not exact:
        raise UpfitError(
            f"DiffLlama pairs key/value heads, and this model has {kv_heads}, an odd number; choose --variant split, which "
            "halves each head instead, or --variant v2, or --exact, which doubles them"
        )


def config_of(architecture: "Architecture", exact: bool) -> dict[str, Any]:
    """DiffLlama's config.json for this source."""
    times, shape = (2 if exact else 1), architecture.layers[0].geometry
    inherited = {key: architecture.config[key] for key in KEPT if key in architecture.config}
    biased = exact or any(f"{part}.bias" in architecture.layers[0].names for part in "qkvo")
    return {
        "architectures": ["DiffLlamaForCausalLM"],
        "model_type": "diffllama",
        **inherited,
        "num_attention_heads": times * shape.heads,
        "num_key_value_heads": times * shape.kv_heads,
        "head_dim": shape.head_dim,
        "attention_bias": biased,
        "attention_dropout": 0.0,
    }


def bias_rules(layer: "Layer", config: dict[str, Any], hidden: int) -> list[Rule]:
    """Zeros for biases that DiffLlama has and the layer has not, as many as its heads at the same size."""
    shape = layer.geometry
    sizes = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.head_dim}
    sizes["o"] = hidden
    if not config["attention_bias"]:
        return []
    return [_zeros(layer, part, size) for part, size in sizes.items() if f"{part}.bias" not in layer.names]


def _zeros(layer: "Layer", part: str, size: int) -> Rule:
    weight = layer.names[f"{part}.weight"]
    name = weight.removesuffix("weight") + "bias"

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        return {name: tensors[weight].new_zeros(size)}

    return Rule((weight,), (name,), apply, "no bias")


def outline_rule(layer: "Layer") -> Rule:
    """The shapes that a fit will write, for a dry run."""
    query = layer.names["q.weight"]
    names = tuple(layer.stem + name for name in NEW)

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        vectors = lambda_vectors(0.0, lambda_init(layer.index), layer.geometry.head_dim)
        return {name: tensors[query].new_zeros(len(vectors[key])) for name, key in zip(names, NEW, strict=True)}

    return Rule((query,), names, apply, "λ")


def exact_rule(layer: "Layer", hidden: int) -> Rule:
    """Each head twice with itself as its pair, ballast in the second half of the values, the norm's factor in the output."""
    parts = [f"{part}.weight" for part in "qkvo"] + [f"{part}.bias" for part in "qkvo"]
    weights = {part: layer.names[f"{part}.weight"] for part in "qkvo"}
    names = {part: weights[part[0]].removesuffix("weight") + part[2:] for part in parts}
    start, shape = lambda_init(layer.index), layer.geometry
    vectors = {layer.stem + name: name for name in NEW}
    reads = tuple(layer.names[part] for part in parts if part in layer.names)

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        stored = {part: tensors[layer.names[part]] for part in parts if part in layer.names}
        doubled = _doubled(LAYOUTS[layer.layout].unpack(stored, shape), start)
        tensors = {names[f"{part}.weight"]: getattr(doubled, part) for part in "qkv"}
        tensors = {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}
        tensors |= {names[f"{part}.bias"]: getattr(doubled, f"{part}_bias").flatten() for part in "qkv"}
        assert doubled.o is not None
        tensors[names["o.weight"]] = doubled.o.flatten(1)
        tensors[names["o.bias"]] = stored.get("o.bias", doubled.o.new_zeros(hidden))
        new = lambda_vectors(start, start, shape.head_dim)
        return tensors | {name: new[key].to(doubled.o) for name, key in vectors.items()}

    return Rule(reads, (*names.values(), *vectors), apply, "heads twice, ballast in the values")


def _doubled(attention: Attention, start: float) -> Attention:
    q, k, v, o = attention.q, attention.k, attention.v, attention.o
    assert q is not None and k is not None and v is not None and o is not None
    wide = torch.promote_types(v.dtype, torch.float32)
    size = (
        v.to(wide).square().sum().div(v.shape[0] * v.shape[1]).sqrt() if v.device.type != "meta" else v.new_ones((), dtype=wide)
    )
    bias = {name: getattr(attention, f"{name}_bias") for name in "qkv"}
    bias = {name: t.new_zeros(t.shape[:2]) if bias[name] is None else bias[name] for name, t in (("q", q), ("k", k), ("v", v))}
    ballast = (BALLAST * size).to(v.dtype)  # a number that the type holds, so that the output's factor is of the same
    # The norm divides by (1 − λ) · ballast / √2, and its input has the same (1 − λ).
    factor = ballast.to(wide) / (2**0.5 * (1 - start))
    columns = (o.to(wide) * factor).to(o.dtype)
    return replace(
        attention,
        q=torch.cat([q, q]),
        k=torch.cat([k, k]),
        v=torch.cat([v, torch.zeros_like(v)]),
        o=torch.stack([columns, torch.zeros_like(columns)], 2).flatten(1, 2),
        q_bias=torch.cat([bias["q"]] * 2),
        k_bias=torch.cat([bias["k"]] * 2),
        v_bias=torch.cat([bias["v"], ballast.expand_as(bias["v"])]),
    )

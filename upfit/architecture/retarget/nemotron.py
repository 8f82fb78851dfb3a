"""GPT-NeoX whose blocks put the MLP after the attention, and Japanese GPT-NeoX, as Nemotron.

Nemotron stores the scale of a norm less one, which a short type cannot hold exactly for scales below a half. Such a scale is
split into a power of two, which goes into the projection behind the norm without rounding, and a rest of at least a half.
"""

from typing import TYPE_CHECKING, Any

from upfit.architecture.retarget.draft import Draft, Named, common, names, projections, rotary, split_heads, zero_bias
from upfit.architecture.retarget.phi import neox_head

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "NemotronForCausalLM"
SMALLEST = -8  # exponent of the powers of two: more would take what is behind the norm out of the range of float16


def from_gpt_neox(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. For layers with the MLP after the attention."""
    config = draft.config
    _blocks(draft, "gpt_neox", config.num_hidden_layers, config.num_attention_heads)
    _ends(draft, "gpt_neox")
    return _config(draft, config.intermediate_size, mlp_bias=True)


def from_gpt_neox_japanese(draft: Draft) -> dict[str, Any]:
    """As `from_gpt_neox`; the only bias is one of the last layer's output, the others are written as zeros."""
    config = draft.config
    _blocks(draft, "gpt_neox_japanese", config.num_hidden_layers, config.num_attention_heads)
    _ends(draft, "gpt_neox_japanese")
    return _config(draft, int(config.hidden_size * config.intermediate_multiple_size), mlp_bias=False)


def _config(draft: Draft, intermediate_size: int, mlp_bias: bool) -> dict[str, Any]:
    config = draft.config
    return common(draft, "nemotron", CLASS) | {
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout,
        "attention_bias": True,
        "mlp_bias": mlp_bias,
        **rotary(config.rope_parameters),
    }


def _blocks(draft: Draft, base: str, layers: int, heads: int) -> None:
    for index in range(layers):
        old, new = f"{base}.layers.{index}", f"model.layers.{index}"
        _norm(draft, f"{old}.input_layernorm", f"{new}.input_layernorm")
        _norm(draft, f"{old}.post_attention_layernorm", f"{new}.post_attention_layernorm")
        _project(draft, old, new, heads)
        if draft.has(f"{old}.attention.dense_bias"):
            draft.keep(f"{new}.self_attn.o_proj", f"{old}.attention.dense", ("weight",))
            draft.renames[f"{new}.self_attn.o_proj.bias"] = draft.stored(f"{old}.attention.dense_bias")
        else:
            draft.with_bias(f"{new}.self_attn.o_proj", f"{old}.attention.dense")
        _scale(draft, f"{old}.mlp.dense_h_to_4h", f"{old}.post_attention_layernorm", f"{new}.mlp.up_proj")
        draft.keep(f"{new}.mlp.up_proj", f"{old}.mlp.dense_h_to_4h", ("bias",))
        draft.keep(f"{new}.mlp.down_proj", f"{old}.mlp.dense_4h_to_h")


def _ends(draft: Draft, base: str) -> None:
    """Embeddings, last norm and head. A tied head is not scaled, as the embeddings must stay: the norm is rounded then."""
    norm, head = f"{base}.final_layer_norm", neox_head(draft)
    draft.keep("model.embed_tokens", f"{base}.embed_in")
    _norm(draft, norm, "model.norm", split=not draft.config.tie_word_embeddings)
    if draft.config.tie_word_embeddings:
        draft.head("lm_head", head)
    else:
        _scale(draft, head, norm, "lm_head")


def _norm(draft: Draft, old: str, new: str, split: bool = True) -> None:
    (weight, bias), written = names(old), names(new)

    def make(tensors: Named) -> Named:
        power = powers(tensors[weight]) if split else tensors[weight].new_ones(tensors[weight].shape)
        return {written[0]: tensors[weight] / power - 1, written[1]: tensors[bias] / power}

    draft.make("scale less one", (weight, bias), written, make)


def _scale(draft: Draft, old: str, norm: str, new: str) -> None:
    """A projection whose columns take the powers of two from the norm before them."""
    weight, scale, written = f"{old}.weight", f"{norm}.weight", f"{new}.weight"
    draft.make(
        "powers of two", (weight, scale), (written,), lambda tensors: {written: tensors[weight] * powers(tensors[scale])}
    )


def _project(draft: Draft, old: str, new: str, heads: int) -> None:
    """q, k and v, stored in turn for each head, with the powers of two from the norm; zeros where there is no bias."""
    (weight, bias), scale = names(f"{old}.attention.query_key_value"), f"{old}.input_layernorm.weight"
    written = projections(f"{new}.self_attn")

    def make(tensors: Named) -> Named:
        weights = split_heads(tensors[weight] * powers(tensors[scale]), heads)
        biases = split_heads(tensors.get(bias, zero_bias(tensors[weight])), heads)
        return dict(zip(written, (tensor for pair in zip(weights, biases, strict=True) for tensor in pair), strict=True))

    draft.make("q, k, v apart", (weight, bias, scale), written, make)


def powers(scale: "Tensor") -> "Tensor":
    """What goes from each scale of a norm into the next projection: 1, or for scales below a half a power of two."""
    import torch

    exponents = torch.floor(torch.log2(scale.double().abs())).clamp(min=SMALLEST) + 1
    signed = torch.exp2(exponents) * scale.double().sign()
    return torch.where((scale >= 0.5) | (scale == 0), torch.ones_like(signed), signed).to(scale.dtype)

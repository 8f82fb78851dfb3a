"""GPT-NeoX, GPT-J and CodeGen as Phi: one block of attention and MLP side by side, partly rotated heads, key/value heads.

GPT-NeoX normalises twice in a block, with a scale and a shift of its own for the attention and for the MLP; Phi once. Both are
folded into the projections behind them, so that what is left is the same plain norm twice: W (x g + b) = (W g) x + W b.
GPT-J and CodeGen rotate neighbouring dimensions, Phi the two halves: rows of q and k change their places.
"""

from typing import TYPE_CHECKING, Any

from upfit.architecture.retarget.draft import (
    Draft,
    Named,
    common,
    halves,
    names,
    projections,
    rotary,
    rotary_share,
    split_heads,
    zero_bias,
)
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "PhiForCausalLM"
BASE = 10000.0  # of the rotation, which GPT-J and CodeGen have in their code
BLOCKS = 4  # in which CodeGen stores its projections
ROWS = 1024  # of a matrix that are held in float64 at a time


def from_gpt_neox(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. For layers with attention and MLP side by side."""
    config = draft.config
    for index in range(config.num_hidden_layers):
        old, new = f"gpt_neox.layers.{index}", f"model.layers.{index}"
        _project(draft, old, new, config.num_attention_heads)
        _fold_mlp(draft, old, new)
        _plain_norm(draft, f"{old}.input_layernorm", f"{new}.input_layernorm")
        draft.with_bias(f"{new}.self_attn.dense", f"{old}.attention.dense")
        draft.keep(f"{new}.mlp.fc2", f"{old}.mlp.dense_4h_to_h")
    draft.keep("model.embed_tokens", "gpt_neox.embed_in")
    draft.keep("model.final_layernorm", "gpt_neox.final_layer_norm")
    head = neox_head(draft)
    draft.head("lm_head", head)
    draft.zero_bias("lm_head", head)
    return common(draft, "phi", CLASS) | {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        **rotary(config.rope_parameters),
    }


def neox_head(draft: Draft) -> str:
    """The output matrix's module, which older versions of transformers call otherwise."""
    return "lm_head" if draft.has("lm_head.weight") else "embed_out"


def from_gptj(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. CodeGen differs in how q, k and v are stored.

    Raises UpfitError for a rotation that the class itself cannot run.
    """
    config = draft.config
    heads, width, head_dim = config.n_head, config.rotary_dim, config.n_embd // config.n_head
    if not isinstance(width, int) or not 0 < width <= head_dim or width % 2:
        raise UpfitError(f"rotary_dim {width} is not an even part of the head width {head_dim}; check config.json")
    for index in range(config.n_layer):
        old, new = f"transformer.h.{index}", f"model.layers.{index}"
        draft.keep(f"{new}.input_layernorm", f"{old}.ln_1")
        draft.keep(f"{new}.mlp.fc1", f"{old}.mlp.fc_in")
        draft.keep(f"{new}.mlp.fc2", f"{old}.mlp.fc_out")
        draft.with_bias(f"{new}.self_attn.dense", f"{old}.attn.out_proj")
        if draft.has(f"{old}.attn.qkv_proj.weight"):
            _unpack(draft, f"{old}.attn.qkv_proj", f"{new}.self_attn", heads, width)
        else:
            for part in "qk":
                _turn(draft, f"{old}.attn.{part}_proj", f"{new}.self_attn.{part}_proj", heads, width)
            draft.with_bias(f"{new}.self_attn.v_proj", f"{old}.attn.v_proj")
    draft.keep("model.embed_tokens", "transformer.wte")
    draft.keep("model.final_layernorm", "transformer.ln_f")
    draft.head("lm_head", "lm_head")
    draft.keep("lm_head", "lm_head", ("bias",))
    rope = {"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": rotary_share(width, head_dim)}
    return common(draft, "phi", CLASS) | {
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config.activation_function,
        "layer_norm_eps": config.layer_norm_epsilon,
        "max_position_embeddings": config.n_positions,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.embd_pdrop,
        "resid_pdrop": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
        **rotary(rope),
    }


def _project(draft: Draft, old: str, new: str, heads: int) -> None:
    """GPT-NeoX's q, k and v, stored in turn for each head, with the norm before them folded in."""
    (weight, bias), norm = names(f"{old}.attention.query_key_value"), names(f"{old}.input_layernorm")
    written = projections(f"{new}.self_attn")

    def make(tensors: Named) -> Named:
        folded = fold(tensors[weight], tensors.get(bias), *(tensors[name] for name in norm))
        weights, biases = (split_heads(tensor, heads) for tensor in folded)
        pairs = zip(weights, biases, strict=True)
        return dict(zip(written, (tensor for pair in pairs for tensor in pair), strict=True))

    draft.make("q, k, v apart, norm folded in", (weight, bias, *norm), written, make)


def _fold_mlp(draft: Draft, old: str, new: str) -> None:
    (weight, bias), norm = names(f"{old}.mlp.dense_h_to_4h"), names(f"{old}.post_attention_layernorm")
    written = names(f"{new}.mlp.fc1")

    def make(tensors: Named) -> Named:
        return dict(zip(written, fold(tensors[weight], tensors[bias], *(tensors[name] for name in norm)), strict=True))

    draft.make("norm folded in", (weight, bias, *norm), written, make)


def _plain_norm(draft: Draft, old: str, new: str) -> None:
    """A norm whose scale and shift are in the projections behind it."""
    (weight, bias), written = names(old), names(new)

    def make(tensors: Named) -> Named:
        return {written[0]: tensors[weight].new_ones(tensors[weight].shape), written[1]: zero_bias(tensors[bias])}

    draft.make("scale 1, shift 0", (weight, bias), written, make)


def _unpack(draft: Draft, old: str, new: str, heads: int, width: int) -> None:
    """CodeGen's q, k and v, stored in four blocks of [q | v | k], the rotated ones in Phi's order, with zero biases."""
    weight, written = f"{old}.weight", projections(new)

    def make(tensors: Named) -> Named:
        q, v, k = (part.flatten(0, 1) for part in tensors[weight].unflatten(0, (BLOCKS, 3, -1)).unbind(1))
        parts = (halves(q, heads, width), halves(k, heads, width), v)
        return dict(zip(written, (tensor for part in parts for tensor in (part, zero_bias(part))), strict=True))

    draft.make("q, k, v apart, in halves, zero biases", (weight,), written, make)


def _turn(draft: Draft, old: str, new: str, heads: int, width: int) -> None:
    """One of GPT-J's projections with its rotated rows in Phi's order, and a zero bias."""
    weight, written = f"{old}.weight", names(new)

    def make(tensors: Named) -> Named:
        return {written[0]: halves(tensors[weight], heads, width), written[1]: zero_bias(tensors[weight])}

    draft.make("in halves, zero bias", (weight,), written, make)


def fold(weight: "Tensor", bias: "Tensor | None", scale: "Tensor", shift: "Tensor") -> "tuple[Tensor, Tensor]":
    """[out, in] and [out] of the projection that does to a plain norm what `weight`, `bias` do after `scale`, `shift` [in].

    The products are rounded once, the sums are made in float64.
    """
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    shifted = torch.cat([rows.double() @ shift.double() for rows in weight.split(ROWS)])
    added = shifted if bias is None else shifted + bias.double()
    return (weight.to(wide) * scale.to(wide)).to(weight.dtype), added.to(weight.dtype)

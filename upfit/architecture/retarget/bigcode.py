"""GPT-2, OPT, BioGPT and XGLM as GPTBigCode: learned positions, norms before attention and MLP, one key/value head or all.

The result has the form with a head of keys and values for each query head, whose q, k and v are stored in turn for each head.
Positions are counted from the first row of the position table, and embeddings enter as they are: families that skip rows,
compute positions or scale embeddings have that written into the tables.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upfit.architecture.retarget.draft import Draft, Named, common, join_heads, names, zero_bias
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "GPTBigCodeForCausalLM"
OFFSET = 2  # rows at the head of the position table that OPT, BioGPT and XGLM never read
CROSS = "this model has cross-attention, which GPTBigCode has not with one key/value head; convert a model without"
PLAIN_EPS = 1e-5  # of a torch LayerNorm to which nobody says otherwise


def from_gpt2(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. Matrices are stored [in, out] there and are transposed.

    Raises UpfitError for a model with cross-attention.
    """
    config = draft.config
    if config.add_cross_attention:
        raise UpfitError(CROSS)
    for index in range(config.n_layer):
        module = f"transformer.h.{index}"
        for norm in ("ln_1", "ln_2"):
            draft.keep(f"{module}.{norm}", f"{module}.{norm}")
        divisor = index + 1 if config.scale_attn_by_inverse_layer_idx else 1
        _transposed_heads(draft, f"{module}.attn.c_attn", config.n_head, divisor)
        for matrix in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            _transpose(draft, f"{module}.{matrix}")
            draft.keep(f"{module}.{matrix}", f"{module}.{matrix}", ("bias",))
    for table in ("wte", "wpe"):
        draft.keep(f"transformer.{table}", f"transformer.{table}")
    draft.keep("transformer.ln_f", "transformer.ln_f")
    draft.head("lm_head", "lm_head")
    return common(draft, "gpt_bigcode", CLASS) | {
        "n_embd": config.n_embd,
        "n_inner": config.n_inner or 4 * config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.n_positions,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "scale_attn_weights": config.scale_attn_weights,
        "embd_pdrop": config.embd_pdrop,
        "resid_pdrop": config.resid_pdrop,
        "attn_pdrop": config.attn_pdrop,
        "multi_query": False,
    }


@dataclass(frozen=True)
class Parts:
    """Where a family of OPT's kind keeps what: modules, and how embeddings are scaled."""

    base: str
    last_norm: str
    head: str
    scale: float = 1.0


def from_opt(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. Raises UpfitError for OPT-350m's kind: norms at the end, narrow embeddings."""
    config = draft.config
    if not config.do_layer_norm_before or config._remove_final_layer_norm or config.word_embed_proj_dim != config.hidden_size:
        raise UpfitError(
            "this OPT normalises after its layers, or its embeddings have another width than its layers (as in OPT-350m); no "
            "class of transformers does so with fewer key/value heads, so convert another size"
        )
    parts = Parts("model.decoder", "final_layer_norm", "lm_head")
    _blocks(draft, parts, config.num_hidden_layers, config.num_attention_heads)
    return _config(draft, config.num_attention_heads, config.num_hidden_layers, config.ffn_dim) | {
        "activation_function": config.activation_function,
        "layer_norm_epsilon": PLAIN_EPS,
        "initializer_range": config.init_std,
        "embd_pdrop": 0.0,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def from_biogpt(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors."""
    config = draft.config
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
    parts = Parts("biogpt", "layer_norm", "output_projection", scale)
    _blocks(draft, parts, config.num_hidden_layers, config.num_attention_heads)
    return _config(draft, config.num_attention_heads, config.num_hidden_layers, config.intermediate_size) | {
        "activation_function": config.hidden_act,
        "layer_norm_epsilon": PLAIN_EPS,  # the class does not read its own layer_norm_eps
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.hidden_dropout_prob,
        "resid_pdrop": config.hidden_dropout_prob,
        "attn_pdrop": config.attention_probs_dropout_prob,
    }


def from_xglm(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors. Raises UpfitError for a model with cross-attention."""
    config = draft.config
    if config.add_cross_attention:
        raise UpfitError(CROSS)
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    _blocks(draft, Parts("model", "layer_norm", "lm_head", scale), config.num_layers, config.attention_heads)
    return _config(draft, config.attention_heads, config.num_layers, config.ffn_dim) | {
        "activation_function": config.activation_function,
        "layer_norm_epsilon": PLAIN_EPS,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _config(draft: Draft, heads: int, layers: int, inner: int) -> dict[str, Any]:
    return common(draft, "gpt_bigcode", CLASS) | {
        "n_embd": draft.config.hidden_size,
        "n_inner": inner,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": draft.config.max_position_embeddings,
        "multi_query": False,
    }


def _blocks(draft: Draft, parts: Parts, layers: int, heads: int) -> None:
    """All tensors of a family of OPT's kind."""
    for index in range(layers):
        old, new = f"{parts.base}.layers.{index}", f"transformer.h.{index}"
        _norm(draft, parts, f"{old}.self_attn_layer_norm", f"{new}.ln_1")
        _norm(draft, parts, f"{old}.final_layer_norm", f"{new}.ln_2")
        _joined_heads(draft, f"{old}.self_attn", f"{new}.attn.c_attn", heads)
        draft.with_bias(f"{new}.attn.c_proj", f"{old}.self_attn.out_proj")
        draft.with_bias(f"{new}.mlp.c_fc", f"{old}.fc1")
        draft.with_bias(f"{new}.mlp.c_proj", f"{old}.fc2")
    _embeddings(draft, parts)
    _positions(draft, f"{parts.base}.embed_positions.weight", f"{parts.base}.embed_tokens.weight")


def _embeddings(draft: Draft, parts: Parts) -> None:
    """Embeddings take their scale; a head that is tied to them gives it back through the last norm."""
    scale, tied = parts.scale, draft.config.tie_word_embeddings
    norm, table, head = f"{parts.base}.{parts.last_norm}", f"{parts.base}.embed_tokens", f"{parts.head}.weight"
    if scale == 1:
        _norm(draft, parts, norm, "transformer.ln_f")
        draft.keep("transformer.wte", table)
        draft.head("lm_head", parts.head)
        return
    _times(draft, f"{table}.weight", "transformer.wte.weight", scale)
    for name in names(norm):
        _times(draft, name, name.replace(norm, "transformer.ln_f"), 1 / scale if tied else 1.0)
    if head in draft.disk or not tied:
        _times(draft, head, "lm_head.weight", scale if tied else 1.0)


def _times(draft: Draft, old: str, new: str, factor: float) -> None:
    if factor == 1:
        draft.renames[new] = draft.stored(old)
    else:
        draft.make(f"times {factor:.4g}", (old,), (new,), lambda tensors: {new: tensors[old] * factor})


def _positions(draft: Draft, table: str, embeddings: str) -> None:
    """The position table without the rows that are never read; a computed one is written down."""
    count, target = draft.config.max_position_embeddings, "transformer.wpe.weight"
    if draft.has(table):
        draft.make("without two rows", (table,), (target,), lambda tensors: {target: tensors[table][OFFSET:]})
        return
    padding = draft.config.pad_token_id

    def make(tensors: Named) -> Named:
        like = tensors[embeddings]
        return {target: sinusoids(count + OFFSET, like.shape[1], padding)[OFFSET:].to(like)}

    draft.make("computed positions written down", (embeddings,), (target,), make)


def sinusoids(count: int, width: int, padding: int | None) -> "Tensor":
    """[count, width] positions of XGLM: sines beside cosines, frequencies from 1 to 1/10000, in float32 as its class does."""
    import torch

    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(count).float()[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos(), torch.zeros(count, width % 2)], 1)
    if padding is not None:
        table[padding] = 0
    return table


def _norm(draft: Draft, parts: Parts, old: str, new: str) -> None:
    """A norm as it is; scale one and shift zero where the family can do without (`layer_norm_elementwise_affine`)."""
    if draft.has(f"{old}.weight"):
        draft.keep(new, old)
        return
    like, (weight, bias), width = f"{parts.base}.embed_tokens.weight", names(new), draft.config.hidden_size

    def make(tensors: Named) -> Named:
        return {weight: tensors[like].new_ones(width), bias: tensors[like].new_zeros(width)}

    draft.make("scale 1, shift 0", (like,), (weight, bias), make)


def _joined_heads(draft: Draft, old: str, new: str, heads: int) -> None:
    """q, k and v in turn for each head; zeros where there is no bias."""
    written = names(new)

    def make(tensors: Named) -> Named:
        weights = [tensors[f"{old}.{part}_proj.weight"] for part in "qkv"]
        biases = [
            tensors.get(f"{old}.{part}_proj.bias", zero_bias(weight)) for part, weight in zip("qkv", weights, strict=True)
        ]
        return {written[0]: join_heads(heads, *weights), written[1]: join_heads(heads, *biases)}

    reads = tuple(name for part in "qkv" for name in names(f"{old}.{part}_proj"))
    draft.make("q, k, v in turn for each head", reads, written, make)


def _transposed_heads(draft: Draft, module: str, heads: int, divisor: int) -> None:
    """GPT-2's [q | k | v], [in, out], in turn for each head; the queries divided by what its scores would be divided by."""
    weight, bias = names(module)

    def make(tensors: Named) -> Named:
        parts = [tensor.chunk(3) for tensor in (tensors[weight].T, tensors[bias])]
        joined = [join_heads(heads, q / divisor if divisor > 1 else q, k, v) for q, k, v in parts]
        return dict(zip((weight, bias), joined, strict=True))

    draft.make("transposed, q, k, v in turn for each head", (weight, bias), (weight, bias), make)


def _transpose(draft: Draft, module: str) -> None:
    weight = f"{module}.weight"
    draft.make("transposed", (weight,), (weight,), lambda tensors: {weight: tensors[weight].T})

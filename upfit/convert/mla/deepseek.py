"""Our latent attention (`upfit_mla`) rewritten as a stock dense `DeepseekV3ForCausalLM`, where that class can hold it.

The same function to rounding: `deepseek_tensors.py` has the attention and how its norm is made to do nothing, this file what is
around it. transformers builds that norm with ε = 1e-6, other engines with the config's ε; so the config says 1e-6, and a model
with another ε gets its residual stream multiplied by κ = sqrt(1e-6 / ε), which every RMSNorm takes back:

    κx / sqrt(κ² mean(x²) + κ² ε) = x / sqrt(mean(x²) + ε)

Embeddings, output projections and the MLPs' last matrices are multiplied by κ; the head, behind the last norm, is not.

Pair i of F in the stock class turns by θ'^(−i/F) a position. The F fastest of a family's P pairs turn by θ^(−i/P), so
θ' = θ^(F/P) says them exactly. It is written as yarn with factor 1, which turns by the same angles: DeepSeek's own form, which
vLLM's CPU kernels turn right as well (plain RoPE they do not, in 0.32).
"""

import math
from typing import TYPE_CHECKING, Any

from upfit.architecture.latent_scale import EPS, FLOAT16, LATENT_ERROR, NORM, latent_scale, mean_square_bound
from upfit.architecture.retarget.draft import Draft, Named, common_keys
from upfit.convert.mla.deepseek_families import FAMILIES, read_family, rotation, stock_family, why_not_family
from upfit.convert.mla.deepseek_tensors import LATENT, OUTPUT, LatentShape, rounded_power, to_stock
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE, CLASS = "deepseek_v3", "DeepseekV3ForCausalLM"
ZERO = None  # in place of a column: a rotated key of zeros, whatever its angle (`pad.py`); our own class cannot load it
SAME = 1e-6  # relative difference of two frequencies that are one, computed in float32
FIXED = ("default", "llama3", "linear", "yarn")  # rope types whose angles do not depend on the length of the text
# No layer has experts; the class wants numbers, and llama.cpp more experts than groups of them.
NO_EXPERTS = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}


def why_not(config: dict[str, Any]) -> str | None:
    """Why the stock class cannot hold a model with this `config.json` of our class, in one sentence; None where it can.

    Raises UpfitError for a config that the family's class refuses.
    """
    parsed = read_family(config)
    reason = why_not_family(config, parsed) or _why_not_latent(config, parsed) or _why_not_rotation(config, parsed)
    half = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.") == "float16"
    return reason or (FLOAT16 if half else None)


def _why_not_latent(config: dict[str, Any], parsed: Any) -> str | None:
    mla = config["mla"]
    layers = mla["layers"]
    if mla["bias"]:
        return "the stock class has no biases of queries, keys and latents (engines drop them)"
    if len(layers) != parsed.num_hidden_layers:
        count = f"{len(layers)} of {parsed.num_hidden_layers}"
        return f"the stock class has latent attention in every layer, and this model in {count}"
    if any(layer != layers[0] for layer in layers):
        return "the stock class has one latent width and the same rotated keys in every layer, and these layers differ"
    if not layers[0]["columns"]:
        return "the stock class rotates a part of its keys, and this model none"
    return None


def _why_not_rotation(config: dict[str, Any], parsed: Any) -> str | None:
    kind = parsed.rope_parameters["rope_type"]
    if kind not in FIXED:
        return f"the stock class cannot turn keys as this model's rope type {kind} does"
    angles, _ = rotation(config, parsed)
    columns = config["mla"]["layers"][0]["columns"]
    chosen = [angles[column] for column in columns if column is not ZERO]
    if len(set(chosen)) < len(chosen):
        return "the stock class has one rotated key on a pair, and this model several"
    if chosen != sorted(set(angles), reverse=True)[: len(chosen)]:
        return f"the stock class rotates the fastest pairs alone, and this model chose others for its {len(chosen)} keys"
    base = rope_theta(config, parsed)
    powers = (base ** (-index / len(columns)) for index in range(len(chosen)))
    if not all(math.isclose(angle, power, rel_tol=SAME) for angle, power in zip(chosen, powers, strict=True)):
        return f"the stock class turns by 1, b, b² ... a position, and this model's {len(chosen)} keys by other angles ({kind})"
    return None


def rope_theta(config: dict[str, Any], parsed: Any) -> float:
    """θ' = θ^(F/P): the base of which F pairs turn as the F fastest of the family's P do. Keys of zeros count among the F."""
    pairs, columns = len(config["mla"]["layers"][0]["columns"]), len(rotation(config, parsed)[0])
    theta: float = parsed.rope_parameters["rope_theta"]
    return theta if 2 * pairs == columns else theta ** (2 * pairs / columns)


def stream(parsed: Any) -> float:
    """κ, by which the residual stream is multiplied."""
    return rounded_power(math.sqrt(EPS / parsed.rms_norm_eps))


def latent_shape(config: dict[str, Any]) -> LatentShape:
    """The layers' shape, and the factors between our class and the stock one."""
    parsed, mla = read_family(config), config["mla"]
    first = mla["layers"][0]
    return LatentShape(
        *(mla["heads"], mla["kv_heads"], first["unrotated"], len(first["columns"]), first["latent"], mla["v_head_dim"]),
        scaling=mla["scaling"],
        magnitude=rotation(config, parsed)[1],
        branch=rounded_power(stream(parsed) * FAMILIES[config["base_model_type"]].branch(parsed)),
    )


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """The whole `config.json` of the stock class, for one of ours. Raises UpfitError where it cannot hold the model."""
    reason = why_not(config)
    if reason is not None:
        raise UpfitError(f"this model cannot be a {CLASS}: {reason}; it stays an upfit_mla model")
    parsed, shape = read_family(config), latent_shape(config)
    return common_keys(stock_family(config), parsed, MODEL_TYPE, CLASS) | {
        "hidden_size": parsed.hidden_size,
        "intermediate_size": parsed.intermediate_size,
        "moe_intermediate_size": parsed.intermediate_size,
        "num_hidden_layers": parsed.num_hidden_layers,
        "first_k_dense_replace": parsed.num_hidden_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "q_lora_rank": None,
        "kv_lora_rank": shape.latent,
        "qk_nope_head_dim": shape.unrotated,
        "qk_rope_head_dim": 2 * shape.pairs,
        "v_head_dim": shape.v_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "max_position_embeddings": parsed.max_position_embeddings,
        "initializer_range": getattr(parsed, "initializer_range", 0.02),
        "attention_dropout": getattr(parsed, "attention_dropout", 0.0),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        **NO_EXPERTS,
        **_rope(rope_theta(config, parsed), parsed.max_position_embeddings),
    }


def _rope(theta: float, positions: int) -> dict[str, Any]:
    """The rotation as transformers 5 reads it, and beside it as its predecessors and other tools do."""
    scaling = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": positions}
    scaling |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    return {
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": theta, **scaling},
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def to_deepseek(draft: Draft, error: float = LATENT_ERROR) -> dict[str, Any]:
    """The stock `config.json`; the draft of an `upfit_mla` checkpoint gets the tensors.

    `error` bounds, for any text, the relative error that the norm's constant makes in a latent. Raises UpfitError where the
    stock class cannot hold the model.
    """
    settings, shape, parsed = stock_config(draft.raw), latent_shape(draft.raw), read_family(draft.raw)
    for index in range(parsed.num_hidden_layers):
        layer = f"model.layers.{index}"
        draft.keep(f"{layer}.input_layernorm", f"{layer}.input_layernorm")
        draft.keep(f"{layer}.post_attention_layernorm", f"{layer}.post_attention_layernorm")
        _attention(draft, layer, shape, error)
        _mlp(draft, f"{layer}.mlp", shape.branch)
    draft.keep("model.norm", "model.norm")
    family = FAMILIES[draft.raw["base_model_type"]]
    _ends(draft, stream(parsed) * family.embedding(parsed), family.logits(parsed))
    return settings


def _attention(draft: Draft, layer: str, shape: LatentShape, error: float) -> None:
    """Scaled by what the layer's own weights bound the latent with: no text is needed, and no text can exceed it."""
    module, norm = f"{layer}.self_attn", f"{layer}.input_layernorm.weight"
    stored = {part: f"{module}.{part}" for part in ("q_proj.weight", LATENT, "kv_b_proj.weight")}
    stored[OUTPUT] = f"{module}.{draft.raw['mla']['output']}.weight"
    writes = tuple(f"{module}.{part}" for part in (*stored, NORM))

    def make(tensors: Named) -> Named:
        parts = {part: tensors[name] for part, name in stored.items()}
        latent = parts[LATENT][: shape.latent]
        scale = 1.0 if latent.is_meta else latent_scale(mean_square_bound(latent, tensors[norm]), error)
        return {f"{module}.{part}": tensor for part, tensor in to_stock(parts, shape, scale).items()}

    draft.make("latent scaled below its norm", (*stored.values(), norm), writes, make)


def _mlp(draft: Draft, module: str, branch: float) -> None:
    """Gate and up apart, down times `branch`."""
    gate, up, fused = (f"{module}.{name}_proj" for name in ("gate", "up", "gate_up"))
    if draft.has(f"{fused}.weight"):

        def split(tensors: Named) -> Named:
            first, second = tensors[f"{fused}.weight"].chunk(2)
            return {f"{gate}.weight": first, f"{up}.weight": second}

        draft.make("gate and up apart", (f"{fused}.weight",), (f"{gate}.weight", f"{up}.weight"), split)
    else:
        draft.keep(gate, gate)
        draft.keep(up, up)
    _scaled(draft, f"{module}.down_proj", branch)


def _scaled(draft: Draft, module: str, factor: float) -> None:
    weight = f"{module}.weight"
    if factor == 1:
        draft.keep(module, module)
    else:
        draft.make(f"times {factor:.6g}", (weight,), (weight,), lambda tensors: {weight: tensors[weight] * factor})


def _ends(draft: Draft, embedding: float, logits: float) -> None:
    """Embeddings and head, which the stock class does not tie: a tied head is written beside the embeddings."""
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if not draft.config.tie_word_embeddings:
        _scaled(draft, "model.embed_tokens", rounded_power(embedding))
        _scaled(draft, "lm_head", rounded_power(logits))
        return
    factors = {table: rounded_power(embedding), head: rounded_power(logits)}

    def make(tensors: Named) -> "dict[str, Tensor]":
        return {name: tensors[table] * factor for name, factor in factors.items()}

    draft.make("embeddings, and a head of their own", (table,), (table, head), make)

"""Which stock families the dense DeepSeek-V3 class can hold, apart from their attention, and with which factors.

Its layer is Llama's: x + attention(norm(x)), then x + MLP(norm(x)), RMSNorms that only scale, a gated MLP with SiLU, no biases.
A family belongs here when its code does the same up to constant factors, which weights can take.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upfit.architecture.meta_model import model_class_for, read_as_class
from upfit.architecture.names import name_map


def one(config: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Family:
    """Constant factors in a family's code, from its config: of the embeddings, of what each branch adds, of the logits."""

    embedding: Callable[[Any], float] = one
    branch: Callable[[Any], float] = one
    logits: Callable[[Any], float] = one


LIKE_LLAMA = (
    *("cwm", "ernie4_5", "exaone", "glm", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "mistral"),
    *("ministral", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
)
FAMILIES: dict[str, Family] = dict.fromkeys(LIKE_LLAMA, Family()) | {
    "granite": Family(
        embedding=lambda config: config.embedding_multiplier,
        branch=lambda config: config.residual_multiplier,
        logits=lambda config: 1 / config.logits_scaling,
    ),
    "hyperclovax": Family(
        embedding=lambda config: config.embedding_multiplier,
        branch=lambda config: config.residual_multiplier,
        logits=lambda config: config.logits_scaling,
    ),
}
OURS = ("architectures", "auto_map", "base_model_type", "mla")  # keys that only our class's config.json has
HELD = re.compile(  # parameters that the stock class has a place for
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm|mlp\.(gate|up|down|gate_up)_proj)\.weight"
)


def stock_family(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of the family that a config of our class is built on."""
    return {key: value for key, value in config.items() if key not in OURS} | {"model_type": config["base_model_type"]}


def read_family(config: dict[str, Any]) -> Any:
    """The same as its class reads it. Raises UpfitError for a config that the class refuses."""
    return read_as_class(stock_family(config))


def why_not_family(config: dict[str, Any], parsed: Any) -> str | None:
    """Why the stock class cannot hold what is not attention in this model; None where it can. `parsed` is `read_family`'s."""
    model_type = config["base_model_type"]
    caps = [key for key in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(parsed, key, None)]
    if caps:
        return f"the stock class has no soft caps of scores or logits ({caps[0]})"
    if any(getattr(parsed, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "experts are not written as those of the stock class, whose router is another"
    activation = str(getattr(parsed, "hidden_act", None) or getattr(parsed, "hidden_activation", None))
    if activation not in ("silu", "swish"):
        return f"engines run the stock class with SiLU in its MLP, and this model has {activation}"
    if model_type not in FAMILIES:
        return f"the layers of {model_type} are not those of the stock class (norms, MLP or what is added to what)"
    return _why_not_window(parsed) or _why_not_parameters(config)


def _why_not_window(parsed: Any) -> str | None:
    """A window is none where every position that the model has lies in it."""
    window = getattr(parsed, "sliding_window", None)
    kinds = set(getattr(parsed, "layer_types", None) or ())
    slides = "sliding_attention" in kinds if kinds else bool(window)
    if slides and window is not None and window < parsed.max_position_embeddings:
        return f"the stock class attends to every token, and layers of this model to the last {window}"
    return None


def _why_not_parameters(config: dict[str, Any]) -> str | None:
    """Biases and norms that settings of a family add. Attention's own are another's question, but for its output's."""
    mla, names = config["mla"], name_map(stock_family(config)).shapes
    gone = tuple(f".self_attn.{name}." for name in mla["dropped"])
    output = f".self_attn.{mla['output']}.weight"
    left = [n for n in names if not HELD.fullmatch(n) and not n.endswith(output) and not any(part in n for part in gone)]
    return f"the stock class has no {left[0].split('.', 3)[-1]}" if left else None


def rotation(config: dict[str, Any], parsed: Any) -> tuple[list[float], float]:
    """Angle a position turns for each column of the family's cosines and sines [rotary], in radians, and their magnitude.

    Angles are measured at position 1, where none has come round yet, in float32.
    """
    import torch

    stock = stock_family(config)
    name = name_map(stock).classes["model.rotary_emb"]
    rotary = getattr(sys.modules[model_class_for(stock).__module__], name)(parsed)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.long))
    return torch.atan2(sin.double(), cos.double()).flatten().tolist(), float(rotary.attention_scaling)

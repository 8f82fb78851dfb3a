"""Latent attention (MLA) on any stock decoder of transformers: one cached vector a token for the keys and values of all heads.

This file ships inside converted folders (`auto_map`), so it imports torch, transformers and its neighbours only. The model is
that of the stock family which `config.json` names (see `upfit_base.py`); `mla` in it holds the settings:

    classes, output, dropped          attention classes that are changed; their output projection; their modules that go away
    heads, kv_heads, v_head_dim       of the source, and of the keys and values that the latent is expanded to
    scaling, bias                     scores are query · key times this; whether the two projections of the input have biases
    layers                            one for each changed attention, in the model's order: `latent` r, `unrotated` N, and
                                      `columns`, where in the family's cosines each rotated slot has its angle (none: no turn)

    c = D x,  k_R = turn(W_R x)                                  cached: 2S + r numbers a token and layer
    score_h = (q_h,N · U_K,j c + turn(q_h,R) · k_R) · scaling    value_j = U_V,j c;  head h reads j = h // (H / K)

The latent has no norm, so that U_K can be multiplied into one query instead of all keys ("absorbed"): a single query attends to
what is cached as it is. Several queries attend to keys and values that are expanded from it.

Legend: B rows, T tokens, L tokens with those of the cache, E width of the input, H query heads, K key/value heads of the
source, N unrotated width of a query, S rotated slots (pairs of dimensions), r latent width, V width of a value.
Paper: DeepSeek-V2, arXiv 2405.04434, section 2.1 (here without its norm of the latent, and with any number of slots a pair).
"""

import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .upfit_base import Own, OwnConfig, OwnModel, Plain, cache_among, put_in_front

MODEL_TYPE = "upfit_mla"
PARAMETERS = {"sinks"}  # of a stock attention itself, which are understood here
# What families call the share of attention weights, and of outputs, that is dropped in training: a number or a module.
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout")
RESIDUAL_DROPOUTS = ("resid_dropout", "residual_dropout")


def turn(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs [B, heads, T, 2S] (all firsts, all seconds) turned by the angles of `cos` and `sin` [B or 1, T, S]."""
    cos, sin = cos[:, None].to(pairs.dtype), sin[:, None].to(pairs.dtype)
    first, second = pairs.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class OneHead(Plain):
    """A latent attention as an attention function sees it to which the cache itself is handed, as one key/value head."""

    def __init__(self, module: Any, groups: int) -> None:
        super().__init__(module)
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Latent(Own):
    """Queries, a latent and shared rotated keys in place of the stock projections; the output projection is the stock one."""

    upfit_cached = ("kv_a_proj_with_mqa.weight",)
    q_proj: nn.Linear  # [H (N + 2S), E]
    kv_a_proj_with_mqa: nn.Linear  # [r + 2S, E]
    kv_b_proj: nn.Linear  # [K (N + V), r]
    config: Any
    layer_idx: int
    training: bool
    arguments: tuple[str, ...]  # of the stock forward
    mla: dict[str, Any]  # settings of this model
    latent: int
    unrotated: int
    columns: list[int]
    dropouts: tuple[float, float]  # of attention weights, of outputs
    _index: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, E] → [B, T, E], and the attention weights [B, H, T, L] where the attention function has them."""
        cache = cache_among(args, kwargs)
        named = dict(zip(self.arguments[1:], args, strict=False)) | kwargs
        options = {name: value for name, value in named.items() if name not in self.arguments}
        query, latent, rotated = self.project(hidden_states, named.get("position_embeddings"))
        if cache is not None:
            latent, rotated = cache.update(latent, rotated, self.layer_idx)
        attended = self.absorbed if cache is not None and self.can_absorb(query) else self.expanded
        heads, weights = attended(query, latent, rotated, named.get("attention_mask"), options | self.options())
        output = getattr(self, self.mla["output"])(heads.reshape(*hidden_states.shape[:-1], -1))
        return F.dropout(output, self.dropouts[1], self.training), weights

    def project(self, hidden: Tensor, positions: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, E] → queries [B, H, T, N + 2S], latents [B, 1, T, r], rotated keys [B, 1, T, 2S].

        positions: the family's cosines and sines, each [B or 1, T, columns]; not read where nothing is rotated. Raises
        ValueError where something is and they are anything else.
        """
        slots = 2 * len(self.columns)
        query = self.q_proj(hidden).unflatten(-1, (self.mla["heads"], -1)).transpose(1, 2)
        latent, key = self.kv_a_proj_with_mqa(hidden)[:, None].split([self.latent, slots], -1)
        if slots:
            if not isinstance(positions, tuple) or positions[0].ndim != 3:
                raise ValueError(
                    "rotated slots need the family's cosines and sines, each [rows, tokens, columns], and this family hands "
                    f"its attention {'none' if positions is None else 'others'}; its `columns` in config.json must be empty"
                )
            cos, sin = (part[..., self.index_on(part.device)] for part in positions)
            plain, pairs = query.split([self.unrotated, slots], -1)
            query, key = torch.cat([plain, turn(pairs, cos, sin)], -1), turn(key, cos, sin)
        return query, latent, key

    def index_on(self, device: torch.device) -> Tensor:
        """The columns [S]. No buffer: transformers leaves those that are not in a file empty."""
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.columns, device=device)
        return self._index

    def can_absorb(self, query: Tensor) -> bool:
        """Whether these queries attend to the latents as they are: one a row, where U is a plain matrix (no adapter, not
        quantised, not on another device until it is called) and the attention function takes heads as wide as a latent."""
        name, weight = self.config._attn_implementation, self.kv_b_proj.weight
        plain = type(self.kv_b_proj) is nn.Linear and type(weight) is nn.Parameter and weight.device == query.device
        return query.shape[2] == 1 and plain and "flash" not in name and "flex" not in name

    def expanded(
        self, query: Tensor, latent: Tensor, rotated: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, T, N + 2S], latent [B, 1, L, r], rotated [B, 1, L, 2S] → [B, T, H, V] and the weights, by keys and
        values of all K heads."""
        kv_heads, width = self.mla["kv_heads"], self.mla["v_head_dim"]
        both = self.kv_b_proj(latent[:, 0]).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        key, value = both.split([self.unrotated, width], -1)
        key = torch.cat([key, rotated.expand(-1, kv_heads, -1, -1)], -1)
        if "flash" in self.config._attn_implementation:  # which takes one width alone
            wide = max(key.shape[-1], width)
            query, key, value = (F.pad(part, (0, wide - part.shape[-1])) for part in (query, key, value))
        output, weights = self.function()(self, query, key, value, mask, **options)
        return output[..., :width], weights

    def absorbed(
        self, query: Tensor, latent: Tensor, rotated: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The same for T = 1, on the latents themselves: q_N · (U_K c) = (U_Kᵀ q_N) · c, and Σ p U_V c = U_V Σ p c."""
        kv_heads, heads = self.mla["kv_heads"], self.mla["heads"]
        up = self.kv_b_proj.weight.unflatten(0, (kv_heads, -1))  # [K, N + V, r]
        up_key, up_value = up.split([self.unrotated, self.mla["v_head_dim"]], 1)
        plain, pairs = query.split([self.unrotated, rotated.shape[-1]], -1)
        grouped = plain[:, :, 0].unflatten(1, (kv_heads, -1)) @ up_key  # [B, K, H / K, r]
        query, key = torch.cat([grouped.flatten(1, 2)[:, :, None], pairs], -1), torch.cat([latent, rotated], -1)
        if self.config._attn_implementation == "sdpa":  # heads of one key as its queries: older sdpa copies the key for each
            query, heads, options = query.transpose(1, 2), 1, options | {"is_causal": False}
        output, weights = self.function()(OneHead(self, heads), query, key, latent, mask, **options)
        sums = output.reshape(len(query), kv_heads, -1, self.latent)
        return (sums @ up_value.transpose(1, 2)).flatten(1, 2)[:, None], weights

    def function(self) -> Any:
        """The attention function that the user chose for the model (eager, sdpa, ...)."""
        eager = sys.modules[self.stock_module].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)

    def options(self) -> dict[str, Any]:
        """What families hand to their attention functions besides tensors of the tokens: sliding windows as the masks have
        them, soft caps, sinks."""
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        optional = {
            "sliding_window": window if getattr(self, "is_sliding", True) else None,
            "softcap": getattr(self, "attn_logit_softcapping", None),
            "s_aux": getattr(self, "sinks", None),
        }
        dropout = self.dropouts[0] if self.training else 0.0
        present = {name: value for name, value in optional.items() if value is not None}
        return {"scaling": self.mla["scaling"], "dropout": dropout} | present


def swap(model: nn.Module, config: Any) -> None:
    """Give every attention of `config.mla["classes"]` in `model` a latent, in place. Raises ValueError where they are not as
    many as the settings have layers, or hold what is not understood here.

    Parameters are added under the attention module, with their biases where the settings say so: `q_proj.weight`
    [H (N + 2S), E], by head N rows, S firsts, S seconds; `kv_a_proj_with_mqa.weight` [r + 2S, E]; and `kv_b_proj.weight`
    [K (N + V), r], by key/value head N rows of its key, V of its value.
    """
    settings = config.mla
    changed: list[Any] = [module for module in model.modules() if type(module).__name__ in settings["classes"]]
    if len(changed) != len(settings["layers"]):
        raise ValueError(
            f"mla in config.json describes {len(settings['layers'])} attentions, the model has {len(changed)} of the classes "
            f"{', '.join(settings['classes'])}; take the config.json that the weights were saved with"
        )
    for attention, layer in zip(changed, settings["layers"], strict=True):
        _drop(attention, settings)
        attention.arguments = tuple(inspect.signature(attention.forward).parameters)
        put_in_front(attention, _Latent, None)
        _grow(attention, settings, layer)


def _drop(attention: Any, settings: dict[str, Any]) -> None:
    """Remove the modules that `dropped` names, and see to it that nothing is left which this attention would not compute."""
    for name in settings["dropped"]:
        if name in attention._modules:  # not every layer has every one
            delattr(attention, name)
    output, kind = settings["output"], type(attention)
    known = {output, *DROPOUTS, *RESIDUAL_DROPOUTS}
    rest = [name for name, _ in attention.named_children() if name not in known]
    rest += [name for name, _ in attention.named_parameters(recurse=False) if name not in PARAMETERS]
    if rest:
        raise ValueError(
            f"{kind.__name__} does more than latent attention can do: it has {', '.join(rest)}, which is not dropped"
        )
    if output not in attention._modules:
        raise ValueError(f"{kind.__name__} has no output projection {output!r}; mla in config.json is not of this family")
    if not hasattr(sys.modules[kind.__module__], "eager_attention_forward"):
        raise ValueError(f"{kind.__name__} does not call transformers' attention interface, which latent attention needs")


def _grow(attention: Any, settings: dict[str, Any], layer: dict[str, Any]) -> None:
    output = attention.get_submodule(settings["output"])
    like = {"dtype": output.weight.dtype, "device": output.weight.device}
    width = output.nf if isinstance(output, Conv1D) else output.out_features
    heads, kv_heads, slots = settings["heads"], settings["kv_heads"], 2 * len(layer["columns"])
    attention.mla, attention.num_key_value_groups = settings, heads // kv_heads
    attention.latent, attention.unrotated, attention.columns = layer["latent"], layer["unrotated"], layer["columns"]
    attention.dropouts = (_share(attention, DROPOUTS), _share(attention, RESIDUAL_DROPOUTS))
    attention.q_proj = nn.Linear(width, heads * (layer["unrotated"] + slots), settings["bias"], **like)
    attention.kv_a_proj_with_mqa = nn.Linear(width, layer["latent"] + slots, settings["bias"], **like)
    rows = kv_heads * (layer["unrotated"] + settings["v_head_dim"])
    attention.kv_b_proj = nn.Linear(layer["latent"], rows, bias=False, **like)


def _share(attention: Any, names: tuple[str, ...]) -> float:
    """The first of these attributes that the attention has, as a number; 0 where it has none."""
    present = [getattr(attention, name) for name in names if hasattr(attention, name)]
    return float(getattr(present[0], "p", present[0])) if present else 0.0


class UpfitMlaConfig(OwnConfig):
    model_type = MODEL_TYPE


class UpfitMlaForCausalLM(OwnModel):
    auto, config_class, swap = AutoModelForCausalLM, UpfitMlaConfig, staticmethod(swap)


class UpfitMlaModel(OwnModel):
    auto, config_class, swap = AutoModel, UpfitMlaConfig, staticmethod(swap)


CONFIG = UpfitMlaConfig
MODELS: dict[Any, Any] = {AutoModelForCausalLM: UpfitMlaForCausalLM, AutoModel: UpfitMlaModel}
UpfitMlaConfig.models = MODELS

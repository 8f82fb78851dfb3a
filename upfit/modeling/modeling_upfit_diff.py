"""Differential attention on any stock decoder of transformers: the stock class, with what its attention returns combined.

This file ships inside converted folders (`auto_map`), so it imports torch, transformers and its neighbours only. The model is
that of the stock family which `config.json` names (see `upfit_base.py`); its attention modules, those of the classes in
`diff_attention_classes`, call the attention interface once, as before, and combine the heads that come back:

    v2     2H query heads; head 2i − λ · head 2i+1; λ = sigmoid(lambda_proj(x)), or one a head
    split  H query heads, each used twice through two scales a dimension; as v2 from there on
    dex    head − λ · head · W for chosen heads

Legend: B rows, T tokens, H heads of the output, K key/value heads, D head width of queries and keys, V of values.
Papers: Ye et al., Differential Transformer, arXiv 2410.05258 (and its V2, 2026); Kong et al., arXiv 2505.16333 (DEX).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .upfit_base import Own, OwnConfig, OwnModel, Plain, put_in_front, stock_attention

INTERFACE = "upfit_diff"
DEX_LAMBDA = 0.1  # not 0: with the weight at 0, a λ of 0 would be a point that no gradient leaves


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention interface that differential modules call: one call of the stock one, and the combination of its heads.

    query [B, heads, T, D], key [B, K, S, D], value [B, K, S, V] → [B, T, H, V] and, where maps are kept, what the values are
    multiplied with [B, H, T, S].
    """
    if options.get("s_aux") is not None:
        options["s_aux"] = module.sinks_of(options["s_aux"])
    outputs, maps = stock_attention(module)(Plain(module), module.queries(query), key, value, attention_mask, **options)
    return module.combine(outputs), None if maps is None else module.combine_maps(maps)


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attend)


class _Differential(Own):
    """What every variant puts in front of a stock attention class."""

    def queries(self, query: Tensor) -> Tensor:
        return query

    def combine_maps(self, maps: Tensor, row: int | None = None) -> Tensor:
        return maps


class _Pairs(_Differential):
    """Heads 2i and 2i+1 become head 2i − λ · head 2i+1. λ is `lambda_proj` of the layer's input, or `lambda_logit` a head."""

    lambdas: Tensor | None = None
    lambda_mean: Tensor | None = None  # of the last batch in training
    lambda_proj: nn.Linear
    lambda_logit: Tensor
    upfit_added = ("lambda_proj.weight", "lambda_logit")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, T, E]; λ is [B, T, H], in the type of the model."""
        logits = self.lambda_proj(hidden_states) if hasattr(self, "lambda_proj") else self.lambda_logit
        self.lambdas = torch.sigmoid(logits.float()).to(hidden_states.dtype)
        if self.training:  # type: ignore[attr-defined]
            self.lambda_mean = self.lambdas.detach().float().mean()
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.lambdas = None

    def combine(self, outputs: Tensor) -> Tensor:
        """[B, T, 2H, V] → [B, T, H, V]."""
        assert self.lambdas is not None
        return outputs[..., 0::2, :] - self.lambdas[..., None].to(outputs.dtype) * outputs[..., 1::2, :]

    def combine_maps(self, maps: Tensor, row: int | None = None) -> Tensor:
        """[B, 2H, T, S] → [B, H, T, S]; with `row`, maps are of that query position alone (T = 1)."""
        assert self.lambdas is not None
        share = self.lambdas if row is None or self.lambdas.ndim == 1 else self.lambdas[:, row : row + 1]
        share = share.movedim(-1, -2) if share.ndim > 1 else share[:, None]  # [B, H, T] or [H, 1]
        return maps[:, 0::2] - share[..., None].to(maps.dtype) * maps[:, 1::2]

    def upfit_measures(self) -> dict[str, float]:
        """`lambda`: mean over heads and the last batch. `cosine`: of the two queries of a pair, mean over pairs."""
        measures = {} if self.lambda_mean is None else {"lambda": float(self.lambda_mean)}
        for name in self.upfit_paired:
            rows = self.get_submodule(name).weight.detach().float()  # type: ignore[attr-defined]
            first, second = rows.unflatten(0, (-1, 2, self.head_dim)).flatten(2).unbind(1)  # type: ignore[attr-defined]
            measures["cosine"] = float(torch.cosine_similarity(first, second).mean())
        return measures


class _Split(_Pairs):
    """Pairs whose two queries are one query, each dimension scaled for one of them (and 0 for the other)."""

    split_scale: Tensor

    def queries(self, query: Tensor) -> Tensor:
        """[B, H, T, D] → [B, 2H, T, D] by `split_scale` [H, 2, D]."""
        pairs = query[:, :, None] * self.split_scale[:, :, None].to(query.dtype)  # [B, H, 2, T, D]
        return pairs.flatten(1, 2)

    def sinks_of(self, sinks: Tensor) -> Tensor:
        return sinks.repeat_interleave(2, 0)


class _Dex(_Differential):
    """Heads of `dex_heads` become head − λ · head · W. λ goes from 0 by way of λ_init to a learned scalar.

    `progress` from 0 to 1 says how far; a training loop sets it, and a finished model is at 1.
    """

    lambda_init: float
    dex_weight: Tensor
    dex_lambda: Tensor
    dex_heads: Tensor
    upfit_added = ("dex_weight", "dex_lambda")

    def combine(self, outputs: Tensor) -> Tensor:
        """[B, T, H, V] → the same. λ = (1 − a) · a · λ_init + a · dex_lambda, with a = progress."""
        a = self.progress
        strength = (1 - a) * a * self.lambda_init + a * self.dex_lambda
        scales = (strength * self.dex_heads).to(outputs.dtype)  # [H]
        return outputs - scales[:, None] * (outputs @ self.dex_weight.to(outputs.dtype))

    def upfit_measures(self) -> dict[str, float]:
        """`lambda`: the learned one. `size`: largest singular value of what is subtracted, in units of the head."""
        return {"lambda": float(self.dex_lambda), "size": float(torch.linalg.matrix_norm(self.dex_weight.detach().float(), 2))}


VARIANTS: dict[str, type[_Differential]] = {"v2": _Pairs, "split": _Split, "dex": _Dex}


def lambda_init(layer: int) -> float:
    """0.8 − 0.6 · exp(−0.3 · layer), layers from 0 (arXiv 2410.05258, below equation 3)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def swap(model: nn.Module, config: Any) -> None:
    """Make every attention of `config.diff_attention_classes` in `model` a differential one, in place.

    Parameters are added under the attention module: `lambda_proj.weight` [H, E] or `lambda_logit` [H]; `dex_weight` [V, V]
    and `dex_lambda` []; buffers `split_scale` [H, 2, D] and `dex_heads` [H].
    """
    for attention in list(model.modules()):
        if type(attention).__name__ in config.diff_attention_classes and not isinstance(attention, Own):
            put_in_front(attention, VARIANTS[config.diff_variant], INTERFACE)
            _grow(attention, config, config.diff_modules)


def _grow(attention: Any, config: Any, names: dict[str, str]) -> None:
    query, output = attention.get_submodule(names["q"]), attention.get_submodule(names["o"])
    weight, width = output.weight, config.diff_value_width
    like = {"dtype": weight.dtype, "device": weight.device}
    heads = output.in_features // width
    if config.diff_variant == "dex":
        attention.lambda_init = lambda_init(attention.layer_idx)
        attention.dex_weight = nn.Parameter(torch.zeros(width, width, **like))
        attention.dex_lambda = nn.Parameter(torch.full((), DEX_LAMBDA, **like))
        attention.register_buffer("dex_heads", torch.ones(heads, **like))
        return
    if config.diff_variant == "v2":  # the stock class has been told 2H heads; the output projection takes H
        heads //= 2
        parent, _, name = names["o"].rpartition(".")
        narrow = nn.Linear(heads * width, output.out_features, output.bias is not None, **like)
        setattr(attention.get_submodule(parent), name, narrow)
        attention.upfit_paired = (names["q"],)
    else:
        attention.num_key_value_groups *= 2
        scale = torch.ones(heads, 2, query.out_features // heads, **like)
        attention.register_buffer("split_scale", scale)
    if config.diff_lambda == "token":
        attention.lambda_proj = nn.Linear(query.in_features, heads, bias=False, **like)
    else:
        attention.lambda_logit = nn.Parameter(torch.zeros(heads, **like))


class UpfitDiffConfig(OwnConfig):
    model_type = INTERFACE


class UpfitDiffForCausalLM(OwnModel):
    auto, config_class, swap = AutoModelForCausalLM, UpfitDiffConfig, staticmethod(swap)


class UpfitDiffModel(OwnModel):
    auto, config_class, swap = AutoModel, UpfitDiffConfig, staticmethod(swap)


CONFIG = UpfitDiffConfig
MODELS: dict[Any, Any] = {AutoModelForCausalLM: UpfitDiffForCausalLM, AutoModel: UpfitDiffModel}
UpfitDiffConfig.models = MODELS

"""Grouped-query attention for stock families whose classes give every query head a key/value head of its own.

This file ships inside converted folders (`auto_map`), so it imports torch, transformers and its neighbours only. The model is
that of the stock family which `config.json` names (see `upfit_base.py`); `gqa` in it holds the settings: how many key/value
heads there are now, what the modules are called, and which `code` the family's attention is written in:

    width   it takes the number of heads from the width of a projection: narrower key and value projections are all
    heads   it reshapes by the number of query heads: each query head gets a copy, and the cache keeps one of a group
    closed  as `heads`, and it does not call transformers' attention interface: what the cache gives back is copied too

`modules` are the key and the value projection, or the one that holds queries, keys and values `fused`: by "model", all
queries, all keys, all values; by "group", for each key/value head its queries, its key and its value.

Query head h reads key/value head h // (H / K). Legend: B rows, T queries, S keys, H query heads, K key/value heads, D head
width. Paper: Ainslie et al., arXiv 2305.13245; of encoder-decoders the decoder is changed, both its attentions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .upfit_base import Own, OwnConfig, OwnModel, Plain, in_front_of, put_in_front, stock_attention

INTERFACE = "upfit_gqa"


def copied(heads: Tensor, times: int) -> Tensor:
    """[B, K, S, D] → [B, K · times, S, D]: every head as often as it is shared."""
    return heads.repeat_interleave(times, 1)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention interface that grouped modules call: query [B, H, T, D], key and value [B, K or H, S, D] → [B, T, H, D].

    The eager functions of these families know no groups; every other implementation does.
    """
    plain: Any = Plain(module)
    plain.num_key_value_groups = query.shape[1] // key.shape[1]
    if module.config.real._attn_implementation == "eager":
        key, value = (copied(heads, plain.num_key_value_groups) for heads in (key, value))
        plain.num_key_value_groups = 1
    return stock_attention(module)(plain, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attend)


class Copies:
    """What goes in front of a projection to K key/value heads, so that it gives out H: each as often as it is shared."""

    kv_heads: int
    times: int  # H / K
    fused: str

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] → [..., H · D], or [..., 3 H · D] of a fused one."""
        return self.spread(super().forward(hidden))  # type: ignore[misc]

    def spread(self, projected: Tensor) -> Tensor:
        """[..., K · D] → [..., H · D]; of a fused one [..., (H + 2 K) · D] → [..., 3 H · D], as the family arranges them."""
        if self.fused == "group":
            q, k, v = projected.unflatten(-1, (self.kv_heads, self.times + 2, -1)).split([self.times, 1, 1], -2)
            return torch.stack([q, k.expand_as(q), v.expand_as(q)], -2).flatten(-4)
        if self.fused == "model":
            rows = projected.shape[-1] // (self.times + 2)
            q, k, v = projected.split([rows * self.times, rows, rows], -1)
            return torch.cat([q, self._copied(k), self._copied(v)], -1)
        return self._copied(projected)

    def _copied(self, heads: Tensor) -> Tensor:
        return heads.unflatten(-1, (self.kv_heads, -1)).repeat_interleave(self.times, -2).flatten(-2)


class Lean:
    """A cache as a stock attention sees it that has H key/value heads: only the first head of every group is kept.

    With `closed` it gives back H heads, else K. It passes for the real cache in `isinstance`, and for everything else.
    """

    def __init__(self, real: Cache, times: int, closed: bool) -> None:
        self.real, self.times, self.closed = real, times, closed

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.real)

    def __len__(self) -> int:
        return len(self.real)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if isinstance(value, Cache):  # the two caches of an encoder-decoder
            return Lean(value, self.times, self.closed)
        if name == "layers" and self.closed:  # the keys of a cross-attention are not always asked for by `update`
            return [LeanLayer(layer, self.times) for layer in value]
        return value

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """key and value [B, H, T, D], the new tokens' → those of all tokens [B, H or K, S, D]."""
        updated = self.real.update(key[:, :: self.times], value[:, :: self.times], *args, **kwargs)
        return tuple(copied(heads, self.times) for heads in updated) if self.closed else updated


class LeanLayer:
    """The keys and values of one layer of a cache, with copies."""

    def __init__(self, real: Any, times: int) -> None:
        self.real, self.times = real, times

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        return copied(value, self.times) if name in ("keys", "values") else value


class _Grouped(Own):
    """An attention whose own code does with fewer key/value heads."""

    copying = False


class _Copying(Own):
    """An attention that is given copies, and a cache that does not keep them."""

    copying = True
    times: int
    closed = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def lean(value: Any) -> Any:
            return Lean(value, self.times, self.closed) if isinstance(value, Cache) else value

        return super().forward(*map(lean, args), **{name: lean(value) for name, value in kwargs.items()})  # type: ignore[misc]


class _Closed(_Copying):
    closed = True


CODES: dict[str, tuple[type[Own], str | None]] = {
    "width": (_Grouped, INTERFACE),
    "heads": (_Copying, INTERFACE),
    "closed": (_Closed, None),
}


def swap(model: nn.Module, config: Any) -> None:
    """Give the attention modules of `model`, in place, `gqa["kv_heads"]` key/value heads: those below a module that is called
    `gqa["inside"]`, or all where that is empty."""
    settings, modules = config.gqa, dict(model.named_modules())
    for path, attention in modules.items():
        inside = settings["inside"] in path.split(".") or not settings["inside"]
        if inside and f"{path}.{settings['modules'][0]}" in modules:
            in_front, interface = CODES[settings["code"]]
            heads = getattr(attention, settings["heads"])
            put_in_front(attention, in_front, interface)
            attention.times = heads // settings["kv_heads"]
            for name in settings["modules"]:
                projection = attention.get_submodule(name)
                _narrow(projection, heads, settings["kv_heads"], settings["fused"])
                if attention.copying:
                    projection.__class__ = in_front_of(Copies, type(projection))
                    projection.kv_heads, projection.times, projection.fused = (
                        settings["kv_heads"],
                        attention.times,
                        settings["fused"],
                    )


def _narrow(projection: Any, heads: int, kv_heads: int, fused: str) -> None:
    """Leave a projection to `heads` key/value heads `kv_heads` of them; to its queries too, where it is fused."""
    axis = 1 if isinstance(projection, Conv1D) else 0
    before, after = (3 * heads, heads + 2 * kv_heads) if fused else (heads, kv_heads)
    rows = projection.weight.shape[axis] // before * after
    projection.weight = nn.Parameter(projection.weight.detach().narrow(axis, 0, rows).clone())
    if projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias.detach()[:rows].clone())
    setattr(projection, "nf" if axis else "out_features", rows)


class UpfitGqaConfig(OwnConfig):
    model_type = INTERFACE


class UpfitGqaForSeq2SeqLM(OwnModel):
    auto, config_class, swap = AutoModelForSeq2SeqLM, UpfitGqaConfig, staticmethod(swap)


class UpfitGqaForSpeechSeq2Seq(OwnModel):
    auto, config_class, swap = AutoModelForSpeechSeq2Seq, UpfitGqaConfig, staticmethod(swap)


class UpfitGqaForCausalLM(OwnModel):
    auto, config_class, swap = AutoModelForCausalLM, UpfitGqaConfig, staticmethod(swap)


class UpfitGqaModel(OwnModel):
    auto, config_class, swap = AutoModel, UpfitGqaConfig, staticmethod(swap)


CONFIG = UpfitGqaConfig
MODELS: dict[Any, Any] = {
    AutoModelForSeq2SeqLM: UpfitGqaForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq: UpfitGqaForSpeechSeq2Seq,
    AutoModelForCausalLM: UpfitGqaForCausalLM,
    AutoModel: UpfitGqaModel,
}
UpfitGqaConfig.models = MODELS

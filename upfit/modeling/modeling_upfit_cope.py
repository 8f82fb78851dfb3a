"""Contextual position encoding (CoPE, arXiv 2405.18719) on any stock decoder of transformers, beside its own positions.

Not Clipped RoPE, which has the same short name. This file ships inside converted folders (`auto_map`), so it imports torch,
transformers and its neighbours only. The model is that of the stock family which `config.json` names (see `upfit_base.py`);
`cope` in it holds the settings. In the layers listed there, gates between each query and key say how far a key is away, and
each distance adds a learned logit (see `cope_equations.py`). Queries and keys for both are those before any rotation.

Gates:
    content   sigmoid(scale_h · q · k + bias_h), with the attention's own queries and keys
    keys      the same with keys of their own, `cope_gate_keys`, kept in cache layers behind the stock ones
    constant  sigmoid(bias_h): distances in tokens, the control

Legend: B rows, T queries, S keys, H query heads, K key/value heads, D head width, P positions.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cope_attention import attend
from .cope_equations import Inputs, Sight, as_mask, last_query, whole
from .upfit_base import Own, OwnConfig, OwnModel, Plain, cache_among, put_in_front, stock_attention

INTERFACE = "upfit_cope"


def heads_of(tensor: Tensor, heads: int, heads_first: bool = False) -> Tensor:
    """[B, heads, T, D] of what a projection ([B, T, heads · D]) or a norm ([B, T, heads, D] or [B, heads, T, D]) gives out."""
    if heads_first:
        return tensor
    return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)


def is_heads_first(tensor: Tensor, heads: int) -> bool:
    """Whether a norm is given [B, heads, T, D]; where T is `heads` too, the strides of a view of a projection's output tell."""
    if tensor.ndim != 4 or tensor.shape[1] != heads:
        return False
    return tensor.shape[2] != heads or tensor.stride(1) < tensor.stride(2)


def rotate_back(stock_module: str, rotary: Any, kind: str | None, part: str, key: Tensor, positions: Tensor) -> Tensor:
    """Keys [B, K, S, D] without the rotation that the family gave them at `positions` [B or 1, S].

    `rotary` is the family's own module, `kind` the layer type that it is to be told, if any. `part`: its function takes the
    "whole" width, or only the "first" dimensions.
    """
    cos, sin = rotary(key, positions) if kind is None else rotary(key, positions, kind)
    length = cos * cos + sin * sin  # some families lengthen what they rotate
    width = key.shape[-1] if part == "whole" else cos.shape[-1]
    turned = sys.modules[stock_module].apply_rotary_pos_emb(key[..., :width], key[..., :width], cos / length, -sin / length)[1]
    return torch.cat([turned, key[..., width:]], -1) if width < key.shape[-1] else turned


class _Cope(Own):
    """Contextual positions on top of what the stock attention does."""

    upfit_added = ("cope_embeddings", "cope_gate_scale", "cope_gate_bias", "cope_gate_keys.weight")
    upfit_rates: ClassVar[dict[str, float]] = {"cope_embeddings": 10.0}  # at the others' rate they stay inert
    upfit_ablations: ClassVar[dict[str, tuple[str, ...]]] = {"cope": ("cope_embeddings",)}
    upfit_cached = ("cope_gate_keys.weight",)
    cope_embeddings: Tensor  # [P, D], or [H, P, D]
    cope_gate_bias: Tensor  # [H]
    cope_gate_scale: Tensor  # [H]
    cope: dict[str, Any]  # settings of this model
    rotation: tuple[Any, str | None, str] | None = None  # what rotate_back needs
    rope: Any = None  # the rotary module, where its rotation is on its way out
    watched: dict[str, Tensor]
    _inert: tuple[int, int, bool] = (0, -1, False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "progress" and self.rope is not None:
            self.rope.cope_rope_share.fill_(1.0 - value)
        super().__setattr__(name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, T, E]."""
        cache = cache_among(args, kwargs)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"contextual positions need a cache of transformers' class Cache, not a {type(cache).__name__}")
        self.seen_now: dict[str, Any] = {"positions": kwargs.get("position_ids"), "cache": cache}
        if hasattr(self, "cope_gate_keys"):
            if cache is not None:
                self._room_for_gate_keys(cache)
            self.seen_now["gate_keys"] = self.cope_gate_keys(hidden_states)
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.seen_now = {}

    def inert(self) -> bool:
        """Nothing was learned yet and nothing is being learned: attention is the stock one, bit for bit."""
        e = self.cope_embeddings
        if (torch.is_grad_enabled() and e.requires_grad) or torch.compiler.is_compiling():
            return False
        if self._inert[:2] != (e.data_ptr(), e._version):
            self._inert = (e.data_ptr(), e._version, not bool(e.any()))
        return self._inert[2]

    def inputs(self, inputs: Inputs, sight: Sight) -> Inputs:
        """`inputs` (queries, keys and values as the stock attention has them) with what gates and positions are made of."""
        q, cache = heads_of(*self.seen_now["q"]), self.seen_now["cache"]
        scale = inputs.scaling if self.cope["scale"] == "code" else 1.0
        wide = torch.promote_types(q.dtype, torch.float32)
        z = (q @ self.cope_embeddings.to(q.dtype).transpose(-1, -2)).to(wide) * scale
        inputs = replace(inputs, z=z, gate_bias=self.cope_gate_bias.to(wide))
        if self.cope["gates"] == "constant":
            return inputs
        gate_q = q * (self.cope_gate_scale.to(wide)[:, None, None] * inputs.scaling).to(q.dtype)
        gate_k: Any
        if self.cope["gates"] == "keys":
            gate_k = heads_of(self.seen_now["gate_keys"], inputs.k.shape[1])
            gate_k = gate_k if cache is None else self._with_cached(cache, gate_k)
        else:
            gate_k = heads_of(*self.seen_now["k"])
            if gate_k.shape[2] != inputs.k.shape[2]:
                gate_k = self._unrotated(inputs.k, sight)
        return replace(inputs, gate_q=gate_q, gate_k=gate_k)

    def _unrotated(self, key: Tensor, sight: Sight) -> Callable[[int, int], Tensor]:
        """Gate keys of cached keys [B, K, S, D]; made for a stretch of them when asked."""
        if self.rotation is None:
            return lambda start, stop: key[:, :, start:stop]
        rotary, kind, part = self.rotation
        if self.seen_now["positions"] is None:
            raise ValueError("content gates of cached keys need to know where the newest token stands: give position_ids")
        newest, last = self.seen_now["positions"][:, -1:], sight.last()

        def gate_keys(start: int, stop: int) -> Tensor:
            positions = newest - (last - torch.arange(start, stop, device=key.device))
            positions = positions.clamp_min(0)  # before the text begins: padding, which nothing looks at
            return rotate_back(self.stock_module, rotary, kind, part, key[:, :, start:stop], positions)

        return gate_keys

    def _room_for_gate_keys(self, cache: Any) -> None:
        """A cache layer for this layer's gate keys, behind those of the stock model, of the same kind as this layer's own."""
        from transformers.cache_utils import DynamicLayer

        place = self._place()
        while len(cache.layers) <= place:
            index = len(cache.layers) - (place - self.layer_idx)  # type: ignore[attr-defined]
            like: Any = cache.layers[index] if index >= 0 else None
            if not hasattr(like, "keys") or (like.is_initialized and index < self.layer_idx):  # type: ignore[attr-defined]
                like = DynamicLayer()  # a place only: of a layer that comes later, or has no contextual positions
            elif like.is_initialized:
                raise ValueError("this cache was filled by a model without gate keys; begin with an empty one")
            cache.layers.append(copy.deepcopy(like))

    def _place(self) -> int:
        """Where in a cache this layer's gate keys are."""
        return int(self.config.real.num_hidden_layers + self.layer_idx)  # type: ignore[attr-defined]

    def _with_cached(self, cache: Any, gate_k: Tensor) -> Tensor:
        return cache.layers[self._place()].update(gate_k, gate_k[..., :0])[0]

    def upfit_measures(self) -> dict[str, float]:
        """`span`: keys before the last position is reached. `saturated`: share of queries that reach it. `position_content`:
        standard deviation of position logits over that of content logits. All of the last queries of the last batch.
        `rope`: what is left of the rotation where that is dropped."""
        measures = {name: float(value) for name, value in getattr(self, "watched", {}).items()}
        return measures if self.rope is None else measures | {"rope": float(self.rope.cope_rope_share)}


def interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface that CoPE modules call: [B, T, H, V], and the weights where the model is `eager`."""
    chosen = module.config.real._attn_implementation
    if "flash" in chosen or "flex" in chosen:
        raise ValueError(f"CoPE has attention of its own; load the model with attn_implementation sdpa or eager, not {chosen}")
    scaling = module.scaling if scaling is None else scaling
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    extra: dict[str, Any] = {"softcap": softcap} if softcap is not None else {}
    extra |= {"s_aux": s_aux} if s_aux is not None else {}

    def stock(mask: Any) -> tuple[Tensor, Tensor | None]:
        attention = stock_attention(module)
        return attention(Plain(module), query, key, value, mask, dropout=dropout, scaling=scaling, **extra, **options)

    if module.inert():
        if module.cope["gates"] == "keys" and module.seen_now["cache"] is not None:  # kept for a later, learned, step
            module._with_cached(module.seen_now["cache"], heads_of(module.seen_now["gate_keys"], key.shape[1]))
        return stock(attention_mask)
    sight = Sight.of(attention_mask, query.shape[2], key.shape[2])
    none = query.new_zeros(0)
    inputs = module.inputs(Inputs(query, key, value, none, none, sinks=sinks, scaling=scaling, cap=softcap), sight)
    if module.training and query.shape[2] > 1:
        with torch.no_grad():
            module.watched = last_query(inputs, sight)
    if chosen not in ("eager", "sdpa"):  # one of somebody's own, such as those that watch attention
        return stock(as_mask(inputs, sight))
    if chosen == "eager" or dropout > 0:
        output, weights = whole(inputs, sight, dropout)
        return output, weights
    return attend(inputs, sight), None


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, interface)


def swap(model: nn.Module, config: Any) -> None:
    """Give the attention of every layer in `config.cope_layers` contextual positions, in place.

    Parameters are added under the attention module: `cope_embeddings` [P, D] or [H, P, D], `cope_gate_bias` [H],
    `cope_gate_scale` [H], and for gate keys `cope_gate_keys.weight` [K · D, E].
    """
    settings, modules = config.cope, dict(model.named_modules())

    def found(path: str) -> Any:
        """The module at this path of the whole model, of which `model` may be a part."""
        while path not in modules and "." in path:
            path = path.partition(".")[2]
        return modules[path]

    for path in settings["layers"]:
        attention = found(path)
        put_in_front(attention, _Cope, INTERFACE)
        if path in settings["rotations"]:
            rotary, kind, part = settings["rotations"][path]
            # Not a submodule of the attention: it is the model's, and is only called.
            object.__setattr__(attention, "rotation", (found(rotary), kind, part))
            if settings["drop_rope"]:
                object.__setattr__(attention, "rope", _fading(found(rotary), attention))
        _grow(attention, settings)


def _fading(rotary: Any, attention: Any) -> Any:
    """The rotary module with its positions multiplied by `cope_rope_share`: 1 as it was, 0 without any rotation."""
    if not hasattr(rotary, "cope_rope_share"):
        weight = next(attention.parameters())
        rotary.register_buffer("cope_rope_share", torch.ones((), dtype=torch.float32, device=weight.device))
        rotary.register_forward_pre_hook(_scale_positions, with_kwargs=True)
    return rotary


def _scale_positions(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    share = rotary.cope_rope_share
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": kwargs["position_ids"] * share}
    return (args[0], args[1] * share, *args[2:]), kwargs


def _grow(attention: Any, settings: dict[str, Any]) -> None:
    query, key = attention.get_submodule(settings["modules"]["q"]), attention.get_submodule(settings["modules"]["k"])
    like = {"dtype": query.weight.dtype, "device": query.weight.device}
    width = attention.head_dim
    heads = query.out_features // width
    shape: tuple[int, ...] = (settings["positions"], width)
    attention.cope = settings
    attention.cope_embeddings = nn.Parameter(
        torch.zeros(shape if settings["embeddings"] == "shared" else (heads, *shape), **like)
    )
    attention.cope_gate_bias = nn.Parameter(torch.zeros(heads, **like))
    if settings["gates"] != "constant":
        attention.cope_gate_scale = nn.Parameter(torch.ones(heads, **like))
    if settings["gates"] == "keys":
        attention.cope_gate_keys = nn.Linear(key.in_features, key.out_features, bias=False, **like)
    for part, projection in (("q", query), ("k", key)):
        tap = _Tap(attention, part, projection.out_features // width)
        projection.register_forward_hook(tap)
        norm = getattr(attention, settings["modules"][f"{part}_norm"], None)
        if isinstance(norm, nn.Module):
            norm.register_forward_hook(tap)


class _Tap:
    """Notes what a projection of queries or keys gives out: (it, how many heads, whether they come first); and in its place
    what a norm makes of it that follows at once. A norm that comes after the rotation is of no use here."""

    def __init__(self, attention: Any, part: str, heads: int) -> None:
        self.attention, self.part, self.heads = attention, part, heads

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        noted: dict[str, Any] = self.attention.__dict__.get("seen_now") or {}
        before = noted.get(self.part)
        if before is None or arguments[0].data_ptr() == before[0].data_ptr():
            noted[self.part] = output, self.heads, before is not None and is_heads_first(arguments[0], self.heads)


class UpfitCopeConfig(OwnConfig):
    model_type = INTERFACE


class UpfitCopeForCausalLM(OwnModel):
    auto, config_class, swap = AutoModelForCausalLM, UpfitCopeConfig, staticmethod(swap)


class UpfitCopeModel(OwnModel):
    auto, config_class, swap = AutoModel, UpfitCopeConfig, staticmethod(swap)


CONFIG = UpfitCopeConfig
MODELS: dict[Any, Any] = {AutoModelForCausalLM: UpfitCopeForCausalLM, AutoModel: UpfitCopeModel}
UpfitCopeConfig.models = MODELS

"""Watches attention while it runs: its queries, keys and values, and the inputs and outputs of modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.meta_model import quiet_transformers
from upfit.calibration.products import rounded
from upfit.modeling.upfit_base import Plain

HIDDEN = -1e4  # a score so low is a key that is not looked at
NAME = "upfit_observed"  # of our function in transformers' attention interface
HARMLESS = {
    "position_ids",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
}  # tensors given to attention that change nothing


class Opaque(Exception):
    """This model, or this layer, cannot be observed; the message says why. Callers fall back to what needs no observation."""


class Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


@dataclass(frozen=True)
class Seen:
    """One call of the attention function. q [B, H, T, D], k [B, K, S, D], v [B, K, S, V], output [B, T, H, V], all as the
    attention sees them (after norms and rotation); S is T but in cross-attention. `mask` is None where no key is hidden, or,
    with `causal`, only those that are still to come; else [B or 1, 1 or H, T, S], bool (True: may look) or added to the scores.
    `cap` and `sinks` [H] are None where the family has none."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scaling: float
    cap: float | None
    sinks: Tensor | None
    output: Tensor
    causal: bool = True

    @property
    def looks_ahead(self) -> bool:
        """Whether a query sees keys that stand behind it: those of another stream, or of the same image."""
        if not self.causal or self.mask is None:
            return not self.causal
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > HIDDEN
        return bool(seen.triu(1).any())

    def scores(self, rows: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Scores before any cap [B, H, R, keys] of the query positions `rows` [R] on the first `keys` keys, and the attention
        weights there (zero where the mask forbids; with sinks they sum to less than one). `keys` must reach past every row."""
        group = self.q.shape[1] // self.k.shape[1]
        q = self.q[:, :, rows].unflatten(1, (-1, group)).flatten(2, 3)
        scores = (q @ self.k[:, :, :keys].transpose(-1, -2)).unflatten(2, (group, -1)).flatten(1, 2) * self.scaling
        return scores, self.weights(scores, rows)

    def attended(self) -> Tensor:
        """[B, T, H, V]: what attention makes of q, k and v here."""
        if self.cap is None and self.sinks is None:
            causal = self.mask is None and self.causal and self.q.shape[2] > 1
            output = nn.functional.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=self.mask, is_causal=causal, scale=self.scaling, enable_gqa=True
            )
        else:
            _, weights = self.scores(torch.arange(self.q.shape[2], device=self.q.device), self.k.shape[2])
            output = weights @ self.v.repeat_interleave(self.q.shape[1] // self.v.shape[1], 1)
        return output.transpose(1, 2).contiguous()

    def weights(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Attention weights of uncapped `scores` [B, H, R, keys] at the query positions `rows`."""
        capped = scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap
        keys = scores.shape[-1]
        if self.mask is None and not self.causal:
            masked = capped
        elif self.mask is None:
            allowed = torch.arange(keys, device=rows.device)[None] <= rows[:, None]
            masked = capped.masked_fill(~allowed, float("-inf"))
        elif self.mask.dtype == torch.bool:
            masked = capped.masked_fill(~self.mask[:, :, rows, :keys], float("-inf"))
        else:
            masked = capped + self.mask[:, :, rows, :keys]
        if self.sinks is None:
            return masked.softmax(-1)
        sink = self.sinks.reshape(1, -1, 1, 1).expand(*masked.shape[:3], 1).to(masked.dtype)
        return torch.cat([masked, sink], -1).softmax(-1)[..., :-1]


Listener = Callable[[Seen], Tensor | None]
_listener: Listener | None = None
_known: tuple[nn.Module, Tensor] | None = None  # an attention, and what it gives out: it need not run


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    strange = [name for name, argument in others.items() if isinstance(argument, Tensor) and name not in HARMLESS]
    if strange:
        raise Opaque(f"its attention is given {strange[0]!r}, which is not understood")
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask = attention_mask if position_bias is None else _added(position_bias, attention_mask, causal, query.shape[2])
    module = module.module if isinstance(module, Plain) else module  # of a class of ours, which hands on a wrapped one
    if _known is not None and _known[0] is module:
        batch, heads, tokens, _ = query.shape
        return _known[1].view(batch, tokens, heads, -1), None
    bare = Seen(module, query, key, value, mask, scaling, softcap, s_aux, query, causal)
    output = bare.attended()
    if _listener is not None:
        replaced = _listener(replace(bare, output=output))
        output = output if replaced is None else replaced
    return output, None


def _added(bias: Tensor, mask: Tensor | None, causal: bool, tokens: int) -> Tensor:
    """`bias` [1 or B, H, T, S] on the scores and what hides keys, as one mask that is added."""
    if mask is None and causal and tokens > 1:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` for every attention inside the block; a tensor that it gives back takes the place of the output."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def knowing(attention: nn.Module, output: Tensor) -> Iterator[None]:
    """Inside, the `attention` module is not computed: it gives out `output` [B, T, H·V]. Classes that do not go through the
    attention interface compute it all the same."""
    global _known
    before, _known = _known, (attention, output)
    try:
        yield
    finally:
        _known = before


def register() -> None:
    """Make NAME an attention implementation of transformers': one that can be listened to."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class Call:
    """What a layer is given for one batch, besides the hidden states. `added` [B, T, E]: what the model adds to them before the
    layer (to those of images, in families that see at several depths); None for nothing. `passed_by`: it is not run, for what
    the model is given has nothing that it looks at (Mllama's layers that attend to images)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    added: Tensor | None = None
    passed_by: bool = False


@rounded()
def run_block(module: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a layer makes of `hidden` [B, T, E]."""
    if call.passed_by:
        return hidden
    with torch.no_grad(), quiet_transformers():
        result = module(hidden, *call.arguments, **call.keywords)
    return result[0] if isinstance(result, tuple) else result


@rounded()
def run_until(block: nn.Module, stop: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The input of the module `stop` inside the layer; what comes after it is not run."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise Stop

    handle = stop.register_forward_pre_hook(catch)
    try:
        run_block(block, hidden, call)
    except Stop:
        pass
    finally:
        handle.remove()
    return by_window(caught[0], hidden)


def by_window(tensor: Tensor, hidden: Tensor) -> Tensor:
    """`tensor` [B, T, ...] where a layer has it as [B·T, ...], `hidden` being [B, T, E]."""
    flat = tensor.ndim == 2 and hidden.ndim == 3 and len(tensor) == hidden.shape[0] * hidden.shape[1]
    return tensor.unflatten(0, hidden.shape[:2]) if flat else tensor


@contextmanager
def tapped(modules: Mapping[str, nn.Module], copies: bool = False) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """A dictionary that holds, after a run inside the block, (input, output) of each of these modules, by their names here;
    with `copies` of the output, to which a layer may add in place."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                result = output[0] if isinstance(output, tuple) else output
                seen[name] = (arguments[0], result.clone() if copies else result)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

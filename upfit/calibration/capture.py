"""Watches an attention that does not go through transformers' attention interface, by its projections and its softmax.

Where a class calls torch's scaled_dot_product_attention itself (Falcon), that is given queries and keys as they are. Else the
scores that reach the softmax are a scale times query · key, plus what the position and the mask add. The projections give
queries and keys; the scale is the one that explains how the scores of different texts differ; the rest is what is added.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upfit.calibration.observe import HIDDEN, Opaque, Seen

SAME = 1e-6  # share of the energy that a guess of the scale may leave unexplained, in float32
SOFTMAX = {torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax}


def calls_torch(module: nn.Module) -> bool:
    """Whether the file of this module's class calls torch's scaled_dot_product_attention itself."""
    return any("scaled_dot_product_attention(" in _source(kind.__module__) for kind in type(module).__mro__ if _is_model(kind))


def _is_model(kind: type) -> bool:
    return kind.__module__.rpartition(".")[2].startswith("modeling_") and kind.__module__ != "transformers.modeling_utils"


@functools.cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


class _Mode(TorchFunctionMode):
    def __init__(self, scores: list[Tensor]) -> None:
        super().__init__()
        self.inside, self.scores, self.calls = False, scores, list[Attended]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and function in SOFTMAX and args:
            self.scores.append(args[0].detach())
        result = function(*args, **(kwargs or {}))
        if self.inside and function is nn.functional.scaled_dot_product_attention:
            self.calls.append(Attended.of(result, *args, **(kwargs or {})))
        return result


@contextmanager
def softmax_inputs(attention: nn.Module) -> Iterator[tuple[list[Tensor], "list[Attended]"]]:
    """What every softmax of this module is given while the block runs, and every call of torch's own attention in it."""
    mode = _Mode([])

    def enter(*_: Any) -> None:
        mode.inside = True

    def leave(*_: Any) -> None:
        mode.inside = False

    handles = [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]
    try:
        with mode:
            yield mode.scores, mode.calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Attended:
    """One call of torch's scaled_dot_product_attention: q [B, H, T, D], k and v [B, K, S, D], and what it gave out."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @staticmethod
    def of(
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Attended":
        return Attended(output, query, key, value, attn_mask, is_causal, scale or query.shape[-1] ** -0.5)

    def seen(self, module: nn.Module) -> Seen:
        """The call as that of any attention."""
        output = self.output.transpose(1, 2)
        return Seen(module, self.query, self.key, self.value, self.mask, self.scale, None, None, output, self.causal)


@dataclass(frozen=True)
class Scored:
    """What one run of an attention showed: the `scores` that its softmax was given ([B, H, T, S] or [B·H, T, S]), its
    projections q [B, T, H, D], k [B, S, K, D], v [B, S, K, V] and its output [B, T, H, V] before the output projection."""

    scores: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor

    def compared(self) -> tuple[Tensor, Tensor]:
        """Scores and query · key, both [B, H, T, S]."""
        q = self.q.transpose(1, 2)
        k = self.k.transpose(1, 2).repeat_interleave(self.q.shape[2] // self.k.shape[2], 1)
        return self.scores.reshape(*q.shape[:3], k.shape[2]).float(), q @ k.transpose(-1, -2)


def seen_in(module: nn.Module, run: Scored, scale: float, causal: bool) -> Seen:
    """The call of an attention whose scores are `scale` times query · key and what it adds. `causal`: keys are those of the
    same stream. Raises Opaque where keys that are still to come are looked at."""
    scores, products = run.compared()
    added = (scores - scale * products).masked_fill(scores < HIDDEN, float("-inf"))
    if causal and bool((scores.triu(1) > HIDDEN).logical_and(torch.ones_like(scores).triu(1) > 0).any()):
        raise Opaque("its attention does not go through transformers' attention interface, and looks at what is still to come")
    q, k, v = (heads.transpose(1, 2) for heads in (run.q, run.k, run.v))
    return Seen(module, q, k, v, added, scale, None, None, run.attended, causal)


def find_scale(run: Scored, other: Scored | None) -> float:
    """By how much scores follow query · key: least squares of how they differ from one text to the next of a batch, or, of a
    single text, from those of `other`; where nothing hides the key.

    Raises Opaque where the scores are not a scale times query · key and something that does not depend on the text.
    """
    scores, products = run.compared()
    others = (scores.roll(1, 0), products.roll(1, 0)) if other is None else other.compared()
    seen = ((scores > HIDDEN) & (others[0] > HIDDEN)).double()
    gap = (scores.clamp_min(HIDDEN).double() - others[0].clamp_min(HIDDEN).double()) * seen
    step = (products.double() - others[1].double()) * seen
    scale = float((gap * step).sum() / step.square().sum().clamp_min(1e-30))  # no division by 0
    if float((gap - scale * step).square().sum()) > SAME * float(gap.square().sum()):
        raise Opaque("what its softmax is given is not query · key and a bias")
    return scale

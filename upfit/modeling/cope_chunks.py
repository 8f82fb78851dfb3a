"""Contextual positions some queries at a time, so that no more than their scores are ever there: any device, any type.

This file ships inside converted folders, so it imports torch and its neighbours only. Legend: see `cope_equations.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cope_equations import TENSORS, Inputs, Sight, cut, gates_of, grouped, mixed, of_queries, position_logits

CHUNK_ELEMENTS = 1 << 18  # scores of one row chunk; some ten tensors of that many elements are alive at once
CHUNK_QUERIES = 32  # at least: with fewer, reading keys takes longer than what is done with their scores
BAND = 256  # keys that are first tried, from the diagonal leftwards, for all positions to be passed


@torch.no_grad()
def near_gates(rows: Inputs, seen: Tensor, band: int = BAND) -> Tensor:
    """Gates [B, H, R, some] of keys in reverse, so many that all queries of `rows` are at their last position behind them:
    attention is plain there. The first `band` keys are tried, then twice as many more."""
    keys, last = seen.shape[-1], rows.z.shape[-1] - 1
    gates, passed = [], torch.zeros((), device=rows.z.device)
    start, stop = 0, min(band, keys)
    while True:
        gates.append(gates_of(rows, seen, start, stop))
        if stop == keys:
            break
        passed = passed + gates[-1].sum(-1)
        blind = ~seen[..., stop:].any(-1)  # nothing is seen further left: whatever the position, it is not needed
        if bool(((passed >= last) | blind).all()):
            break
        start, stop = stop, min(3 * stop - 2 * start, keys)
    return torch.cat(gates, -1) if len(gates) > 1 else gates[0]


def _last_first(inputs: Inputs, keys: int) -> Inputs:
    """All `keys` keys, with values and gate keys, in reverse, and heads before keys in memory: products then make no copies."""
    gate_k = inputs.gate_k
    turned: dict[str, Any] = {"k": inputs.k.flip(2).contiguous(), "v": inputs.v.flip(2).contiguous()}
    if isinstance(gate_k, Tensor):
        return replace(inputs, **turned, gate_k=gate_k.flip(2).contiguous())
    flipped = None if gate_k is None else lambda start, stop: gate_k(keys - stop, keys - start).flip(2)
    return replace(inputs, **turned, gate_k=flipped)


def newest(inputs: Inputs, sight: Sight) -> Tensor:
    """[B, 1, H, V] for one query: torch's own attention, with a mask that is made of the keys before the last position only.

    No gradients, caps or sinks. A query that may look at nothing gets the mean of all values, as it does in torch.
    """
    batch, heads = inputs.q.shape[:2]
    first, end = sight.stretch(0, 1)
    seen, gate_k = sight.rows(0, 1, inputs.q.device)[..., first:end], inputs.gate_k
    turned = replace(
        inputs, gate_k=None if gate_k is None else lambda start, stop: cut(gate_k, end - stop, end - start).flip(2)
    )
    gates = near_gates(turned, seen.flip(-1))
    positions = gates.cumsum(-1).clamp_(max=inputs.z.shape[-1] - 1).flip(-1)
    added = torch.zeros(batch, heads, 1, end - first, dtype=inputs.q.dtype, device=inputs.q.device)
    added[..., end - first - gates.shape[-1] :] = position_logits(inputs.z.to(gates.dtype), positions)
    if sight.mask is not None:
        added.masked_fill_(~seen, torch.finfo(added.dtype).min)
    k, v = inputs.k[:, :, first:end], inputs.v[:, :, first:end]
    shared = (batch, k.shape[1], heads // k.shape[1], -1)  # heads that share a key are queries of it
    output = torch.nn.functional.scaled_dot_product_attention(
        inputs.q.reshape(shared), k, v, added.view(shared), scale=inputs.scaling
    )
    return output.reshape(batch, 1, heads, -1)


@dataclass
class _Chunk:
    """Some queries and the keys they may see, last key first: a position is then a running sum. What the forward pass has made
    of them by `run` is there for `backward`."""

    rows: Inputs  # keys, values and gate keys in reverse
    seen: Tensor  # [B or 1, 1 or H, R, S], keys in reverse
    gates: Tensor  # [B, H, R, band]: of the keys before the last position is passed

    def run(self) -> Tensor:
        """→ [B, R, H, V]."""
        rows, wide = self.rows, self.gates.dtype
        logits = grouped(rows.q, rows.k).to(wide).mul_(rows.scaling)
        if rows.cap is not None:
            logits = logits.div_(rows.cap).tanh_()
            self.slope = 1 - logits * logits
            logits.mul_(rows.cap)
        z = rows.z.to(wide)
        z = z - z[..., -1:]
        positions = self.gates.cumsum(-1).clamp_(max=z.shape[-1] - 1)
        self.below = positions.long()
        self.share = positions.frac_()
        self.step = torch.nn.functional.pad(z.diff(dim=-1), (0, 1)).gather(-1, self.below)  # 0 from the last position on
        logits[..., : self.gates.shape[-1]].add_(z.gather(-1, self.below)).addcmul_(self.step, self.share)
        logits.masked_fill_(~self.seen, float("-inf"))
        self.weights = logits.softmax(-1)  # not by exp: of numbers as far below 0 as these it is slow
        if not bool(self.seen.any(-1).all()):
            self.weights.nan_to_num_(0.0)  # queries that may look at nothing
        if rows.sinks is not None:
            self.sunk = torch.sigmoid(rows.sinks.to(wide)[:, None, None] - logits.logsumexp(-1, keepdim=True))
            self.weights.mul_(1 - self.sunk)
        return mixed(self.weights.to(rows.v.dtype), rows.v)

    def backward(self, grad: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Gradients of the rows' tensors, of keys in reverse; `grad` and `output` [B, R, H, V]."""
        rows, near, wide = self.rows, slice(None, self.gates.shape[-1]), self.weights.dtype
        grad, output = grad.transpose(1, 2), output.transpose(1, 2)
        delta = (grad.to(wide) * output.to(wide)).sum(-1, keepdim=True)
        grads = {"v": _over_rows(self.weights.to(grad.dtype), grad, rows.v)}
        scores = grouped(grad, rows.v).to(wide).sub_(delta).mul_(self.weights)  # gradients of the logits
        if rows.sinks is not None:
            grads["sinks"] = -(self.sunk * delta).sum((0, 2, 3))
        close = scores[..., near]
        places = torch.zeros(rows.z.shape, dtype=wide, device=close.device).scatter_add_(-1, self.below, close)
        steps = torch.zeros_like(places).scatter_add_(-1, self.below, close * self.share)
        grads["z"] = places.sub_(steps)
        grads["z"][..., 1:] += steps[..., :-1]
        grads["z"][..., -1] -= grads["z"].sum(-1)
        moved = close * self.step  # gradients of the positions
        passed = moved.cumsum(-1)
        gates = moved.sub_(passed).add_(passed[..., -1:])  # of the gates: of all positions from theirs on
        gates = torch.ops.aten.sigmoid_backward(gates, self.gates)  # of the gates' logits
        grads["gate_bias"] = gates.sum((0, 2, 3))
        if rows.gate_q is not None and isinstance(rows.gate_k, Tensor):
            gates = gates.to(rows.gate_q.dtype)
            grads["gate_q"] = _over_keys(gates, rows.gate_k[:, :, near])
            grads["gate_k"] = _over_rows(gates, rows.gate_q, rows.gate_k)
        if rows.cap is not None:
            scores.mul_(self.slope)
        scores = scores.mul_(rows.scaling).to(rows.q.dtype)
        return grads | {"q": _over_keys(scores, rows.k), "k": _over_rows(scores, rows.q, rows.k)}


def _over_keys(scores: Tensor, k: Tensor) -> Tensor:
    """scores [B, H, R, S] · k [B, K, S, D] → [B, H, R, D]."""
    return mixed(scores, k).transpose(1, 2)


def _over_rows(scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """scores [B, H, R, S] and q [B, H, R, D] → [B, K, S, D], the sum over rows and over the heads that share a key (of `k`)."""
    batch, _, _, keys = scores.shape
    folded = scores.reshape(batch, k.shape[1], -1, keys)
    return folded.transpose(-1, -2) @ q.reshape(batch, k.shape[1], -1, q.shape[-1])


class _Chunked(torch.autograd.Function):
    """Chunk by chunk, and again in the backward pass, so that no more than one chunk's scores are ever there."""

    @staticmethod
    def forward(ctx: Any, sight: Sight, size: int, scalars: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        inputs = _last_first(Inputs(**dict(zip(TENSORS, tensors, strict=True)), **scalars), sight.keys)  # type: ignore[arg-type]
        parts, bands = [], []
        for start, stop in _pieces(sight, size):
            chunk = _chunk(inputs, sight, start, stop)
            parts.append(chunk.run())
            bands.append(chunk.gates.shape[-1])
        output = torch.cat(parts, 1)
        ctx.settings = sight, size, scalars, bands
        ctx.save_for_backward(output, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sight, size, scalars, bands = ctx.settings
        output, *tensors = ctx.saved_tensors
        inputs = _last_first(Inputs(**dict(zip(TENSORS, tensors, strict=True)), **scalars), sight.keys)
        wide = torch.promote_types(inputs.q.dtype, torch.float32)
        totals = {n: torch.zeros_like(t, dtype=wide) for n, t in zip(TENSORS, tensors, strict=True) if t is not None}
        for (start, stop), band in zip(_pieces(sight, size), bands, strict=True):
            chunk = _chunk(inputs, sight, start, stop, band)
            chunk.run()
            for name, part in chunk.backward(grads[0][:, start:stop], output[:, start:stop]).items():
                place = totals[name]
                if name in ("q", "z", "gate_q"):
                    place = place[:, :, start:stop]
                elif name in ("k", "v", "gate_k"):
                    skipped = sight.keys - sight.stretch(start, stop)[1]
                    place = place[:, :, skipped : skipped + part.shape[2]]
                place += part
        for name in {"k", "v", "gate_k"} & totals.keys():
            totals[name] = totals[name].flip(2)
        return (
            None,
            None,
            None,
            *(totals[n].to(t.dtype) if t is not None else None for n, t in zip(TENSORS, tensors, strict=True)),
        )


def _pieces(sight: Sight, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, sight.queries)) for start in range(0, sight.queries, size)]


def _chunk(turned: Inputs, sight: Sight, start: int, stop: int, band: int | None = None) -> _Chunk:
    """The queries from `start` to `stop` of `turned` (`_last_first`); `band` is looked for where it is not known."""
    first, end = sight.stretch(start, stop)
    seen = sight.rows(start, stop, turned.q.device)[..., first:end].flip(-1)
    keys, gate_k = slice(sight.keys - end, sight.keys - first), turned.gate_k
    rows = replace(of_queries(turned, start, stop), k=turned.k[:, :, keys], v=turned.v[:, :, keys])
    if isinstance(gate_k, Tensor):
        rows = replace(rows, gate_k=gate_k[:, :, keys])
    elif gate_k is not None:
        rows = replace(rows, gate_k=lambda start, stop: gate_k(keys.start + start, keys.start + stop))
    return _Chunk(rows, seen, near_gates(rows, seen) if band is None else gates_of(rows, seen, 0, band))


def chunked(inputs: Inputs, sight: Sight, size: int | None = None) -> Tensor:
    """[B, T, H, V], `size` queries at a time: memory O(T · (D + P)) besides one chunk's scores; any device, any type."""
    if inputs.q.shape[0] > 1:  # row by row of the batch: more queries to a product, and each row's own keys
        rows = zip(inputs.each(), sight.each(inputs.q.shape[0]), strict=True)
        return torch.cat([chunked(*row, size) for row in rows])
    size = size or max(CHUNK_QUERIES, CHUNK_ELEMENTS // (inputs.q.shape[1] * sight.keys))
    if not torch.is_grad_enabled():
        turned = _last_first(inputs, sight.keys)
        return torch.cat([_chunk(turned, sight, *piece).run() for piece in _pieces(sight, size)], 1)
    scalars = {"scaling": inputs.scaling, "cap": inputs.cap}
    return _Chunked.apply(sight, size, scalars, *(getattr(inputs, name) for name in TENSORS))

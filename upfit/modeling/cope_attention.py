"""Contextual position encoding (CoPE, Golovneva et al. 2024, arXiv 2405.18719) as attention, twice: plain, and in row chunks.

This file ships inside converted folders, so it imports torch only.

A key's position, seen from a query, is the sum of gates from that key to the query; each position adds a logit to the
content's. For query i, keys j it may look at, and P learned positions:

    gate[i, j]     = sigmoid(gate logit), 0 where i may not look                      (equation 3)
    position[i, j] = min(sum of gate[i, k] over keys k from j on, P - 1)              (equation 4)
    logit[i, j]    = q_i · k_j + z_i(position[i, j]) - z_i(P - 1)                     (equations 5 to 9)

with z_i linear between whole positions. Taking off z_i(P - 1), the same for all keys of a query, changes no softmax over keys
and makes the logit of every key at the last position the content's alone: from there on leftwards attention is plain.

Legend: B rows, H query heads, K key/value heads, T queries, S keys, D head width, V width of values, G of gates, P positions.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 19  # scores of one row chunk; some ten tensors of that many elements are alive at once
BAND = 256  # keys that are first tried, from the diagonal leftwards, for all positions to be passed


@dataclass(frozen=True)
class Sight:
    """Which keys each query may look at. `mask` [B or 1, 1 or H, T, S] is True there; None: all keys up to the query's own,
    the last query's being the last key."""

    queries: int
    keys: int
    mask: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, queries: int, keys: int) -> "Sight":
        """From what transformers gives an eager or sdpa attention: nothing, a bool mask, or an additive one."""
        if mask is None:
            return cls(queries, keys)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return cls(queries, keys, seen[..., :keys])

    def stretch(self, start: int, stop: int) -> tuple[int, int]:
        """The queries from `start` to `stop` see no keys before the first number, and none from the second on."""
        if self.mask is None:
            return 0, self.keys - self.queries + stop
        first, end = min(self._ends[0][start:stop]), max(self._ends[1][start:stop])
        return (first, end) if first < end else (0, 1)

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Of each query in any row and head: the first key seen, and the one after the last. Without any: `keys` and 0."""
        assert self.mask is not None
        seen = self.mask.flatten(0, 1).any(0)
        found, seen = seen.any(-1), seen.int()
        first = torch.where(found, seen.argmax(-1), self.keys)
        return first.tolist(), torch.where(found, self.keys - seen.flip(-1).argmax(-1), 0).tolist()

    def stretches(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """First and last key that each query sees, [batch, T] int32 each, or None when it is not all between them.

        A query that sees nothing has its first after its last.
        """
        if self.mask is None:
            last = torch.arange(self.queries, dtype=torch.int32, device=device) + (self.keys - self.queries)
            return torch.zeros_like(last).expand(batch, -1).contiguous(), last.expand(batch, -1).contiguous()
        if self.mask.shape[1] != 1:
            return None
        seen = self.mask[:, 0].expand(batch, -1, -1)
        count, any_seen = seen.sum(-1), seen.any(-1)
        first = torch.where(any_seen, seen.int().argmax(-1), self.keys)
        last = torch.where(any_seen, self.keys - 1 - seen.flip(-1).int().argmax(-1), -1)
        if not bool((~any_seen | (last - first + 1 == count)).all()):
            return None
        return first.int().contiguous(), last.int().contiguous()

    def last(self) -> Tensor | int:
        """The last key that the last query sees: [B or 1, 1], or a number for all."""
        if self.mask is None:
            return self.keys - 1
        return self.keys - 1 - self.mask[:, 0, -1].flip(-1).int().argmax(-1, keepdim=True)

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """[B or 1, 1 or H, stop - start, S]"""
        if self.mask is not None:
            return self.mask[:, :, start:stop]
        keys = torch.arange(self.keys, device=device)
        return (keys <= torch.arange(start, stop, device=device)[:, None] + (self.keys - self.queries))[None, None]


@dataclass(frozen=True)
class Inputs:
    """What one attention call is made of.

    q [B, H, T, D], k [B, K, S, D], v [B, K, S, V] as plain attention has them (rotated where the family rotates).
    z [B, H, T, P]: logits of whole positions. gate_q [B, H, T, G] and gate_k [B, K, S, G]: their product, plus gate_bias [H],
    is the gate's logit; without them it is gate_bias alone. `cap`: content logits are cap · tanh(logit / cap). `sinks` [H]: a
    logit for looking at nothing. Where no gradients are wanted, gate_k may be a function that makes the gate keys from `start`
    to `stop`: only those near the queries are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    gate_bias: Tensor
    gate_q: Tensor | None = None
    gate_k: Tensor | Callable[[int, int], Tensor] | None = None
    sinks: Tensor | None = None
    scaling: float = 1.0
    cap: float | None = None


TENSORS = ("q", "k", "v", "z", "gate_bias", "gate_q", "gate_k", "sinks")


def positions_of(gates: Tensor, most: int) -> Tensor:
    """Equation 4: suffix sums of gates [..., S] over the keys, at most `most`."""
    return gates.flip(-1).cumsum(-1).flip(-1).clamp(max=most)


def position_logits(z: Tensor, positions: Tensor) -> Tensor:
    """z [..., P] at fractional positions [..., S], linear between whole ones (equation 8), less z at the last one."""
    z = z - z[..., -1:]
    below = positions.detach().floor().long().clamp(max=z.shape[-1] - 2)
    share = positions - below
    return z.gather(-1, below) * (1 - share) + z.gather(-1, below + 1) * share


def reference(given: Inputs, sight: Sight) -> Tensor:
    """The equations as they stand, in the inputs' type; float64 for tests. → [B, T, H, V]. Memory O(H · T · S)."""
    group = given.q.shape[1] // given.k.shape[1]
    k, v = given.k.repeat_interleave(group, 1), given.v.repeat_interleave(group, 1)
    seen = sight.rows(0, sight.queries, given.q.device)
    content = given.q @ k.transpose(-1, -2) * given.scaling
    if given.cap is not None:
        content = given.cap * torch.tanh(content / given.cap)
    gate_logits = given.gate_bias[:, None, None].expand_as(content)
    if given.gate_q is not None and given.gate_k is not None:
        gate_k = _cut(given.gate_k, 0, sight.keys).repeat_interleave(group, 1)
        gate_logits = gate_logits + given.gate_q @ gate_k.transpose(-1, -2)
    positions = positions_of(torch.sigmoid(gate_logits) * seen, given.z.shape[-1] - 1)
    logits = (content + position_logits(given.z, positions)).masked_fill(~seen, float("-inf"))
    if given.sinks is not None:
        logits = torch.cat([logits, given.sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)  # a query that may look at nothing
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2)


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H, R, D] · k [B, K, S, D] → [B, H, R, S] without repeating keys."""
    batch, heads, rows, width = q.shape
    folded = q.reshape(batch, k.shape[1], -1, width)
    return (folded @ k.transpose(-1, -2)).view(batch, heads, rows, k.shape[2])


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, R, S] · v [B, K, S, V] → [B, R, H, V] without repeating values."""
    batch, heads, rows, keys = weights.shape
    folded = weights.reshape(batch, v.shape[1], -1, keys) @ v
    return folded.view(batch, heads, rows, v.shape[3]).transpose(1, 2)


def _cut(gate_k: Tensor | Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
    return gate_k[:, :, start:stop] if isinstance(gate_k, Tensor) else gate_k(start, stop)


def _gates(rows: Inputs, seen: Tensor, start: int, stop: int) -> Tensor:
    """Gates [B, H, R, stop - start] for keys from `start` on, in float32 (float64 of float64), as many errors would add up."""
    wide = torch.float64 if rows.z.dtype == torch.float64 else torch.float32
    bias, unseen = rows.gate_bias.to(wide)[:, None, None], ~seen[..., start:stop]
    if rows.gate_q is None or rows.gate_k is None:
        return bias.masked_fill(unseen, float("-inf")).sigmoid().expand(*rows.z.shape[:3], -1)
    device = bias.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        logits = grouped(rows.gate_q.to(wide), _cut(rows.gate_k, start, stop).to(wide)).add_(bias)
    return logits.masked_fill_(unseen, float("-inf")).sigmoid()


@torch.no_grad()
def near_gates(rows: Inputs, seen: Tensor, band: int = BAND) -> Tensor:
    """Gates [B, H, R, some] of keys in reverse, so many that all queries of `rows` are at their last position behind them:
    attention is plain there. The first `band` keys are tried, then twice as many more."""
    keys, last = seen.shape[-1], rows.z.shape[-1] - 1
    found, passed = [], torch.zeros((), device=rows.z.device)
    start, stop = 0, min(band, keys)
    while True:
        found.append(_gates(rows, seen, start, stop))
        if stop == keys:
            break
        passed = passed + found[-1].sum(-1)
        blind = ~seen[..., stop:].any(-1)  # nothing is seen further left: whatever the position, it is not needed
        if bool(((passed >= last) | blind).all()):
            break
        start, stop = stop, min(3 * stop - 2 * start, keys)
    return torch.cat(found, -1) if len(found) > 1 else found[0]


def counted(rows: Inputs, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, positions and position logits [B, H, R, S] of all keys, in float32 or wider."""
    gates = _gates(rows, seen, 0, seen.shape[-1])
    positions = positions_of(gates, rows.z.shape[-1] - 1)
    return gates, positions, position_logits(rows.z.to(gates.dtype), positions)


def _of_queries(given: Inputs, start: int, stop: int) -> Inputs:
    """The queries from `start` to `stop`."""
    cut = {n: getattr(given, n)[:, :, start:stop] for n in ("q", "z", "gate_q") if getattr(given, n) is not None}
    return replace(given, **cut)


def _last_first(given: Inputs, keys: int) -> Inputs:
    """All `keys` keys, with values and gate keys, in reverse, and heads before keys in memory: products then make no copies."""
    gate_k = given.gate_k
    turned: dict[str, Any] = {"k": given.k.flip(2).contiguous(), "v": given.v.flip(2).contiguous()}
    if isinstance(gate_k, Tensor):
        return replace(given, **turned, gate_k=gate_k.flip(2).contiguous())
    made = None if gate_k is None else lambda start, stop: gate_k(keys - stop, keys - start).flip(2)
    return replace(given, **turned, gate_k=made)


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
        found = {"v": _over_rows(self.weights.to(grad.dtype), grad, rows.v)}
        scores = grouped(grad, rows.v).to(wide).sub_(delta).mul_(self.weights)  # gradients of the logits
        if rows.sinks is not None:
            found["sinks"] = -(self.sunk * delta).sum((0, 2, 3))
        close = scores[..., near]
        places = torch.zeros(rows.z.shape, dtype=wide, device=close.device).scatter_add_(-1, self.below, close)
        steps = torch.zeros_like(places).scatter_add_(-1, self.below, close * self.share)
        found["z"] = places.sub_(steps)
        found["z"][..., 1:] += steps[..., :-1]
        found["z"][..., -1] -= found["z"].sum(-1)
        moved = close * self.step  # gradients of the positions
        passed = moved.cumsum(-1)
        gates = moved.sub_(passed).add_(passed[..., -1:])  # of the gates: of all positions from theirs on
        gates = torch.ops.aten.sigmoid_backward(gates, self.gates)  # of the gates' logits
        found["gate_bias"] = gates.sum((0, 2, 3))
        if rows.gate_q is not None and isinstance(rows.gate_k, Tensor):
            gates = gates.to(rows.gate_q.dtype)
            found["gate_q"] = _over_keys(gates, rows.gate_k[:, :, near])
            found["gate_k"] = _over_rows(gates, rows.gate_q, rows.gate_k)
        if rows.cap is not None:
            scores.mul_(self.slope)
        scores = scores.mul_(rows.scaling).to(rows.q.dtype)
        return found | {"q": _over_keys(scores, rows.k), "k": _over_rows(scores, rows.q, rows.k)}


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
        given = _last_first(Inputs(**dict(zip(TENSORS, tensors, strict=True)), **scalars), sight.keys)  # type: ignore[arg-type]
        parts, bands = [], []
        for start, stop in _pieces(sight, size):
            chunk = _chunk(given, sight, start, stop)
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
        given = _last_first(Inputs(**dict(zip(TENSORS, tensors, strict=True)), **scalars), sight.keys)
        wide = torch.promote_types(given.q.dtype, torch.float32)
        totals = {n: torch.zeros_like(t, dtype=wide) for n, t in zip(TENSORS, tensors, strict=True) if t is not None}
        for (start, stop), band in zip(_pieces(sight, size), bands, strict=True):
            chunk = _chunk(given, sight, start, stop, band)
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
    rows = replace(_of_queries(turned, start, stop), k=turned.k[:, :, keys], v=turned.v[:, :, keys])
    if isinstance(gate_k, Tensor):
        rows = replace(rows, gate_k=gate_k[:, :, keys])
    elif gate_k is not None:
        rows = replace(rows, gate_k=lambda start, stop: gate_k(keys.start + start, keys.start + stop))
    return _Chunk(rows, seen, near_gates(rows, seen) if band is None else _gates(rows, seen, 0, band))


def chunked(given: Inputs, sight: Sight, size: int | None = None) -> Tensor:
    """[B, T, H, V], `size` queries at a time: memory O(T · (D + P)) besides one chunk's scores; any device, any type."""
    batch, heads = given.q.shape[:2]
    size = size or max(1, min(sight.queries, CHUNK_ELEMENTS // max(1, batch * heads * sight.keys)))
    if not torch.is_grad_enabled():
        turned = _last_first(given, sight.keys)
        return torch.cat([_chunk(turned, sight, *piece).run() for piece in _pieces(sight, size)], 1)
    scalars = {"scaling": given.scaling, "cap": given.cap}
    return _Chunked.apply(sight, size, scalars, *(getattr(given, name) for name in TENSORS))


def whole(given: Inputs, sight: Sight, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """[B, T, H, V] and the attention weights [B, H, T, S], all queries at once."""
    seen = sight.rows(0, sight.queries, given.q.device)
    content = grouped(given.q, given.k) * given.scaling
    if given.cap is not None:
        content = given.cap * torch.tanh(content / given.cap)
    added = counted(given, seen)[2]
    logits = (content.to(added.dtype) + added).masked_fill(~seen, float("-inf"))
    if given.sinks is not None:
        logits = torch.cat([logits, given.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)], -1)
    most = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min).detach()
    weights = torch.exp(logits - most)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    weights = torch.dropout(weights[..., : sight.keys], dropout, dropout > 0).to(given.v.dtype)
    return mixed(weights, given.v), weights


def as_mask(given: Inputs, sight: Sight) -> Tensor:
    """Position logits [B, H, T, S] in the queries' type, the least number where nothing is seen.

    As a mask they make plain attention contextual, in any implementation with additive masks. Memory O(H · T · S).
    """
    seen = sight.rows(0, sight.queries, given.q.device)
    added = counted(given, seen)[2].to(given.q.dtype)
    return added.masked_fill(~seen, torch.finfo(given.q.dtype).min)


def last_query(given: Inputs, sight: Sight) -> dict[str, Tensor]:
    """Of the last query of each row: how many keys come before the last position (`span`), whether it is reached
    (`saturated`), and the spread of position logits over that of content logits (`position_content`); means over heads."""
    rows = _of_queries(given, sight.queries - 1, sight.queries)
    seen = sight.rows(sight.queries - 1, sight.queries, given.q.device)
    gates, positions, added = counted(rows, seen)
    last, content = rows.z.shape[-1] - 1, grouped(rows.q, rows.k).float() * rows.scaling
    kept = seen.expand_as(added)
    return {
        "span": ((positions < last) & seen).sum(-1).float().mean(),
        "saturated": (gates.sum(-1) >= last).float().mean(),
        "position_content": added[kept].std() / content[kept].std().clamp_min(1e-9),
    }


def fused(given: Inputs, sight: Sight) -> Tensor | None:
    """[B, T, H, V] by the Triton kernels; None where they are not to be had or what queries see is not a stretch of keys."""
    kernels = _kernels()
    stretch = sight.stretches(given.q.shape[0], given.q.device) if kernels else None
    if kernels is None or stretch is None or not (given.gate_k is None or isinstance(given.gate_k, Tensor)):
        return None
    tensors = (given.q, given.k, given.v, given.gate_q, given.gate_k, given.gate_bias, given.sinks, given.z)
    return kernels.apply(*tensors, *stretch, given.scaling, given.cap)


@functools.cache
def _kernels() -> Any:
    try:
        from .cope_kernels import Fused
    except ImportError:  # no Triton here
        return None
    return Fused


def attend(given: Inputs, sight: Sight) -> Tensor:
    """[B, T, H, V] by the best implementation for where the tensors are; under autocast q, k and v are in its type."""
    device = given.q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        given = replace(given, q=given.q.to(lower), k=given.k.to(lower), v=given.v.to(lower))
    found = fused(given, sight) if given.q.is_cuda else None
    return chunked(given, sight) if found is None else found

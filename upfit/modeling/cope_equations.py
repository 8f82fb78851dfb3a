"""Contextual position encoding (CoPE, Golovneva et al. 2024, arXiv 2405.18719) as attention: the equations.

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
        any_seen, seen = seen.any(-1), seen.int()
        first = torch.where(any_seen, seen.argmax(-1), self.keys)
        return first.tolist(), torch.where(any_seen, self.keys - seen.flip(-1).argmax(-1), 0).tolist()

    def each(self, batch: int) -> list["Sight"]:
        """For the rows of the batch, one by one."""
        if self.mask is None or self.mask.shape[0] == 1:
            return [self] * batch
        return [Sight(self.queries, self.keys, mask) for mask in self.mask.split(1)]

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

    def each(self) -> list["Inputs"]:
        """The rows of the batch, one by one."""
        gate_k, batch = self.gate_k, self.q.shape[0]
        parts: dict[str, Any] = {n: x.split(1) for n in BY_ROW if isinstance(x := getattr(self, n), Tensor)}
        if callable(gate_k) and not isinstance(gate_k, Tensor):
            cached = functools.cache(gate_k)
            parts["gate_k"] = [lambda start, stop, row=row: cached(start, stop)[row : row + 1] for row in range(batch)]
        return [replace(self, **{name: part[row] for name, part in parts.items()}) for row in range(batch)]


BY_ROW = ("q", "k", "v", "z", "gate_q", "gate_k")
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


def reference(inputs: Inputs, sight: Sight) -> Tensor:
    """The equations as they stand, in the inputs' type; float64 for tests. → [B, T, H, V]. Memory O(H · T · S)."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = inputs.k.repeat_interleave(group, 1), inputs.v.repeat_interleave(group, 1)
    seen = sight.rows(0, sight.queries, inputs.q.device)
    content = inputs.q @ k.transpose(-1, -2) * inputs.scaling
    if inputs.cap is not None:
        content = inputs.cap * torch.tanh(content / inputs.cap)
    gate_logits = inputs.gate_bias[:, None, None].expand_as(content)
    if inputs.gate_q is not None and inputs.gate_k is not None:
        gate_k = cut(inputs.gate_k, 0, sight.keys).repeat_interleave(group, 1)
        gate_logits = gate_logits + inputs.gate_q @ gate_k.transpose(-1, -2)
    positions = positions_of(torch.sigmoid(gate_logits) * seen, inputs.z.shape[-1] - 1)
    logits = (content + position_logits(inputs.z, positions)).masked_fill(~seen, float("-inf"))
    if inputs.sinks is not None:
        logits = torch.cat([logits, inputs.sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
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


def cut(gate_k: Tensor | Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
    return gate_k[:, :, start:stop] if isinstance(gate_k, Tensor) else gate_k(start, stop)


def gates_of(rows: Inputs, seen: Tensor, start: int, stop: int) -> Tensor:
    """Gates [B, H, R, stop - start] for keys from `start` on, in float32 (float64 of float64), as many errors would add up."""
    wide = torch.float64 if rows.z.dtype == torch.float64 else torch.float32
    bias, unseen = rows.gate_bias.to(wide)[:, None, None], ~seen[..., start:stop]
    if rows.gate_q is None or rows.gate_k is None:
        return bias.masked_fill(unseen, float("-inf")).sigmoid().expand(*rows.z.shape[:3], -1)
    device = bias.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        logits = grouped(rows.gate_q.to(wide), cut(rows.gate_k, start, stop).to(wide)).add_(bias)
    return logits.masked_fill_(unseen, float("-inf")).sigmoid()


def counted(rows: Inputs, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, positions and position logits [B, H, R, S] of all keys, in float32 or wider."""
    gates = gates_of(rows, seen, 0, seen.shape[-1])
    positions = positions_of(gates, rows.z.shape[-1] - 1)
    return gates, positions, position_logits(rows.z.to(gates.dtype), positions)


def of_queries(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The queries from `start` to `stop`."""
    cut = {n: getattr(inputs, n)[:, :, start:stop] for n in ("q", "z", "gate_q") if getattr(inputs, n) is not None}
    return replace(inputs, **cut)


def whole(inputs: Inputs, sight: Sight, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """[B, T, H, V] and the attention weights [B, H, T, S], all queries at once."""
    seen = sight.rows(0, sight.queries, inputs.q.device)
    content = grouped(inputs.q, inputs.k) * inputs.scaling
    if inputs.cap is not None:
        content = inputs.cap * torch.tanh(content / inputs.cap)
    added = counted(inputs, seen)[2]
    logits = (content.to(added.dtype) + added).masked_fill(~seen, torch.finfo(added.dtype).min)
    if inputs.sinks is not None:
        logits = torch.cat([logits, inputs.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., : sight.keys] * seen.any(-1, keepdim=True)  # a query that may look at nothing: 0
    weights = torch.dropout(weights, dropout, dropout > 0).to(inputs.v.dtype)
    return mixed(weights, inputs.v), weights


def as_mask(inputs: Inputs, sight: Sight) -> Tensor:
    """Position logits [B, H, T, S] in the queries' type, the least number where nothing is seen.

    As a mask they make plain attention contextual, in any implementation with additive masks. Memory O(H · T · S).
    """
    seen = sight.rows(0, sight.queries, inputs.q.device)
    added = counted(inputs, seen)[2].to(inputs.q.dtype)
    return added.masked_fill(~seen, torch.finfo(inputs.q.dtype).min)


def last_query(inputs: Inputs, sight: Sight) -> dict[str, Tensor]:
    """Of the last query of each row: how many keys come before the last position (`span`), whether it is reached
    (`saturated`), and the spread of position logits over that of content logits (`position_content`); means over heads."""
    rows = of_queries(inputs, sight.queries - 1, sight.queries)
    seen = sight.rows(sight.queries - 1, sight.queries, inputs.q.device)
    gates, positions, added = counted(rows, seen)
    last, content = rows.z.shape[-1] - 1, grouped(rows.q, rows.k).float() * rows.scaling
    visible = seen.expand_as(added)
    return {
        "span": ((positions < last) & seen).sum(-1).float().mean(),
        "saturated": (gates.sum(-1) >= last).float().mean(),
        "position_content": added[visible].std() / content[visible].std().clamp_min(1e-9),
    }

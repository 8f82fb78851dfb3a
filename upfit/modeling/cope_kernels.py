"""Contextual position encoding as fused Triton kernels: forward and backward, O(N) memory, deterministic dK and dV.

This file ships inside converted folders, so it imports torch and triton only. The mathematics is that of `cope_equations.py`.

Forward: for a block of queries, key blocks from the diagonal leftwards, with the gates' sum so far carried along; once every
query of the block is at its last position (or sees nothing further left), what remains is plain attention. Backward: positions
come from the right and gate gradients from the left, so one kernel walks each block of queries from left to right, makes
their gradients and notes both sums at every active tile; a second one, for each block of keys, reads them and makes the keys'
gradients without atomics. Queries go through the two in segments, so that the notes take no more than NOTES bytes. Gradients of
z are added with atomics: each belongs to one query, so that only the order of a few additions is open.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(1 << 30)  # a block of keys that there is not
NOTES = 1 << 27  # bytes


@triton.jit
def _content(q, k, scaling, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Content logits of a tile, and their slope in the uncapped logit."""
    a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    slope = tl.full(a.shape, 1.0, tl.float32)
    if CAPPED:
        t = 2.0 * tl.sigmoid(2.0 * a / cap) - 1.0
        a = cap * t
        slope = 1.0 - t * t
    return a, slope


@triton.jit
def _gates(gq, gk, bias, seen, GATED: tl.constexpr, PRECISION: tl.constexpr):
    u = tl.zeros(seen.shape, tl.float32) + bias
    if GATED:
        u += tl.dot(gq, tl.trans(gk), input_precision=PRECISION)
    return tl.where(seen, tl.sigmoid(u), 0.0)


@triton.jit
def _places(g, carry, P: tl.constexpr):
    """Positions before the limit, the whole position below them (limited), and the share of the next one."""
    raw = tl.cumsum(g, axis=1, reverse=True) + carry[:, None]
    limited = tl.minimum(raw, P - 1.0)
    below = tl.minimum(tl.floor(limited), P - 2.0)
    return raw, below.to(tl.int32), limited - below


@triton.jit
def _weights(s, most, seen):
    """exp(s - most), 0 where nothing is seen."""
    return tl.where(seen, tl.exp2((tl.where(seen, s, most[:, None]) - most[:, None]) * LOG2E), 0.0)


@triton.jit
def _tile(X, base, at, limit, width, WIDTH: tl.constexpr):
    """Rows `at` of a [limit, width] matrix at X + base, WIDTH columns with zeros past `width`.

    Offsets inside one head's matrix are 32 bits wide: 64-bit ones take twice the registers.
    """
    columns = tl.arange(0, WIDTH)
    inside = (at[:, None] < limit) & (columns[None, :] < width)
    return tl.load(X + base + (at[:, None] * width + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _put(X, base, at, limit, width, values, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = (at[:, None] < limit) & (columns[None, :] < width)
    tl.store(X + base + (at[:, None] * width + columns[None, :]), values, mask=inside)


# fmt: off
@triton.jit
def forward_kernel(
    Q, K, V, GQ, GK, BIAS, SINKS, Z, STARTS, ENDS, OUT, LSE, TOTAL, JSAT,
    scaling, cap, H, KV, T, S, d, dv, dg,
    D: tl.constexpr, DV: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, CAPPED: tl.constexpr, SINKING: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """OUT [B, H, T, V]; LSE and TOTAL [B, H, T] float32; JSAT [B, H, T] int32, the first active block of keys."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    kv = b * KV + h // (H // KV)
    at, keys = block * BM + tl.arange(0, BM), tl.arange(0, BN)
    real = at < T
    starts = tl.load(STARTS + b * T + at, mask=real, other=S)
    ends = tl.load(ENDS + b * T + at, mask=real, other=-1)
    bias = tl.load(BIAS + h)
    q = _tile(Q, bh * T * d, at, T, d, D)
    gq = q
    if GATED:
        gq = _tile(GQ, bh * T * dg, at, T, dg, DG)
    table = Z + bh * T * P
    zrow = tl.minimum(at, T - 1) * P
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    if SINKING:
        m = tl.zeros([BM], tl.float32) + tl.load(SINKS + h)
        weight += 1.0
    acc = tl.zeros([BM, DV], tl.float32)
    jb = tl.maximum(tl.max(ends, 0), 0) // BN
    lowest = tl.maximum(tl.min(starts, 0), 0) // BN
    active = tl.max(ends - starts, 0) >= 0
    while (jb >= lowest) & active:
        js = jb * BN + keys
        k = _tile(K, kv * S * d, js, S, d, D)
        v = _tile(V, kv * S * dv, js, S, dv, DV)
        gk = k
        if GATED:
            gk = _tile(GK, kv * S * dg, js, S, dg, DG)
        seen = (js[None, :] >= starts[:, None]) & (js[None, :] <= ends[:, None])
        a, _ = _content(q, k, scaling, cap, CAPPED, PRECISION)
        g = _gates(gq, gk, bias, seen, GATED, PRECISION)
        raw, below, share = _places(g, total, P)
        total += tl.sum(g, 1)
        place = zrow[:, None] + below
        z0 = tl.load(table + place)
        z1 = tl.load(table + place + 1)
        s = tl.where(seen, a + z0 + (z1 - z0) * share, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        fade = tl.exp2((m - higher) * LOG2E)
        p = _weights(s, higher, seen)
        weight = weight * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        m = higher
        done = (total >= P - 1.0) | (starts >= jb * BN)
        active = tl.min(done.to(tl.int32), 0) == 0
        jb -= 1
    first = jb + 1
    for jb in range(lowest, first):
        js = jb * BN + keys
        k = _tile(K, kv * S * d, js, S, d, D)
        v = _tile(V, kv * S * dv, js, S, dv, DV)
        a, _ = _content(q, k, scaling, cap, CAPPED, PRECISION)
        seen = (js[None, :] >= starts[:, None]) & (js[None, :] <= ends[:, None])
        s = tl.where(seen, a, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        fade = tl.exp2((m - higher) * LOG2E)
        p = _weights(s, higher, seen)
        weight = weight * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        m = higher
    safe = tl.where(weight > 0, weight, 1.0)
    _put(OUT, bh * T * dv, at, T, dv, (acc / safe[:, None]).to(OUT.dtype.element_ty), DV)
    tl.store(LSE + bh * T + at, m + tl.log(safe), mask=real)
    tl.store(TOTAL + bh * T + at, total, mask=real)
    tl.store(JSAT + bh * T + at, at * 0 + first, mask=real)


# fmt: off
@triton.jit
def queries_kernel(
    Q, K, V, GQ, GK, BIAS, Z, STARTS, ENDS, DOUT, LSE, DELTA, TOTAL, JSAT, DQ, DGQ, DZ, DU, RIGHT, LEFT,
    scaling, cap, H, KV, T, S, d, dv, dg, row0, rows, tiles,
    D: tl.constexpr, DV: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Gradients of the queries from row0 on: DQ, DGQ, DZ, DU [B, H, T] (of each query's gate logits, summed).

    RIGHT and LEFT [B, H, tiles, rows]: at each active tile, the gates' sum right of it and the sum of the positions' gradients
    left of it.
    """
    block, bh = row0 // BM + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    kv = b * KV + h // (H // KV)
    at, keys = block * BM + tl.arange(0, BM), tl.arange(0, BN)
    real = at < T
    starts = tl.load(STARTS + b * T + at, mask=real, other=S)
    ends = tl.load(ENDS + b * T + at, mask=real, other=-1)
    bias = tl.load(BIAS + h)
    q = _tile(Q, bh * T * d, at, T, d, D)
    do = _tile(DOUT, bh * T * dv, at, T, dv, DV)
    gq = q
    if GATED:
        gq = _tile(GQ, bh * T * dg, at, T, dg, DG)
    table, grads = Z + bh * T * P, DZ + bh * T * P
    zrow = tl.minimum(at, T - 1) * P
    lse = tl.load(LSE + bh * T + at, mask=real, other=0.0)
    delta = tl.load(DELTA + bh * T + at, mask=real, other=0.0)
    right = tl.load(TOTAL + bh * T + at, mask=real, other=0.0)
    own = tl.load(JSAT + bh * T + at, mask=real, other=NEVER)
    first = tl.min(own, 0)
    lowest = tl.maximum(tl.min(starts, 0), 0) // BN
    stop = tl.maximum(tl.max(ends, 0), 0) // BN + 1
    dq = tl.zeros([BM, D], tl.float32)
    dgq = tl.zeros([BM, DG], tl.float32)
    left = tl.zeros([BM], tl.float32)
    du_sum = tl.zeros([BM], tl.float32)
    for jb in range(lowest, tl.minimum(first, stop)):
        js = jb * BN + keys
        k = _tile(K, kv * S * d, js, S, d, D)
        v = _tile(V, kv * S * dv, js, S, dv, DV)
        a, slope = _content(q, k, scaling, cap, CAPPED, PRECISION)
        seen = (js[None, :] >= starts[:, None]) & (js[None, :] <= ends[:, None])
        p = _weights(a, lse, seen)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    for jb in range(tl.maximum(first, lowest), stop):
        js = jb * BN + keys
        k = _tile(K, kv * S * d, js, S, d, D)
        v = _tile(V, kv * S * dv, js, S, dv, DV)
        gk = k
        if GATED:
            gk = _tile(GK, kv * S * dg, js, S, dg, DG)
        seen = (js[None, :] >= starts[:, None]) & (js[None, :] <= ends[:, None])
        a, slope = _content(q, k, scaling, cap, CAPPED, PRECISION)
        g = _gates(gq, gk, bias, seen & (jb >= own)[:, None], GATED, PRECISION)
        right -= tl.sum(g, 1)
        note = (bh * tiles + jb) * rows + at - row0
        tl.store(RIGHT + note, right, mask=real)
        tl.store(LEFT + note, left, mask=real)
        raw, below, share = _places(g, right, P)
        place = zrow[:, None] + below
        z0 = tl.load(table + place)
        z1 = tl.load(table + place + 1)
        s = a + z0 + (z1 - z0) * share
        p = _weights(s, lse, seen)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        tl.atomic_add(grads + place, ds * (1.0 - share), mask=seen, sem="relaxed")
        tl.atomic_add(grads + place + 1, ds * share, mask=seen, sem="relaxed")
        dp = tl.where(raw < P - 1.0, ds * (z1 - z0), 0.0)
        du = (tl.cumsum(dp, axis=1) + left[:, None]) * g * (1.0 - g)
        left += tl.sum(dp, 1)
        du_sum += tl.sum(du, 1)
        dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision=PRECISION)
        if GATED:
            dgq = tl.dot(du.to(gk.dtype), gk, dgq, input_precision=PRECISION)
    _put(DQ, bh * T * d, at, T, d, (dq * scaling).to(DQ.dtype.element_ty), D)
    if GATED:
        _put(DGQ, bh * T * dg, at, T, dg, dgq.to(DGQ.dtype.element_ty), DG)
    tl.store(DU + bh * T + at, du_sum, mask=real)


# fmt: off
@triton.jit
def keys_kernel(
    Q, K, V, GQ, GK, BIAS, Z, STARTS, ENDS, DOUT, LSE, DELTA, JSAT, DK, DV_, DGK, RIGHT, LEFT,
    scaling, cap, H, KV, T, S, d, dv, dg, row0, rows, tiles,
    D: tl.constexpr, DV: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Adds to DK, DV_, DGK (float32) of one block of keys what `rows` queries from row0 on, of all heads of its group, give."""
    jb, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, group = bk // KV, H // KV
    js = jb * BN + tl.arange(0, BN)
    k = _tile(K, bk * S * d, js, S, d, D)
    v = _tile(V, bk * S * dv, js, S, dv, DV)
    gk = k
    if GATED:
        gk = _tile(GK, bk * S * dg, js, S, dg, DG)
    dk = _tile(DK, bk * S * d, js, S, d, D)
    dv_ = _tile(DV_, bk * S * dv, js, S, dv, DV)
    dgk = tl.zeros([BN, DG], tl.float32)
    if GATED:
        dgk = _tile(DGK, bk * S * dg, js, S, dg, DG)
    for member in range(group):
        h = (bk % KV) * group + member
        bh = b * H + h
        bias = tl.load(BIAS + h)
        for block in range(row0 // BM, tl.cdiv(tl.minimum(row0 + rows, T), BM)):
            at = block * BM + tl.arange(0, BM)
            real = at < T
            starts = tl.load(STARTS + b * T + at, mask=real, other=S)
            ends = tl.load(ENDS + b * T + at, mask=real, other=-1)
            if (tl.max(ends, 0) >= jb * BN) & (tl.min(starts, 0) < (jb + 1) * BN):
                own = tl.load(JSAT + bh * T + at, mask=real, other=NEVER)
                q = _tile(Q, bh * T * d, at, T, d, D)
                do = _tile(DOUT, bh * T * dv, at, T, dv, DV)
                lse = tl.load(LSE + bh * T + at, mask=real, other=0.0)
                delta = tl.load(DELTA + bh * T + at, mask=real, other=0.0)
                seen = (js[None, :] >= starts[:, None]) & (js[None, :] <= ends[:, None])
                s, slope = _content(q, k, scaling, cap, CAPPED, PRECISION)
                dov = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                if jb >= tl.min(own, 0):
                    gq = q
                    if GATED:
                        gq = _tile(GQ, bh * T * dg, at, T, dg, DG)
                    note = (bh * tiles + jb) * rows + at - row0
                    # The others are at the last position, or see nothing here; nothing was noted of them.
                    open_ = (jb >= own) & (ends >= jb * BN) & (starts < (jb + 1) * BN)
                    right = tl.load(RIGHT + note, mask=open_, other=P - 1.0)
                    left = tl.load(LEFT + note, mask=open_, other=0.0)
                    g = _gates(gq, gk, bias, seen & open_[:, None], GATED, PRECISION)
                    raw, below, share = _places(g, right, P)
                    table = Z + bh * T * P
                    place = tl.minimum(at, T - 1)[:, None] * P + below
                    z0 = tl.load(table + place)
                    z1 = tl.load(table + place + 1)
                    s += z0 + (z1 - z0) * share
                    p = _weights(s, lse, seen)
                    ds = p * dov
                    if GATED:
                        dp = tl.where(raw < P - 1.0, ds * (z1 - z0), 0.0)
                        du = (tl.cumsum(dp, axis=1) + left[:, None]) * g * (1.0 - g)
                        dgk = tl.dot(tl.trans(du).to(gq.dtype), gq, dgk, input_precision=PRECISION)
                else:
                    p = _weights(s, lse, seen)
                    ds = p * dov
                dv_ = tl.dot(tl.trans(p).to(do.dtype), do, dv_, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds * slope * scaling).to(q.dtype), q, dk, input_precision=PRECISION)
    _put(DK, bk * S * d, js, S, d, dk, D)
    _put(DV_, bk * S * dv, js, S, dv, dv_, DV)
    if GATED:
        _put(DGK, bk * S * dg, js, S, dg, dgk, DG)


# (queries, keys) of a tile, warps and stages of the pipeline, by the widest head width up to: forward, queries, keys. All three
# walk the same blocks of keys. Chosen so that no register spills on sm_80 and sm_90 in bfloat16, where that could be had
# (`benchmarks/cope_compile.py` tells); the time they take has not been measured.
TILES = {
    64: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((16, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
KERNELS = ("forward", "queries", "keys")


def tiles_for(widths: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """For each kernel: BM, BN, num_warps and num_stages of its launch, by the widest of the head widths."""
    chosen = TILES[min((limit for limit in TILES if limit >= max(widths)), default=max(TILES))]
    names = ("BM", "BN", "num_warps", "num_stages")
    return {kernel: dict(zip(names, numbers, strict=True)) for kernel, numbers in zip(KERNELS, chosen, strict=True)}


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class Fused(torch.autograd.Function):
    """`apply(q, k, v, gate_q, gate_k, gate_bias, sinks, z, starts, ends, scaling, cap)` → [B, T, H, V].

    Shapes as in `cope_equations.Inputs`; starts and ends [B, T] int32: the first and the last key that each query sees.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, gate_q, gate_k, gate_bias, sinks, z, starts, ends, scaling, cap = arguments
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        gated = gate_q is not None
        gq, gk = (gate_q.contiguous(), gate_k.contiguous()) if gated else (q, k)
        table = (z.float() - z[..., -1:].float()).contiguous()
        (batch, heads, rows, width), (kv, keys) = q.shape, k.shape[1:3]
        sizes = (heads, kv, rows, keys, width, v.shape[-1], gq.shape[-1])
        tile = tiles_for((width, v.shape[-1], gq.shape[-1]))["forward"]
        blocks = triton.cdiv(rows, tile["BM"])
        out = q.new_empty(batch, heads, rows, v.shape[-1])
        lse, total = (torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) for _ in range(2))
        first = torch.empty(batch, heads, rows, dtype=torch.int32, device=q.device)
        bias = gate_bias.float().contiguous()
        sunk = bias if sinks is None else sinks.float().contiguous()
        marks = _marks(q, v, gq, z.shape[-1], gated, cap)
        limit = 1.0 if cap is None else float(cap)
        forward_kernel[(blocks, batch * heads)](
            q, k, v, gq, gk, bias, sunk, table, starts, ends, out, lse, total, first, float(scaling), limit, *sizes,
            SINKING=sinks is not None, **marks, **tile,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, gate_q, gate_k, bias, sinks, table, starts, ends, out, lse, total, first)
        ctx.settings = float(scaling), cap, sizes, gate_bias.dtype, z.dtype
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, gate_q, gate_k, bias, sinks, table, starts, ends, out, lse, total, first = ctx.saved_tensors
        scaling, cap, sizes, bias_dtype, z_dtype = ctx.settings
        heads, kv, rows, keys = sizes[:4]
        batch, gated, device = q.shape[0], gate_q is not None, q.device
        gq, gk = (gate_q.contiguous(), gate_k.contiguous()) if gated else (q, k)
        dout = grads[0].transpose(1, 2).to(q.dtype).contiguous()
        delta = (dout.float() * out.float()).sum(-1)
        tiles = tiles_for((q.shape[-1], v.shape[-1], gq.shape[-1]))
        dq, dgq = torch.empty_like(q), torch.empty_like(gq)
        dk, dv, dgk = (torch.zeros(like.shape, dtype=torch.float32, device=device) for like in (k, v, gk))
        dz, du = torch.zeros_like(table), torch.empty_like(lse)
        count, step = triton.cdiv(keys, tiles["keys"]["BN"]), max(tiles[name]["BM"] for name in ("queries", "keys"))
        segment = max(1, NOTES // (8 * batch * heads * count) // step) * step
        segment = min(segment, triton.cdiv(rows, step) * step)
        right, left = (torch.empty(batch, heads, count, segment, dtype=torch.float32, device=device) for _ in range(2))
        limit, marks = 1.0 if cap is None else float(cap), _marks(q, v, gq, table.shape[-1], gated, cap)
        shared = (q, k, v, gq, gk, bias, table, starts, ends, dout, lse, delta)
        for row0 in range(0, rows, segment):
            numbers = (scaling, limit, *sizes, row0, segment, count)
            here = triton.cdiv(min(segment, rows - row0), tiles["queries"]["BM"])
            queries_kernel[(here, batch * heads)](
                *shared, total, first, dq, dgq, dz, du, right, left, *numbers, **marks, **tiles["queries"]
            )
            keys_kernel[(count, batch * kv)](*shared, first, dk, dv, dgk, right, left, *numbers, **marks, **tiles["keys"])
        dz[..., -1] -= dz.sum(-1)
        dsinks = None if sinks is None else -(torch.exp(sinks.float()[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
        gates = (dgq, dgk.to(gk.dtype)) if gated else (None, None)
        dbias = du.sum((0, 2)).to(bias_dtype)
        return (dq, dk.to(k.dtype), dv.to(v.dtype), *gates, dbias, dsinks, dz.to(z_dtype), None, None, None, None)


def _marks(q: Tensor, v: Tensor, gq: Tensor, positions: int, gated: bool, cap: float | None) -> dict[str, Any]:
    return {
        "D": _padded(q.shape[-1]),
        "DV": _padded(v.shape[-1]),
        "DG": _padded(gq.shape[-1]),
        "P": positions,
        "GATED": gated,
        "CAPPED": cap is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }

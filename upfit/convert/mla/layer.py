"""One layer of latent attention, and its closed form from the layer that it replaces.

Shapes: E' inputs, H query heads, K key/value heads of the source, D and V head widths, S slots, N unrotated dimensions of a
head, r latent width. Rotated dimensions stand as the first of every slot, then the second of every slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upfit.calibration.reduction import TINY, powers, reduce
from upfit.convert.mla.latent import Metrics, joint, together
from upfit.convert.mla.slots import Slots, share_pairs


@dataclass(frozen=True)
class Source:
    """The layer as it is, float64: q [H, D, E'] and k [K, D, E'] in `AttentionTraits.order`, linear in the inputs; v [K, V,
    E'], o [E, H, V]; P rotated `pairs`; scores are q · k times `scaling`."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    pairs: int
    scaling: float

    @property
    def owners(self) -> Tensor:
        """[H]: the key/value head that a query head uses."""
        return torch.arange(len(self.q)).div(len(self.q) // len(self.k), rounding_mode="floor")


@dataclass(frozen=True)
class Latent:
    """q [H, 2S + N, E'], key [2S + r, E'] (rotated keys, then the latent), up_k [K, N, r], up_v [K, V, r], o [E, H, V]."""

    q: Tensor
    key: Tensor
    up_k: Tensor
    up_v: Tensor
    o: Tensor
    slots: tuple[int, ...]  # the pair of each slot

    @property
    def rotated(self) -> int:
        return 2 * len(self.slots)

    def to(self, device: torch.device) -> "Latent":
        return replace(self, **{name: getattr(self, name).float().to(device) for name in ("q", "key", "up_k", "up_v", "o")})

    def of_heads(self, up: Tensor) -> Tensor:
        """`up` [K, .., r] for each query head."""
        return up.repeat_interleave(len(self.q) // len(up), 0)

    def absorbed(self, queries: Tensor) -> Tensor:
        """Queries [.., H, 2S + N] as they meet what is cached: [.., H, 2S + r]."""
        inner = torch.einsum("...hn,hnr->...hr", queries[..., self.rotated :], self.of_heads(self.up_k))
        return torch.cat([queries[..., : self.rotated], inner], -1)


def closed_form(
    source: Source,
    sums: dict[str, Tensor],
    metrics: Metrics,
    counts: Sequence[int],
    width: int,
    balance: float,
    cut: int | None = None,
) -> Latent:
    """The layer with `counts` [P] shared keys for each pair (fastest first) and a latent of `width`; `sums` as in `sums.py`,
    `metrics` by `metrics_of`.

    Pairs without a shared key lose their rotation and are plain dimensions. `balance` multiplies the weight of the keys' errors
    against the values': 1 where score errors of all keys agree, less where they partly average out. Where nothing has to be
    left out, nothing is: the layer computes the same. With a `cut`, where every pair has one shared key, pairs from it on turn
    so slowly that all keys on them are mixed as if they did not, and then turned; with values alone in the latent that is
    multi-query attention as heads are merged.
    """
    first = torch.arange(source.pairs)
    energy = sums["queries"].diagonal(dim1=1, dim2=2)
    energy = energy[:, first] + energy[:, source.pairs + first]
    slots = share_pairs(sums["pairs"], energy, source.owners, counts)
    rotated_q, rotated_k = _rotated(source, slots)
    if cut is not None:
        _mix_slow(source, sums, cut, rotated_q, rotated_k)
    plain = plain_places(source, counts)
    down, up_k, up_v = _reduced(source, sums, metrics, plain, width, balance)
    q = torch.cat([rotated_q, source.q[:, plain]], 1)
    return even(Latent(q, torch.cat([rotated_k, down]), up_k, up_v, source.o, slots.pairs), sums)


def metrics_of(sums: dict[str, Tensor]) -> Metrics:
    """The moments of the inputs as keys and as values see them, of one size."""
    return together(*(sums[name] / sums[name].trace().clamp_min(1e-30) for name in ("keys", "values")))


def _reduced(
    source: Source, sums: dict[str, Tensor], metrics: Metrics, plain: list[int], width: int, balance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The latent [width, E'], and what makes `plain` keys [K, N, width] and values [K, V, width] of it."""
    keys, values, count = source.k[:, plain].flatten(0, 1), source.v.flatten(0, 1), len(source.k)
    both = torch.cat([keys, values])
    if width >= min(both.shape):  # all of them, or the inputs that they are made of: the layer's text does not matter
        rows, inputs = both.shape
        down, up = (both, torch.eye(rows).to(both)) if width >= rows else (torch.eye(inputs).to(both), both)
        up = torch.nn.functional.pad(up, (0, width - len(down)))
        down = torch.nn.functional.pad(down, (0, 0, 0, width - len(down)))
        return down, up[: len(keys)].unflatten(0, (count, -1)), up[len(keys) :].unflatten(0, (count, -1))
    of_keys, of_values = (sums[name].trace().clamp_min(1e-30) / sums["rows"] / len(source.q) for name in ("keys", "values"))
    units = source.scaling * (balance * of_keys).sqrt(), of_values.sqrt()  # both errors are the output's, both moments alike
    (root_k, back_k), (root_v, back_v) = key_metric(source, sums, plain), _metric_of_values(source)
    reduced = joint(units[0] * (root_k @ keys), units[1] * (root_v @ values), metrics, width)
    up_k, up_v = back_k @ reduced.keys / units[0], back_v @ reduced.values / units[1]
    return reduced.down, up_k.unflatten(0, (count, -1)), up_v.unflatten(0, (count, -1))


def _rotated(source: Source, slots: Slots) -> tuple[Tensor, Tensor]:
    """Queries [H, 2S, E'] and shared keys [2S, E'] of the slots."""
    pairs = list(slots.pairs)
    first, second = pairs, [source.pairs + pair for pair in pairs]
    keys = torch.complex(source.k[:, first], source.k[:, second])  # [K, S, E']
    queries = torch.complex(source.q[:, first], source.q[:, second])
    keys = torch.einsum("sk,kse->se", slots.mix, keys)
    queries = slots.factors.conj().T[..., None] * queries
    return torch.cat([queries.real, queries.imag], 1), torch.cat([keys.real, keys.imag])


def _mix_slow(source: Source, sums: dict[str, Tensor], cut: int, rotated_q: Tensor, rotated_k: Tensor) -> None:
    """Write into `rotated_q` [H, 2P, E'] and `rotated_k` [2P, E'] what pairs from `cut` on get where keys on all of them are
    reduced together, the strongest directions on the slowest."""
    slow = [place for pair in reversed(range(cut, source.pairs)) for place in (pair, source.pairs + pair)]
    keys = source.k[:, slow].flatten(0, 1)
    moment, (root, _) = keys @ sums["keys"] @ keys.T, key_metric(source, sums, slow)
    up, down, _ = reduce(moment, root @ root, len(slow))
    scale = (down @ moment @ down.T).diagonal().mean() / moment.diagonal().mean().clamp_min(TINY)
    scale = scale.clamp_min(TINY).sqrt()  # the new keys are as large as the old
    rotated_k[slow] = down @ keys / scale
    rotated_q[:, slow] = (
        torch.einsum("hsr,hse->hre", up.unflatten(0, (len(source.k), -1))[source.owners], source.q[:, slow]) * scale
    )


def plain_places(source: Source, counts: Sequence[int]) -> list[int]:
    """The dimensions that have no shared rotated key."""
    slow = [pair for pair, count in enumerate(counts) if not count]
    return [*slow, *(source.pairs + pair for pair in slow), *range(2 * source.pairs, source.q.shape[1])]


def key_metric(source: Source, sums: dict[str, Tensor], plain: list[int]) -> tuple[Tensor, Tensor]:
    """Root and inverse root [K·N, K·N] of what errors of unrotated keys do to the scores: block-diagonal, the moment of the
    queries of each head, weighed by what its scores do to the output."""
    share = sums["share"] / sums["share"].mean().clamp_min(1e-30)
    weighed = sums["queries"] / sums["rows"] * share[:, None, None]
    return _block_powers(weighed[:, plain][:, :, plain], source)


def _metric_of_values(source: Source) -> tuple[Tensor, Tensor]:
    """The same [K·V, K·V] of values: the output projection's."""
    return _block_powers(torch.einsum("ehv,ehw->hvw", source.o, source.o), source)


def _block_powers(of_heads: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    parts = [powers(own.sum(0)) for own in of_heads.unflatten(0, (len(source.k), -1))]
    return torch.block_diag(*[root for root, _ in parts]), torch.block_diag(*[inverse for _, inverse in parts])


def even(latent: Latent, sums: dict[str, Tensor]) -> Latent:
    """The same layer with every latent number of a mean square near 1 on the text, by powers of two, which round nothing."""
    down = latent.key[latent.rotated :]
    size = ((down @ sums["inputs"].to(down)) * down).sum(1) / sums["tokens"].to(down)
    factor = torch.exp2(-size.clamp_min(1e-30).sqrt().log2().round()).where(size > 0, torch.ones_like(size))
    key = torch.cat([latent.key[: latent.rotated], down * factor[:, None]])
    return replace(latent, key=key, up_k=latent.up_k / factor, up_v=latent.up_v / factor)

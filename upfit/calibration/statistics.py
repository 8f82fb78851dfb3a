"""What calibration keeps of one attention layer: sums over sampled query positions, as named tensors.

Shapes: H query heads, K key/value heads, D and V head widths, P rotated pairs. Queries and keys are taken as the attention sees
them (after norms and rotation) with their dimensions in `AttentionTraits.order`. For each sampled query position, p are its
attention weights; "centred" takes the mean under p away, for a softmax does not see a shift of all its scores. The sums are
linear in the text, so pieces add up.

- `keys` [K·D, K·D]: centred second moment of the keys under p, over all heads.
- `key_pairs` [H, P, K, K, 2]: the same for each query head and rotated pair, keys as complex numbers (real, imaginary).
- `queries` [H, D, D]: second moment of the queries.
- `values` [K·V, K·V]: second moment of what each query head's attention makes of all the values, over all heads; as the
  output projection sees it, where a gate multiplies each head.
- `value_dimensions` [H, V, K, K]: in its place where a gate multiplies each dimension, of each query head and dimension.
- `rows` []: how many query positions were summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.between import OF_DIMENSIONS
from upfit.calibration.observe import Seen
from upfit.calibration.traits import AttentionTraits

SEGMENT = 512  # positions that share one range of keys: rows of a long window do not look at keys that are still to come


@dataclass(frozen=True)
class Rows:
    """Sampled query positions of one batch: `at` [R] ascending; they look at the first `keys` keys. `counted` [B, R]: 1 where a
    position is no padding, else 0; None: all are."""

    at: Tensor
    keys: int
    counted: Tensor | None = None

    def of_counted(self, rows: Tensor) -> Tensor:
        """`rows` [B, H, R, ...] with those of padding 0."""
        if self.counted is None:
            return rows
        return rows * self.counted[:, None].reshape(*self.counted[:, None].shape, *[1] * (rows.ndim - 3))


ROWS = 96  # query positions sampled of each SEGMENT


def sample_rows(
    tokens: int,
    per_segment: int,
    layer: int,
    batch: int,
    device: torch.device | str = "cpu",
    keys: int | None = None,
    counted: Tensor | None = None,
) -> list[Rows]:
    """`per_segment` positions of each stretch of SEGMENT positions of a window (half as many in a longer one, whose rows are
    longer), drawn without repetition, for one layer and batch. They look at the keys up to the end of their stretch, or at all
    `keys` of another stream. `counted` [B, tokens]: False at padding."""
    if tokens > SEGMENT:
        per_segment = per_segment // 2
    # A prime above any number of batches: no seed comes twice.
    generator = torch.Generator().manual_seed(100_003 * layer + batch)
    chosen = []
    for start in range(0, tokens, SEGMENT):
        length = min(SEGMENT, tokens - start)
        at = start + torch.randperm(length, generator=generator)[:per_segment].sort().values
        rows = at.to(device)
        real = None if counted is None else counted[:, rows].float()
        chosen.append(Rows(rows, start + length if keys is None else keys, real))
    return chosen


def observe(seen: Seen, traits: AttentionTraits, rows: list[Rows], gates: Tensor | None = None) -> dict[str, Tensor]:
    """The sums of one batch (float64), see the module. Without `traits.keys` or `traits.values` their parts are left out.
    `gates` [B, T, H, V]: of layers that have them."""
    sums: dict[str, Tensor] = {}
    for sampled in rows:
        weights = sampled.of_counted(seen.scores(sampled.at, sampled.keys)[1])
        add(sums, {"rows": torch.tensor(float(weights.shape[0] * weights.shape[2]), dtype=torch.float64)})
        if traits.keys:
            add(sums, _key_sums(seen, traits, sampled, weights))
        if traits.values:
            add(sums, _value_sums(seen, traits, sampled, weights, gates))
    return sums


def _value_sums(seen: Seen, traits: AttentionTraits, rows: Rows, weights: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
    values = seen.v[:, :, : rows.keys].transpose(1, 2).flatten(2)  # [B, keys, K·V]
    mixed = torch.einsum("bhrl,blv->bhrv", weights, values)
    if traits.gated:
        assert gates is not None
        mixed = mixed.unflatten(-1, (seen.v.shape[1], -1)) * gates[:, rows.at].transpose(1, 2)[..., None, :]
        if traits.gated == OF_DIMENSIONS:
            return {"value_dimensions": torch.einsum("bhrkv,bhrjv->hvkj", mixed, mixed).double()}
        mixed = mixed.flatten(-2)
    mixed = mixed.flatten(0, 2)
    return {"values": (mixed.T @ mixed).double()}


def add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add `more` into `sums`."""
    for name, tensor in more.items():
        sums[name] = sums[name] + tensor if name in sums else tensor


def _key_sums(seen: Seen, traits: AttentionTraits, rows: Rows, weights: Tensor) -> dict[str, Tensor]:
    order, pairs = list(traits.order), traits.pairs
    queries = rows.of_counted(seen.q[:, :, rows.at])[..., order].transpose(0, 1).flatten(1, 2)  # [H, B·R, D]
    keys = seen.k[:, :, : rows.keys, order].transpose(1, 2)  # [B, keys, K, D]
    flat = keys.flatten(2)
    columns = weights.sum(2)  # [B, H, keys]
    means = torch.einsum("bhrl,blk->hbrk", weights, flat).flatten(1, 2)  # [H, B·R, K·D]
    total = (flat * columns.sum(1)[..., None]).flatten(0, 1).T @ flat.flatten(0, 1)
    total = total - sum(mean.T @ mean for mean in means)
    sums = {"keys": total.double(), "queries": (queries.transpose(1, 2) @ queries).double()}
    if pairs:
        turned = torch.complex(keys[..., :pairs], keys[..., pairs : 2 * pairs]).flatten(0, 1).permute(2, 1, 0)  # [P, K, N]
        turned = turned.contiguous()
        across, parts = turned.mH.resolve_conj().contiguous(), []  # else each product would copy it
        for head, mean in enumerate(means):
            width = keys.shape[-1]
            middle = mean.unflatten(1, (-1, width))
            centre = torch.complex(middle[..., :pairs], middle[..., pairs : 2 * pairs]).permute(2, 1, 0)  # [P, K, B·R]
            weighted = turned * columns[:, head].flatten()
            centre = centre.contiguous()
            parts.append(weighted @ across - centre @ centre.mH.resolve_conj())
        sums["key_pairs"] = torch.view_as_real(torch.stack(parts)).double()
    return sums

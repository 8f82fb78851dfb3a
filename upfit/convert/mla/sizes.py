"""How wide a latent is and how many rotated keys stand beside it: what a cache of so many numbers a token is spent on.

Shapes: K key/value heads, D and V head widths, P rotated pairs, S slots (rotated keys that all heads share), N unrotated
dimensions of a head, r latent width. A token's cache in a layer is 2S + r numbers; of the source K (D + V).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.attention import Geometry
    from upfit.architecture.layers import Architecture

ROTATED_SHARE = 0.4  # at most, of a cache: beyond it a rotated key is worth less than what it takes from the latent
STOCK_SHARE = 0.5  # of the pairs, the fastest: which are best with one rotated key each, at half and a third of a cache


@dataclass(frozen=True)
class Sizes:
    """`counts` [P]: rotated keys on each pair, fastest first; `latent` r; `unrotated` N."""

    counts: tuple[int, ...]
    latent: int
    unrotated: int

    @property
    def slots(self) -> int:
        return sum(self.counts)

    @property
    def numbers(self) -> int:
        """What a token adds to a layer's cache."""
        return 2 * self.slots + self.latent


def sizes(shape: "Geometry", pairs: int, several: bool, cache: str | None, latent: int | None, rope: int | None) -> Sizes:
    """What `cache` (a share such as 50%, or numbers a token and layer) is spent on, or the widths as they are asked for; with
    `several` a pair may have more than one rotated key.

    Raises UpfitError for widths that are none.
    """
    whole = shape.kv_heads * (shape.head_dim + shape.v_head_dim)
    if cache is not None:
        return _of_cache(_numbers(cache, whole), shape, pairs, several)
    assert latent is not None and rope is not None
    counts = _dealt(rope, shape, pairs)
    result = _sizes(counts, latent, shape)
    most = shape.kv_heads * (result.unrotated + shape.v_head_dim)
    if not 1 <= latent <= most:
        raise UpfitError(f"--latent got {latent}; with --rope-dim {rope} choose from 1 to {most}, which loses nothing")
    return result


def _numbers(cache: str, whole: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", cache.strip())
    if match is None:
        raise UpfitError(f"--cache got {cache!r}; give a share of the source's, such as 50%, or numbers a token and layer")
    numbers = round(float(match[1]) / 100 * whole) if match[2] else int(float(match[1]))
    if not 2 <= numbers <= whole:
        raise UpfitError(f"--cache {cache} is {numbers} numbers a token and layer; choose from 2 to the source's {whole}")
    return numbers


def _of_cache(numbers: int, shape: "Geometry", pairs: int, several: bool) -> Sizes:
    if numbers == shape.kv_heads * (shape.head_dim + shape.v_head_dim):
        return _sizes([shape.kv_heads] * pairs, numbers - 2 * pairs * shape.kv_heads, shape)
    rotated = min(round(STOCK_SHARE * pairs), int(ROTATED_SHARE * numbers) // 2)
    most = min(shape.kv_heads, int(ROTATED_SHARE * numbers) // (2 * rotated)) if rotated and several else 1
    counts = [most] * rotated + [0] * (pairs - rotated)
    return _sizes(counts, numbers - 2 * sum(counts), shape)


def _dealt(rope: int, shape: "Geometry", pairs: int) -> list[int]:
    """How many rotated keys each pair has of `rope` numbers: one each on the fastest; where half of the pairs cannot take them,
    several on the faster half, and on all of them only where all heads keep theirs."""
    most = shape.kv_heads * pairs
    if rope < 0 or rope % 2 or rope > 2 * most:
        raise UpfitError(f"--rope-dim got {rope}; choose an even number from 0 to {2 * most}, which loses nothing")
    slots, half = rope // 2, max(1, round(STOCK_SHARE * pairs))
    if slots == most:
        return [shape.kv_heads] * pairs
    if slots <= half or (shape.kv_heads == 1 and slots <= pairs):
        return [1] * slots + [0] * (pairs - slots)
    each, over = divmod(slots, half)
    if each + bool(over) > shape.kv_heads:  # more than the faster half can hold
        each, over = divmod(slots, pairs)
        return [each + (pair < over) for pair in range(pairs)]
    return [each + (pair < over) for pair in range(half)] + [0] * (pairs - half)


def _sizes(counts: list[int], latent: int, shape: "Geometry") -> Sizes:
    return Sizes(tuple(counts), latent, shape.head_dim - 2 * sum(count > 0 for count in counts))


def rotated_pairs(architecture: "Architecture") -> int:
    """Pairs of dimensions that the model's class rotates by position; 0 where it has no rotation.

    Raises UpfitError where parts of the model rotate in different numbers.
    """
    from upfit.architecture.meta_model import build_on_meta

    model = build_on_meta(architecture.config)
    known = {int(buffer.shape[-1]) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if len(known) > 1:
        raise UpfitError(
            f"{architecture.entry.model_type} rotates {sorted(known)} pairs in its layers; it has to be one number"
        )
    return known.pop() if known else 0


def layer_settings(sizes: Sizes, columns: list[int]) -> dict[str, Any]:
    """What `modeling_upfit_mla.py` is told of a layer; `columns` [P] are those of the family's cosines, pairs fastest first."""
    own = [columns[pair] for pair, count in enumerate(sizes.counts) for _ in range(count)]
    return {"latent": sizes.latent, "unrotated": sizes.unrotated, "columns": own}

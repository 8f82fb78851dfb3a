"""How wide a latent is and how many rotated keys stand beside it: what a cache of so many numbers a token is spent on.

Shapes: K key/value heads, D and V head widths, P rotated pairs, S slots (rotated keys that all heads share), N unrotated
dimensions of a head, r latent width. A token's cache in a layer is 2S + r numbers; of the source K (D + V).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upfit.architecture.meta_model import build_on_meta
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.attention import Geometry
    from upfit.architecture.layers import Architecture

ROTATED_SHARES = (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # of the pairs, the fastest, that may keep a rotation
MOST_ROTATED = 0.8  # of a cache: the rest is for values, of which rotated keys hold nothing


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


@dataclass(frozen=True)
class Asked:
    """A cache, as a share such as 50% or as numbers a token and layer, or the widths that it is spent on."""

    cache: str | None = None
    latent: int | None = None
    rope_dim: int | None = None


def possible_sizes(shape: "Geometry", inputs: int, pairs: int, several: bool, asked: Asked) -> list[Sizes]:
    """Ways to have what is `asked`, of layers with so many `inputs`; with `several` a pair may have more than one rotated key.
    A latent is never wider than what it is made of, whatever the cache.

    Raises UpfitError for widths that are none.
    """
    most, whole = shape.kv_heads if several else 1, shape.kv_heads * (shape.head_dim + shape.v_head_dim)
    cache, latent, rope_dim = asked.cache, asked.latent, asked.rope_dim
    if cache is not None:
        numbers = _numbers(cache, whole)
        dealt = _dealings(pairs, most)
        every = [_sizes(counts, _widest(counts, shape, inputs, numbers - 2 * sum(counts)), shape) for counts in dealt]
        lossless = [one for one in every if _whole(one, shape)]
        if numbers == whole and lossless:
            return lossless
        chosen = [one for one in every if 2 * one.slots <= MOST_ROTATED * numbers and one.latent > 0]
        if not chosen:
            least = f"{numbers} numbers a token and layer, too few to rotate {sum(count > 0 for count in dealt[0])} pairs"
            raise UpfitError(f"--cache {cache} is {least}; give more, or --latent and --rope-dim")
        return chosen
    assert latent is not None and rope_dim is not None
    dealt = [counts for counts in _dealings(pairs, most, any_share=True) if 2 * sum(counts) == rope_dim]
    if not dealt:
        raise UpfitError(f"--rope-dim got {rope_dim}; choose an even number from 2 to {2 * pairs * most}")
    chosen = [_sizes(counts, latent, shape) for counts in dealt]
    widest = max(_widest(counts, shape, inputs, whole) for counts in dealt)
    if not 1 <= latent <= widest:
        raise UpfitError(f"--latent got {latent}; with --rope-dim {rope_dim} choose from 1 to {widest}, which loses nothing")
    return chosen


def _widest(counts: list[int], shape: "Geometry", inputs: int, most: int) -> int:
    """The width of a latent, up to `most`, beyond which there is nothing to hold."""
    plain = shape.head_dim - 2 * sum(count > 0 for count in counts)
    return min(most, inputs, shape.kv_heads * (plain + shape.v_head_dim))


def _whole(sizes: Sizes, shape: "Geometry") -> bool:
    """Whether nothing is lost."""
    return all(count == shape.kv_heads for count in sizes.counts)


def _numbers(cache: str, whole: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", cache.strip())
    if match is None:
        raise UpfitError(f"--cache got {cache!r}; give a share of the source's, such as 50%, or numbers a token and layer")
    numbers = round(float(match[1]) / 100 * whole) if match[2] else int(float(match[1]))
    if not 2 <= numbers <= whole:
        raise UpfitError(f"--cache {cache} is {numbers} numbers a token and layer; choose from 2 to the source's {whole}")
    return numbers


def _dealings(pairs: int, most: int, any_share: bool = False) -> list[list[int]]:
    """Ways to give the fastest of `pairs` up to `most` rotated keys each, all as many: of a few shares of them, or of any."""
    if not pairs:
        return [[]]
    fast = range(1, pairs + 1) if any_share else sorted({max(1, round(share * pairs)) for share in ROTATED_SHARES})
    return [[count] * rotated + [0] * (pairs - rotated) for rotated in fast for count in range(1, most + 1)]


def _sizes(counts: list[int], latent: int, shape: "Geometry") -> Sizes:
    return Sizes(tuple(counts), latent, shape.head_dim - 2 * sum(count > 0 for count in counts))


def without_rotation(sizes: Sizes, shape: "Geometry", inputs: int) -> Sizes:
    """The same cache in a layer that rotates nothing."""
    return Sizes((), _widest([], shape, inputs, sizes.numbers), shape.head_dim)


def rotated_pairs(architecture: "Architecture") -> int:
    """Pairs of dimensions that the model's class rotates by position; 0 where it has no rotation.

    Raises UpfitError where parts of the model rotate in different numbers.
    """
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

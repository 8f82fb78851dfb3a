"""What a cache is spent on: no more than was asked for, no more than there is to hold, and all of it where that is exact."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from upfit.architecture.attention import Geometry
from upfit.convert.mla import sizes as sizes_room
from upfit.convert.mla.sizes import (
    MOST_ROTATED,
    Asked,
    Sizes,
    layer_settings,
    possible_sizes,
    rotated_pairs,
    without_rotation,
)
from upfit.errors import UpfitError

SHAPES = [Geometry(9, 3, 64, 64), Geometry(4, 2, 8, 8), Geometry(4, 1, 16, 15), Geometry(8, 8, 16, 16)]
CACHES = ["100%", "50%", "33.3%", "25%"]


def whole(shape: Geometry) -> int:
    return shape.kv_heads * (shape.head_dim + shape.v_head_dim)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_share_of_the_cache_is_spent_and_no_more(shape: Geometry, cache: str, several: bool) -> None:
    numbers, inputs, pairs = round(float(cache[:-1]) / 100 * whole(shape)), 1000, shape.head_dim // 2
    sizes = possible_sizes(shape, inputs, pairs, several, Asked(cache))
    assert sizes and len(set(sizes)) == len(sizes)
    for one in sizes:
        rotated = sum(count > 0 for count in one.counts)
        holds = shape.kv_heads * (one.unrotated + shape.v_head_dim)
        assert len(one.counts) == pairs and one.unrotated == shape.head_dim - 2 * rotated
        assert one.counts == tuple(sorted(one.counts, reverse=True)) and max(one.counts) <= (shape.kv_heads if several else 1)
        assert one.slots == sum(one.counts) and one.numbers == 2 * one.slots + one.latent
        assert one.numbers == numbers or (one.numbers < numbers and one.latent == holds)
        assert one.latent >= 1 and (2 * one.slots <= MOST_ROTATED * numbers or one.numbers == whole(shape))
    assert possible_sizes(shape, inputs, pairs, several, Asked(str(numbers))) == sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_cache_loses_nothing(shape: Geometry) -> None:
    """A slot for every head on the pairs that rotate, a latent as wide as the rest."""
    pairs = shape.head_dim // 4
    (one,) = possible_sizes(shape, 1000, pairs, True, Asked("100%"))
    assert one.counts == (shape.kv_heads,) * pairs and one.numbers == whole(shape)
    assert one.latent == shape.kv_heads * (one.unrotated + shape.v_head_dim)
    assert possible_sizes(shape, 1000, 0, True, Asked("100%")) == [Sizes((), whole(shape), shape.head_dim)]


def test_a_latent_is_no_wider_than_what_it_is_made_of() -> None:
    shape = Geometry(8, 8, 16, 16)
    for several, cache in itertools.product((False, True), ("100%", "50%")):
        sizes = possible_sizes(shape, 20, 8, several, Asked(cache))
        assert max(one.latent for one in sizes) == 20
    assert without_rotation(Sizes((1,) * 8, 128, 0), shape, 20) == Sizes((), 20, 16)
    assert without_rotation(Sizes((1,) * 8, 128, 0), shape, 1000) == Sizes((), 144, 16)


@pytest.mark.parametrize(("several", "rope_dim"), [(False, 4), (True, 4), (True, 12)])
def test_widths_are_taken_as_they_are(several: bool, rope_dim: int) -> None:
    """Every way to have that many rotated keys."""
    shape = Geometry(6, 3, 8, 8)
    sizes = possible_sizes(shape, 1000, 4, several, Asked(latent=5, rope_dim=rope_dim))
    assert all(one.latent == 5 and 2 * one.slots == rope_dim for one in sizes)
    rotated = {False: {4: [2]}, True: {4: [1, 2], 12: [2, 3]}}[several][rope_dim]
    assert sorted(sum(count > 0 for count in one.counts) for one in sizes) == rotated


ERRORS = [
    (Asked("lots"), "--cache got 'lots'; give a share of the source's, such as 50%, or numbers a token and layer"),
    (Asked("-5"), "--cache got '-5'; give a share of the source's, such as 50%, or numbers a token and layer"),
    (Asked("1%"), "--cache 1% is 0 numbers a token and layer; choose from 2 to the source's 32"),
    (Asked("1"), "--cache 1 is 1 numbers a token and layer; choose from 2 to the source's 32"),
    (Asked("33"), "--cache 33 is 33 numbers a token and layer; choose from 2 to the source's 32"),
    (Asked("200%"), "--cache 200% is 64 numbers a token and layer; choose from 2 to the source's 32"),
    (Asked("2"), "--cache 2 is 2 numbers a token and layer, too few to rotate 2 pairs; give more, or --latent and --rope-dim"),
    (Asked(latent=4, rope_dim=3), "--rope-dim got 3; choose an even number from 2 to 8"),
    (Asked(latent=4, rope_dim=0), "--rope-dim got 0; choose an even number from 2 to 8"),
    (Asked(latent=4, rope_dim=10), "--rope-dim got 10; choose an even number from 2 to 8"),
    (Asked(latent=0, rope_dim=4), "--latent got 0; with --rope-dim 4 choose from 1 to 24, which loses nothing"),
    (Asked(latent=25, rope_dim=4), "--latent got 25; with --rope-dim 4 choose from 1 to 24, which loses nothing"),
]


@pytest.mark.parametrize(("asked", "line"), ERRORS)
def test_widths_that_are_none_are_refused(asked: Asked, line: str) -> None:
    with pytest.raises(UpfitError) as refused:
        possible_sizes(Geometry(4, 2, 8, 8), 1000, 4, False, asked)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("model_type", "changes", "pairs"),
    [
        ("llama", {}, 4),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 2),
        ("opt", {}, 0),
        ("cohere", {}, 4),
    ],
)
def test_pairs_are_those_of_the_class(model_type: str, changes: dict[str, Any], pairs: int) -> None:
    architecture: Any = SimpleNamespace(config=tiny_config(model_type, **changes).to_dict())
    assert rotated_pairs(architecture) == pairs


def test_parts_that_rotate_in_different_numbers_are_refused() -> None:
    config = tiny_config("llama").to_dict()
    both: Any = SimpleNamespace(config=config, entry=SimpleNamespace(model_type="llama"))
    buffers = [("a.inv_freq", torch.ones(4)), ("b.inv_freq", torch.ones(8))]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UpfitError, match=r"llama rotates \[4, 8\] pairs"):
        patch.setattr(sizes_room, "build_on_meta", lambda _: SimpleNamespace(named_buffers=lambda: buffers))
        rotated_pairs(both)


def test_settings_name_the_column_of_every_slot() -> None:
    sizes = Sizes((2, 1, 0), 7, 4)
    assert layer_settings(sizes, [5, 3, 1]) == {"latent": 7, "unrotated": 4, "columns": [5, 5, 3]}
    assert layer_settings(Sizes((), 7, 4), []) == {"latent": 7, "unrotated": 4, "columns": []}

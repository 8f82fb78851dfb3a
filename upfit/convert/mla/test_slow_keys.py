"""Keys on slow pairs, mixed as if they stood still: exact where they do and few directions are used, else the strongest."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upfit.convert.mla.layer import closed_form, metrics_of
from upfit.convert.mla.test_mathematics import (
    FREE,
    KV_HEADS,
    OWNERS,
    PAIRS,
    SPEEDS,
    TOKENS,
    E,
    V,
    drawn,
    random_source,
    random_sums,
    run_latent,
    run_source,
)

SLOW = [2, PAIRS + 2, 3, PAIRS + 3]  # dimensions of the two slowest pairs


def test_slow_keys_of_as_few_directions_as_one_head_are_kept() -> None:
    """Where slow pairs stand still, and the fast ones of all heads are one but for factors, nothing is lost."""
    source = random_source()
    factors = drawn(KV_HEADS, PAIRS, 1, seed=22, kind=torch.complex128)
    shared = torch.complex(source.k[:1, :PAIRS], source.k[:1, PAIRS : 2 * PAIRS]) * factors
    keys = torch.cat([shared.real, shared.imag, source.k[:, 2 * PAIRS :]], 1)
    keys[:, SLOW] = drawn(KV_HEADS, len(SLOW), len(SLOW), seed=23) @ drawn(len(SLOW), E, seed=24)
    source, x = replace(source, k=keys), drawn(12, E, seed=30) / 4
    sums = random_sums(source, drawn(TOKENS, E, seed=31))
    still = SPEEDS * (torch.arange(PAIRS) < 2)
    expected = run_source(source, x, still)
    for cut, least, most in ((2, 0.0, 1e-5), (None, 1e-2, 1e2)):
        latent = closed_form(source, sums, metrics_of(sums), [1] * PAIRS, KV_HEADS * (FREE + V), 0.25, cut)
        assert latent.key.shape == (2 * PAIRS + KV_HEADS * (FREE + V), E)
        gap = run_latent(latent, source.scaling, x, True, still)[0] - expected[0]
        assert least <= float(gap.abs().max() / expected[0].abs().max()) <= most


def test_of_slow_keys_the_strongest_directions_are_kept() -> None:
    """No mixture of as many directions loses less of the scores, and fast pairs are as without a cut."""
    source = random_source()
    sums = random_sums(source, drawn(TOKENS, E, seed=31))
    plain, mixed = (closed_form(source, sums, metrics_of(sums), [1] * PAIRS, 20, 0.25, cut) for cut in (None, 2))
    fast = [0, 1, PAIRS, PAIRS + 1]
    assert torch.equal(plain.q[:, fast], mixed.q[:, fast]) and torch.equal(plain.key[fast], mixed.key[fast])
    down = mixed.key[SLOW]

    def lost(down: Tensor) -> Tensor:
        """Σ_h share · E|q_h · (k_own − Σ u k')|² on slow pairs, with the best u [of each old head] for `down`."""
        keys, total = source.k[:, SLOW], torch.zeros((), dtype=torch.float64)
        for head, owner in enumerate(OWNERS.tolist()):
            up = keys[owner] @ sums["keys"] @ down.T @ torch.linalg.inv(down @ sums["keys"] @ down.T)
            gap = keys[owner] - up @ down
            total += sums["share"][head] * (sums["queries"][head][SLOW][:, SLOW] @ gap @ sums["keys"] @ gap.T).trace()
        return total

    best = lost(down)
    assert best < lost(plain.key[SLOW])
    assert lost(mixed.key[SLOW[:2]]) > lost(mixed.key[SLOW[2:]])  # the strongest stand on the slowest pair
    for seed in range(10):
        assert lost(down + 0.05 * down.norm() * drawn(*down.shape, seed=seed) / down.numel() ** 0.5) > best
    size = [(each @ sums["keys"] * each).sum() for each in (down, source.k[:, SLOW].flatten(0, 1))]
    assert size[0] == pytest.approx(float(size[1]) / KV_HEADS, rel=1e-6)  # as large as the old keys

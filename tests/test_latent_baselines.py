"""The baselines that latents stand beside: the best of their kind, and exact where nothing has to be left out."""

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import balanced_pca, components, dealt_ranks, joint_svd, transmla, weighted_svd
from benchmarks.latent_baselines import transmla_sizes
from upfit.architecture.attention import Geometry
from upfit.convert.mla.layer import Latent, Source

HEADS, KV_HEADS, PAIRS, FREE, V, E = 6, 3, 4, 2, 5, 26
WIDTH = 2 * PAIRS + FREE
SPEEDS = torch.tensor([1.0, 0.4, 0.1, 0.02], dtype=torch.float64)
RANKS = pytest.mark.parametrize("rank", [1, 4, 7])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int = 0) -> Tensor:
    """Of inputs whose directions differ in size."""
    inputs = drawn(200, E, seed=seed) * torch.logspace(-1, 1, E, dtype=torch.float64)
    return inputs.T @ inputs


def source(kv_heads: int = KV_HEADS) -> Source:
    shapes = ((HEADS, WIDTH, E), (kv_heads, WIDTH, E), (kv_heads, V, E), (E, HEADS, V))
    q, k, v, o = (drawn(*shape, seed=number) for number, shape in enumerate(shapes))
    return Source(q, k, v, o, PAIRS, 0.3)


def lost(gap: Tensor, of: Tensor) -> float:
    return float((gap @ of @ gap.T).trace())


@RANKS
def test_a_weighted_svd_loses_what_its_singular_values_say_and_nothing_of_its_rank_loses_less(rank: int) -> None:
    weight, of = drawn(9, E, seed=3), moment()
    best = weighted_svd(weight, of, rank)
    least = lost(weight - best.product, of)
    torch.testing.assert_close(least, float(best.sizes[rank:].square().sum()), rtol=1e-5, atol=0.0)
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    assert lost(weight - left[:, :rank] * sizes[:rank] @ right[:rank], of) > least
    for seed in range(5):  # the best of other factors: least squares in turn, from anywhere
        up = drawn(9, rank, seed=10 + seed)
        for _ in range(300):
            down = torch.linalg.lstsq(up, weight).solution
            up = weight @ of @ down.T @ torch.linalg.inv(down @ of @ down.T)
        torch.testing.assert_close(lost(weight - up @ down, of), least, rtol=1e-5, atol=0.0)


def test_a_weighted_svd_of_full_rank_is_exact() -> None:
    weight = drawn(9, E, seed=3)
    torch.testing.assert_close(weighted_svd(weight, moment(), 9, ridge=0.1).product, weight, rtol=0, atol=1e-9)


def test_one_latent_for_both_is_exact_at_full_rank_and_does_not_see_in_what_unit_keys_are() -> None:
    keys, values, of = drawn(9, E, seed=4), drawn(7, E, seed=5), moment()
    for new, old in zip(joint_svd(keys, values, of, 16, 0.3), (keys, values), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-9)
    cut, scaled = joint_svd(keys, values, of, 5, 1.0), joint_svd(100 * keys, values, of, 5, 1.0)
    torch.testing.assert_close(scaled[0], 100 * cut[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled[1], cut[1], rtol=1e-9, atol=1e-9)
    more, fewer = (joint_svd(keys, values, of, 5, balance) for balance in (4.0, 0.25))
    assert lost(keys - more[0], of) < lost(keys - fewer[0], of)
    assert lost(values - more[1], of) > lost(values - fewer[1], of)


def test_dealt_ranks_spend_the_budget_where_something_is_left() -> None:
    steep, flat = torch.tensor([1.0, 0.5] + [0.0] * 14), torch.ones(16)
    assert dealt_ranks([steep, flat], 4, 16) == [2, 6]
    assert dealt_ranks([steep, flat], 4, 5) == [3, 5]  # what the one cannot hold the other gets
    alike = dealt_ranks([torch.ones(64)] * 3, 8, 64)
    assert sum(alike) == 24 and alike[0] > alike[2]  # errors of early layers go further


def turned(halves: Tensor, time: float, speeds: Tensor) -> Tensor:
    """[2, N, ..] halves of pairs at a position, by the angles `speeds` [N]."""
    cos, sin = ((time * speeds).cos(), (time * speeds).sin())
    first, second = halves
    return torch.stack([first * cos - second * sin, second * cos + first * sin])


def source_scores(layer: Source, x: Tensor, y: Tensor, time: float) -> Tensor:
    """[H] of the query of x, `time` behind the key of y."""
    q, k = layer.q @ x, (layer.k @ y)[layer.owners]
    ahead = torch.stack([turned(row[: 2 * PAIRS].unflatten(0, (2, PAIRS)), time, SPEEDS).flatten() for row in q])
    return (ahead * k[:, : 2 * PAIRS]).sum(1) + (q[:, 2 * PAIRS :] * k[:, 2 * PAIRS :]).sum(1)


def latent_scores(latent: Latent, x: Tensor, y: Tensor, time: float) -> Tensor:
    q, key = latent.absorbed(latent.q @ x), latent.key @ y
    speeds = SPEEDS[list(latent.slots)]
    ahead = [turned(row[: latent.rotated].unflatten(0, (2, -1)), time, speeds).flatten() for row in q]
    return torch.stack(ahead) @ key[: latent.rotated] + q[:, latent.rotated :] @ key[latent.rotated :]


def sums() -> dict[str, Tensor]:
    return {"inputs": moment(), "tokens": torch.tensor(200.0)}


def test_rotating_keys_of_one_frequency_into_each_other_leaves_every_score() -> None:
    layer, x, y = source(), drawn(E, seed=8), drawn(E, seed=9)
    parts = components(layer, moment(), 1)
    queries = torch.einsum("ghn,hsge->hsgne", parts.turn[:, layer.owners], layer.q[:, : 2 * PAIRS].unflatten(1, (2, PAIRS)))
    for time in (0.0, 3.0, 40.0):
        keys = (parts.keys @ y).permute(2, 0, 1)  # [K, 2, P]
        ahead = torch.stack([torch.stack([turned(row, time, SPEEDS) for row in own.permute(2, 0, 1)]) for own in queries @ x])
        free = ((layer.q @ x)[:, 2 * PAIRS :] * (layer.k @ y)[layer.owners, 2 * PAIRS :]).sum(1)
        torch.testing.assert_close((ahead * keys).sum((1, 2, 3)) + free, source_scores(layer, x, y, time))


def test_the_components_that_turn_hold_most_energy() -> None:
    for fold in (1, 2, 4):
        parts = components(source(), moment(), fold)
        energy = torch.einsum("sgne,ef,sgnf->gn", parts.keys, moment(), parts.keys)
        assert (energy.diff(dim=1) <= 0).all()
        other = torch.linalg.qr(drawn(*parts.turn.shape, seed=fold))[0]
        mixed = torch.einsum("gij,sgie->sgje", other, parts.keys)
        assert (torch.einsum("sgne,ef,sgnf->gn", mixed, moment(), mixed)[:, 0] < energy[:, 0]).all()


def test_one_head_with_all_pairs_and_a_full_latent_stays_as_it_is() -> None:
    layer, x, y = source(1), drawn(E, seed=8), drawn(E, seed=9)
    latent = transmla(layer, sums(), range(PAIRS), FREE + V, 1, 0.3)
    for time in (0.0, 3.0, 40.0):
        torch.testing.assert_close(latent_scores(latent, x, y, time), source_scores(layer, x, y, time))
    torch.testing.assert_close(latent.up_v @ (latent.key[latent.rotated :] @ y), layer.v @ y)


@pytest.mark.parametrize(("fold", "slots"), [(1, (0, 1, 2, 3)), (2, (0, 1, 2, 3)), (4, (0, 1, 2, 3)), (2, (0, 2)), (4, (0,))])
def test_a_full_latent_loses_only_what_turns(fold: int, slots: tuple[int, ...]) -> None:
    """Between tokens of one position scores are the source's, and values always."""
    layer, x, y = source(), drawn(E, seed=8), drawn(E, seed=9)
    width = KV_HEADS * (WIDTH + V) - 2 * len(slots)
    latent = transmla(layer, sums(), slots, width, fold, 0.3)
    torch.testing.assert_close(latent_scores(latent, x, y, 0.0), source_scores(layer, x, y, 0.0))
    torch.testing.assert_close(latent.up_v @ (latent.key[latent.rotated :] @ y), layer.v @ y)
    assert not torch.allclose(latent_scores(latent, x, y, 3.0), source_scores(layer, x, y, 3.0))


def test_principal_components_of_what_is_given_out_are_the_weighted_svd() -> None:
    """So CARE's initialisation of such a latent is TransMLA's, but for its damping."""
    keys, values, width = source().k.flatten(0, 1), source().v.flatten(0, 1), 7
    expected = joint_svd(keys, values, moment(), width, 0.5)
    down, up_keys, up_values = balanced_pca(keys, values, moment(), width, 0.5)
    torch.testing.assert_close(up_keys @ down, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up_values @ down, expected[1], rtol=1e-5, atol=1e-5)


def test_sizes_never_cost_more_than_asked() -> None:
    shape = Geometry(heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, v_head_dim=V)
    for asked in (10, 20, 45):
        sizes = transmla_sizes(shape, E, PAIRS, asked)
        assert sizes and all(one.numbers <= asked and one.latent <= E for one in sizes)
        assert len({one.slots for one in sizes}) == len(sizes)

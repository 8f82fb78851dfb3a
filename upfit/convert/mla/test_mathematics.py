"""What the pieces of a latent promise: exact where nothing has to be left out, best where something has to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upfit.convert.mla import latent as reduction
from upfit.convert.mla import slots as sharing
from upfit.convert.mla.latent import Joint, joint, separate, together
from upfit.convert.mla.layer import Latent, Source, closed_form, even, metrics_of
from upfit.convert.mla.slots import Slots, share_pairs

HEADS, KV_HEADS, PAIRS, FREE, V, E, TOKENS = 6, 3, 4, 2, 5, 26, 300
WIDTH = 2 * PAIRS + FREE
OWNERS = torch.arange(HEADS) // (HEADS // KV_HEADS)
SPEEDS = torch.tensor([1.0, 0.4, 0.1, 0.02], dtype=torch.float64)
SEEDS = pytest.mark.parametrize("seed", range(4))


def drawn(*shape: int, seed: int = 0, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


def pair_moments(keys: Tensor) -> Tensor:
    """[H, P, K, K] of keys [N, K, P], seen by every query head with weights of its own."""
    weights = drawn(HEADS, len(keys), seed=50).abs()
    return torch.einsum("hn,nip,njp->hpij", weights.to(keys), keys, keys.conj())


def lost_of_pairs(moments: Tensor, energy: Tensor, slots: Slots) -> Tensor:
    """[P]: Σ_h energy · E|k_own − Σ_s u k_s|², from the definition."""
    lost = torch.zeros(moments.shape[1], dtype=torch.float64)
    for pair in range(moments.shape[1]):
        chosen = [slot for slot, own in enumerate(slots.pairs) if own == pair]
        for head, owner in enumerate(OWNERS.tolist()):
            gap = -sum(slots.factors[slot, head] * slots.mix[slot] for slot in chosen)
            gap = gap + torch.eye(KV_HEADS, dtype=moments.dtype)[owner]
            lost[pair] += energy[head, pair] * (gap @ moments[head, pair] @ gap.conj()).real
    return lost


@SEEDS
def test_as_many_slots_as_heads_lose_nothing(seed: int) -> None:
    moments = pair_moments(drawn(80, KV_HEADS, PAIRS, seed=seed, kind=torch.complex128))
    slots = share_pairs(moments, drawn(HEADS, PAIRS).abs(), OWNERS, [KV_HEADS] * PAIRS)
    assert torch.equal(lost_of_pairs(moments, drawn(HEADS, PAIRS).abs(), slots), torch.zeros(PAIRS).double())
    assert slots.pairs == tuple(pair for pair in range(PAIRS) for _ in range(KV_HEADS))


@pytest.mark.parametrize("count", [1, 2])
def test_heads_that_are_one_but_for_factors_need_one_slot(count: int) -> None:
    base, factors = (
        drawn(*shape, seed=n, kind=torch.complex128) for n, shape in enumerate([(80, 1, PAIRS), (KV_HEADS, PAIRS)])
    )
    moments, energy = pair_moments(base * factors), drawn(HEADS, PAIRS).abs()
    slots = share_pairs(moments, energy, OWNERS, [count] * PAIRS)
    nothing = lost_of_pairs(moments, energy, Slots((), slots.mix[:0], slots.factors[:0]))
    assert float((lost_of_pairs(moments, energy, slots) / nothing).max()) < 1e-8


@SEEDS
def test_one_slot_is_no_worse_than_the_best_head_and_more_are_no_worse_than_fewer(seed: int) -> None:
    moments = pair_moments(drawn(80, KV_HEADS, PAIRS, seed=seed, kind=torch.complex128) * torch.tensor([3, 1, 1])[:, None])
    energy = drawn(HEADS, PAIRS, seed=seed).abs()
    lost = [lost_of_pairs(moments, energy, share_pairs(moments, energy, OWNERS, [count] * PAIRS)) for count in range(4)]
    assert all((more <= fewer).all() for fewer, more in zip(lost, lost[1:], strict=False))
    for head in range(KV_HEADS):
        alone = moments[..., head, head].real  # [H, P], and each query head's best factor for that head's key
        factors = moments[torch.arange(HEADS), :, OWNERS, head] / alone
        one = [
            Slots((pair,), torch.eye(KV_HEADS)[head : head + 1].to(moments), factors[:, pair][None]) for pair in range(PAIRS)
        ]
        assert all(lost[1][pair] <= lost_of_pairs(moments, energy, slots)[pair] for pair, slots in enumerate(one))


@SEEDS
def test_one_slot_cannot_be_bettered(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many alternations no small change of the mixture, with the best factors for it, loses less."""
    monkeypatch.setattr(sharing, "ALTERNATIONS", 1000)
    moments = pair_moments(drawn(80, KV_HEADS, PAIRS, seed=seed, kind=torch.complex128))
    energy = drawn(HEADS, PAIRS, seed=seed).abs()
    slots = share_pairs(moments, energy, OWNERS, [1] * PAIRS)
    best = lost_of_pairs(moments, energy, slots)
    for step in range(20):
        mix = slots.mix + 0.02 * drawn(PAIRS, KV_HEADS, seed=step, kind=torch.complex128)
        seen = torch.einsum("hpij,pj->hpi", moments, mix.conj())
        factors = seen[torch.arange(HEADS), :, OWNERS] / torch.einsum("pi,hpi->hp", mix, seen)
        assert (lost_of_pairs(moments, energy, replace(slots, mix=mix, factors=factors.T)) > best).all()


@pytest.mark.parametrize("count", [1, 2])
def test_factors_cannot_be_bettered(count: int) -> None:
    """Those by which a query head takes up the shared keys of a pair."""
    moments = pair_moments(drawn(80, KV_HEADS, PAIRS, kind=torch.complex128))
    energy = drawn(HEADS, PAIRS).abs()
    slots = share_pairs(moments, energy, OWNERS, [count] * PAIRS)
    best = lost_of_pairs(moments, energy, slots)
    for step in range(20):
        factors = slots.factors + 1e-3 * drawn(*slots.factors.shape, seed=step, kind=torch.complex128)
        assert (lost_of_pairs(moments, energy, replace(slots, factors=factors)) > best).all()


def test_pairs_without_a_slot_have_none() -> None:
    moments, energy = pair_moments(drawn(80, KV_HEADS, PAIRS, kind=torch.complex128)), drawn(HEADS, PAIRS).abs()
    slots = share_pairs(moments, energy, OWNERS, [2, 1, 0, 0])
    assert slots.pairs == (0, 0, 1) and slots.mix.shape == (3, KV_HEADS) and slots.factors.shape == (3, HEADS)
    empty = share_pairs(moments, energy, OWNERS, [0] * PAIRS)
    assert empty.pairs == () and empty.mix.shape == (0, KV_HEADS) and empty.factors.shape == (0, HEADS)


def two_metrics(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A_K [9, E], A_V [7, E] and two different moments of the inputs, far from white."""
    spread = torch.logspace(0, -2, E, dtype=torch.float64)
    turns = [torch.linalg.qr(drawn(E, E, seed=seed + n))[0] for n in (2, 3)]
    inputs = [drawn(TOKENS, E, seed=seed + n) * spread.roll(5 * n) @ turn for n, turn in enumerate(turns)]
    moments = [x.T @ x / x.square().sum() for x in inputs]
    return drawn(9, E, seed=seed + 4), drawn(7, E, seed=seed + 5), moments[0], moments[1]


def error(keys: Tensor, values: Tensor, of_keys: Tensor, of_values: Tensor, done: Joint) -> float:
    """tr (A_K − U_K D) C_K (·)ᵀ + tr (A_V − U_V D) C_V (·)ᵀ"""
    return sum(
        float((gap @ moment @ gap.T).trace())
        for gap, moment in ((keys - done.keys @ done.down, of_keys), (values - done.values @ done.down, of_values))
    )


def test_both_moments_are_diagonal_in_one_basis() -> None:
    _, _, of_keys, of_values = two_metrics(0)
    metrics = together(of_keys, of_values)
    for moment, diagonal in ((of_keys, metrics.keys), (of_values, 1 - metrics.keys)):
        torch.testing.assert_close(metrics.basis * diagonal @ metrics.basis.T, moment, rtol=0, atol=1e-9)
    torch.testing.assert_close(metrics.basis @ metrics.back, torch.eye(E).double(), rtol=0, atol=1e-9)


@SEEDS
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_of_equal_moments_the_joint_latent_is_the_singular_vectors(seed: int, rank: int) -> None:
    keys, values, moment, _ = two_metrics(seed)
    done = joint(keys, values, together(moment, moment), rank)
    both, half = torch.cat([keys, values]), torch.linalg.cholesky(moment)
    u, sizes, vectors = torch.linalg.svd(both @ half, full_matrices=False)
    best = u[:, :rank] * sizes[:rank] @ vectors[:rank]
    torch.testing.assert_close(torch.cat([done.keys, done.values]) @ done.down @ half, best, rtol=0, atol=1e-5)
    assert error(keys, values, moment, moment, done) == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-5)


@SEEDS
@pytest.mark.parametrize("rank", [2, 6, 11])
def test_one_latent_is_no_worse_than_two(seed: int, rank: int) -> None:
    """At the same width, however that is divided; and every round of the alternation loses less than the one before."""
    keys, values, *moments = two_metrics(seed)
    metrics = together(moments[0], moments[1])
    together_lost = error(keys, values, moments[0], moments[1], joint(keys, values, metrics, rank))
    for of_keys in range(max(0, rank - 7), min(rank, 9) + 1):
        apart = separate(keys, values, metrics, of_keys, rank - of_keys)
        assert apart.down.shape == (rank, E)
        assert together_lost <= error(keys, values, moments[0], moments[1], apart) * (1 + 1e-9)


@SEEDS
def test_every_round_loses_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values, *moments = two_metrics(seed)
    metrics, lost = together(moments[0], moments[1]), list[float]()
    for rounds in range(9):
        monkeypatch.setattr(reduction, "ROUNDS", rounds)
        lost.append(error(keys, values, moments[0], moments[1], joint(keys, values, metrics, 5)))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(lost, lost[1:], strict=False))
    assert lost[-1] < lost[0]


@SEEDS
def test_the_latent_is_where_the_error_does_not_fall(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many rounds the gradient by D is nothing, and so it is by U; autograd of the definition says so."""
    monkeypatch.setattr(reduction, "ROUNDS", 3000)
    keys, values, *moments = two_metrics(seed)
    done = joint(keys, values, together(moments[0], moments[1]), 5)
    parts = [part.clone().requires_grad_() for part in (done.down, done.keys, done.values)]
    gaps = [(keys - parts[1] @ parts[0], moments[0]), (values - parts[2] @ parts[0], moments[1])]
    whole = torch.stack([(gap @ moment @ gap.T).trace() for gap, moment in gaps]).sum()
    slopes = torch.autograd.grad(whole, parts)
    for part, slope in zip((done.down, done.keys, done.values), slopes, strict=True):
        assert float(slope.norm() * part.norm()) < 1e-4 * float(whole.detach())


def test_shares_that_are_lost_are_told() -> None:
    keys, values, of_keys, of_values = two_metrics(1)
    metrics = together(of_keys, of_values)
    for done in (joint(keys, values, metrics, 5), separate(keys, values, metrics, 3, 2)):
        for share, rows, up, moment in (
            (done.lost[0], keys, done.keys, of_keys),
            (done.lost[1], values, done.values, of_values),
        ):
            gap = rows - up @ done.down
            assert share == pytest.approx(float((gap @ moment @ gap.T).trace() / (rows @ moment @ rows.T).trace()), rel=1e-6)


def random_source(seed: int = 0) -> Source:
    return Source(
        q=drawn(HEADS, WIDTH, E, seed=seed),
        k=drawn(KV_HEADS, WIDTH, E, seed=seed + 1),
        v=drawn(KV_HEADS, V, E, seed=seed + 2),
        o=drawn(E, HEADS, V, seed=seed + 3),
        pairs=PAIRS,
        scaling=0.3,
    )


def random_sums(source: Source, inputs: Tensor) -> dict[str, Tensor]:
    """Sums as of a text whose inputs are `inputs` [N, E], keys and values seen with weights of their own."""
    seen = [drawn(len(inputs), 1, seed=seed).abs() * inputs for seed in (7, 8)]
    keys = torch.einsum("kde,ne->nkd", source.k, seen[0])
    queries = torch.einsum("hde,ne->hnd", source.q, inputs)
    return {
        "pairs": pair_moments(torch.complex(keys[..., :PAIRS], keys[..., PAIRS : 2 * PAIRS])),
        "queries": queries.mT @ queries,
        "keys": seen[0].T @ seen[0],
        "values": 3 * seen[1].T @ seen[1],
        "share": drawn(HEADS, seed=9).abs(),
        "inputs": inputs.T @ inputs,
        "tokens": torch.tensor(float(len(inputs)), dtype=torch.float64),
        "rows": torch.tensor(float(len(inputs)), dtype=torch.float64),
    }


def turned(heads: Tensor, pairs: tuple[int, ...], speeds: Tensor) -> Tensor:
    """[T, heads, D]: of each of `pairs`, firsts then seconds, turned by the position times its speed; the rest as it is."""
    count = len(pairs)
    angles = torch.arange(len(heads))[:, None] * speeds[list(pairs)]
    values = torch.complex(heads[..., :count], heads[..., count : 2 * count])
    values = values * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([values.real, values.imag, heads[..., 2 * count :]], -1)


def run_source(source: Source, x: Tensor, speeds: Tensor = SPEEDS) -> tuple[Tensor, Tensor]:
    """Scores [H, T, T] and what attention gives out [T, E], head by head."""
    q, k = (turned(torch.einsum("hde,te->thd", w, x), tuple(range(PAIRS)), speeds) for w in (source.q, source.k))
    scores, output = list[Tensor](), torch.zeros(len(x), E, dtype=torch.float64)
    for head, owner in enumerate(OWNERS.tolist()):
        scores.append(q[:, head] @ k[:, owner].T * source.scaling)
        output += scores[-1].softmax(-1) @ (x @ source.v[owner].T) @ source.o[:, head].T
    return torch.stack(scores), output


def run_latent(latent: Latent, scaling: float, x: Tensor, absorbed: bool, speeds: Tensor = SPEEDS) -> tuple[Tensor, Tensor]:
    """The same of latent attention, on keys and values of every head, or on the latent itself."""
    cached = turned((x @ latent.key.T)[:, None], latent.slots, speeds)[:, 0]
    queries = turned(torch.einsum("hde,te->thd", latent.q, x), latent.slots, speeds)
    rotated, inner = cached.split([latent.rotated, len(latent.key) - latent.rotated], 1)
    scores, output = list[Tensor](), torch.zeros(len(x), E, dtype=torch.float64)
    for head, owner in enumerate(OWNERS.tolist()):
        if absorbed:
            scores.append(latent.absorbed(queries)[:, head] @ cached.T * scaling)
        else:
            keys = torch.cat([rotated, inner @ latent.up_k[owner].T], 1)
            scores.append(queries[:, head] @ keys.T * scaling)
        output += scores[-1].softmax(-1) @ (inner @ latent.up_v[owner].T) @ latent.o[:, head].T
    return torch.stack(scores), output


ABSORBED = pytest.mark.parametrize("absorbed", [False, True])


@ABSORBED
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("rotated", [PAIRS, 2, 0])
def test_at_full_width_a_layer_is_what_it_was(rotated: int, spare: int, absorbed: bool) -> None:
    """Scores and outputs; where pairs have no slot, those of the source with these pairs standing still."""
    source, x = random_source(), drawn(12, E, seed=30) / 4
    sums = random_sums(source, drawn(TOKENS, E, seed=31))
    counts = [KV_HEADS] * rotated + [0] * (PAIRS - rotated)
    width = KV_HEADS * (WIDTH - 2 * rotated + V) + spare
    latent = closed_form(source, sums, metrics_of(sums), counts, width, 0.25)
    assert latent.key.shape == (2 * KV_HEADS * rotated + width, E)
    still = SPEEDS * (torch.arange(PAIRS) < rotated)
    for ours, expected in zip(run_latent(latent, source.scaling, x, absorbed), run_source(source, x, still), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@ABSORBED
@pytest.mark.parametrize("spare", [0, 3])
def test_as_wide_as_its_inputs_a_latent_loses_nothing(spare: int, absorbed: bool) -> None:
    """Nor on inputs that are nothing like the text that was summed up."""
    source, x = random_source(), drawn(12, E, seed=30) / 4
    sums = random_sums(source, drawn(TOKENS, 5, seed=31) @ drawn(5, E, seed=32))
    latent = closed_form(source, sums, metrics_of(sums), [KV_HEADS, KV_HEADS, 0, 0], E + spare, 0.25)
    assert len(latent.key) == 4 * KV_HEADS + E + spare and E + spare < KV_HEADS * (WIDTH - 4 + V)
    still = SPEEDS * (torch.arange(PAIRS) < 2)
    for ours, expected in zip(run_latent(latent, source.scaling, x, absorbed), run_source(source, x, still), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@ABSORBED
def test_a_latent_as_wide_as_what_it_holds_loses_nothing(absorbed: bool) -> None:
    """Heads that share a key but for factors on its pairs, and keys and values of fewer directions than they are wide."""
    source, rank = random_source(), 4
    plain = drawn(KV_HEADS * (FREE + V), rank, seed=20) @ drawn(rank, E, seed=21)
    factors = drawn(KV_HEADS, PAIRS, 1, seed=22, kind=torch.complex128)
    shared = torch.complex(source.k[:1, :PAIRS], source.k[:1, PAIRS : 2 * PAIRS]) * factors
    parts = plain.unflatten(0, (KV_HEADS, -1))
    source = replace(source, k=torch.cat([shared.real, shared.imag, parts[:, :FREE]], 1), v=parts[:, FREE:])
    sums, x = random_sums(source, drawn(TOKENS, E, seed=31)), drawn(12, E, seed=30) / 4
    latent = closed_form(source, sums, metrics_of(sums), [1] * PAIRS, rank, 0.25)
    assert latent.key.shape == (2 * PAIRS + rank, E)
    for ours, expected in zip(run_latent(latent, source.scaling, x, absorbed), run_source(source, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def predicted(source: Source, sums: dict[str, Tensor], latent: Latent, balance: float, rotated: int) -> Tensor:
    """What errors of unrotated keys and of values do to the layer's output, summed head by head from their definitions."""
    rest = [*range(rotated, PAIRS), *range(PAIRS + rotated, 2 * PAIRS), *range(2 * PAIRS, WIDTH)]
    share, rows = sums["share"] / sums["share"].mean(), sums["rows"] * HEADS
    down, lost = latent.key[latent.rotated :], torch.zeros((), dtype=torch.float64)
    for head, owner in enumerate(OWNERS.tolist()):
        gap = source.k[owner, rest] - latent.up_k[owner] @ down
        queries = sums["queries"][head][rest][:, rest] / sums["rows"] * share[head]
        lost = lost + balance * source.scaling**2 * (queries @ gap @ (sums["keys"] / rows) @ gap.T).trace()
        gap = source.o[:, head] @ (source.v[owner] - latent.up_v[owner] @ down)
        lost = lost + (gap @ (sums["values"] / rows) @ gap.T).trace()
    return lost


@pytest.mark.parametrize("balance", [0.06, 1.0])
def test_a_narrow_latent_loses_the_least_of_the_output(balance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a change of any of its three matrices does to the output, to first order there is nothing to gain."""
    monkeypatch.setattr(reduction, "ROUNDS", 3000)
    source = random_source()
    sums = random_sums(source, drawn(TOKENS, E, seed=31) * torch.logspace(0, -1, E).double())
    latent = closed_form(source, sums, metrics_of(sums), [1, 1, 0, 0], 8, balance)
    parts = {"key": latent.key, "up_k": latent.up_k, "up_v": latent.up_v}
    free = {name: part.clone().requires_grad_() for name, part in parts.items()}
    moved = replace(latent, key=free["key"], up_k=free["up_k"], up_v=free["up_v"])
    lost = predicted(source, sums, moved, balance, rotated=2)
    slopes = torch.autograd.grad(lost, list(free.values()))
    for part, slope in zip(parts.values(), slopes, strict=True):
        assert float(slope.norm() * part.norm()) < 1e-3 * float(lost.detach())


def test_latents_are_of_even_size_and_the_layer_is_the_same() -> None:
    source, x = random_source(), drawn(40, E, seed=31)
    sums = random_sums(source, x)
    latent = closed_form(source, sums, metrics_of(sums), [1, 1, 0, 0], 8, 1.0)
    sizes = torch.logspace(-4, 4, 8).double()
    uneven = replace(latent, up_k=latent.up_k / sizes, up_v=latent.up_v / sizes)
    uneven = replace(uneven, key=torch.cat([latent.key[:4], latent.key[4:] * sizes[:, None]]))
    silent = replace(uneven, key=torch.cat([uneven.key, 0 * uneven.key[:1]]))
    up_k, up_v = (torch.nn.functional.pad(up, (0, 1), value=3) for up in (silent.up_k, silent.up_v))
    silent = replace(silent, up_k=up_k, up_v=up_v)
    for one in (uneven, silent):
        done = even(one, sums)
        squares = (x @ done.key[4:].T).square().mean(0)
        assert ((squares >= 0.49) & (squares <= 2.01) | (squares == 0)).all()
        assert torch.equal(done.key[:4], one.key[:4]) and torch.equal(done.q, one.q)
        for name in ("up_k", "up_v"):
            before, after = getattr(one, name) @ one.key[4:], getattr(done, name) @ done.key[4:]
            torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12 * float(before.abs().max()))
        assert torch.equal(done.up_k[..., 8:], one.up_k[..., 8:])  # of a number that is always 0
        factors = (done.key[4:] / one.key[4:])[:8, 0].log2()
        assert torch.equal(factors, factors.round())

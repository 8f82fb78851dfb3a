"""Three implementations of one function: the plain equations, row chunks, Triton kernels (here in Triton's interpreter)."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from upfit.modeling import cope_attention, cope_chunks
from upfit.modeling.cope_attention import attend, fused
from upfit.modeling.cope_chunks import chunked, near_gates
from upfit.modeling.cope_equations import TENSORS, Inputs, Sight, counted, last_query, position_logits, reference, whole

SHAPES: dict[str, dict[str, Any]] = {
    "ragged": {"queries": 37},
    "constant gates": {"gated": False},
    "cap and sinks": {"sinks": True, "cap": 5.0},
    "all saturated": {"bias": 8.0, "queries": 70},
    "none saturated": {"bias": -7.0},
    "more keys than queries": {"queries": 12, "keys": 45},
    "two positions": {"positions": 2},
    "one key head": {"kv_heads": 1},
    "wide keys": {"width": 136},  # in the smallest tiles: both passes have to take those
}
MASKS = ("causal", "left padding", "packed", "window")


def random_inputs(dtype: torch.dtype = torch.float64, **shape: Any) -> Inputs:
    """Random inputs that want gradients; `shape` changes what stands here."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, width = 2, shape.get("heads", 4), shape.get("kv_heads", 2), shape.get("width", 16)
    queries, positions = shape.get("queries", 40), shape.get("positions", 9)
    keys = shape.get("keys", queries)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    gated = shape.get("gated", True)
    bias = (torch.randn(heads, generator=generator, dtype=torch.float64) * 0.3 + shape.get("bias", 0.0)).to(dtype)
    return Inputs(
        random(batch, heads, queries, width),
        random(batch, kv_heads, keys, width),
        random(batch, kv_heads, keys, 24),
        random(batch, heads, queries, positions),
        bias.requires_grad_(),
        random(batch, heads, queries, 16) if gated else None,
        random(batch, kv_heads, keys, 16, scale=0.3) if gated else None,
        random(heads) if shape.get("sinks") else None,
        scaling=width**-0.5,
        cap=shape.get("cap"),
    )


def sight_of(kind: str, queries: int, keys: int) -> Sight:
    if kind == "causal":
        return Sight(queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).repeat(2, 1, 1, 1)
    if kind == "left padding":
        mask[1, :, :, :7] = False
    elif kind == "window":
        mask &= torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - 11)
    else:
        document = torch.arange(keys) // 15
        mask &= document == document[keys - queries :, None]
    return Sight(queries, keys, mask)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    tensors = {name: getattr(inputs, name) for name in TENSORS}
    changed: dict[str, Any] = {k: v if v is None else v.detach().to(dtype).requires_grad_() for k, v in tensors.items()}
    return replace(inputs, **changed)


def results(function: Any, inputs: Inputs, sight: Sight) -> dict[str, Tensor]:
    """The output, and the gradient of each input for one random gradient of the output."""
    output = function(inputs, sight)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    wanted = [name for name in TENSORS if getattr(inputs, name) is not None]
    grads = torch.autograd.grad(output, [getattr(inputs, name) for name in wanted], grad)
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def check_same(actual: dict[str, Tensor], true: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in true.items():
        # Sums over all gates of a head, or over the weights of a query: their parts nearly cancel.
        size = float(tensor.abs().max()) * (4 if name in ("gate_bias", "z") else 1)
        assert float((actual[name].double() - tensor.double()).abs().max()) < tolerance * size, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_all_at_once_are_the_equations(shape: str, mask: str) -> None:
    inputs = random_inputs(**SHAPES[shape])
    sight = sight_of(mask, inputs.q.shape[2], inputs.k.shape[2])
    true = results(reference, inputs, sight)
    check_same(results(lambda i, s: chunked(i, s, 16), inputs, sight), true, 1e-10)
    check_same(results(lambda i, s: whole(i, s)[0], inputs, sight), true, 1e-10)


def test_kernels_with_all_at_once_are_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows, heads, blocks of queries, segments and tiles, with gates, sinks, a cap; the slow tests take them singly."""
    from upfit.modeling import cope_kernels

    monkeypatch.setattr(cope_kernels, "NOTES", 1)
    inputs = cast(random_inputs(heads=2, queries=70, kv_heads=1, sinks=True, cap=5.0), torch.float32)
    sight = sight_of("left padding", 70, 70)
    check_same(results(fused, inputs, sight), results(reference, cast(inputs, torch.float64), sight), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_the_equations(shape: str) -> None:
    for mask in MASKS if shape == "ragged" else ("causal", "packed"):
        inputs = random_inputs(**SHAPES[shape])
        sight = sight_of(mask, inputs.q.shape[2], inputs.k.shape[2])
        single = cast(inputs, torch.float32)
        check_same(results(fused, single, sight), results(reference, cast(single, torch.float64), sight), 1e-5)


@pytest.mark.slow
def test_kernels_walk_their_notes_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the notes of one block of queries at a time, the gradients are the same."""
    from upfit.modeling import cope_kernels

    inputs = cast(random_inputs(queries=80, bias=-2.0), torch.float32)
    before = results(fused, inputs, Sight(80, 80))
    monkeypatch.setattr(cope_kernels, "NOTES", 1)
    after = results(fused, inputs, Sight(80, 80))
    assert all(torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-6) for name in before)
    again = results(fused, inputs, Sight(80, 80))
    assert all(torch.equal(after[name], again[name]) for name in ("k", "v", "gate_k"))


class Launches:
    """Stands where a kernel stood, and notes what it is launched on."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **marks: self.calls.append((grid[0], arguments, marks))


def launched(monkeypatch: pytest.MonkeyPatch, inputs: Inputs, sight: Sight) -> dict[str, Launches]:
    """What each kernel is launched on, by its name; nothing is computed."""
    from upfit.modeling import cope_kernels

    launches = {name: Launches() for name in cope_kernels.KERNELS}
    for name, stand_in in launches.items():
        monkeypatch.setattr(cope_kernels, f"{name}_kernel", stand_in)
    results(fused, inputs, sight)
    return launches


@pytest.mark.parametrize("blocks", [0.5, 1, 2, 2.99, 3, 10**6])
def test_segments_are_as_long_as_notes_have_room(monkeypatch: pytest.MonkeyPatch, blocks: float) -> None:
    """As many blocks of queries at a time as NOTES bytes hold the notes of, one at least; every query is in one of them."""
    from upfit.modeling import cope_kernels

    queries, block, tiles = 200, 32, 7
    monkeypatch.setattr(cope_kernels, "NOTES", int(blocks * 2 * 4 * 2 * 4 * tiles * block))  # two of 4 bytes, 2 rows, 4 heads
    inputs, walked = cast(random_inputs(queries=queries), torch.float32), list[int]()
    for count, arguments, marks in launched(monkeypatch, inputs, Sight(queries, queries))["queries"].calls:
        assert marks["BM"] == block
        *_, right, left = (argument for argument in arguments if isinstance(argument, Tensor))
        assert right.shape == left.shape == (2, 4, tiles, min(max(int(blocks), 1), 7) * block)
        walked += [arguments[-3] // block + number for number in range(count)]
    assert walked == list(range(7))


@pytest.mark.parametrize("widest", ["q", "v", "gate_q"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_launched_for_the_widest_of_their_heads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, widest: str
) -> None:
    """All three in its tiles, each width padded to a power of two; products of float32 are exact."""
    from upfit.modeling.cope_kernels import KERNELS, tiles_for

    inputs, narrow = cast(random_inputs(cap=5.0 if widest == "v" else None), dtype), {"q": 16, "v": 24, "gate_q": 16}
    wide = {name: torch.zeros(2, 4 if "q" in name else 2, 40, 136, dtype=dtype, requires_grad=True) for name in ("q", "k", "v")}
    wide |= {"gate_q": wide["q"], "gate_k": wide["k"]}
    chosen = {"q": ("q", "k"), "v": ("v",), "gate_q": ("gate_q", "gate_k")}[widest]
    changed: dict[str, Any] = {name: wide[name] for name in chosen}
    inputs = replace(inputs, **changed)
    padded = {name: 256 if name == widest else 32 if name == "v" else 16 for name in narrow}
    for name, launches in launched(monkeypatch, inputs, Sight(40, 40)).items():
        ((*_, marks),) = launches.calls
        assert name in KERNELS and marks.items() >= tiles_for((136,))[name].items() and marks["BM"] == marks["BN"] == 16
        assert (marks["D"], marks["DV"], marks["DG"], marks["P"]) == (*padded.values(), 9)
        assert (marks["GATED"], marks["CAPPED"], marks["PRECISION"]) == (
            True, widest == "v", "ieee" if dtype == torch.float32 else "tf32",
        )  # fmt: skip


def test_tiles_are_what_a_gpu_takes() -> None:
    """Powers of two, products of 16 at least, and the same blocks of keys in all kernels, which read each other's notes."""
    from upfit.modeling.cope_kernels import TILES, tiles_for

    assert list(TILES) == sorted(TILES)
    for width in (1, 64, 65, 128, 129, 256, 999):
        tiles = tiles_for((width, 1))
        assert tiles == tiles_for((1, width)) == tiles_for((min(width, 256),))
        for tile in tiles.values():
            assert all(number & (number - 1) == 0 for name, number in tile.items() if name != "num_stages")
            assert tile["BM"] >= 16 and 1 <= tile["num_warps"] <= 16 and tile["num_stages"] >= 1
        assert len({tile["BN"] for tile in tiles.values()}) == 1
    narrow, middle, wide = (tiles_for((width,)) for width in (64, 128, 256))
    assert narrow != middle != wide and tiles_for((65,)) == middle and tiles_for((129,)) == wide


@pytest.mark.parametrize("seen", [1, 2])
def test_a_query_may_see_next_to_nothing(seen: int) -> None:
    """Its own key alone, or that and the one before, beside a sink."""
    single = cast(random_inputs(heads=2, queries=20, sinks=True), torch.float32)
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & torch.ones(20, 20, dtype=torch.bool).triu(1 - seen)
    sight = Sight(20, 20, mask[None, None])
    check_same(results(fused, single, sight), results(reference, cast(single, torch.float64), sight), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(dtype: torch.dtype) -> None:
    low = cast(random_inputs(queries=70), dtype)
    truth = results(reference, cast(low, torch.float64), Sight(70, 70))
    functions: list[Any] = [lambda i, s: chunked(i, s, 32)]
    if dtype == torch.float16:  # Triton's interpreter multiplies bfloat16 wrongly
        functions.append(fused)
    for function in functions:
        for name, actual in results(function, low, Sight(70, 70)).items():
            error = (actual.double() - truth[name]).norm() / truth[name].norm()
            assert error < 2 * torch.finfo(dtype).eps, name


def test_open_gates_count_tokens() -> None:
    """Every gate at 1: an ordinary relative position, one for each token from the query's own on."""
    inputs = random_inputs(bias=60.0, gated=False, positions=9)
    distance = torch.arange(40)[:, None] - torch.arange(40) + 1
    added = inputs.z.gather(-1, distance.clamp(0, 8).expand(2, 4, -1, -1)) - inputs.z[..., -1:]
    below = torch.ones(40, 40, dtype=torch.bool).tril()
    content = inputs.q @ inputs.k.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scaling
    weights = (content + added).masked_fill(~below, -math.inf).softmax(-1)
    plain = (weights @ inputs.v.repeat_interleave(2, 1)).transpose(1, 2)
    assert torch.allclose(chunked(inputs, Sight(40, 40)), plain, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_the_newest_query_alone_is_the_last_row(mask: str, gated: bool) -> None:
    inputs, sight = random_inputs(queries=300, bias=1.0, gated=gated), sight_of(mask, 300, 300)
    full = reference(inputs, sight)[:, -1:]
    inputs = replace(
        inputs, **{name: x[:, :, -1:] for name in ("q", "z", "gate_q") if (x := getattr(inputs, name)) is not None}
    )
    with torch.no_grad():
        last_row = attend(inputs, Sight(1, 300, None if sight.mask is None else sight.mask[:, :, -1:]))
    assert torch.allclose(last_row, full, atol=1e-12)


@pytest.mark.parametrize("function", [chunked, attend])
def test_decoding_asks_gate_keys_only_as_far_as_the_last_position(function: Any) -> None:
    inputs = random_inputs(queries=600, bias=1.0)
    full = chunked(inputs, Sight(600, 600))
    asked = []

    def gate_keys(start: int, stop: int) -> Tensor:
        asked.append(start)
        assert isinstance(inputs.gate_k, Tensor)
        return inputs.gate_k[:, :, start:stop]

    newest: dict[str, Any] = {name: getattr(inputs, name)[:, :, -1:] for name in ("q", "z", "gate_q")}
    with torch.no_grad():
        last = function(replace(inputs, **newest, gate_k=gate_keys), Sight(1, 600))
    assert torch.allclose(last, full[:, -1:], atol=1e-12)
    assert min(asked) > 300


def test_far_keys_are_plain() -> None:
    """Left of the band, the position logit is 0 and gates have no gradient; the band is no wider than it must be."""
    inputs = random_inputs(queries=600, bias=1.0)
    seen = Sight(600, 600).rows(590, 600, torch.device("cpu"))
    rows = replace(inputs, **{name: getattr(inputs, name)[:, :, 590:600] for name in ("q", "z", "gate_q")})
    assert isinstance(inputs.gate_k, Tensor)
    assert 10 < near_gates(replace(rows, gate_k=inputs.gate_k.flip(2)), seen.flip(-1), 16).shape[-1] < 100
    assert torch.allclose(chunked(rows, Sight(10, 600)), whole(rows, Sight(10, 600))[0], atol=1e-12)
    (grad,) = torch.autograd.grad(chunked(inputs, Sight(600, 600))[:, 590:].sum(), inputs.gate_k)
    assert not grad[:, :, :500].any() and grad[:, :, 590:].any()


def test_the_band_ends_at_the_last_position_and_not_before() -> None:
    """Open gates count tokens: of nine positions the last one is reached at eight keys, and a band of seven is too short."""
    rows = random_inputs(queries=30, gated=False, bias=40.0)
    seen = Sight(30, 30).rows(29, 30, torch.device("cpu")).flip(-1)
    row = replace(rows, q=rows.q[:, :, 29:], z=rows.z[:, :, 29:])
    assert near_gates(row, seen, 8).shape[-1] == 8
    assert near_gates(row, seen, 7).shape[-1] > 7


def test_autocast_lowers_content_and_not_gates() -> None:
    """q, k and v are taken as plain attention would take them; a position is a sum of many gates, so those stay as they are."""
    inputs, sight = cast(random_inputs(queries=200, positions=64), torch.float32), Sight(200, 200)
    low = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in ("q", "k", "v")})
    positions = counted(inputs, sight.rows(0, 200, torch.device("cpu")))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(inputs, sight), attend(low, sight))
        assert torch.equal(counted(inputs, sight.rows(0, 200, torch.device("cpu")))[1], positions)


def test_chunks_leave_out_what_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and documents cost what they show, not what there is."""
    inputs, mask = random_inputs(queries=60), sight_of("window", 60, 60).mask
    assert mask is not None
    mask[:, :, 32:48] = False  # a chunk that sees nothing
    run, asked = cope_chunks._Chunk.run, []

    def watched(chunk: Any) -> Tensor:
        asked.append(chunk.rows.k.shape[2])
        return run(chunk)

    monkeypatch.setattr(cope_chunks._Chunk, "run", watched)
    sight = Sight(60, 60, mask)
    assert torch.allclose(chunked(inputs, sight, 16), whole(inputs, sight)[0], atol=1e-12)
    assert asked == [16, 27, 1, 23] * 2  # rows of the batch


def test_embeddings_share_a_null_direction() -> None:
    """Gradients of the position logits of a query sum to zero: adding one vector to all embeddings changes nothing."""
    inputs = random_inputs()
    (grad,) = torch.autograd.grad(chunked(inputs, Sight(40, 40)).square().sum(), inputs.z)
    assert grad.sum(-1).abs().max() < 1e-12 * grad.abs().max() * 40


def test_whole_positions_take_their_own_logit() -> None:
    z = torch.tensor([[[3.0, 1.0, 0.5, 0.25]]])
    assert torch.equal(
        position_logits(z, torch.tensor([[[0.0, 1.0, 2.0, 3.0, 0.5]]])), torch.tensor([[[2.75, 0.75, 0.25, 0, 1.75]]])
    )


def test_weights_are_those_of_the_output() -> None:
    inputs = random_inputs(sinks=True)
    output, weights = whole(inputs, sight_of("left padding", 40, 40))
    again = (weights @ inputs.v.repeat_interleave(2, 1)).transpose(1, 2)
    assert torch.allclose(output, again, atol=1e-12) and bool((weights.sum(-1) <= 1).all())


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cope_attention, "_kernels", lambda: None)
    assert fused(random_inputs(), Sight(40, 40)) is None


@pytest.mark.parametrize("bias", [-1.0, 0.0, 8.0])
def test_measures_of_the_last_query_are_what_they_say(bias: float) -> None:
    """Head by head: keys before the last position is reached, whether it is, and spreads of both kinds of logits."""
    inputs = random_inputs(queries=12, keys=15, positions=6, kv_heads=4, bias=bias)
    plain: dict[str, Any] = {n: x.detach() for n in TENSORS if isinstance(x := getattr(inputs, n), Tensor)}
    inputs = replace(inputs, **plain)
    assert isinstance(inputs.gate_q, Tensor) and isinstance(inputs.gate_k, Tensor)
    spans, reached, by_position, by_content = [], [], [], []
    for row, head in itertools.product(range(2), range(4)):
        gates = torch.sigmoid(inputs.gate_k[row, head] @ inputs.gate_q[row, head, -1] + inputs.gate_bias[head])
        positions = torch.stack([gates[key:].sum() for key in range(15)]).clamp(max=5)
        spans.append(int((positions < 5).sum()))
        reached.append(float(gates.sum() >= 5))
        by_position.append(position_logits(inputs.z[row, head, -1], positions))
        by_content.append(inputs.k[row, head] @ inputs.q[row, head, -1] * inputs.scaling)
    measures = last_query(inputs, Sight(12, 15))
    assert float(measures["span"]) == pytest.approx(sum(spans) / 8) and float(measures["saturated"]) == sum(reached) / 8
    spread = torch.cat(by_position).std() / torch.cat(by_content).std()
    assert float(measures["position_content"]) == pytest.approx(float(spread), rel=1e-5)

"""What a dry run says of time and memory: it grows as the work does, and the work is what is really multiplied."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.folders import save_tiny
from upfit.architecture.attention import Geometry
from upfit.architecture.layers import open_model
from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Machine, Weights, Windows, Work, block_of, conversion_of
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa import cost, fit
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion
from upfit.demo import embedded_model
from upfit.output import Output, human_seconds

QUIET = Output(quiet=True)
BLOCK = Block(Geometry(8, 8, 32, 32), 500_000, 192, 512)
WINDOWS = [Windows(4000 / 512, 512), Windows(4000 / 1024, 1024)]
MACHINE = Machine(rate=1e10, stored_rate=1e10, held=10**8, free=10**10)
FAR = 2.5  # times that a count may be off: steps end when they gain nothing, and decompositions are not counted


def run(source: Path, out: Path, recipe: str = "gqa", dry_run: bool = True, **options: Any) -> Conversion:
    chosen = get_recipe(recipe)
    return convert(chosen, str(source), out, chosen.options(**options), Settings(dry_run=dry_run, verify=False), QUIET)


def test_a_rate_is_multiplications_by_the_time_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts them, two operations each; of several times the middle one, which a busy moment does not change."""
    seconds = [1.0] + [2.0] * 5 + [50.0] * 4
    times = [float(now) for took in seconds for now in (100, 100 + took)]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: times.pop(0))
    with FlopCounterMode(display=False) as counter:
        rate = estimate.measured_rate(torch.float32)
    assert rate == counter.get_total_flops() / 2 / len(seconds) / 2.0


def test_more_work_takes_longer() -> None:
    base = cost.aligned(BLOCK, 2, WINDOWS)
    assert cost.aligned(BLOCK, 2, WINDOWS, refit=False).products < base.products
    for wider in ({"mlp": 4096}, {"weights": 4_000_000}, {"hidden": 1024}, {"geometry": Geometry(32, 8, 32, 32)}):
        more = cost.aligned(dataclasses.replace(BLOCK, **wider), 2, WINDOWS)
        assert more.products > base.products and more.bytes > base.bytes
    grown = cost.aligned(BLOCK, 2, [Windows(10 * each.count, each.length) for each in WINDOWS])
    fixed = cost.aligned(BLOCK, 2, [Windows(1e-12, each.length) for each in WINDOWS])
    assert grown.products - fixed.products == pytest.approx(10 * (base.products - fixed.products), rel=0.05)


COUNTED = [
    (BLOCK, 2, WINDOWS, True, 1.28999e11, 1.49408e08),
    (BLOCK, 4, [Windows(3000 / 2048, 2048)], False, 5.19276e10, 7.2352e07),
    (
        Block(Geometry(6, 6, 20, 28), 300_000, 160, 0),
        3,
        [Windows(500 / 64, 64), Windows(900 / 700, 700)],
        True,
        4.94072e10,
        2.08062e07,
    ),
]


@pytest.mark.parametrize(("block", "kv_heads", "windows", "refit", "products", "nbytes"), COUNTED)
def test_counts_are_those_that_were_held_against_profiles(
    block: Block, kv_heads: int, windows: list[Windows], refit: bool, products: float, nbytes: float
) -> None:
    """Whoever counts otherwise, or changes what is done, measures again."""
    counted = cost.aligned(block, kv_heads, windows, refit)
    assert (counted.products, counted.bytes) == (pytest.approx(products, rel=1e-5), pytest.approx(nbytes, rel=1e-5))


@pytest.mark.parametrize(
    ("stored_rate", "read_back", "seconds", "nbytes"),
    [(1e10, True, 22.61, 896_608_000), (1e9, False, 21.61, 1_396_608_000), (2e10, False, 12.805, 896_608_000)],
)
def test_a_comparison_is_in_the_faster_type_and_holds_the_larger_model(
    stored_rate: float, read_back: bool, seconds: float, nbytes: float
) -> None:
    weights = Weights([10**8, 2 * 10**8], [4 * 10**8, 5 * 10**8], 32_000)
    machine = dataclasses.replace(MACHINE, stored_rate=stored_rate)
    told = conversion_of(Work(3e10, 4e8), weights, machine, True, read_back)
    assert told == (pytest.approx(seconds), pytest.approx(nbytes))
    assert estimate.ends(100.0) == [60.0, 200.0] and estimate.ends(7.0) == [4.0, 20.0]


def test_a_fit_is_of_all_layers_and_holds_one_at_a_time() -> None:
    assert Work(1.0, 5.0).then(Work(2.0, 4.0)) == Work(3.0, 5.0)


def test_seconds_and_bytes_of_a_conversion() -> None:
    weights = Weights([10**8, 10**8], [4 * 10**8, 4 * 10**8], 32_000)
    alone = conversion_of(Work(), weights, MACHINE, compared=False, read_back=False)
    assert alone == (pytest.approx(4 * 10**8 * estimate.SECONDS_A_BYTE), MACHINE.held)
    back = conversion_of(Work(), weights, MACHINE, compared=False, read_back=True)
    compared = conversion_of(Work(), weights, MACHINE, compared=True, read_back=True)
    assert alone[0] < back[0] < compared[0] and compared[1] > MACHINE.held + max(weights.nbytes)
    slow = dataclasses.replace(MACHINE, stored_rate=1e9)  # a type that is slow here is made wider
    assert conversion_of(Work(), weights, slow, True, True)[0] == compared[0]
    assert conversion_of(Work(), weights, slow, True, True)[1] > compared[1] + max(weights.nbytes) / 2
    fitted = conversion_of(Work(1e12, 1e10), weights, MACHINE, compared=True, read_back=True)
    assert fitted[0] == pytest.approx(compared[0] + 100) and fitted[1] == MACHINE.held + 1e10


def test_the_block_around_an_attention(tmp_path: Path) -> None:
    with open_checkpoint(embedded_model()) as checkpoint:
        opened, architecture = open_model(checkpoint)
        assert [block_of(layer, opened.tensors, architecture.layers) for layer in architecture.layers] == [
            Block(Geometry(8, 8, 32, 32), 4 * 192 * 256 + 3 * 192 * 512 + 2 * 192, 192, 512)
        ] * 4


@pytest.mark.slow
def test_the_count_is_of_what_is_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[float] = []
    real = fit.convert_layers

    def counting(*arguments: object) -> None:
        with FlopCounterMode(display=False) as counter:
            real(*arguments)  # type: ignore[arg-type]
        counts.append(counter.get_total_flops() / 2)

    monkeypatch.setattr(fit, "convert_layers", counting)
    for name, value in (("A_NUMBER", 0), ("A_LAYER", 0), ("A_DOUBLE", 1)):
        monkeypatch.setattr(estimate, name, value)
    (tmp_path / "text.txt").write_text("A line about many things that are not the same.\n" * 2000)
    text = [str(tmp_path / "text.txt")]
    run(embedded_model(), tmp_path / "out", dry_run=False, kv_heads=2, calibration=text, calibration_tokens="2k")
    expected = 4 * cost.aligned(BLOCK, 2, [Windows(1000 / 512, 512), Windows(1000 / 1024, 1024)]).products
    assert expected / FAR < counts[0] < expected * FAR


def test_a_dry_run_tells_both_where_they_are_counted(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    mean = run(source, tmp_path / "out", kv_heads=2, method="mean")
    few, many = (run(source, tmp_path / "out", kv_heads=2, calibration_tokens=tokens) for tokens in ("1k", "10M"))
    assert mean.estimate is not None and few.estimate is not None and many.estimate is not None
    assert mean.estimate.seconds[0] < mean.estimate.seconds[1] < many.estimate.seconds[0]
    assert 10**8 < mean.estimate.memory < 10**11 and many.estimate.memory > few.estimate.memory
    assert json.loads(json.dumps(mean.record()))["estimate"] == mean.estimate.record()
    lines = str(mean).splitlines()
    assert lines[0].startswith("Would write") and lines[1] == mean.estimate.words()


def test_nothing_is_told_of_a_fit_that_nobody_counted_or_of_what_was_written(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    assert run(source, tmp_path / "out", "diff", variant="split").estimate is None
    assert run(source, tmp_path / "out", "diff", variant="v2").estimate is not None
    written = run(source, tmp_path / "out", kv_heads=2, method="mean", dry_run=False)
    assert written.estimate is None and "estimate" not in written.record()


@pytest.mark.parametrize(
    ("ends", "words"),
    [((3.0, 9.0), "3 to 9 s"), ((20.0, 60.0), "20 to 60 s"), ((70.0, 200.0), "1 to 3 min"), ((5.0, 5.0), "5 s")]
    + [((3000.0, 9000.0), "0.8 to 2 h"), ((1e5, 3e5), "28 to 83 h")],
)
def test_a_stretch_of_time_in_words(ends: tuple[float, float], words: str) -> None:
    assert human_seconds(*ends) == words

"""What a dry run says that a latent takes: it grows as the work does, and the work is what is really multiplied."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from upfit.architecture.attention import Geometry
from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Windows
from upfit.convert.conversion import Settings, convert
from upfit.convert.mla import cost, fit
from upfit.convert.mla.sizes import Sizes
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion
from upfit.demo import embedded_model
from upfit.output import Output
from upfit.text import python_documents

BLOCK = Block(Geometry(8, 8, 32, 32), 500_000, 192, 512)
SIZES = Sizes((1,) * 10 + (0,) * 6, 108, 12)
WINDOWS = [Windows(4000 / 512, 512), Windows(4000 / 1024, 1024)]
FAR = 1.5  # times that a count may be off: steps end when they gain nothing


def run(folder: Path, dry_run: bool, **options: Any) -> Conversion:
    (folder / "text.txt").write_text("\n".join(document.text for document in python_documents()[:12]))
    recipe, text = get_recipe("mla"), {"calibration": [str(folder / "text.txt")]}
    settings = Settings(dry_run=dry_run, verify=False)
    return convert(
        recipe, str(embedded_model()), folder / "out", recipe.options(**text | options), settings, Output(quiet=True)
    )


def test_more_work_takes_longer() -> None:
    base = cost.fitted(BLOCK, SIZES, WINDOWS)
    assert cost.fitted(BLOCK, SIZES, WINDOWS, refit=False).products < base.products
    for wider in ({"mlp": 4096}, {"weights": 4_000_000}, {"hidden": 1024}, {"geometry": Geometry(32, 8, 32, 32)}):
        more = cost.fitted(dataclasses.replace(BLOCK, **wider), SIZES, WINDOWS)
        assert more.products > base.products and more.bytes >= base.bytes
    assert cost.fitted(BLOCK, dataclasses.replace(SIZES, latent=150), WINDOWS).products > base.products
    grown = cost.fitted(BLOCK, SIZES, [Windows(10 * each.count, each.length) for each in WINDOWS])
    fixed = cost.fitted(BLOCK, SIZES, [Windows(1e-12, each.length) for each in WINDOWS])
    assert grown.products - fixed.products == pytest.approx(10 * (base.products - fixed.products), rel=0.05)
    one, two = (cost.chosen([BLOCK] * 4, [SIZES] * number, WINDOWS) for number in (1, 2))
    assert one.products < two.products < 2 * one.products and one.bytes == two.bytes


@pytest.mark.slow
def test_the_count_is_of_what_is_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions, which torch does not count, are a few percent here."""
    counts: list[float] = []
    real = fit.convert_layers

    def counting(*arguments: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            real(*arguments)
        counts.append(counter.get_total_flops() / 2)

    monkeypatch.setattr(fit, "convert_layers", counting)
    for name, value in (("A_NUMBER", 0), ("A_LAYER", 0), ("A_DOUBLE", 1)):
        monkeypatch.setattr(estimate, name, value)
    run(tmp_path, dry_run=False, latent=108, rope_dim=20, target="deepseek_v3", calibration_tokens="2k")
    expected = 4 * cost.fitted(BLOCK, SIZES, [Windows(2, 512), Windows(1, 1024)]).products
    assert expected / FAR < counts[0] < expected * FAR

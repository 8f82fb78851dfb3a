"""Products are exact unless two places agree: the layer may be rounded, and the function says so."""

import pytest
import torch

from upfit.calibration import products
from upfit.calibration.products import quick_products, rounded

CPU = torch.device("cpu")


@rounded()
def precision_inside() -> str:
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize("units", [True, False])
def test_only_what_is_rounded_inside_quick_products_is(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16_fast", lambda device: units)
    quick = "medium" if units else "highest"
    assert precision_inside() == "highest"
    with quick_products(CPU):
        assert torch.get_float32_matmul_precision() == "highest", "nothing is rounded where no function says so"
        assert precision_inside() == quick
        with quick_products(CPU, quick=False):
            assert precision_inside() == "highest", "a layer that loses nothing"
        assert precision_inside() == quick
    assert precision_inside() == "highest"


def test_exact_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16_fast", lambda device: True)

    @rounded()
    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError), quick_products(CPU):
        fails()
    assert precision_inside() == "highest" and torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_rounds_to_tf32() -> None:
    with quick_products(torch.device("cuda")):
        assert precision_inside() == "high"
    assert precision_inside() == "highest"

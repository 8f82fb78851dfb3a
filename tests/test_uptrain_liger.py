"""Kernels of others take the place of norms and feed-forward layers only where they compute the same."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.folders import tiny_llama
from tests.tiny import tiny_model
from tests.uptraining import Workshop, make_workshop, metrics
from upfit.errors import UpfitError
from upfit.uptrain.model.liger import fuse
from upfit.uptrain.model.model_traits import examine


def install(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0, backward: float = 1.0) -> list[dict[str, Any]]:
    """What is asked of a Liger whose only kernel is a norm by plain torch, `factor` and `backward` times too large."""
    asked: list[dict[str, Any]] = []

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight: Any = self.weight
            y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)  # type: ignore
            y = y * weight * factor
            return (y * backward + (y * (1 - backward)).detach()).to(x.dtype)

    def change(rope: bool = True, fused_linear_cross_entropy: bool = True, rms_norm: bool = True, model: Any = None) -> None:
        asked.append({"rope": rope, "fused_linear_cross_entropy": fused_linear_cross_entropy, "rms_norm": rms_norm})
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.__dict__["forward"] = Norm.forward.__get__(module)
        modeling_llama.LlamaRMSNorm = Norm  # type: ignore[misc, assignment]

    patch: Any = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": change}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    return asked


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.slow
def test_a_run_learns_the_same(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, losses = modeling_llama.LlamaRMSNorm, []
    for liger in (False, True):
        asked = install(monkeypatch)
        shop.run(tmp_path / str(liger), liger=liger, tokens="512")
        losses.append([line["loss"] for line in metrics(tmp_path / str(liger))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert asked == [{"rope": False, "fused_linear_cross_entropy": False, "rms_norm": True}] * 2, "student and teacher"
    assert modeling_llama.LlamaRMSNorm is stock


@pytest.mark.parametrize("wrong", [{"factor": 1.01}, {"backward": 1.01}])
def test_what_computes_something_else_is_refused(wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    install(monkeypatch, **wrong)
    with pytest.raises(UpfitError, match="computes something else; leave it out"):
        fuse(model, examine(model))


def test_without_liger_or_its_kernels_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UpfitError, match=r"pip install 'upfit\[liger\]'"):
        fuse(tiny_llama(), examine(tiny_llama()))
    install(monkeypatch)
    model = tiny_model("bloom")
    with pytest.raises(UpfitError, match="no kernels for bloom models"):
        fuse(model, examine(model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run there")
def test_the_real_one_asks_for_a_gpu() -> None:
    pytest.importorskip("liger_kernel")
    with pytest.raises(UpfitError, match="do not run here .* leave it out"):
        fuse(tiny_llama(), examine(tiny_llama()))

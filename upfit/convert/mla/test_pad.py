"""Padding widens what is cached, and leaves the function as it is."""

from pathlib import Path

import pytest
import torch

from tests.folders import save_tiny, tiny_llama
from upfit.convert.conversion import Settings, convert
from upfit.convert.mla.pad import read_pad
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output

TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 40


def test_zeros_change_nothing_but_the_cache(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "source", tiny_llama())
    (tmp_path / "text.txt").write_text(TEXT)
    recipe, logits = get_recipe("mla"), []
    for name, pad in (("plain", None), ("wide", "32+8")):
        options = recipe.options(
            latent=12, rope_dim=4, pad=pad, calibration=[str(tmp_path / "text.txt")], calibration_tokens="1k", refit=False
        )
        convert(recipe, str(source), tmp_path / name, options, Settings(verify=False), Output(quiet=True))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        widths = (32, 8) if pad else (12, 4)
        assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == widths
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(24).reshape(2, 12) + 3).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4 * float(logits[0].abs().max()))


def test_a_type_that_cannot_hold_the_scale_is_refused_before_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upfit.convert.mla import fit

    def fitted(*_: object) -> None:
        raise AssertionError("it must not come to the fit")

    monkeypatch.setattr(fit, "fit", fitted)
    source, recipe = save_tiny(tmp_path / "source", tiny_llama()), get_recipe("mla")
    with pytest.raises(UpfitError, match=r"--dtype float16: the scaled latent is too small for float16"):
        options = recipe.options(latent=12, rope_dim=4)
        convert(recipe, str(source), tmp_path / "out", options, Settings(dtype="float16"), Output(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["512", "512+", "512+63", "512+66", "a+b"])
def test_widths_that_cannot_be(text: str) -> None:
    with pytest.raises(UpfitError, match=r"--pad"):
        read_pad(text, 32)


def test_less_than_the_layers_have_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_llama())
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = get_recipe("mla")
    options = recipe.options(latent=12, rope_dim=4, pad="8+4", calibration=[str(tmp_path / "text.txt")])
    with pytest.raises(UpfitError, match=r"--pad 8\+4 is less than what the layers have, 12\+4"):
        convert(recipe, str(source), tmp_path / "out", options, Settings(verify=False), Output(quiet=True))
    assert not (tmp_path / "out").exists()

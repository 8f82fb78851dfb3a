"""Padding widens what is cached, and leaves the function as it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import save_tiny, tiny_llama
from upfit.convert.conversion import Settings, convert
from upfit.convert.mla.fit import stock_note
from upfit.convert.mla.pad import read_pad
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output

TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 40


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Its last two pairs turn slower than they would: where they have no key but zeros, that does not matter.
SLOWER = {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 48}}


@pytest.mark.parametrize(("rotation", "rotated"), [(SLOWER, 8), ({}, 20)], ids=["slower pairs", "more than all pairs"])
def test_zeros_change_nothing_but_the_cache(tmp_path: Path, rotation: dict[str, Any], rotated: int) -> None:
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "source", tiny_llama(**rotation))
    (tmp_path / "text.txt").write_text(TEXT)
    recipe, logits = get_recipe("mla"), []
    for name, pad in (("plain", None), ("wide", f"32+{rotated}")):
        options = recipe.options(
            latent=12, rope_dim=4, pad=pad, calibration=[str(tmp_path / "text.txt")], calibration_tokens="1k", refit=False
        )
        convert(recipe, str(source), tmp_path / name, options, Settings(verify=False), Output(quiet=True))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        widths = (32, rotated) if pad else (12, 4)
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


@pytest.mark.parametrize("text", ["512", "512+", "512+63", "a+b"])
def test_widths_that_cannot_be(text: str) -> None:
    with pytest.raises(UpfitError, match=r"--pad"):
        read_pad(text)


def test_less_than_the_layers_have_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_llama())
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = get_recipe("mla")
    options = recipe.options(latent=12, rope_dim=4, pad="8+4", calibration=[str(tmp_path / "text.txt")])
    with pytest.raises(UpfitError, match=r"--pad 8\+4 is less than what the layers have, 12\+4"):
        convert(recipe, str(source), tmp_path / "out", options, Settings(verify=False), Output(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ((512, 64), r"transformers' own$"),
        ((256, 64), r"; vLLM on a CPU wants --pad 512\+64$"),
        ((96, 32), r"and this is 128: for vLLM give --pad 512\+64$"),
        ((600, 64), r"and this is 664: for vLLM give a latent up to 512"),
        ((96, 80), r"and this is 176: for vLLM give a latent up to 512"),
    ],
)
def test_what_vllm_wants_is_said(widths: tuple[int, int], words: str) -> None:
    assert re.search(words, stock_note({"kv_lora_rank": widths[0], "qk_rope_head_dim": widths[1]}))

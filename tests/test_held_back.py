"""Held-back windows choose, and nothing is fitted on them: other text in them changes errors, and no weight.

They choose nothing here, else other text could choose differently: choices are made on the windows that are fitted.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny
from upfit.calibration import fit_values, ridge
from upfit.calibration.residual import FEW
from upfit.calibration.sample import Sample, text_sample
from upfit.calibration.scores import fit as fit_scores
from upfit.convert import fitting
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa import merge_layer
from upfit.convert.recipe import get_recipe
from upfit.output import Output

TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 60
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "aligned": ("gqa", {"kv_heads": 2}),
    "aligned, without refit": ("gqa", {"kv_heads": 1, "refit": False}),
    "split": ("diff", {"variant": "split"}),
}


@pytest.fixture
def choices_on_fitted_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the strength of ridges, of rounds and steps; there is one cut of slow pairs."""
    for room, name in ((ridge, "ridge"), (fit_values, "refine_values"), (fit_scores, "fit_scores")):
        choose = getattr(room, name)
        monkeypatch.setattr(room, name, lambda fitted, held, *others, choose=choose: choose(fitted, fitted, *others))
    monkeypatch.setattr(merge_layer, "CUTS", (0.6,))


def with_other_text(sample: Sample, held: bool) -> Sample:
    """One window read backwards: the last of those that are held back, or of the others. What is asked of a layer before
    anything is fitted, it is asked on the first FEW windows; these stay."""
    [(length, rows)], rows = sample.windows.items(), sample.windows[max(sample.windows)].clone()
    assert sample.held[length] > FEW
    changed = sample.held[length] - 1 if held else len(rows) - 1
    rows[changed] = rows[changed].flip(0)
    return replace(sample, windows={length: rows})


def fitted(folder: Path, name: str, out: str) -> tuple[bytes, list[Any]]:
    verb, options = FITS[name]
    text = {"calibration": [str(folder / "text.txt")], "calibration_tokens": "2k", "calibration_length": 32}
    recipe = get_recipe(verb)
    settings = Settings(verify=False)
    convert(recipe, str(folder / "model"), folder / out, recipe.options(**options, **text), settings, Output(quiet=True))
    step = json.loads((folder / out / "recipe.json").read_text())["steps"][-1]
    return (folder / out / "model.safetensors").read_bytes(), step["measurements"]["layers"]


@pytest.mark.usefixtures("choices_on_fitted_windows")
@pytest.mark.parametrize("name", FITS)
def test_nothing_is_fitted_on_held_back_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    save_tiny(tmp_path / "model")
    weights, layers = fitted(tmp_path, name, "plain")
    for held in (True, False):
        monkeypatch.setattr(fitting, "sample_for", lambda *words, held=held: with_other_text(text_sample(*words), held))
        other, other_layers = fitted(tmp_path, name, f"other {held}")
        assert (other == weights) == held
        assert other_layers != layers, "errors are measured on held-back windows"

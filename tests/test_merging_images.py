"""A model that sees, merged on images with texts: its language model is watched on what it makes of both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.test_aligned_laws import equal_heads
from tests.test_merging_everywhere import convert_to, logits
from tests.vision import FAMILIES, image_folder, raw_examples, save_seeing
from upfit.architecture.layers import open_model
from upfit.calibration import calibrate as calibrating
from upfit.calibration import sample_for as sampling
from upfit.calibration.calibrate import calibrate
from upfit.calibration.example_sample import ExampleSample, hold_back
from upfit.calibration.observe import Seen
from upfit.calibration.teacher_student import enter, open_pair, pass_by
from upfit.checkpoint.reader import open_checkpoint, read_config
from upfit.examples import Examples, batches
from upfit.examples.images import read_images
from upfit.output import Output

pytest.importorskip("PIL")
OWN_POSITIONS = ("qwen2_vl", "qwen3_vl", "qwen3_5")  # whose processors want torchvision
QUIET = Output(quiet=True)
OFTEN = ("llava", "mllama", "qwen2_vl", "qwen3_5")


def sampled(name: str) -> Any:
    return name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)


def saved(model_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny model in `folder`/source and images beside it; what it is calibrated on, as options."""
    raw = model_type in OWN_POSITIONS
    save_seeing(folder / "source", model_type, processor=not raw)
    images = image_folder(folder / "images", sides=(30, 120))
    if raw:
        shown = Examples("images", raw_examples(model_type), {"sha256": "0"})
        monkeypatch.setattr(sampling, "read_images", lambda *_: shown)
    return {"calibration": [str(images)]}


def shown(model_type: str, folder: Path) -> Examples:
    if model_type in OWN_POSITIONS:
        return Examples("images", raw_examples(model_type), {"sha256": "0"})
    source = folder / "source"
    return read_images(source, read_config(source), [str(folder / "images")], "--calibration", "text", None, 512, QUIET)


def distance(folder: Path, model_type: str, first: str, second: str) -> float:
    """Mean square of the difference of their logits on the images and texts, as a share of those of the first."""
    lost = []
    for batch in batches(shown(model_type, folder).examples, read_config(folder / "source"), 1):
        one, other = (logits(folder / name, batch.keywords) for name in (first, second))
        lost.append(float((one - other).square().mean() / one.var()))
    return sum(lost) / len(lost)


def layers_of(folder: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads((folder / "recipe.json").read_text())["steps"][-1]["measurements"]["layers"]
    return layers


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_it_computes_what_the_model_computes(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model adds to the hidden states between layers, and where some layers attend to images alone."""
    saved(model_type, tmp_path, monkeypatch)
    source = tmp_path / "source"
    sample = hold_back(shown(model_type, tmp_path), read_config(source), {})
    whole = AutoModelForImageTextToText.from_pretrained(source).eval()
    ends: list[Tensor] = []

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    with open_checkpoint(source) as stored:
        model, paired = open_pair(*open_model(stored), sample)
        assert all(parameter.device.type == "meta" for parameter in model.model.parameters())
        for index, block in enumerate(model.blocks):
            model.load(index)
            enter(index, paired)
            pass_by(block.module, index, paired, alone=True)
    whole.get_submodule(model.blocks[-1].path).register_forward_hook(end)
    for batch, inputs in zip(paired, sample.batches()[0], strict=True):
        with torch.no_grad():
            whole(**inputs.keywords)
        torch.testing.assert_close(batch.teacher, ends.pop(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", map(sampled, FAMILIES))
def test_heads_that_are_one_merge_without_loss(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every attention, those to images too; scores are what they were in every example, wherever its image stands."""
    options = saved(model_type, tmp_path, monkeypatch)
    equal_heads(tmp_path / "source", tmp_path / "equal", 2)
    convert_to(tmp_path, "equal", "merged", kv_heads=2, method="aligned", **options)
    layers = layers_of(tmp_path / "merged")
    assert len(layers) == (3 if model_type == "mllama" else 2)
    assert all(layer["merged_error"] < 1e-6 and layer["fitted_error"] < 1e-6 for layer in layers)
    assert distance(tmp_path, model_type, "equal", "merged") < 1e-8


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_what_it_makes_of_images_suffers_less_than_with_text(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And less than by the mean; text alone is told for what it is."""
    options = saved(model_type, tmp_path, monkeypatch)
    (tmp_path / "text.txt").write_text("this is number one and more. " * 100)
    text = {"calibration": [str(tmp_path / "text.txt")], "calibration_tokens": "1k", "calibration_length": 64}
    convert_to(tmp_path, "source", "images-seen", kv_heads=2, method="aligned", **options)
    convert_to(tmp_path, "source", "text-alone", kv_heads=2, method="aligned", **text)
    convert_to(tmp_path, "source", "mean", kv_heads=2, method="mean")
    seen, alone, mean = (distance(tmp_path, model_type, "source", out) for out in ("images-seen", "text-alone", "mean"))
    assert seen < 0.1 * alone < 0.1 * mean
    sampling.sample_for(tmp_path / "source", open_checkpoint(tmp_path / "source"), None, "1k", 64, Output())
    said = capsys.readouterr().err
    assert said.count("this model sees, and --calibration has no images") == 1 and "may suffer more" in said


def test_statistics_of_images_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting with images equals calibrating first and converting with the file, of an attention to images too."""
    options = saved("mllama", tmp_path, monkeypatch)
    convert_to(tmp_path, "source", "at-once", kv_heads=2, **options)
    stats = tmp_path / "stats.safetensors"
    record = calibrate(str(tmp_path / "source"), options["calibration"], stats, "64k", None, None, False, QUIET)
    assert record.layers == 3 and not record.not_watched and not record.windows
    convert_to(tmp_path, "source", "reused", kv_heads=2, calibration=[str(stats)])
    at_once, reused = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at-once", "reused"))
    assert at_once == reused
    step = json.loads((tmp_path / "reused" / "recipe.json").read_text())["steps"][-1]["measurements"]
    assert step["calibration"]["kind"] == "images" and step["calibration"]["examples"] == 12


def test_a_query_that_sees_the_rest_of_its_image_is_sampled_with_it() -> None:
    """Where a mask lets queries look ahead, they look at all keys; elsewhere at those up to the end of their stretch."""
    heads = torch.zeros(1, 1, 4, 2)
    own = Seen(nn.Identity(), heads, heads, heads, None, 1.0, None, None, heads)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    ahead = causal.clone()
    ahead[..., 1, 2] = True
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    masks = {"none": None, "causal": causal, "added": added, "ahead": ahead}
    assert [name for name, mask in masks.items() if replace(own, mask=mask).looks_ahead] == ["ahead"]
    assert replace(own, causal=False).looks_ahead


def test_examples_with_images_each_stand_by_themselves(tmp_path: Path) -> None:
    """No padding, one image's pixels a batch."""
    config = read_config(save_seeing(tmp_path / "source", "qwen2_vl", processor=False))
    sample = hold_back(Examples("images", raw_examples("qwen2_vl"), {"sha256": "0"}), config, {})
    assert isinstance(sample, ExampleSample)
    inputs, held = sample.batches()
    assert len(inputs) == 12 and held == [True] + [False] * 11
    assert all(len(each.keywords["input_ids"]) == 1 and each.counted is None and each.own_positions for each in inputs)
    assert sample.tokens == sum(each.keywords["input_ids"].numel() for each in inputs)


def test_a_calibration_goes_on_where_the_model_adds_between_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added before a layer is added once, whether the run was stopped there or not."""
    options = saved("qwen3_vl", tmp_path, monkeypatch)
    original = calibrating.gather_layer

    def run(out: str) -> bytes:
        stats = tmp_path / out
        calibrate(str(tmp_path / "source"), options["calibration"], stats, "64k", None, None, False, QUIET)
        return stats.read_bytes()

    def stop(model: Any, architecture: Any, index: int, batches: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return original(model, architecture, index, batches)

    whole = run("whole.safetensors")
    monkeypatch.setattr(calibrating, "gather_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped.safetensors")
    monkeypatch.setattr(calibrating, "gather_layer", original)
    assert (tmp_path / "stopped.safetensors.upfit-work").is_dir()
    assert run("stopped.safetensors") == whole

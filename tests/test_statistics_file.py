"""Files of statistics: plain tensors, of one model and tokenizer down to the bit, damage told in a line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import save_tiny, tiny_llama
from tests.test_calibrate import TEXT, converted, run
from upfit.calibration.statistics_file import fingerprint, open_statistics, read_metadata
from upfit.checkpoint import content
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.safetensors_header import read_header
from upfit.errors import UpfitError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return save_tiny(tmp_path / "model")


def test_the_file_is_plain_safetensors(model: Path) -> None:
    told = run(model)
    tensors = load_file(model.parent / "stats.safetensors")
    path = "model.layers.1.self_attn"
    assert tensors[f"{path}/key_pairs"].shape == (4, 4, 4, 4, 2) and tensors[f"{path}/keys"].shape == (32, 32)
    assert tensors[f"{path}/queries"].shape == (4, 8, 8) and tensors[f"{path}/values"].shape == (32, 32)
    assert tensors["windows.64"].shape == (15, 64) and told.layers == 2
    with open_checkpoint(model) as checkpoint:
        opened = open_statistics(model.parent / "stats.safetensors", checkpoint)
        found = opened.layer(path)
    assert found is not None and found[0].pairs == 4 and found[0].factors and found[0].movable
    assert torch.equal(found[1]["keys"], tensors[f"{path}/keys"])


def test_statistics_of_another_model_are_refused(model: Path) -> None:
    run(model)
    other = save_tiny(model.parent / "other", tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    with pytest.raises(UpfitError, match="statistics of another model"):
        converted(other, "out", kv_heads=2, calibration=[str(model.parent / "stats.safetensors")])


def one_bit_flipped(path: Path, name: str) -> None:
    """Change one bit in the middle of a tensor, and neither the file's size nor its time."""
    info = next(info for info in read_header(path) if info.name == name)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[(info.start + info.end) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_every_bit_of_the_model_counts(model: Path, name: str) -> None:
    """Statistics of a model that differs in one bit of one tensor, large or small, are those of another model."""
    run(model)
    one_bit_flipped(model / "model.safetensors", name)
    with pytest.raises(UpfitError, match="statistics of another model"):
        converted(model, "out", kv_heads=2, calibration=[str(model.parent / "stats.safetensors")])


def test_the_fingerprint_is_of_tensors_not_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over several files, hashed in other pieces' company or by other threads, a model is the one it was; a tensor under
    another name is not."""
    whole, spread = save_tiny(tmp_path / "whole"), save_tiny(tmp_path / "spread", shards=3)
    monkeypatch.setattr(content, "PIECE", 1000)  # tensors of several pieces, as they are in large models

    def of(folder: Path) -> str:
        with open_checkpoint(folder) as checkpoint:
            return fingerprint(checkpoint)

    known = of(whole)
    assert of(spread) == known
    monkeypatch.setattr(content, "THREADS", 1)
    assert of(whole) == known
    weights = load_file(whole / "model.safetensors")
    a, b = (f"model.layers.{index}.self_attn.k_proj.weight" for index in (0, 1))
    save_file(weights | {a: weights[b], b: weights[a]}, whole / "model.safetensors", metadata={"format": "pt"})
    assert of(whole) != known


def test_statistics_of_another_tokenizer_are_refused(model: Path) -> None:
    """Windows are token ids: those of another vocabulary are another text."""
    run(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UpfitError, match="another tokenizer than .*model has now; make statistics anew"):
        converted(model, "out", kv_heads=2, calibration=[str(model.parent / "stats.safetensors")])
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()  # nothing is there that could disagree
    converted(model, "out", kv_heads=2, calibration=[str(model.parent / "stats.safetensors")])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("held", "{"),
        ("held", "[]"),
        ("held", '{"64": 1, "9": 1}'),
        ("facts", "[1]"),
        ("tokenizer", ""),
        ("rows", "x"),
        ("text", None),
    ],
)
def test_damaged_statistics_are_refused_in_a_line(model: Path, key: str, value: str | None) -> None:
    run(model)
    path = model.parent / "stats.safetensors"
    header = read_metadata(path)
    header = {name: text for name, text in (header | {key: value}).items() if text is not None}
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(UpfitError, match="not what `upfit calibrate` writes|is not valid JSON") as caught:
        converted(model, "out", kv_heads=2, calibration=[str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": ["nowhere.txt"]}, "--calibration nowhere.txt is not here"),
        ({"calibration": ["nowhere.safetensors"]}, "no statistics file at nowhere.safetensors"),
        ({"calibration": ["a.txt", "b.safetensors"]}, "text, or one statistics file"),
        ({"calibration": ["b.safetensors"], "calibration_length": 8}, "are those of the statistics file"),
        ({"method": "mean", "calibration_tokens": "1k"}, "--calibration-tokens goes with --method auto or aligned, not mean"),
        ({"method": "first", "refit": False}, "--no-refit goes with --method auto or aligned, not first"),
        ({"calibration_length": 4096}, "above the model's 128 positions"),
        ({"calibration_length": 2}, "give at least 8"),
        ({"calibration_tokens": "many"}, "--calibration-tokens got 'many'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(model: Path, options: dict[str, Any], message: str) -> None:
    before = sorted(model.parent.iterdir())
    with pytest.raises(UpfitError, match=message) as caught:
        converted(model, "out", kv_heads=2, **options)
    assert "\n" not in str(caught.value) and sorted(model.parent.iterdir()) == before


def test_too_little_text(model: Path) -> None:
    (model.parent / "text.txt").write_text("short")
    with pytest.raises(UpfitError, match="the calibration text has 6 tokens"):
        run(model)
    assert sorted(path.name for path in model.parent.iterdir()) == ["model", "text.txt"]

"""Records in which anything may be of another type: read as they are meant, or refused in one line that names the file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_convert import damaged
from tests.folders import letter_tokenizer, save_tiny
from tests.uptraining import QUIET
from upfit.calibration.calibrate import calibrate
from upfit.calibration.statistics_file import open_statistics
from upfit.checkpoint.reader import open_checkpoint
from upfit.errors import UpfitError
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.shards import MANIFEST, Shards

SEEDS = 150


def refused_or_read(read: Callable[[], object], name: str) -> bool:
    """Whether it was refused; anything but one line with the file's name is an error of ours."""
    try:
        read()
    except UpfitError as error:
        assert "\n" not in str(error) and name in str(error)
        return True
    return False


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    letter_tokenizer().save_pretrained(place / "tokenizer")
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": "some words " * n}) for n in range(1, 9)))
    prepare([str(place / "text.jsonl")], place / "data", str(place / "tokenizer"), "text", QUIET)
    return place / "data"


def test_a_manifest_of_any_shape_is_read_or_refused(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "data")
    content = (folder / MANIFEST).read_bytes()

    def read() -> None:
        found = Shards(folder)
        found.read(0, found.tokens)
        assert found.fingerprint and found.tokenizer

    read()
    refused = 0
    for seed in range(SEEDS):
        (folder / MANIFEST).write_bytes(damaged(content, MANIFEST, random.Random(seed)))
        refused += refused_or_read(read, str(folder))
    assert refused > SEEDS / 3


def test_positions_of_documents_go_upwards(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "data")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["format"] = 1
    for entry in manifest["files"].values():
        entry.pop("crc32")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    content = bytearray((folder / "documents.bin").read_bytes())
    content[8:16] = (-5).to_bytes(8, "little", signed=True)
    (folder / "documents.bin").write_bytes(content)
    with pytest.raises(UpfitError, match="no positions of documents"):
        Shards(folder)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("calibrated")
    (place / "text.txt").write_text("def f(x): return x + 1; the quick brown fox jumps. " * 60)
    save_tiny(place / "model")
    calibrate(str(place / "model"), [str(place / "text.txt")], place / "stats.safetensors", "1k", 64, None, False, QUIET)
    return place


def opened(place: Path, path: Path) -> None:
    with open_checkpoint(place / "model") as checkpoint:
        found = open_statistics(path, checkpoint)
    for layer in found.traits:
        found.layer(layer)


def test_statistics_of_any_shape_are_read_or_refused(calibrated: Path, tmp_path: Path) -> None:
    whole = calibrated / "stats.safetensors"
    opened(calibrated, whole)
    tensors = load_file(whole)
    with safe_open(whole, "pt") as file:
        told = dict(file.metadata())
    path, refused = tmp_path / "stats.safetensors", 0
    for seed in range(SEEDS):
        draw = random.Random(seed)
        key = draw.choice(["held", "facts", "text", "rows", "facts"])
        changed = damaged(told[key].encode(), key, draw).decode("utf-8", "replace")
        save_file(tensors, path, told | {key: changed})
        refused += refused_or_read(lambda: opened(calibrated, path), str(path))
    assert refused > SEEDS / 3


@pytest.mark.parametrize("change", ["missing", "other shape", "not finite", "other type", "negative ids", "more"])
def test_statistics_are_whole(calibrated: Path, tmp_path: Path, change: str) -> None:
    whole = calibrated / "stats.safetensors"
    tensors: dict[str, Any] = load_file(whole)
    with safe_open(whole, "pt") as file:
        told = dict(file.metadata())
    name = next(name for name in tensors if name.endswith("/keys"))
    if change == "missing":
        tensors.pop(name)
    elif change == "other shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "not finite":
        tensors[name][0, 0] = float("nan")
    elif change == "other type":
        tensors[name] = tensors[name].double()
    elif change == "negative ids":
        tensors["windows.64"][0, 0] = -1
    else:
        tensors[f"{name}2"] = tensors[name].clone()
    path = tmp_path / "stats.safetensors"
    save_file(tensors, path, told)
    with pytest.raises(UpfitError, match=str(path)):
        opened(calibrated, path)

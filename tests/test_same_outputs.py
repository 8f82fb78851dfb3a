"""`benchmarks/same_outputs.py` sees what differs between two folders, and not what differs from one run to the next."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_bytes import MASKS, masked
from benchmarks.same_outputs import SAID, Side, compared

STEP = {"step": 3, "loss": 3.8461732864379883, "lr": 0.003, "tokens_per_second": 2002.0157326689446, "seconds": 0.127}
RECIPE = {"steps": [{"verb": "convert gqa", "date": "2026-11-30T05:42:45+00:00", "measurements": {"score_error": 0.25}}]}
SAYS = "Wrote out: 768 tokens in 0 s, 7824 tokens/s, 0 steps skipped\nHeld-out loss: 8.108 → 6.063 nats a token in 12 steps\n"
CHECKPOINT = {"files": {".metadata": [3180, "3ae62956a7"], "__0_0.distcp": [7, "1b880e4c55"]}, "counters": {"seconds": 1.25}}


def written(folder: Path) -> Path:
    """What a command might have written there; its own place stands in one of the files."""
    (folder / "out").mkdir(parents=True)
    (folder / SAID).mkdir()
    save_file({"weight": torch.arange(6.0)}, folder / "out" / "model.safetensors")
    (folder / "out" / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    (folder / "out" / "recipe.json").write_text(json.dumps(RECIPE | {"path": str(folder / "out")}))
    (folder / "out" / "trainer.json").write_text(json.dumps(CHECKPOINT, indent=2))
    (folder / "out" / "shard.bin").write_bytes(bytes(range(256)))
    (folder / SAID / "00.stdout").write_text(SAYS)
    (folder / SAID / "00.stderr").write_text("verifying ...\n")
    return folder


def told(tmp_path: Path, change: Callable[[Path], Any]) -> dict[str, str]:
    """What is said to differ, by file, where `change` was done to one of two equal folders."""
    old, new = (Side(name, tmp_path / f"{name}-code", written(tmp_path / name)) for name in ("old", "new"))
    change(new.folder)
    return {name: difference for name, _, difference in compared(old, new) if difference is not None}


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def test_equal_folders_are_equal(tmp_path: Path) -> None:
    assert told(tmp_path, lambda _: None) == {}


@pytest.mark.parametrize(
    "name,old,new",
    [
        ("out/metrics.jsonl", "0.127", "7.5"),
        ("out/metrics.jsonl", "2002.0157326689446", "1e-05"),
        ("out/recipe.json", "05:42:45", "06:00:01"),
        ("out/trainer.json", "3ae62956a7", "c0ffee"),
        ("out/trainer.json", "1.25", "12.5"),
        ("said/00.stdout", "0 s, 7824 tokens/s", "12 s, 9.1 k tokens/s"),
        ("said/00.stderr", "verifying", "uptrain: 45% loss 3.1, 9 tokens/s, 0:00:30 left\nverifying"),
    ],
)
def test_times_may_differ(tmp_path: Path, name: str, old: str, new: str) -> None:
    assert told(tmp_path, replaced(name, old, new)) == {}


@pytest.mark.parametrize(
    "name,old,new",
    [
        ("out/metrics.jsonl", "3.8461732864379883", "3.8461732864379884"),
        ("out/metrics.jsonl", "0.003", "0.0031"),
        ("out/metrics.jsonl", "seconds", "time"),
        ("out/recipe.json", "0.25", "0.26"),
        ("out/trainer.json", "1b880e4c55", "c0ffee"),
        ("out/trainer.json", "3180", "3181"),
        ("said/00.stdout", "6.063", "6.064"),
        ("said/00.stdout", "768 tokens", "769 tokens"),
        ("said/00.stdout", "12 steps", "13 steps"),
        ("said/00.stdout", "Held-out loss: 8", "Held-out loss: 8%"),
        ("said/00.stderr", "verifying", "checking"),
    ],
)
def test_all_else_may_not(tmp_path: Path, name: str, old: str, new: str) -> None:
    found = told(tmp_path, replaced(name, old, new))
    assert list(found) == [name] and found[name].startswith("line ")


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    found = told(tmp_path, lambda folder: (folder / "out" / "shard.bin").write_bytes(bytes(range(255)) + b"\0"))
    assert found == {"out/shard.bin": "byte 255 of 256 / 256"}


def test_a_changed_weight_is_named(tmp_path: Path) -> None:
    weights = torch.arange(6.0)
    weights[-1] += 2**-20
    found = told(tmp_path, lambda folder: save_file({"weight": weights}, folder / "out" / "model.safetensors"))
    assert found["out/model.safetensors"].startswith("tensor weight: up to 9.5")


def test_a_changed_header_is_seen_but_for_the_place(tmp_path: Path) -> None:
    def header(folder: Path, text: str) -> None:
        about = {"files": str(folder / text)}
        save_file({"weight": torch.arange(6.0)}, folder / "out" / "model.safetensors", metadata=about)

    old, new = (Side(name, tmp_path / "code", written(tmp_path / name)) for name in ("old", "new"))
    header(old.folder, "a.txt")
    header(new.folder, "a.txt")
    assert not [name for name, _, told in compared(old, new) if told]
    header(new.folder, "b.txt")
    assert [name for name, _, told in compared(old, new) if told] == ["out/model.safetensors"]


def test_missing_and_added_files_are_seen(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        (folder / "out" / "recipe.json").unlink()
        (folder / "stray").touch()

    assert told(tmp_path, change) == {"out/recipe.json": "not there with NEW", "stray": "not there with OLD"}


def test_another_mode_is_seen(tmp_path: Path) -> None:
    assert "out/shard.bin" in told(tmp_path, lambda folder: os.chmod(folder / "out" / "shard.bin", 0o600))


def test_a_file_is_compared_when_it_was_written_again(tmp_path: Path) -> None:
    old, new = (Side(name, tmp_path, written(tmp_path / name)) for name in ("old", "new"))
    assert len(list(compared(old, new))) == 7
    assert list(compared(old, new)) == []
    replaced("out/recipe.json", "0.25", "0.26")(new.folder)
    assert [name for name, _, _ in compared(old, new)] == ["out/recipe.json"]


def test_every_mask_is_needed_and_explained() -> None:
    """None of them finds anything in what was masked, and each says why it is there."""
    assert all(mask.reason for mask in MASKS)
    text = json.dumps(STEP) + json.dumps(RECIPE) + SAYS
    once = masked(text, "x.stderr", {})
    assert masked(once, "x.stderr", {}) == once != text

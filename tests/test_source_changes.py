"""A source that is written to while it is read gives no result, and a conversion goes on only with the source it began with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny, tiny_llama
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert import conversion
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output

Change = Callable[[Path], None]


def run(source: Path, out: Path, **settings: Any) -> None:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=2, method="mean")
    convert(recipe, str(source), out, options, Settings(verify=False, **settings), Output(quiet=True))


def one_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def quietly(path: Path) -> None:
    """Rewritten in place, with its old size and times."""
    before = path.stat()
    one_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file under its name, as a download would put it there, with the old size and times."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-4096:] = bytes(min(4096, len(content)))
    path.with_name("new").write_bytes(content)
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path.with_name("new"), path)


CHANGES: dict[str, Change] = {"one-bit": one_bit, "quietly": quietly, "replaced": replaced, "removed": Path.unlink}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("moment", ["before its data", "after its data"])
@pytest.mark.parametrize("pattern", ["model-00002-of-*.safetensors", "config.json"])
def test_nothing_is_made_of_a_source_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, moment: str, pattern: str
) -> None:
    source = save_tiny(tmp_path / "source", tiny_llama(num_hidden_layers=4), shards=3)
    original, path = conversion.write_shards, next(source.glob(pattern))

    def changing(*work: Any) -> None:
        if moment == "before its data":
            change(path)
        original(*work)
        if moment == "after its data":
            change(path)

    monkeypatch.setattr(conversion, "write_shards", changing)
    with pytest.raises(UpfitError) as caught:
        run(source, tmp_path / "out")
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_is_opened_later_is_what_was_looked_at(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    with open_checkpoint(source) as checkpoint:
        quietly(source / "model.safetensors")
        with pytest.raises(UpfitError, match="has changed since it was first read"):
            checkpoint.read("lm_head.weight")


@pytest.mark.parametrize("change", [one_bit, quietly, replaced])
def test_a_kill_between_two_sources_mixes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """What was written of the old source is not gone on with, and what is told of the new one is true."""
    source = save_tiny(tmp_path / "source", tiny_llama(num_hidden_layers=4), shards=3)
    original = conversion.write_shards

    def stopped(*work: Any) -> None:
        original(*work)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(conversion, "write_shards", stopped)
        run(source, tmp_path / "out")
    for path in source.glob("*.safetensors"):
        change(path)
    run(source, tmp_path / "out")
    run(source, tmp_path / "fresh")
    for path in (tmp_path / "fresh").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_an_identity_sees_another_file_of_the_same_size_and_times(tmp_path: Path) -> None:
    """By its samples alone, where everything that the system says is alike."""
    from upfit.checkpoint.identity import SAMPLE_BYTES, sampled

    content = bytearray(os.urandom(64 * SAMPLE_BYTES))
    (tmp_path / "a").write_bytes(content)
    seen = set()
    for place in (None, 0, len(content) - 1, 4 * SAMPLE_BYTES + 900):
        if place is not None:
            content[place] ^= 1
        (tmp_path / "a").write_bytes(content)
        with open(tmp_path / "a", "rb") as file:
            seen.add(sampled(file.fileno()))
    assert len(seen) >= 3

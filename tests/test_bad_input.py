"""Every mistake in a source is one line, told before a byte is written."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import save_tiny
from upfit.checkpoint.output_folder import check_output
from upfit.checkpoint.safetensors_header import read_header
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output


def attempt(source: Path | str, out: Path, kv_heads: int = 2, keeps: bool = False, **settings: object) -> str:
    """The message with which a conversion is refused, or with which it ends and `keeps` what is done in its work folder."""
    recipe = get_recipe("gqa")
    parent_before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(UpfitError) as caught:
        options = recipe.options(kv_heads=kv_heads, method="mean")
        convert(recipe, str(source), out, options, Settings(**settings), Output(quiet=True))  # type: ignore[arg-type]
    kept = [f"{out.name}.upfit-work"] if keeps else []
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([*parent_before, *kept]), "something was written"
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", shards=3)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the JSON header of model.safetensors, leaving the data as it is."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_missing_folder(tmp_path: Path) -> None:
    assert "no model folder" in attempt(tmp_path / "nowhere", tmp_path / "out")


def test_no_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in attempt(folder, tmp_path / "out")


def test_damaged_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in attempt(folder, tmp_path / "out")


def test_truncated_file(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert "cut short" in attempt(folder, tmp_path / "out")


def test_a_header_of_one_byte_more_than_there_are(tmp_path: Path) -> None:
    """Whatever stands in it: JSON may be whole without its last spaces."""
    (tmp_path / "x.safetensors").write_bytes((9).to_bytes(8, "little") + b"{}" + b" " * 6)
    with pytest.raises(UpfitError, match="cut short: its header claims 9 bytes, the file has 16"):
        read_header(tmp_path / "x.safetensors")


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size // 2)
    assert "cut short" in attempt(sharded, tmp_path / "out")


def test_empty_file(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    assert "cut short" in attempt(folder, tmp_path / "out")


def test_trailing_bytes(folder: Path, tmp_path: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert "no tensor owns" in attempt(folder, tmp_path / "out")


def test_header_of_a_terabyte(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 10**12) + content[8:])
    assert "header claims 1000000000000 bytes" in attempt(folder, tmp_path / "out")


def test_large_header(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 40_000_000) + b" " * 40_000_000)
    assert "at most" in attempt(folder, tmp_path / "out")


def test_overlapping_offsets(folder: Path, tmp_path: Path) -> None:
    def overlap(header: dict) -> None:
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        first, second = header[names[0]], header[names[1]]
        begin, end = second["data_offsets"]
        second["data_offsets"] = [begin - 4, end - 4]
        assert first["data_offsets"][1] > begin - 4

    edit_header(folder, overlap)
    assert "overlaps" in attempt(folder, tmp_path / "out")


def test_offsets_out_of_range(folder: Path, tmp_path: Path) -> None:
    def push(header: dict) -> None:
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        begin, end = header[last]["data_offsets"]
        header[last]["data_offsets"] = [begin + 2**40, end + 2**40]

    edit_header(folder, push)
    assert "leaves a gap" in attempt(folder, tmp_path / "out")


@pytest.mark.parametrize("value", [[-4, 0], [0, 1.5], [True, 2], "x", None, [0]])
def test_strange_offsets(folder: Path, tmp_path: Path, value: object) -> None:
    def change(header: dict) -> None:
        header["model.norm.weight"]["data_offsets"] = value

    edit_header(folder, change)
    assert "model.norm.weight" in attempt(folder, tmp_path / "out")


def test_wrong_shape_in_header(folder: Path, tmp_path: Path) -> None:
    def change(header: dict) -> None:
        header["model.norm.weight"]["shape"] = [10**9, 10**9]

    edit_header(folder, change)
    assert "need another number" in attempt(folder, tmp_path / "out")


def test_a_name_twice(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps({"model.norm.weight": json.loads(header)["model.norm.weight"]}).encode()
    text = header[:-1] + b"," + entry[1:]
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert "occurs twice" in attempt(folder, tmp_path / "out")


def test_index_names_a_missing_file(sharded: Path, tmp_path: Path) -> None:
    sorted(sharded.glob("*.safetensors"))[0].unlink()
    assert "not in the folder" in attempt(sharded, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "a\0.safetensors"])
def test_index_points_outside(sharded: Path, tmp_path: Path, name: str) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    assert "only plain names" in attempt(sharded, tmp_path / "out")


def test_index_disagrees_with_shards(sharded: Path, tmp_path: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    assert "disagree on tensor 'model.norm.weight'" in attempt(sharded, tmp_path / "out")


def test_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert "outside the model folder" in attempt(folder, tmp_path / "out")


def test_side_file_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "tokenizer_extra.json").symlink_to(secret)
    assert "outside the model folder" in attempt(folder, tmp_path / "out")


def dangling(folder: Path) -> None:
    (folder / "LICENSE").symlink_to(folder / "nowhere")


def deep_link(folder: Path) -> None:
    (folder / "tokenizer_old" / "deep").mkdir(parents=True)
    (folder / "tokenizer_old" / "deep" / "x.json").symlink_to("/etc/passwd")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def damaged_story(folder: Path) -> None:
    (folder / "recipe.json").write_text('{"pancakes": 3}')


@pytest.mark.parametrize("change", [dangling, deep_link, pipe, damaged_story])
def test_what_cannot_be_copied_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    from upfit.convert import conversion

    monkeypatch.setattr(conversion, "write_shards", lambda *_: pytest.fail("the shards were begun"))
    change(folder)
    attempt(folder, tmp_path / "out")
    attempt(folder, tmp_path / "out", dry_run=True)


def test_a_folder_linked_from_outside_is_refused_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "vocab.txt").write_text("secret")
    (folder / "tokenizer_old").symlink_to(tmp_path / "else")
    assert "outside the model folder" in attempt(folder, tmp_path / "out")


def test_links_of_the_hub_cache_are_fine(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    recipe = get_recipe("gqa")
    convert(recipe, str(snapshot), tmp_path / "out", recipe.options(kv_heads=2, method="mean"), Settings(), Output(quiet=True))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_single_file_beside_an_index(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"")
    assert "remove the stale one" in attempt(sharded, tmp_path / "out")


def test_pickled_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "pickled weights" in attempt(folder, tmp_path / "out")


def test_quantised(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert "quantised (gptq)" in attempt(folder, tmp_path / "out")


def test_heads_that_do_not_divide(folder: Path, tmp_path: Path) -> None:
    assert "choose one of 1, 2, 4" in attempt(folder, tmp_path / "out", 3)


def test_more_heads_than_the_source(folder: Path, tmp_path: Path) -> None:
    assert "above the checkpoint's 4" in attempt(folder, tmp_path / "out", 8)


@pytest.mark.parametrize("heads", [0, -2])
def test_no_heads(folder: Path, tmp_path: Path, heads: int) -> None:
    assert "choose one of 1, 2, 4" in attempt(folder, tmp_path / "out", heads)


def test_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, model_type="novelformer")
    assert "unknown architecture 'novelformer'" in attempt(folder, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "mamba", "bert", "jetmoe"])
def test_refused_architectures_say_why(folder: Path, tmp_path: Path, model_type: str) -> None:
    edit_config(folder, model_type=model_type)
    assert attempt(folder, tmp_path / "out").startswith(f"{model_type} cannot be converted: ")


def test_config_that_lies_about_shapes(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, num_key_value_heads=2)
    assert "fetch it again" in attempt(folder, tmp_path / "out", 1)


def test_config_that_asks_for_a_million_layers(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, num_hidden_layers=10**6)
    assert "layers" in attempt(folder, tmp_path / "out")


def test_incomplete_source(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    assert "fetch it again" in attempt(folder, tmp_path / "out")


def test_missing_head(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    assert "the source" in attempt(folder, tmp_path / "out") and "lm_head.weight" in attempt(folder, tmp_path / "out")


def test_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    assert "not finite" in attempt(folder, tmp_path / "out")


def test_output_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in attempt(folder, tmp_path / "out")


def test_output_is_not_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--overwrite" in attempt(folder, tmp_path / "out")
    assert "Upfit did not write it" in attempt(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_output_overlaps_the_source(folder: Path, tmp_path: Path, where: str) -> None:
    assert "overlaps the source" in attempt(folder, tmp_path / where)


def test_small_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    assert "free some space" in attempt(folder, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**19, 0, 4 * 10**18))
    with pytest.raises(UpfitError, match=r" has 4000000000\.00 GB free, the output needs 5000000000\.00 GB; "):
        check_output(tmp_path / "out", [], 5 * 10**18, False)


@pytest.mark.parametrize(
    ("code", "word"), [("ENOSPC", "is full"), ("EDQUOT", "is full"), ("EIO", "was not written"), ("EROFS", "was")]
)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "preadv", "replace"])
def test_disk_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, word: str, call: str
) -> None:
    """One line, with the name of a file, whatever the disk says and wherever it says it."""
    import errno

    from upfit.convert import conversion

    original = conversion.write_shards

    def failing(*_: object) -> int:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def later(*work: Any) -> None:  # checks of the source are behind us
        if call == "replace":
            original(*work)
        monkeypatch.setattr(os, call, failing)
        if call != "replace":
            original(*work)

    monkeypatch.setattr(conversion, "write_shards", later)
    message = attempt(folder, tmp_path / "out", keeps=True)
    assert word in message and (call == "replace" or "model.safetensors" in message)


def test_disk_that_fills_while_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "is full" in attempt(folder, tmp_path / "out", keeps=True)


def test_unknown_dtype(folder: Path, tmp_path: Path) -> None:
    assert "--dtype 'int4'" in attempt(folder, tmp_path / "out", dtype="int4")


@pytest.mark.parametrize(
    "shape",
    [
        [10**400] * 200_000,  # a product that is never done with
        [2] * 10_000,
        [2**62, 2**62, 0],
        [10**5000 // 7],
        [1] * 65,
    ],
)
def test_a_shape_that_no_bytes_can_hold_is_refused_at_once(folder: Path, tmp_path: Path, shape: list[int]) -> None:
    import sys
    import time

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        edit_header(folder, lambda header: header["model.norm.weight"].update(shape=shape[:2000]))
    finally:
        sys.set_int_max_str_digits(limit)
    began = time.monotonic()
    message = attempt(folder, tmp_path / "out")
    assert time.monotonic() - began < 2 and len(message) < 1000


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "recipe.json", "tokenizer.json", "generation_config.json"]
)
def test_a_pipe_in_a_files_place_is_not_waited_for(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is not an ordinary file" in attempt(folder, tmp_path / "out")


def test_a_pipe_in_the_place_of_an_index_or_shard_is_not_waited_for(sharded: Path, tmp_path: Path) -> None:
    for path in ("model.safetensors.index.json", next(sharded.glob("model-*")).name):
        content = (sharded / path).read_bytes()
        (sharded / path).unlink()
        os.mkfifo(sharded / path)
        assert f"{path} is not an ordinary file" in attempt(sharded, tmp_path / "out")
        (sharded / path).unlink()
        (sharded / path).write_bytes(content)

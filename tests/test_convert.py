"""The verb `convert`: what a folder holds afterwards, and that nothing half-made is ever left."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.folders import letter_tokenizer, logits, save_tiny, tiny_llama
from tests.warm_python import ENVIRONMENT, shared_python
from upfit import provenance
from upfit.checkpoint import remote_code, writer
from upfit.checkpoint import work_folder as work_room
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.remote_code import side_file, without_code
from upfit.checkpoint.source import teacher_source
from upfit.checkpoint.work_folder import RESULT, work_folder
from upfit.convert import conversion
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion, Verification
from upfit.errors import UpfitError
from upfit.output import Output

QUIET = Output(quiet=True)


def run(source: Path, out: Path, kv_heads: int = 2, **settings: object) -> Conversion:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=kv_heads, method="mean")
    return convert(recipe, str(source), out, options, Settings(**settings), QUIET)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_fresh_process_loads_it_without_upfit(tmp_path: Path) -> None:
    run(save_tiny(tmp_path / "source"), tmp_path / "out")
    code = f"""
        import sys
        sys.modules["upfit"] = None
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        ids = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})("a word", return_tensors="pt")["input_ids"]
        print(model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] - ids.shape[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_cache_equals_no_cache(tmp_path: Path) -> None:
    """Greedy generation with the cache, unpadded and left-padded, equals arg-max over full forwards."""
    from transformers import AutoModelForCausalLM

    run(save_tiny(tmp_path / "source"), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.tensor([[5, 17, 40, 3, 77]])
    expected = ids
    for _ in range(8):
        step = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, step], 1)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": 10**6,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], expected)


@pytest.mark.slow
def test_recipe_file_tells_the_steps(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    run(source, tmp_path / "two")
    run(tmp_path / "two", tmp_path / "one", 1)
    steps = provenance.read(tmp_path / "one")
    assert [step["options"]["kv_heads"] for step in steps] == [2, 1]
    assert steps[1]["measurements"]["verify"]["tokens"] > 0
    found = teacher_source(tmp_path / "one")
    assert found is not None and found.path == tmp_path / "two"


def test_identity_is_verified_as_equal(tmp_path: Path) -> None:
    answer = run(save_tiny(tmp_path / "source"), tmp_path / "out", 4)
    assert isinstance(answer.verify, Verification) and answer.verify.equal is True


def test_a_broken_promise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If untouched bytes did not arrive as they were, the logits would show it and nothing would be kept."""
    original = writer.write_shards

    def damaged(shards: Any, rules: Any, checkpoint: Any, folder: Path, *rest: Any) -> None:
        original(shards, rules, checkpoint, folder, *rest)
        with open(folder / shards[0].name, "r+b") as file:
            file.seek(shards[0].offsets["model.layers.1.mlp.down_proj.weight"])
            file.write(bytes(4096))

    monkeypatch.setattr(conversion, "write_shards", damaged)
    with pytest.raises(UpfitError, match="promises equality"):
        run(save_tiny(tmp_path / "source"), tmp_path / "out", 4, verify_bytes=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.upfit-work").exists()


@pytest.mark.slow
def test_without_kernel_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def unsupported(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    source = save_tiny(tmp_path / "source", shards=2)
    run(source, tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", unsupported)
    run(source, tmp_path / "plain")
    for path in (tmp_path / "kernel").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes()


@pytest.mark.slow
def test_resharding(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", shards=1)
    run(source, tmp_path / "whole")
    run(source, tmp_path / "parts", max_shard_bytes=20_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    with open_checkpoint(tmp_path / "parts") as parts:
        largest = max(info.nbytes for info in parts.tensors.values())
    assert all(path.stat().st_size < max(20_000, largest) + 4096 for path in files)
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))


def test_dtype(tmp_path: Path) -> None:
    run(save_tiny(tmp_path / "source"), tmp_path / "out", dtype="bfloat16")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
        assert checkpoint.config["dtype"] == "bfloat16"


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    answer = run(source, tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert {tuple(row.after) for row in answer.tensors} == {(16, 32)}
    json.dumps(answer.record())


@pytest.mark.slow
def test_room_is_asked_for_what_is_written_and_for_what_a_fit_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the attention's weights beside the output; a dry run needs none."""
    source, recipe, asked = save_tiny(tmp_path / "source"), get_recipe("gqa"), list[int]()
    (tmp_path / "text.txt").write_text("Some words. " * 400)
    text = {"calibration": [str(tmp_path / "text.txt")], "calibration_tokens": "1k", "calibration_length": 64}
    check = conversion.check_output

    def noted(out: Path, sources: Any, needed: int, overwrite: bool) -> None:
        asked.append(needed)
        check(out, sources, needed, overwrite)

    monkeypatch.setattr(conversion, "check_output", noted)
    for name, more, dry in (("mean", {}, False), ("aligned", text, False), ("dry", {}, True)):
        options = recipe.options(kv_heads=2, method="mean" if name == "dry" else name, **more)
        convert(recipe, str(source), tmp_path / name, options, Settings(verify=False, dry_run=dry), QUIET)
    tensors = load_file(tmp_path / "mean" / "model.safetensors")
    beside = sum(path.stat().st_size for path in source.iterdir() if path.name not in ("config.json", "model.safetensors"))
    written = sum(tensor.nbytes for tensor in tensors.values()) + beside + 2**20
    assert asked == [written, written + 4 * sum(t.nbytes for name, t in tensors.items() if ".self_attn." in name), 0]


def test_overwrite_replaces_only_its_own(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    run(source, tmp_path / "out")
    run(source, tmp_path / "out", 1, overwrite=True)
    assert provenance.read(tmp_path / "out")[0]["options"]["kv_heads"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_code_and_pickles_do_not_travel(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    for name in ("tokenizer_evil.py", "training_args.bin", "tokenizer.pkl"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("terms")
    run(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "LICENSE" in names and not names & {"tokenizer_evil.py", "training_args.bin", "tokenizer.pkl"}


def test_folders_of_side_files_travel_whole(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    for name in ("tokenizer_old/deep/x.json", "additional_chat_templates/a.jinja", "LICENSES/a/b/c.txt", "vocab/x.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    run(source, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "tokenizer_old/deep/x.json").read_text() == "{}"
    assert (tmp_path / "out" / "LICENSES/a/b/c.txt").exists() and not (tmp_path / "out" / "vocab/x.py").exists()


def test_names_of_code_stay_behind_with_the_code(tmp_path: Path) -> None:
    """With trust_remote_code or without, the result is of transformers' own classes; what is found elsewhere is still named."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = save_tiny(tmp_path / "source")
    mapped = {"config.json": {"AutoConfig": "configuration_x.X"}, "tokenizer_config.json": {"AutoTokenizer": ["tok_x.X", None]}}
    for name, told in mapped.items():
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(content | {"auto_map": told, "task_specific_params": {"auto_map": told}}))
    (source / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "org/model--x.X"}}')
    run(source, tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out" / "processor_config.json").read_text() == (source / "processor_config.json").read_text()
    for trusted in (False, True):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trusted).config.num_key_value_heads == 2
        assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trusted)("a word")["input_ids"]


def test_only_classes_of_ours_are_named_and_only_outermost() -> None:
    code, inner = {"AutoConfig": "x.X"}, {"model_type": "llama", "sizes": [1]}
    for model_type, stays in (("llama", False), ("upfit_gqa", True)):
        config = {
            "model_type": model_type,
            "auto_map": code,
            "text_config": inner | {"auto_map": code, "deep": {"auto_map": code}},
        }
        named = {"auto_map": code} if stays else {}
        assert without_code(config) == {"model_type": model_type, "text_config": inner | {"deep": {}}} | named
        assert without_code({"model_type": model_type}) == {"model_type": model_type}


def test_a_side_file_that_is_large_or_no_settings_travels_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only settings of a usual size that name code of their own folder are written anew, and then only that is missing."""
    local, code = {"auto_map": {"AutoTokenizer": ["tok_x.X", None]}}, tmp_path / "tokenizer_config.json"
    for content in (json.dumps(local | {"size": 1}), "[1]", json.dumps({"size": 1}), "{auto_map", '"auto_map"'):
        code.write_text(content)
        if content.startswith('{"auto_map'):
            assert json.loads(side_file(code)) == {"size": 1}
            (tmp_path / "notes.txt").write_text(content)
            assert side_file(tmp_path / "notes.txt").decode() == content
            with monkeypatch.context() as patch:
                patch.setattr(remote_code, "MAX_BYTES", len(content) - 1)
                assert side_file(code).decode() == content
                patch.setattr(remote_code, "MAX_BYTES", len(content))
                assert side_file(code).decode() != content
        else:
            assert side_file(code).decode() == content


def test_two_writers_of_one_place(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", "convert") as work:
        made = work.folder(RESULT)
        (made / "a").write_text("first")
        with pytest.raises(UpfitError, match="another process"):
            run(save_tiny(tmp_path / "source"), tmp_path / "out")
        work.publish(made, overwrite=False)
    assert (tmp_path / "out" / "a").read_text() == "first"


@pytest.mark.slow
def test_an_error_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    run(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(path: Path) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(work_room, "sync_tree", fail)
    with pytest.raises(RuntimeError):
        run(source, tmp_path / "out", 1, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.fixture(scope="module")
def python() -> str:
    return shared_python()


@pytest.mark.slow
@pytest.mark.xdist_group("killed conversions")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
def test_killed_at_any_moment_nothing_looks_finished(tmp_path: Path, python: str, delay: float) -> None:
    """SIGKILL `delay` seconds after the work folder appears: OUT is absent or whole, and the next run succeeds."""
    source = save_tiny(tmp_path / "source", tiny_llama(hidden_size=256, intermediate_size=4096, num_hidden_layers=4))
    command = [python, "-m", "upfit", "convert", "gqa", str(source), str(tmp_path / "out"), "-q"]
    command += ["--kv-heads", "2", "--method", "mean"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    while not (tmp_path / "out.upfit-work").exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out").exists():
        logits(tmp_path / "out")
    else:
        subprocess.run(command, env=ENVIRONMENT, check=True)
        logits(tmp_path / "out")
    assert not (tmp_path / "out.upfit-work").exists()


def test_tokenizer_of_the_tests_reads_text() -> None:
    """The sample text must be tokens, not unknowns, or the loss that verify reports would mean nothing."""
    from upfit.convert.verify import sample_text

    ids = letter_tokenizer()(sample_text())["input_ids"]
    assert sum(i == 2 for i in ids) / len(ids) < 0.02

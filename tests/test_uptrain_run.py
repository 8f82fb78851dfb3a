"""Whole runs in one process: what is written, what is measured, what is refused, what happens on bad steps."""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.folders import logits, save_tiny, tiny_llama
from tests.uptraining import QUIET, Workshop, config, make_workshop, metrics, weights
from upfit import provenance
from upfit.cli import app
from upfit.errors import UpfitError
from upfit.uptrain.config import Config, resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.run.run import Run
from upfit.uptrain.train import uptrain


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in names}


def test_a_run_leaves_a_standard_folder_that_is_better(shop: Workshop, tmp_path: Path) -> None:
    before, began = {path.name: path.read_bytes() for path in shop.student.iterdir()}, time.monotonic()
    report = shop.run(tmp_path / "out", tokens="4096", measure_every=16)
    took = time.monotonic() - began
    assert report.steps == report.step == 32 and report.tokens == 4096 and not report.stopped
    measured = report.holdout
    assert measured["after"]["kl"] < 0.5 * measured["before"]["kl"] and report.holdout_rows == 4
    assert {path.name: path.read_bytes() for path in shop.student.iterdir()} == before, "the source was touched"
    out = tmp_path / "out"
    assert (out / "config.json").read_bytes() == before["config.json"]
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert header(out / "model.safetensors") == header(shop.student / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside the result"
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "new").stat().st_mode}, "who may read it"
    assert not torch.equal(logits(out), logits(shop.student))
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 33))
    for line, earlier in zip(lines, [{"seconds": 0.0}, *lines], strict=False):
        assert line["tokens_per_second"] * (line["seconds"] - earlier["seconds"]) == pytest.approx(128, rel=1e-6)
    assert 0 < lines[-1]["seconds"] < took, "steps take their time and no other"
    assert [line["step"] for line in lines if "holdout_kl" in line] == [16, 32]
    assert lines[-1]["holdout_kl"] == pytest.approx(measured["after"]["kl"], rel=1e-5)
    assert resolve(out / "uptrain.toml", {}) == config(tokens="4096", measure_every=16)
    verbs = [step["verb"] for step in provenance.read(out)]
    told = provenance.read(out)[-1]
    assert verbs == ["convert gqa", "uptrain"] and told["teacher"]["path"] == str(shop.teacher)
    assert told["measurements"]["holdout"] == measured and told["options"]["resolved"]["rows_a_step"] == 4
    assert provenance.teacher(out) == told["teacher"], "a second uptraining finds the same teacher"


@pytest.mark.slow
def test_attention_alone_learns_and_the_rest_is_held_once(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[bool] = []
    made = Distiller.__init__

    def seen(self: Distiller, student: Any, traits: Any, teacher: Any, *more: Any) -> None:
        made(self, student, traits, teacher, *more)
        if teacher is not None:
            pointers = [model.model.embed_tokens.weight.data_ptr() for model in (student, teacher.student)]
            shared.append(pointers[0] == pointers[1])

    monkeypatch.setattr(Distiller, "__init__", seen)
    report = shop.run(tmp_path / "out", trainable="attention", tokens="4096")
    assert report.holdout["after"]["kl"] < report.holdout["before"]["kl"] and shared == [True]
    before, after = load_file(shop.student / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}


@pytest.mark.slow
def test_the_student_that_is_its_teacher_has_nothing_to_learn(shop: Workshop, tmp_path: Path) -> None:
    same = config(teacher=str(shop.teacher), tokens="256", learning_rate=1e-9, weight_decay=0.0)
    report = uptrain(str(shop.teacher), str(shop.data), tmp_path / "out", same, False, False, QUIET)
    assert abs(metrics(tmp_path / "out")[0]["kl"]) < 1e-6 and abs(report.holdout["before"]["kl"]) < 1e-6


@pytest.mark.slow
def test_micro_batches_do_not_change_the_losses(shop: Workshop, tmp_path: Path) -> None:
    lines = []
    for micro in (1, 3, 4):
        shop.run(tmp_path / str(micro), micro_batch=micro, chunk=7 * micro)
        lines.append([(line["loss"], line["ce"], line["grad_norm"]) for line in metrics(tmp_path / str(micro))])
    for other in lines[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(lines[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_sent_once_a_step_and_those_of_shards_at_once(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Four batches in each of two steps: whole gradients are added up here until the last, shards have no room for them."""
    events: list[str] = []
    alone, backward = Accelerator.no_sync, Accelerator.backward

    @contextmanager
    def noted(self: Accelerator, model: Any) -> Iterator[None]:
        events.append("held back")
        with alone(self, model):
            yield

    def counted(self: Accelerator, loss: torch.Tensor, **more: Any) -> None:
        events.append("backward")
        backward(self, loss, **more)

    monkeypatch.setattr(Accelerator, "no_sync", noted)
    monkeypatch.setattr(Accelerator, "backward", counted)
    monkeypatch.setattr(Run, "sharded", sharded)
    shop.run(tmp_path / "out", tokens="256", micro_batch=1)
    step = ["backward"] * 4 if sharded else ["held back", "backward"] * 3 + ["backward"]
    assert events == 2 * step


@pytest.mark.slow
def test_the_loss_is_the_mean_over_all_labels_of_the_step(shop: Workshop, tmp_path: Path) -> None:
    from upfit.uptrain.data.rows import IGNORE, TextRows
    from upfit.uptrain.data.shards import Shards

    shop.run(tmp_path / "out", tokens="128", kl_weight=0.0, micro_batch=1)
    rows = TextRows(Shards(shop.data), 32, 4, 0).of_step(0, 4, 0, 1)
    student = save_and_load(shop)
    total, count = 0.0, 0
    for row in rows:
        ids, positions, labels = (torch.from_numpy(part)[None] for part in (row.input_ids, row.position_ids, row.labels))
        out = student(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(out, labels[0], reduction="sum", ignore_index=IGNORE).item()
        count += int((labels != IGNORE).sum())
    assert metrics(tmp_path / "out")[0]["ce"] == pytest.approx(total / count, rel=1e-5)


def save_and_load(shop: Workshop) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shop.student).eval()


@pytest.mark.slow
def test_without_a_recipe_it_learns_from_the_text(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from upfit.output import Output

    uptrain(str(shop.teacher), str(shop.data), tmp_path / "out", config(), False, False, Output())
    assert "cross-entropy" in capsys.readouterr().err
    lines = metrics(tmp_path / "out")
    assert all(line["loss"] == line["ce"] and line["kl"] == 0 for line in lines)
    assert lines[-1]["ce"] < lines[0]["ce"] and provenance.read(tmp_path / "out")[-1]["teacher"] is None


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
def test_shards_dtypes_and_tied_weights_are_kept(shop: Workshop, tmp_path: Path, tie: bool) -> None:
    rounded = tiny_llama(tie_word_embeddings=tie)
    torch.nn.Module.to(rounded, torch.bfloat16)
    source = save_tiny(tmp_path / "source", rounded, shards=3)
    files = sorted(source.glob("*.safetensors"))
    assert len(files) > 1
    extra = load_file(files[0]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(extra, files[0], metadata={"format": "pt"})  # old checkpoints carry this; the class does not read it
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = files[0].name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    uptrain(str(source), str(shop.data), tmp_path / "out", config(teacher=str(shop.teacher)), False, False, QUIET)
    for path in files:
        assert header(tmp_path / "out" / path.name) == header(path)
    assert (tmp_path / "out" / "model.safetensors.index.json").read_bytes() == (
        source / "model.safetensors.index.json"
    ).read_bytes()
    assert torch.equal(
        load_file(tmp_path / "out" / files[0].name)["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.ones(4)
    )


@pytest.mark.slow
def test_bfloat16_compute_is_near_float32(shop: Workshop, tmp_path: Path) -> None:
    first = {}
    for dtype in ("float32", "bfloat16"):
        shop.run(tmp_path / dtype, dtype=dtype, tokens="128")
        first[dtype] = metrics(tmp_path / dtype)[0]
    assert first["bfloat16"]["ce"] != first["float32"]["ce"]
    assert first["bfloat16"]["ce"] == pytest.approx(first["float32"]["ce"], rel=2e-2)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps (from 0; one micro-batch each) not a number."""
    original, seen = Distiller.forward, [0]

    def forward(self: Distiller, *batch: Any) -> tuple[torch.Tensor, ...]:
        loss, ce, kl = original(self, *batch)
        if not self.training:
            return loss, ce, kl
        seen[0] += 1
        return (loss * float("nan") if seen[0] - 1 in steps else loss), ce, kl

    monkeypatch.setattr(Distiller, "forward", forward)


@pytest.mark.slow
def test_the_rates_of_a_run_are_those_that_its_flags_and_its_file_say(shop: Workshop, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("holdout = 4\nlearning_rate = 1.0\nwarmup = 0.5\ndecay = 0.3\nmin_rate = 0.5\n")
    words = ["uptrain", str(shop.student), str(shop.data), str(tmp_path / "out"), "--tokens", "1280", "--length", "32"]
    words += ["--batch-tokens", "128", "--stages", "distill", "--learning-rate", "0.01", "-q", "--config", str(file)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    rising, falling = [0.002, 0.004, 0.006, 0.008, 0.01], [0.005 + 0.005 * (1 - (step / 4) ** 0.5) for step in (1, 2, 3)]
    assert [line["lr"] for line in metrics(tmp_path / "out")] == pytest.approx([*rising, 0.01, 0.01, *falling])


@pytest.mark.slow
def test_a_gradient_is_clipped_to_the_norm_that_was_asked_for(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at where the optimiser does; told is what the norm was before."""
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def seen(self: torch.optim.AdamW, *more: Any) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()))
        return step(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    for clip in (1e-3, 1e3):
        shop.run(tmp_path / str(clip), tokens="128", clip=clip)
    (line,) = metrics(tmp_path / "0.001")
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] == pytest.approx(line["grad_norm"], rel=1e-3)
    assert line["grad_norm"] > 0.01


@pytest.mark.slow
def test_a_bad_step_is_skipped_and_counted(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 3, 7})
    report = shop.run(tmp_path / "out", max_bad_steps=2)
    lines = metrics(tmp_path / "out")
    assert report.skipped == 3 and [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert lines[2]["loss"] is None and lines[4]["loss"] is not None
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_bad_steps_in_a_row_end_the_run(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {4, 5, 6})
    with pytest.raises(UpfitError, match="3 steps in a row"):
        shop.run(tmp_path / "out", max_bad_steps=2, max_rollbacks=0)
    assert not (tmp_path / "out").exists()
    assert len(metrics(tmp_path / "out.upfit-work")) == 7


def other_tokenizer(shop: Workshop, folder: Path) -> Path:
    from tests.folders import letter_tokenizer

    copy = Path(shutil.copytree(shop.student, folder / "other"))
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(["workshop"])
    tokenizer.save_pretrained(copy)
    return copy


REFUSED: list[tuple[str, Callable[[Workshop, Path], tuple[Path, Path, Path, Config]], str]] = [
    ("out in model", lambda s, t: (s.student, s.data, s.student / "out", config()), "overlaps"),
    ("out in data", lambda s, t: (s.student, s.data, s.data / "out", config()), "overlaps"),
    ("out in teacher", lambda s, t: (s.student, s.data, s.teacher / "out", config()), "overlaps"),
    ("no budget", lambda s, t: (s.student, s.data, t / "out", config(tokens=None)), "budget"),
    ("no data", lambda s, t: (s.student, s.teacher, t / "out", config()), "prepare"),
    ("large batch", lambda s, t: (s.student, s.data, t / "out", config(batch_tokens="1M")), "batch-tokens"),
    ("long rows", lambda s, t: (s.student, s.data, t / "out", config(length=4096)), "--length"),
    ("tokenizer", lambda s, t: (other_tokenizer(s, t), s.data, t / "out", config()), "tokenizer"),
    ("tracker", lambda s, t: (s.student, s.data, t / "out", config(track="abacus")), "abacus"),
    ("link", lambda s, t: (linked(s, t), s.data, t / "out", config()), "outside the model folder"),
    ("pipe", lambda s, t: (unreadable(s, t), s.data, t / "out", config()), "not an ordinary file"),
    ("vocabulary", lambda s, t: (s.student, s.data, t / "out", config(teacher=str(smaller(t)))), "vocabulary"),
]


def linked(shop: Workshop, folder: Path) -> Path:
    """A side file that leads out of the model."""
    copy = Path(shutil.copytree(shop.student, folder / "linked"))
    (folder / "secret").write_text("mine")
    (copy / "LICENSE").symlink_to(folder / "secret")
    return copy


def unreadable(shop: Workshop, folder: Path) -> Path:
    """A side file that is none."""
    copy = Path(shutil.copytree(shop.student, folder / "unreadable"))
    os.mkfifo(copy / "chat_template.jinja")
    return copy


def smaller(folder: Path) -> Path:
    return save_tiny(folder / "smaller", tiny_llama(vocab_size=96))


@pytest.mark.parametrize("arrange,told", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_is_one_line(
    shop: Workshop, tmp_path: Path, arrange: Callable[[Workshop, Path], tuple[Path, Path, Path, Config]], told: str
) -> None:
    model, data, out, settings = arrange(shop, tmp_path)
    with pytest.raises(UpfitError, match=told) as caught:
        uptrain(str(model), str(data), out, settings, False, False, QUIET)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists() and not (tmp_path / "out.upfit-work").exists()


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", tiny_llama(vocab_size=20))
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", str(small), "text", QUIET)
    with pytest.raises(UpfitError, match="holds token 28, the model knows 20"):
        uptrain(str(small), str(tmp_path / "data"), tmp_path / "out", config(), False, False, QUIET)


def test_a_teacher_that_went_away_is_told(shop: Workshop, tmp_path: Path) -> None:
    student = Path(shutil.copytree(shop.student, tmp_path / "student"))
    gone = {"name": str(tmp_path / "gone"), "revision": None, "path": str(tmp_path / "gone")}
    provenance.write(student, [provenance.step("convert gqa", gone, {})])
    with pytest.raises(UpfitError, match="--teacher"):
        uptrain(str(student), str(shop.data), tmp_path / "out", config(), False, False, QUIET)
    uptrain(str(student), str(shop.data), tmp_path / "out", config(teacher="none", tokens="128"), False, False, QUIET)


class Diary(GeneralTracker):
    """A tracker as accelerate wants it, which keeps what it is told."""

    name, requires_logging_directory = "diary", False
    told: list[dict[str, Any]] = []

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> "Diary":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append({**values, "step": step})


def test_a_tracker_is_told_the_config_and_every_step(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "diary", Diary)
    monkeypatch.setattr("upfit.uptrain.run.setup.get_available_trackers", lambda: ["diary"])
    shop.run(tmp_path / "out", tokens="256", track="diary")
    assert Diary.told[0]["tokens"] == "256" and Diary.told[1:] == metrics(tmp_path / "out")


@pytest.mark.slow
def test_overwrite_replaces_a_result(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "out", tokens="128")
    first = weights(tmp_path / "out")
    with pytest.raises(UpfitError, match="--overwrite"):
        shop.run(tmp_path / "out", tokens="128")
    shop.run(tmp_path / "out", tokens="128", seed=1, overwrite=True)
    assert weights(tmp_path / "out") != first


def test_text_of_less_than_a_batch_is_refused(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 70)
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", str(shop.teacher), "text", QUIET)
    with pytest.raises(UpfitError, match="2 rows of 32 tokens to train on, a step takes 4"):
        uptrain(str(shop.student), str(tmp_path / "data"), tmp_path / "out", config(), False, False, QUIET)


@pytest.mark.slow
def test_the_written_config_is_plain_toml(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "out", tokens="128")
    told = tomllib.loads((tmp_path / "out" / "uptrain.toml").read_text())
    assert told["tokens"] == "128" and told["length"] == 32 and "teacher" not in told


@pytest.mark.slow
def test_measuring_on_the_way_changes_nothing(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "plain")
    report = shop.run(tmp_path / "measured", measure_every=4)
    assert weights(tmp_path / "plain") == weights(tmp_path / "measured")
    lines = metrics(tmp_path / "measured")
    assert [line["step"] for line in lines if "holdout_kl" in line] == [4, 8, 12]
    assert lines[-1]["holdout_kl"] == pytest.approx(report.holdout["after"]["kl"])

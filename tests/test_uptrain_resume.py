"""Stopped or killed and resumed, a run ends with the same bytes as one that was never broken; two processes agree with one."""

import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.uptraining import Workshop, make_workshop, metrics, one_thread, weights
from upfit import provenance
from upfit.checkpoint import content as content_room
from upfit.checkpoint.content import content_hash
from upfit.checkpoint.work_folder import LOCK, MARK, work_folder
from upfit.cli import app
from upfit.errors import UpfitError
from upfit.output import Meter, Output
from upfit.uptrain.run import state
from upfit.uptrain.run.state import Counters, Workspace

ROOT = Path(__file__).parent.parent
TIMED = {"tokens_per_second", "seconds"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_thread():
        yield make_workshop(tmp_path_factory.mktemp("shop"))


class Interrupting(Output):
    """Sends this process a signal in the course of step `at`."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(quiet=True)
        self.at, self.number = at, number

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        meter, steps = Meter(label, total, True, None), [0]

        def advance(amount: float, note: str = "") -> None:
            steps[0] += bool(note)
            if steps[0] == self.at:
                os.kill(os.getpid(), self.number)

        meter.advance = advance  # type: ignore[method-assign]
        yield meter


def untimed(folder: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in metrics(folder)]


@pytest.mark.slow
def test_a_signal_saves_and_a_resumed_run_ends_with_the_same_bytes(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGTERM)
    report = shop.run(tmp_path / "broken", output=Interrupting(5), save_every="100")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert report.stopped and report.step == 5 and not (tmp_path / "broken").exists()
    assert [path.name for path in Workspace(tmp_path / "broken.upfit-work").checkpoints()] == ["step-00000005"]
    assert (tmp_path / "broken.upfit-work" / "stopped").exists()
    report = shop.run(tmp_path / "broken", resume=True, output=Interrupting(3, signal.SIGUSR1))
    assert report.stopped and report.step == 8
    (tmp_path / "broken.upfit-work" / "step-00000008").rename(tmp_path / "broken.upfit-work" / "step-00000008.tmp")
    with pytest.raises(UpfitError, match="--resume"):
        shop.run(tmp_path / "broken")
    assert not (tmp_path / "broken.upfit-work" / "stopped").exists(), "it would be taken for that of the run that failed"
    finished = shop.run(tmp_path / "broken", resume=True)
    assert not finished.stopped and not (tmp_path / "broken.upfit-work").exists()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")


def stopped(shop: Workshop, tmp_path: Path, at: int = 9) -> Path:
    shop.run(tmp_path / "out", output=Interrupting(at))
    return tmp_path / "out.upfit-work"


@pytest.mark.slow
def test_a_run_begun_is_neither_lost_nor_mixed_up(shop: Workshop, tmp_path: Path) -> None:
    stopped(shop, tmp_path)
    with pytest.raises(UpfitError, match="--resume"):
        shop.run(tmp_path / "out")
    for changed in ({"learning_rate": 1e-4}, {"seed": 1}, {"tokens": "2048"}, {"teacher": "none"}):
        with pytest.raises(UpfitError, match=next(iter(changed))):
            shop.run(tmp_path / "out", resume=True, **changed)
    shop.run(tmp_path / "out", resume=True, micro_batch=2, save_every="100", keep=1)


@pytest.mark.slow
def test_other_data_cannot_be_resumed_with(shop: Workshop, tmp_path: Path) -> None:
    stopped(shop, tmp_path)
    other = make_workshop(tmp_path / "shop", documents=50)
    with pytest.raises(UpfitError, match="data's fingerprint"):
        Workshop(shop.teacher, shop.student, other.data).run(tmp_path / "out", resume=True)


@pytest.mark.slow
def test_overwrite_begins_anew(shop: Workshop, tmp_path: Path) -> None:
    stopped(shop, tmp_path)
    report = shop.run(tmp_path / "out", overwrite=True, tokens="256")
    assert report.step == 2 and len(metrics(tmp_path / "out")) == 2


@pytest.mark.slow
def test_files_of_the_user_in_the_workspace_survive(shop: Workshop, tmp_path: Path) -> None:
    place = stopped(shop, tmp_path)
    (place / "step-notes").mkdir()
    (place / "diary.txt").write_text("mine")
    shop.run(tmp_path / "out", tokens="256", overwrite=True)
    assert {path.name for path in place.iterdir()} - {MARK, LOCK} == {"diary.txt", "step-notes"}


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_anew(shop: Workshop, tmp_path: Path) -> None:
    assert shop.run(tmp_path / "out", resume=True, tokens="256").step == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_finished_run_is_finished_already(shop: Workshop, tmp_path: Path) -> None:
    """--resume answers with what the run has reported, also where it is carried out otherwise, and writes nothing."""
    report = shop.run(tmp_path / "out", tokens="256")
    before = contents(tmp_path)
    again = shop.run(tmp_path / "out", tokens="256", resume=True, micro_batch=2)
    assert again == report and contents(tmp_path) == before
    provenance.append(tmp_path / "out", provenance.step("evaluate", {}, {}))
    assert shop.run(tmp_path / "out", tokens="256", resume=True) == report
    with pytest.raises(UpfitError, match="--overwrite"):
        shop.run(tmp_path / "out", tokens="256")
    inode = (tmp_path / "out" / "model.safetensors").stat().st_ino
    shop.run(tmp_path / "out", tokens="256", resume=True, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino != inode, "done again"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size and the time of its last change stay."""
    state = path.stat()
    with open(path, "r+b") as file:
        file.seek(state.st_size // 2)
        byte = file.read(1)[0]
        file.seek(state.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    flip(path)
    yield
    flip(path)


@contextmanager
def away(path: Path) -> Iterator[None]:
    path.rename(path.with_suffix(".away"))
    yield
    path.with_suffix(".away").rename(path)


@contextmanager
def marked(path: Path) -> Iterator[None]:
    path.parent.mkdir()
    path.touch()
    yield
    shutil.rmtree(path.parent)


@pytest.mark.slow
def test_what_another_run_has_finished_is_refused_as_ever(shop: Workshop, tmp_path: Path) -> None:
    """Of other settings or data, a model or teacher that was changed since, a result that is not whole, a later run stopped."""
    teacher, student = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (shop.teacher, shop.student))
    mine, out = Workshop(teacher, student, shop.data), tmp_path / "out"

    def refused(shop: Workshop = mine, **changes: Any) -> None:
        with pytest.raises(UpfitError, match="exists and is not empty"):
            shop.run(out, resume=True, **{"tokens": "256", "teacher": str(teacher), **changes})

    mine.run(out, tokens="256", teacher=str(teacher))
    refused(seed=1)
    refused(stages="distill")
    refused(Workshop(teacher, student, make_workshop(tmp_path / "shop", documents=50).data))
    for folder in (student, teacher):
        with flipped(folder / "model.safetensors"):
            refused()
    for name in ("model.safetensors", "recipe.json", "config.json"):
        with away(out / name):
            refused()
    with marked(tmp_path / "out.upfit-work" / "stopped"):
        refused()
    assert not mine.run(out, resume=True, tokens="256", teacher=str(teacher)).stopped, "but for all that, it is finished"


def test_a_finished_run_whose_teacher_went_away_stays_finished(shop: Workshop, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(shop.teacher, tmp_path / "teacher"))
    report = shop.run(tmp_path / "out", tokens="256", teacher=str(teacher))
    shutil.rmtree(teacher)
    assert shop.run(tmp_path / "out", tokens="256", teacher=str(teacher), resume=True).holdout == report.holdout


def test_a_finished_run_whose_data_went_away_stays_finished(shop: Workshop, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shop.data, tmp_path / "data"))
    words = ["uptrain", str(shop.student), str(data), str(tmp_path / "out"), "--tokens", "256", "--length", "32"]
    words += ["--batch-tokens", "128", "--resume", "--json"]
    first = CliRunner().invoke(app, words)
    shutil.rmtree(data)
    again = CliRunner().invoke(app, words)
    assert (first.exit_code, again.exit_code) == (0, 0) and json.loads(first.stdout) == json.loads(again.stdout)
    for others in (["--tokens", "512"], ["--overwrite"]):  # these are to be trained
        with pytest.raises(UpfitError, match="no manifest.json"):
            CliRunner().invoke(app, [*words, *others], catch_exceptions=False)
    words[2] = str(tmp_path / "others")
    with pytest.raises(UpfitError, match="no manifest.json"):
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.slow
def test_finished_already_on_the_command_line(shop: Workshop, tmp_path: Path) -> None:
    words = ["uptrain", str(shop.student), str(shop.data), str(tmp_path / "out"), "--tokens", "256", "--length", "32"]
    (tmp_path / "config.toml").write_text("holdout = 4\n")
    words += ["--batch-tokens", "128", "--config", str(tmp_path / "config.toml"), "--stages", "layerwise=50%,lm"]
    first, again, told = (CliRunner().invoke(app, [*words, "--resume", *more]) for more in (["--json"], ["--json"], []))
    assert first.exit_code == again.exit_code == told.exit_code == 0
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert [stage["stage"] for stage in json.loads(again.stdout)["stages"]] == ["layerwise", "lm"]
    assert "is finished already" in told.stderr and "Held-out loss" in told.stdout


@pytest.mark.slow
def test_metrics_are_truncated_to_the_step_resumed_from(shop: Workshop, tmp_path: Path) -> None:
    place = stopped(shop, tmp_path)
    shutil.rmtree(place / "step-00000009")
    with open(place / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "los')
    shop.run(tmp_path / "out", resume=True)
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 13))


@pytest.mark.slow
def test_training_does_not_wait_for_the_hashes_of_a_checkpoint(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[str, bool]] = []

    @functools.lru_cache
    def seen(file: content_room._File) -> str:
        hashed.append((file.path.parent.name, threading.current_thread() is threading.main_thread()))
        return "hash"

    monkeypatch.setattr(content_room, "_hash", seen)
    shop.run(tmp_path / "out", tokens="1024")
    here = {folder for folder, main in hashed if main}
    assert here == {"student", "teacher"} and {folder for folder, _ in hashed} > here


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(shop: Workshop, tmp_path: Path) -> None:
    place = Path(stopped(shop, tmp_path, at=9))
    assert sorted(path.name for path in place.glob("step-*")) == ["step-00000008", "step-00000009"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave a name whose bytes only memory knew, and the older checkpoints are removed by then."""
    workspace, synced = Workspace(tmp_path / "out"), list[tuple[Path, list[str]]]()
    partial = workspace.partial(1)
    partial.mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(8))
    monkeypatch.setattr(state, "sync_tree", lambda path: synced.append((path, sorted(p.name for p in path.iterdir()))))
    checkpoint = workspace.publish(Counters(step=1), {}, 1)
    assert synced == [(partial, sorted(path.name for path in checkpoint.iterdir()))]


def test_what_is_older_than_is_needed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of checkpoints of many gigabytes: the newest whole one to go on from, `keep` of them when older ones are removed."""
    workspace, read = Workspace(tmp_path / "out"), list[str]()

    def save(step: int, keep: int) -> None:
        workspace.partial(step).mkdir(parents=True)
        (workspace.partial(step) / "weights").write_bytes(bytes([step]) * 1000)
        workspace.publish(Counters(step=step), {}, keep)

    for step in range(1, 7):
        save(step, keep=9)
    flip(workspace.path / "step-00000006" / "weights")

    def seen(path: Path) -> str:
        read.append(path.parent.name)
        return content_hash(path)

    monkeypatch.setattr(state, "digest", seen)
    assert workspace.begin(resume=True, overwrite=False) == workspace.newest() == workspace.path / "step-00000005"
    assert read == ["step-00000006", "step-00000005"] * 2
    read.clear()
    save(6, keep=2)
    assert read == ["step-00000006.tmp", "step-00000006", "step-00000005"]
    assert sorted(path.name for path in workspace.path.iterdir()) == ["step-00000005", "step-00000006"]


@pytest.mark.slow
def test_killed_while_old_ones_are_removed_none_is_left_by_half(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        if not path.exists():
            return
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        shop.run(tmp_path / "out", keep=1, async_save=False)
    monkeypatch.undo()
    workspace = state.Workspace(tmp_path / "out.upfit-work")
    named = [path for path in workspace.path.iterdir() if state.STEP_NAME.fullmatch(path.name)]
    assert named == list(workspace.checkpoints()) and len(list(workspace.path.glob("*.old"))) == 1
    shop.run(tmp_path / "out", resume=True)
    assert not workspace.path.exists()


def test_two_runs_cannot_share_a_place(shop: Workshop, tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", "uptrain"), pytest.raises(UpfitError, match="another process"):
        shop.run(tmp_path / "out")

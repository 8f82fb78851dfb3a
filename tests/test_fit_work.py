"""The work folder of a fit: stopped at any rename or inside a file, the next run goes on and ends with the same bytes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from upfit.calibration import fit_work
from upfit.calibration.carried import Carried
from upfit.calibration.fit_work import FitWork
from upfit.calibration.observe import Call
from upfit.calibration.teacher_student import PairedBatch

LAYERS = 4
IDENTITY = {"model": "m", "settings": {"kv_heads": 2}}


class Stopped(BaseException):
    """The user, or the machine, stops the process."""


def walk(folder: Path, identity: dict[str, Any] = IDENTITY) -> list[int]:
    """A fit of small sums, all layers of which depend on those before; the layers that were run."""
    work, run = FitWork(folder, identity), []
    hidden = work.state()["hidden"] if work.progress.state else torch.arange(12.0).reshape(3, 4).T
    for index in range(work.progress.next, LAYERS):
        run.append(index)
        hidden = (hidden * 1.7 + index).sin()
        if index != 2:  # one without an attention
            tensors = {"w": (hidden * 2).contiguous(), "b": hidden[0].clone()}
            work.add(f"layers.{index}", {"error": float(hidden.sum())}, {}, tensors)
        work.keep(index + 1, LAYERS, {"hidden": hidden} if index + 1 < LAYERS else None)
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stop_at(
    patch: pytest.MonkeyPatch,
    number: int,
    before: bool,
    seen: Callable[[], None] = lambda: None,
    error: type[BaseException] = Stopped,
) -> None:
    """The fit ends at the rename of this number (from 0), before it is done or after; `seen` is called after each."""
    count = iter(range(1000))

    def replace(source: Path, target: Path) -> None:
        now = next(count)
        if now == number and before:
            raise error
        os.rename(source, target)
        seen()
        if now == number:
            raise error

    patch.setattr(fit_work.os, "replace", replace)


RENAMES = 3 + 3 + 2 + 2  # a layer's tensors, its state and the JSON; without tensors, and after the last, one fewer


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", range(RENAMES))
def test_stopped_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, before: bool) -> None:
    assert walk(tmp_path / "whole") == [0, 1, 2, 3]
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "fit").glob("before-*"))))

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, number, before, count)
        walk(tmp_path / "fit")
    finished = sum(number + (not before) >= done for done in (3, 6, 8, 10))
    assert walk(tmp_path / "fit") == list(range(finished, LAYERS))
    assert content(tmp_path / "fit") == content(tmp_path / "whole") and most <= 2
    assert walk(tmp_path / "fit") == []  # all is there for the next command


def test_stopped_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written of the state before layer 2 is no state: layer 1 is run again."""
    walk(tmp_path / "whole")
    real = fit_work.save_file

    def torn(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
        real(tensors, path, **more)
        if path.name == "before-00002.state.new":
            os.truncate(path, path.stat().st_size // 2)
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fit_work, "save_file", torn)
        walk(tmp_path / "fit")
    assert walk(tmp_path / "fit") == [1, 2, 3] and content(tmp_path / "fit") == content(tmp_path / "whole")


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that ended after layer 1."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 6, before=False)
        walk(folder)


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "before-00002.state", "fit.json"])
def test_damaged_work_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    walk(tmp_path / "whole")
    stopped(tmp_path / "fit", monkeypatch)
    damaged = bytearray((tmp_path / "fit" / name).read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "fit" / name).write_bytes(damaged)
    assert walk(tmp_path / "fit") == [0, 1, 2, 3] and content(tmp_path / "fit") == content(tmp_path / "whole")


def test_other_work_is_begun_anew_and_other_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"model": "m", "settings": {"kv_heads": 1}}
    walk(tmp_path / "whole", other)
    stopped(tmp_path / "fit", monkeypatch)
    for name in ("notes.txt", "layer-1.safetensors", "before-00002.state.bak", "lock"):
        (tmp_path / "fit" / name).write_text("the user's, or the folder's own")
    FitWork(tmp_path / "fit", other)
    assert sorted(content(tmp_path / "fit")) == ["before-00002.state.bak", "layer-1.safetensors", "lock", "notes.txt"]
    assert walk(tmp_path / "fit", other) == [0, 1, 2, 3]
    assert content(tmp_path / "whole").items() <= content(tmp_path / "fit").items()


def test_what_was_decided_before_the_first_layer_is_not_decided_again(tmp_path: Path) -> None:
    """It outlives a stop at any time after it, and belongs to its own fit."""
    decided = {"at": 3, "errors": [0.1 + 0.2, 1e-300]}
    FitWork(tmp_path, IDENTITY).settle(decided)
    again = FitWork(tmp_path, IDENTITY)
    assert (again.progress.decided, again.progress.next, again.finished) == (decided, 0, False)
    assert walk(tmp_path) == [*range(LAYERS)] and FitWork(tmp_path, IDENTITY).progress.decided == decided
    assert FitWork(tmp_path, {"model": "another"}).progress.decided is None


def test_without_room_the_earlier_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is kept only where it leaves room for the layers to come, without which there would be no result at all."""
    work, full = FitWork(tmp_path, IDENTITY), torch.ones(1000)
    work.add("layers.0", {}, {}, {"w": full})
    work.keep(1, LAYERS, {"hidden": full})
    layer = (tmp_path / "layer-00000.safetensors").stat().st_size
    for short, kept in ((1, 1), (0, 2)):
        free = fit_work.RESERVE_BYTES + full.nbytes + 2 * layer - short
        monkeypatch.setattr(fit_work.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        work.keep(2, LAYERS, {"hidden": full})
        assert json.loads((tmp_path / "fit.json").read_text())["progress"]["next"] == kept


def test_a_state_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while a state is written: the fit goes on, and a later run goes on from the state before."""
    walk(tmp_path / "whole")
    real = fit_work.save_file

    def failing(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
        real(tensors, path, **more)
        if path.name == "before-00002.state.new":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit_work, "save_file", failing)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4, before=True)  # after layer 1, whose state is not there
        walk(tmp_path / "fit")
    assert not list((tmp_path / "fit").glob("before-00002*"))
    assert walk(tmp_path / "fit") == [1, 2, 3] and content(tmp_path / "fit") == content(tmp_path / "whole")


def batch(shared: dict[str, Any]) -> PairedBatch:
    """A batch before two layers that are given the same dictionary, which the student has one of its own of."""
    own = dict(shared)
    calls, student = ([Call((), {"shared": some, "other": 3})] * 2 for some in (shared, own))
    hidden = torch.ones(1, 2, 3)
    return PairedBatch(False, calls, student, hidden, hidden, 2)


def test_what_layers_leave_for_later_ones_is_carried(tmp_path: Path) -> None:
    """Keys and values in a dictionary, of the teacher and of the student, come back as they were, laid out as they were; what
    was there before the first layer is not written."""
    table = torch.zeros(50)
    batches = [batch({"table": table})]
    carried = Carried(batches, alone=False)
    keys = torch.arange(24.0).reshape(2, 3, 4)
    batches[0].teacher, batches[0].student = batches[0].teacher + 1, batches[0].student.double() + 2
    batches[0].calls[0].keywords["shared"]["full"] = (keys.transpose(0, 1), keys)
    batches[0].student_calls[1].keywords["shared"]["one"] = keys[:, 1]
    batches[0].student_calls[1].keywords["shared"]["same"] = keys  # in the memory of the teacher's
    tensors = carried.tensors()
    assert tensors is not None and not any(tensor is table for tensor in tensors.values())
    work = FitWork(tmp_path, IDENTITY)
    work.keep(1, LAYERS, tensors)
    again = [batch({"table": table})]
    Carried(again, alone=False).restore(FitWork(tmp_path, IDENTITY).state())
    for part in ("teacher", "student"):
        assert torch.equal(getattr(again[0], part), getattr(batches[0], part))
    first, second = again[0].calls[1].keywords["shared"]["full"]
    assert torch.equal(first, keys.transpose(0, 1)) and first.stride() == keys.transpose(0, 1).stride()
    assert torch.equal(second, keys) and torch.equal(again[0].student_calls[0].keywords["shared"]["one"], keys[:, 1])
    assert torch.equal(again[0].student_calls[0].keywords["shared"]["same"], keys)
    assert again[0].calls[0].keywords["shared"].keys() == {"table", "full"}


def test_what_is_not_made_of_tensors_is_not_carried() -> None:
    batches = [batch({})]
    carried = Carried(batches, alone=False)
    batches[0].student_calls[0].keywords["shared"]["cache"] = object()
    assert carried.tensors() is None
    assert Carried(batches, alone=True).tensors() is not None

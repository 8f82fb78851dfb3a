"""A disk that is full, bursts of bad steps: nothing is lost, and the bytes at the end are the same."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from tests.folders import save_tiny, tiny_llama
from tests.test_uptrain_resume import Interrupting, untimed
from tests.uptraining import BASE, QUIET, Workshop, make_workshop, metrics, one_thread, weights
from upfit import provenance
from upfit.checkpoint.output_folder import RESERVE_BYTES
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.output import Meter, Output
from upfit.uptrain.config import Config
from upfit.uptrain.data.dataloader import RowGroup, StepSampler
from upfit.uptrain.data.rows import TextRows
from upfit.uptrain.data.shards import Shards
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.run import checkpointing
from upfit.uptrain.run.checkpointing import data_step
from upfit.uptrain.run.metrics_file import MetricsFile
from upfit.uptrain.run.run import Progress
from upfit.uptrain.run.saver import reason
from upfit.uptrain.run.setup import check_places
from upfit.uptrain.run.state import Counters, Workspace


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_thread():
        yield make_workshop(tmp_path_factory.mktemp("shop"))


class Telling(Output):
    """Keeps its notes, and calls `at[n]` after n steps."""

    def __init__(self, at: dict[int, Callable[[], object]]) -> None:
        super().__init__(quiet=True)
        self.at, self.notes = at, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        meter, steps = Meter(label, total, True, None), [0]

        def advance(amount: float, note: str = "") -> None:
            steps[0] += bool(note)
            if note and steps[0] in self.at:
                self.at[steps[0]]()

        meter.advance = advance  # type: ignore[method-assign]
        yield meter


@pytest.fixture
def disk() -> Iterator[Callable[[int], object]]:
    """Sets the size in bytes beyond which this process cannot write files: to programs, a disk that is full."""
    if "MUTANT_DURATIONS" in os.environ:
        pytest.skip("which tests run a line is being measured, and that file would have no room either")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run gives that nothing befalls."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shop.run(out)
    return out


@pytest.mark.slow
def test_a_disk_full_for_a_while_costs_its_checkpoints(
    shop: Workshop, whole: Path, tmp_path: Path, disk: Callable[[int], object]
) -> None:
    seen: list[str] = []
    workspace = Workspace(tmp_path / "out.upfit-work")
    output = Telling(
        {
            3: lambda: disk(1000),
            6: lambda: seen.extend(path.name for path in workspace.path.glob("step-*")),
            7: lambda: disk(resource.RLIM_INFINITY),
            10: lambda: seen.extend(path.name for path in workspace.path.glob("step-*")),
        }
    )
    shop.run(tmp_path / "out", output=output, save_every="2", async_save=False)
    assert sorted(seen) == ["step-00000002", "step-00000002", "step-00000008"]
    told = [note for note in output.notes if "could not be written" in note]
    assert len(told) == 3 and "step-00000002" in told[1] and "metrics.jsonl" in told[0] and "File too large" in told[0]
    assert weights(tmp_path / "out") == weights(whole)
    assert untimed(tmp_path / "out") == untimed(whole)


@pytest.mark.slow
def test_a_disk_full_to_the_end_is_one_line_and_resume_goes_on(
    shop: Workshop, whole: Path, tmp_path: Path, disk: Callable[[int], object]
) -> None:
    with pytest.raises(UpfitError, match="out could not be written .*step-00000004; free some space") as caught:
        shop.run(tmp_path / "out", output=Telling({6: lambda: disk(1000)}), async_save=False)
    disk(resource.RLIM_INFINITY)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.glob("out*")] == ["out.upfit-work"]
    shop.run(tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(whole)
    assert untimed(tmp_path / "out") == untimed(whole)


def test_a_stop_that_cannot_be_saved_leaves_no_mark(shop: Workshop, tmp_path: Path, disk: Callable[[int], object]) -> None:
    def fill_and_signal() -> None:
        disk(1000)
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(UpfitError, match="stopped, but the checkpoint of step 3 could not be written"):
        shop.run(tmp_path / "out", output=Telling({3: fill_and_signal}))
    assert not (tmp_path / "out.upfit-work" / "stopped").exists()


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (None, "another process says why"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the line is cut\nand a stack"), "the line is cut"),
        (
            CheckpointException("two failed", {1: (OSError(28, "No space left on device"), StackSummary())}),
            "No space left on device",
        ),
        (CheckpointException("nobody knows", {}), "CheckpointException ranks:dict_keys([])"),
    ],
)
def test_why_a_checkpoint_was_not_written_is_a_line(cause: BaseException | None, line: str) -> None:
    """That of the first process that failed, where torch knows it."""
    assert reason(cause) == line


def test_lines_wait_for_the_disk_and_none_is_lost(tmp_path: Path) -> None:
    journal = MetricsFile(Path("/dev/full"))
    for line in ("one", "two"):
        with pytest.raises(OSError, match="No space left"):
            journal.append(line)
    journal.path = tmp_path / "metrics.jsonl"
    journal.append("three")
    assert journal.path.read_text() == "one\ntwo\nthree\n" and not journal.waiting


def test_the_data_of_a_step_is_the_one_after_what_was_left_out() -> None:
    left_out = [[5, 5, 8], [5, 8, 11], [7, 13, 14]]
    told = [data_step(step, left_out) for step in range(10)]
    assert told == [0, 1, 2, 3, 4, 11, 12, 14, 15, 16]
    assert [data_step(step, []) for step in range(3)] == [0, 1, 2]


def poison(monkeypatch: pytest.MonkeyPatch, shop: Workshop, steps: set[int]) -> None:
    """Make the loss on the data of these steps (from 0) not a number."""
    rows = TextRows(Shards(shop.data), BASE["length"], BASE["holdout"], 0)
    bad = {bytes(row.input_ids) for step in steps for row in rows.of_step(step, 4, 0, 1)}
    original = Distiller.forward

    def forward(self: Distiller, ids: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        loss, ce, kl = original(self, ids, *rest)
        return (loss * float("nan") if any(bytes(row.numpy()) in bad for row in ids) else loss), ce, kl

    monkeypatch.setattr(Distiller, "forward", forward)


@pytest.mark.parametrize(
    "since,took,writing,due",
    [
        (14 * 60, 0, False, False),
        (15 * 60, 0, False, True),
        (13 * 60, 120, False, True),  # whole when 15 minutes are over
        (12 * 60, 120, False, False),
        (20 * 60, 0, True, False),
        (60, 16 * 60, False, True),
    ],
)
def test_a_checkpoint_is_whole_before_more_time_is_lost(since: int, took: int, writing: bool, due: bool) -> None:
    saver = SimpleNamespace(writing=Future() if writing else None, took=took)
    config, sound = Config(save_every="15m"), Counters(step=7)
    first = SimpleNamespace(is_main_process=True)
    progress = Progress(counters=sound, sound=sound, saved_step=3, saved_at=time.monotonic() - since)
    run: Any = SimpleNamespace(config=config, accelerator=first, counters=sound, saver=saver, progress=progress)
    assert checkpointing.save_due(run) == due
    progress.saved_step = 7
    assert not checkpointing.save_due(run), "there is one of this step"


@pytest.mark.slow
def test_a_burst_is_left_out_exactly_and_resumably(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 to 7 and 11 to 13 of the data are poison, and step 3 once: the run that never saw the bursts is the law."""
    bursts = [[5, 5, 8], [8, 11, 14]]
    settings: dict[str, Any] = {"max_bad_steps": 2}
    with monkeypatch.context() as patch:
        poison(patch, shop, {3})
        of_step = StepSampler.of_step

        def without(self: StepSampler, step: int, rank: int, world: int) -> list[RowGroup]:
            return of_step(self, data_step(step, bursts), rank, world)

        patch.setattr(StepSampler, "of_step", without)
        shop.run(tmp_path / "law", **settings)
    poison(monkeypatch, shop, {3, *range(5, 8), *range(11, 14)})
    report = shop.run(tmp_path / "whole", **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "law")
    told = [{"step": 5, "data_of_steps": [5, 8]}, {"step": 8, "data_of_steps": [11, 14]}]
    assert report.record()["rollbacks"] == told == provenance.read(tmp_path / "whole")[-1]["measurements"]["rollbacks"]
    assert [line["rollbacks"] for line in metrics(tmp_path / "whole")] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [line["skipped"] for line in metrics(tmp_path / "whole")] == [0, 0, 0, *[1] * 9]
    for stop in (7, 9, 99):  # steps since the start, those of bursts counted: in the first burst, in the second
        if not shop.run(tmp_path / "broken", resume=True, output=Interrupting(stop), save_every="100", **settings).stopped:
            break
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")


@pytest.mark.parametrize("steps,most,told", [({1, 2}, 3, "there is no checkpoint"), ({5, 6, 7, 8}, 1, "it went back 1 times")])
def test_what_going_back_does_not_heal_ends_the_run(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: set[int], most: int, told: str
) -> None:
    poison(monkeypatch, shop, steps)
    with pytest.raises(UpfitError, match=told):
        shop.run(tmp_path / "out", max_bad_steps=1, max_rollbacks=most, output=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_room_is_wanted_for_the_result_and_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """What is kept and the next one: float32 weights and two moments each; beside them the result, and it in float32."""
    source = Source(save_tiny(tmp_path / "source"), "source")
    data: Any = SimpleNamespace(folders=[tmp_path / "data"])
    numbers = sum(parameter.numel() for parameter in tiny_llama().parameters())
    with open_checkpoint(source.path) as checkpoint:
        needed = checkpoint.nbytes + 4 * numbers + 3 * 4 * numbers * (keep + 1)
    for missing in (0, 1):
        free = needed + RESERVE_BYTES - missing
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UpfitError, match="free some space") if missing else nullcontext():
            check_places(tmp_path / "out", source, data, None, Config(keep=keep), overwrite=False)

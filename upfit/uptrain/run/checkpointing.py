"""What a run does about signals, full disks, and bursts of steps that are not finite.

A checkpoint is always of a good step. During a burst no update is made, so the state at its beginning is still the present one.
A checkpoint taken during a burst (a signal may ask for one) is that of its beginning.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from upfit.errors import UpfitError
from upfit.uptrain.config import save_interval
from upfit.uptrain.run.saver import reason

if TYPE_CHECKING:
    from upfit.uptrain.run.run import Run

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # the end is near: of schedulers in general, and as Slurm's jobs ask for it
NOT_WRITTEN = (OSError, SafetensorError)  # safetensors tells a full disk by an error of its own
NOWHERE = -1  # the step of a checkpoint that is not there


@contextlib.contextmanager
def watch_for_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set instead of ending the process."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen  # signals reach only the main thread
        return
    before = {number: signal.signal(number, lambda *_: seen.set()) for number in SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_due(run: "Run") -> bool:
    """Whether this process asks for a checkpoint: only the first one does, so that clocks need not agree.

    A time is how much work may be lost, so the next checkpoint is begun as much earlier as the last one took to become whole,
    but not before that one is.
    """
    steps, seconds = save_interval(run.config.save_every)
    if not run.accelerator.is_main_process or run.progress.sound.step == run.progress.saved_step:
        return False
    if steps is not None:
        return run.counters.step % steps == 0
    saver = run.saver
    return seconds is not None and saver.writing is None and time.monotonic() - run.progress.saved_at >= seconds - saver.took


def save(run: "Run") -> None:
    """Begin to write a checkpoint of the newest step that was fine, unless there is one already.

    Where the disk does not take it the run goes on with the older ones, and tries again when the next one is due.
    """
    finish(run)
    progress = run.progress
    if progress.sound.step != progress.saved_step:
        try:
            run.metrics_file.flush(sync=True)
            run.saver.start(run.learner.student, run.optimizer, progress.sound, run.identity, run.config.keep)
        except NOT_WRITTEN as error:
            run.saver.failure = error
    progress.saved_at, progress.saved_step = time.monotonic(), progress.sound.step


def finish(run: "Run") -> str:
    """Wait for the checkpoint that is being written; what kept it from being whole (then said), empty where nothing did."""
    problem = run.saver.finish()
    if problem:
        problem = f"the checkpoint of step {run.progress.saved_step} could not be written ({problem}): {newest(run)}"
        run.progress.saved_step = NOWHERE
        run.output.note(f"{problem}; the run goes on")
    return problem


def stop(run: "Run") -> None:
    """Save, and leave a mark by which a job script knows that the same command with --resume goes on.

    Raises UpfitError when the checkpoint cannot be written.
    """
    save(run)
    problem = finish(run)
    if problem:
        raise UpfitError(f"stopped, but {problem}; free some space and go on with --resume")
    if run.accelerator.is_main_process:
        with one_line(run, "the mark of a clean stop"):
            run.mark.touch()
    run.progress.counters = run.progress.sound


@contextlib.contextmanager
def one_line(run: "Run", what: str) -> Iterator[None]:
    """Raise UpfitError where the block cannot write; `what` names what then is not there."""
    try:
        yield
    except NOT_WRITTEN as error:
        raise UpfitError(
            f"{what} could not be written ({reason(error)}): {newest(run)}; free some space and go on with --resume"
        ) from error


def newest(run: "Run") -> str:
    checkpoint = run.workspace.newest()
    return f"the newest checkpoint in {run.workspace.path} is {checkpoint.name}" if checkpoint else "there is no checkpoint yet"


def roll_back(run: "Run") -> None:
    """Go back to the newest checkpoint, and leave out the data of the burst that the run is in from then on.

    The steps up to the burst are done again as they were, so it makes no difference which checkpoint that is.
    Raises UpfitError when there is none, or the run has gone back `max_rollbacks` times.
    """
    counters, began = run.counters, run.progress.sound.step
    finish(run)
    checkpoint = broadcast_object_list([run.workspace.newest() if run.accelerator.is_main_process else None])[0]
    trouble = f"{counters.bad} steps in a row, from step {began + 1} on, had a loss or gradient that is not finite"
    if checkpoint is None or len(counters.rollbacks) >= run.config.max_rollbacks:
        why = "there is no checkpoint to go back to" if checkpoint is None else f"it went back {len(counters.rollbacks)} times"
        raise UpfitError(f"{trouble}, and {why}; lower --learning-rate and start anew with --overwrite")
    first = data_step(began, counters.rollbacks)
    restored = run.saver.restore(checkpoint, run.learner.student, run.optimizer, run.identity)
    restored.rollbacks = [*counters.rollbacks, [began, first, first + counters.bad]]
    restored.seconds = counters.seconds
    run.progress.stand_at(restored)
    if run.accelerator.is_main_process:
        run.metrics_file.waiting = b""  # lines of steps before a checkpoint are on the disk before it
        with one_line(run, "metrics.jsonl"):
            run.workspace.truncate_metrics(run.counters.step)
    run.output.note(f"{trouble}: back to step {run.counters.step}, and on without the data of those steps")


def data_step(step: int, rollbacks: list[list[int]]) -> int:
    """The number by which the data of step `step` is addressed: that of the step, and all that was left out before it."""
    for _, first, end in rollbacks:
        if step >= first:
            step += end - first
    return step

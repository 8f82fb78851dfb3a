"""Writes checkpoints while training continues: the state is copied, and a thread writes the copy and renames it when it is
whole.

One checkpoint at a time. Where each process holds everything, the first one writes; of shards each process writes its own.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from upfit.durable import remove_tree
from upfit.uptrain.run.state import Counters, Workspace, digest, expect_one_process, restore, tensors_of


class Saver:
    """Saves and restores the state of a run; all processes call `start`, `finish` and `restore` at the same steps."""

    def __init__(
        self, workspace: Workspace, accelerator: Accelerator, sharded: bool, background: bool, timeout: timedelta
    ) -> None:
        self.workspace, self.accelerator, self.sharded, self.background = workspace, accelerator, sharded, background
        # Of its own, because a thread talks in it while the others train; and gloo, because copies lie in the host's memory.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.writing: Future | None = None
        self.reader = ThreadPoolExecutor(1)
        self.saved: tuple[Counters, dict[str, Any], int] | None = None
        self.failure: BaseException | None = None
        self.began = 0.0  # when the newest checkpoint was begun
        self.took = 0.0  # seconds in which the last one was written beside training

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters, identity: dict[str, Any], keep: int
    ) -> None:
        """Begin to write the state as it is now; `finish` has to have been called for the checkpoint before.

        Raises OSError where it cannot even begin.
        """
        if not (self.sharded or self.accelerator.is_main_process):
            return
        partial = self.workspace.partial(counters.step)
        if self.accelerator.is_main_process:  # it also plans who writes what, so the others write later
            remove_tree(partial)
            partial.mkdir()
        self.saved, self.began = (replace(counters), identity, keep), time.monotonic()
        self.writing = self._write(tensors_of(model, optimizer), partial)
        if self.background and self.accelerator.is_main_process:
            self.writing = self.reader.submit(read_back, self.writing, partial)
        self.settle()

    def _write(self, tensors: dict[str, torch.Tensor], partial: Path) -> Future:
        expect_one_process()
        how: dict[str, Any] = {"checkpoint_id": partial, "process_group": self.group, "no_dist": not self.sharded}
        if self.background:
            writing = dcp.async_save(tensors, **how)
            assert isinstance(writing, Future), "only another stager answers with two"
            return writing
        written: Future = Future()
        try:
            written.set_result(dcp.save(tensors, **how))
        except CheckpointException as error:
            written.set_exception(error)
        return written

    def settle(self) -> None:
        """Give the checkpoint its name if it is whole by now; never waits, so the first process may call it alone.

        What went wrong is kept until `finish`, where all processes hear of it.
        """
        if self.writing is None or not self.writing.done():
            return
        self.failure = self.failure or self.writing.exception()
        if self.failure is None and self.accelerator.is_main_process:
            assert self.saved is not None
            try:
                self.workspace.publish(*self.saved)
            except OSError as error:
                self.failure = error
        self.writing = None
        if self.background:  # else no work is done meanwhile
            self.took = time.monotonic() - self.began

    def finish(self) -> str:
        """Wait until what is being written has its name; what kept it from that, on all processes, empty where nothing did.

        Then nothing half-written is left either.
        """
        if self.writing is not None:
            self.writing.exception()  # waits
        self.settle()
        cause, self.failure = self.failure, None
        failures = torch.tensor([float(cause is not None)], device=self.accelerator.device)
        if float(self.accelerator.reduce(failures, "sum")) == 0:
            return ""
        if self.accelerator.is_main_process:
            self.workspace.sweep()
        return reason(cause)

    def restore(
        self, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
    ) -> Counters:
        """Load `checkpoint`; raises UpfitError when it belongs to another run than `identity`."""
        return restore(checkpoint, model, optimizer, identity, self.group if self.sharded else None)


def read_back(writing: Future, partial: Path) -> None:
    """Wait until a checkpoint is written, and hash its files, so that giving it its name keeps nobody from training."""
    writing.result()
    for path in partial.iterdir():
        digest(path)


def reason(cause: BaseException | None) -> str:
    """What went wrong, in a line; torch keeps it by the processes it befell."""
    if isinstance(cause, CheckpointException) and cause.failures:
        cause = next(iter(cause.failures.values()))[0]
    if cause is None:
        return "another process says why"
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause).splitlines()[0]

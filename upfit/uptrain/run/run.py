"""Everything that the training loop works with."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from upfit.output import Output
from upfit.uptrain.config import Config
from upfit.uptrain.data.dataloader import StepSampler, micro_batches
from upfit.uptrain.data.rows import Row
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.layerwise import Layerwise
from upfit.uptrain.run.metrics_file import MetricsFile
from upfit.uptrain.run.saver import Saver
from upfit.uptrain.run.state import Counters, Workspace
from upfit.uptrain.schedule import Plan

MEASURE_EVERY = 10  # steps
Learner = Distiller | Layerwise  # from rows to a loss and its metrics


@dataclass
class Progress:
    """How far a run is, in steps and in checkpoints: all of it that changes while it goes on."""

    counters: Counters = field(default_factory=Counters)
    sound: Counters = field(default_factory=Counters)  # of the newest step that was fine
    saved_step: int = -1  # of the newest checkpoint, written or being written
    saved_at: float = field(default_factory=time.monotonic)

    def stand_at(self, counters: Counters) -> None:
        """Go on from a step that was fine, and that needs no checkpoint: it has one, or is the first."""
        self.counters, self.sound, self.saved_step = counters, replace(counters), counters.step


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run works with, from its first step to its last. `module` is the learner as wrapped for several processes,
    `learner` the same without wrapper; `stop` asks for the run's end."""

    accelerator: Accelerator
    learner: Learner
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sampler: StepSampler
    plan: Plan
    peak: float
    micro_tokens: int
    config: Config
    workspace: Workspace
    saver: Saver
    identity: dict[str, Any]
    output: Output
    stage: str
    mark: Path  # that a signal has ended the run
    layout: dict[str, str]  # of the result's tensors, see export.layout_of
    metrics_file: MetricsFile
    stop: threading.Event
    progress: Progress = field(default_factory=Progress)

    @property
    def counters(self) -> Counters:
        return self.progress.counters

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        return micro_batches(rows, self.config.micro_batch, self.micro_tokens)

    @property
    def sharded(self) -> bool:
        return self.saver.sharded

    def lacking(self, batches: int) -> int:
        """How many batches another process has more than this one's. Shards are gathered in each, so all must do as many."""
        if not self.sharded:
            return 0
        counts = self.accelerator.gather(torch.tensor([batches], device=self.accelerator.device))
        return int(counts.max()) - batches

    def total(self, values: list[float] | Tensor) -> Tensor:
        """The sum over all processes; whole numbers up to 2^53 are exact where the device has float64."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        tensor = torch.as_tensor(values, dtype=dtype, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum")

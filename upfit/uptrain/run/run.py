"""Everything that the training loop works with."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from upfit.uptrain.run.state import METRICS, Counters, Workspace
from upfit.uptrain.schedule import Plan

MEASURE_EVERY = 10  # steps
Learner = Distiller | Layerwise  # from rows to a loss and what is told of it


@dataclass
class Run:
    """A run in progress. `module` is the learner as wrapped for several processes, `learner` the same without wrapper.

    `stop` asks for its end; `sound` are the counters of the newest step that was fine, `saved_step` is that of the newest
    checkpoint, written or being written.
    """

    accelerator: Accelerator
    learner: Learner
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    feed: StepSampler
    plan: Plan
    peak: float
    micro_tokens: int
    config: Config
    counters: Counters
    workspace: Workspace
    saver: Saver
    identity: dict[str, Any]
    output: Output
    stage: str
    mark: Path  # that a signal has ended the run
    layout: dict[str, str]  # of the result's tensors, see export.layout_of
    stop: threading.Event = field(default_factory=threading.Event)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    journal: MetricsFile = field(init=False)
    sound: Counters = field(init=False)

    def __post_init__(self) -> None:
        self.journal = MetricsFile(self.workspace.path / METRICS if self.accelerator.is_main_process else None)
        self.sound = self.counters

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

"""What `upfit uptrain` answers."""

from dataclasses import dataclass
from typing import Any

from upfit.output import Output, human_count
from upfit.results import Part, Result, absent, beside


@dataclass(frozen=True)
class Rollback(Part):
    """A return to the newest checkpoint after steps that were not finite.

    step: steps done before it
    data_of_steps: the first and the end of the steps whose data it left out
    """

    step: int
    data_of_steps: list[int]


@dataclass(frozen=True, repr=False)
class Uptraining(Result):
    """What a run has done; of several stages the last one, with all of them in `stages`.

    stopped: whether a signal ended the run early: a checkpoint was written, OUT was not
    stage: what was learned from: layerwise, distill, lm or answers
    step: optimiser steps done
    steps: optimiser steps planned
    tokens: tokens trained on
    skipped: steps skipped for a loss or gradient that was not finite
    rollbacks: returns to a checkpoint
    seconds: time in steps, seconds
    tokens_per_second: rate, tokens a second; None before the first step
    holdout: what was measured of held-out rows before and after, by name: losses (ce, kl, teacher_ce) in nats a token,
        attention_error (attention_errors: a layer) as a share of the teacher's mean square; empty where the run was stopped
    holdout_rows: number of held-out rows
    stages: of a run of several stages, each that was begun
    out: the folder that was written (not in the record)
    """

    stopped: bool
    stage: str
    step: int
    steps: int
    tokens: int
    skipped: int
    rollbacks: list[Rollback]
    seconds: float
    tokens_per_second: float | None
    holdout: dict[str, dict[str, Any]]
    holdout_rows: int
    stages: "list[Uptraining] | None" = absent()
    out: str = beside()

    def show(self, output: Output) -> None:
        if self.stopped:
            where = f"step {self.step} of {self.steps}" + ("" if self.stages is None else f" of {self.stage}")
            output.line(f"Stopped at {where}; the same command with --resume goes on")
            return
        for stage in self.stages or []:
            stage.show_stage(stage.stage.capitalize(), output)
        if self.stages is None:
            self.show_stage(f"Wrote {self.out}", output)
        else:
            output.line(f"Wrote {self.out}")

    def show_stage(self, title: str, output: Output) -> None:
        """Rate and held-out losses of one stage."""
        output.line(
            f"{title}: {human_count(self.tokens)} tokens in {self.seconds:.0f} s, "
            f"{self.tokens_per_second:.0f} tokens/s, {self.skipped} steps skipped"
        )
        before, after = self.holdout["before"], self.holdout["after"]
        rows = f"of {self.holdout_rows} rows of DATA"
        if "attention_error" in before:
            errors = f"{before['attention_error']:.4f} → {after['attention_error']:.4f}"
            output.line(f"Held-out error of attention outputs {rows}: {errors} of the teacher's mean square")
        elif before:
            line = f"Held-out loss {rows}: {before['ce']:.3f} → {after['ce']:.3f} nats a token"
            output.line(line + (f" (teacher {before['teacher_ce']:.3f})" if "teacher_ce" in before else ""))
            for name in (key.removesuffix("/ce") for key in before if key.endswith("/ce")):
                output.line(f"  {name}: {before[f'{name}/ce']:.3f} → {after[f'{name}/ce']:.3f}")

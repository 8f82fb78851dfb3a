"""Reports each step: a line in metrics.jsonl, the tracker, the progress bar."""

import json
import math
from typing import TYPE_CHECKING, Any

from upfit.output import Meter

if TYPE_CHECKING:
    from upfit.uptrain.run.run import Run


def record(run: "Run", line: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl and tell the tracker. JSON has no NaN: such values are null.

    A list holds one number a layer; trackers get each as a series of its own.
    """
    waited = bool(run.metrics_file.waiting)
    try:
        run.metrics_file.append(json.dumps({name: finite(value) for name, value in line.items()}))
    except OSError as error:
        if not waited:
            trouble = f"{run.metrics_file.path} could not be written ({error.strerror})"
            run.output.note(f"{trouble}; its lines wait in memory, and the run goes on")
    if run.config.track is not None:
        layers = {name: value for name, value in line.items() if isinstance(value, list)}
        values = {name: value for name, value in line.items() if name not in ("step", *layers)}
        values |= {f"{name}/{layer}": value for name, row in layers.items() for layer, value in enumerate(row)}
        run.accelerator.log(values, step=line["step"])


def finite(value: Any) -> Any:
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(run: "Run", meter: Meter, line: dict[str, Any], seconds_a_step: float) -> None:
    left = round(seconds_a_step * (run.plan.steps - run.counters.step))
    hours, rest = divmod(left, 3600)
    rate = run.plan.tokens_a_step / seconds_a_step  # of answers about: their lengths differ
    meter.advance(1, f"loss {line['loss']:.4f}, {rate:.0f} tokens/s, {hours}:{rest // 60:02d}:{rest % 60:02d} left")

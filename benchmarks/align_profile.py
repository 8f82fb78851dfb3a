"""Where a fitted conversion spends its CPU seconds, by step and by layer.

    python -m benchmarks.align_profile MODEL SCRATCH --kv-heads 1 --calibration TEXT --calibration-tokens 16k --layers 4

Each step is timed without the steps that it calls. `--layers` stops after so many layers; all without. Steps are functions of
Upfit by their names, so a checkout of another day is profiled by its own copy of this file.
"""

import argparse
import contextlib
import functools
import importlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.recipe import Options
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.output import Output

STEPS = {  # the step: the functions that it is
    "run layers": ["upfit.calibration.observe.run_block", "upfit.calibration.observe.run_until"],
    "traits": ["upfit.calibration.traits.probe_attention"],
    "teacher's rows": ["upfit.calibration.teacher_view._target"],
    "statistics": ["upfit.calibration.statistics.observe"],
    "closed forms": ["upfit.convert.gqa.merge_layer.merge_layer", "upfit.convert.mla.layer.closed_form"],
    "sums of inputs": ["upfit.convert.mla.sums.observe"],
    "their basis": ["upfit.convert.mla.layer.metrics_of"],
    "errors held back": ["upfit.convert.mla.watch_layer.output_error"],
    "values": ["upfit.convert.gqa.merge_layer.refine"],
    "drift": ["upfit.calibration.stream_refit.drifts_of"],
    "cuts": ["upfit.calibration.scores.fit.held_error"],
    "scores": ["upfit.calibration.scores.fit.fit_scores"],
    "moments": ["upfit.calibration.ridge.Moments.add"],
    "ridges": ["upfit.calibration.ridge.ridge"],
}
READERS = (  # the modules that import them by name
    "upfit.calibration.teacher_student",
    "upfit.calibration.watch",
    "upfit.calibration.residual",
    "upfit.calibration.capture",
    "upfit.calibration.gather",
    "upfit.calibration.traits",
    "upfit.calibration.teacher_view",
    "upfit.convert.gqa.merge_layer",
    "upfit.calibration.stream_refit",
    "upfit.convert.gqa.convert_layers",
    "upfit.calibration.fit_values",
    "upfit.convert.mla.refine",
    "upfit.convert.mla.watch_layer",
    "upfit.convert.mla.convert_layers",
)


class Enough(Exception):
    """So many layers were wanted, and are done."""


class Clock:
    """Seconds of each step without the steps inside it, by layer."""

    def __init__(self) -> None:
        self.layers: list[dict[str, float]] = []
        self.now: dict[str, float] = defaultdict(float)
        self.inside = [0.0]
        self.began = time.process_time()

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                self.now[step] += took - self.inside.pop()
                self.inside[-1] += took

        return run

    def mean(self, layers: list[dict[str, float]]) -> dict[str, float]:
        """Seconds of each step in one of the `layers`, and of the whole."""
        steps = sorted({step for layer in layers for step in layer})
        return {step: sum(layer.get(step, 0.0) for layer in layers) / max(1, len(layers)) for step in steps}

    def next_layer(self) -> None:
        now = time.process_time()
        self.now["rest"] = now - self.began - sum(self.now.values())
        self.layers.append({**self.now, "whole": now - self.began})
        self.now.clear()
        self.began = now


def install(clock: Clock, layers: int | None) -> None:
    """Time the steps wherever they are called, and stop after so many layers."""
    modules = [importlib.import_module(name) for name in READERS]
    for step, names in STEPS.items():
        for name in names:
            owner, _, own = name.rpartition(".")
            try:
                holder: Any = importlib.import_module(owner)
            except ModuleNotFoundError:
                outer, _, kind = owner.rpartition(".")
                holder = getattr(importlib.import_module(outer), kind)
            function = getattr(holder, own)
            timed = clock.timed(step, function)
            setattr(holder, own, timed)
            for module in modules:
                if getattr(module, own, None) is function:
                    setattr(module, own, timed)
    fitting: Any = importlib.import_module("upfit.convert.fitting").LayerFits
    store = fitting.store

    def stored(*args: Any, **kwargs: Any) -> Any:
        result = store(*args, **kwargs)
        clock.next_layer()
        if len(clock.layers) == layers:
            raise Enough
        return result

    fitting.store = stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--calibration-tokens", default="16k")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    clock = Clock()
    install(clock, args.layers)
    options: dict[str, Any] = {"kv_heads": args.kv_heads, "method": "aligned", "calibration_tokens": args.calibration_tokens}
    options |= {"calibration": args.calibration} if args.calibration else {}
    with contextlib.suppress(Enough):
        convert(get_recipe("gqa"), args.model, args.scratch, Options(**options), Settings(verify=False), Output(quiet=True))
    mean = clock.mean(clock.layers[1:])  # the first one's time has the start in it
    for step, seconds in sorted(mean.items(), key=lambda item: -item[1]):
        print(f"{step:16} {seconds:8.3f} s a layer {seconds / mean['whole']:6.1%}", flush=True)
    if args.results:
        record = {"tokens": args.calibration_tokens, "kv_heads": args.kv_heads, "mean": mean, "layers": clock.layers}
        args.results.write_text(json.dumps(record | {"environment": environment()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

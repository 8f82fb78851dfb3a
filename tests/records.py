"""Verbs as functions that give the dictionary of `--json`, for tests of what stands in it."""

from typing import Any

from upfit.evaluate.evaluate import evaluate as run
from upfit.evaluate.options import Options
from upfit.output import Output


def evaluate(model: str, options: Options, output: Output) -> dict[str, Any]:
    return run(model, options, output).record()

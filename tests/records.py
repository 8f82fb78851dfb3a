"""Verbs as functions that give the dictionary of `--json`, for tests of what stands in it."""

from pathlib import Path
from typing import Any

import upfit.evaluate.evaluate
import upfit.plan.plan
import upfit.publish.push
import upfit.report.compare
import upfit.report.run
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.output import Output
from upfit.plan.options import Options as PlanOptions
from upfit.publish.options import Options as PushOptions


def evaluate(model: str, options: EvaluateOptions, output: Output) -> dict[str, Any]:
    return upfit.evaluate.evaluate.evaluate(model, options, output).record()


def plan(model: str, options: PlanOptions, revision: str | None = None) -> dict[str, Any]:
    return upfit.plan.plan.plan(model, options, revision).record()


def report(model: str, out: Path | None, results: list[Path], png: Path | None, overwrite: bool) -> dict[str, Any]:
    return upfit.report.run.report(model, out, results, png, overwrite).record()


def compare(models: list[str]) -> list[dict[str, Any]]:
    return upfit.report.compare.compare(models).record()


def push(
    model: str, repo: str, options: PushOptions, ask: upfit.publish.push.Ask | None, output: Output
) -> list[dict[str, Any]]:
    return [publication.record() for publication in upfit.publish.push.push(model, repo, options, ask, output)]

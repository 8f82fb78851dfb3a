"""What a folder and the answers of other verbs tell, as plain data: nothing here draws or formats."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upfit import history
from upfit.convert.describe import describe
from upfit.convert.folders import find_source
from upfit.errors import UpfitError

METRICS = "metrics.jsonl"
KINDS = "`upfit evaluate --json` or `upfit convert gqa --dry-run --calibration --json`"


@dataclass(frozen=True)
class Story:
    """`facts`: what `upfit show` tells. `steps`: of recipe.json, oldest first. `training`: the lines of metrics.jsonl, of
    the newest uptraining. `evaluations`: [label, answer of `upfit evaluate`]. `predictions`: [label, sensitivity]."""

    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    training: list[dict[str, Any]]
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    predictions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def gather(model: str, results: list[Path]) -> Story:
    """Read the folder (or hub model) and the answers kept in `results`.

    Raises UpfitError for a file that none of the verbs wrote, or a folder that `upfit show` cannot tell of.
    """
    kept = [_result(path) for path in results]
    facts, folder = describe(model), find_source(model).path
    steps = history.read(folder)
    told = [(_label(steps, index), step["measurements"]) for index, step in enumerate(steps) if step["verb"] == "evaluate"]
    told += [(path.stem, answer) for path, answer in zip(results, kept, strict=True) if "sensitivity" not in answer]
    predictions = [
        (path.stem, answer["sensitivity"]) for path, answer in zip(results, kept, strict=True) if "sensitivity" in answer
    ]
    return Story(facts, steps, _training(folder / METRICS), told, predictions)


def _label(steps: list[dict[str, Any]], index: int) -> str:
    """`after uptrain`: the verb that made what the evaluation at `index` measured."""
    made = [step["verb"] for step in steps[:index] if step["verb"] != "evaluate"]
    return f"after {made[-1]}" if made else "as it was"


def _result(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UpfitError(f"--results {path} cannot be read ({error.strerror}); give a file that holds {KINDS}") from error
    except ValueError as error:
        raise UpfitError(f"--results {path} is not JSON; give a file that holds {KINDS}") from error
    evaluation = isinstance(answer, dict) and isinstance(answer.get("model"), dict) and "loss" in answer["model"]
    if not evaluation and not (isinstance(answer, dict) and answer.get("sensitivity")):
        raise UpfitError(f"--results {path} holds neither losses nor predicted errors; give a file that holds {KINDS}")
    return answer


def _training(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if isinstance(line["tokens"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise UpfitError(f"{path} is not what `upfit uptrain` writes ({error!r}); remove it to report without it") from error


def newest_evaluation(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation of the weights as they are; None when there is none since they last changed."""
    return steps[-1]["measurements"] if steps and steps[-1]["verb"] == "evaluate" else None

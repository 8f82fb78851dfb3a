"""Collects what a folder and the answers of other commands say, as plain data. Nothing here draws or formats."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.bounded import LINES_BYTES, RECORD_BYTES, check_ordinary, parse_json, read_lines, read_text, shaped
from upfit.checkpoint.reader import most_positions, read_config
from upfit.checkpoint.source import find_source
from upfit.convert.describe import describe
from upfit.errors import UpfitError

METRICS = "metrics.jsonl"
KEPT_BYTES = 32 * 2**20  # of metrics.jsonl; more points than that no plot shows
KINDS = "`upfit evaluate --json` or `upfit convert --dry-run --calibration --json`"


@dataclass(frozen=True)
class Story:
    """`facts`: what `upfit show` tells. `steps`: of recipe.json, oldest first. `training`: the lines of metrics.jsonl, of
    the newest uptraining. `evaluations`: [label, answer of `upfit evaluate`]. `predictions`: [label, sensitivity].
    `context`: the longest input that the model takes, in tokens; `sliding`: whether it has layers that forget old ones."""

    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    training: list[dict[str, Any]]
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    predictions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    context: int | None = None
    sliding: bool = False


def gather(model: str, results: list[Path]) -> Story:
    """Read the folder (or hub model) and the answers kept in `results`.

    Raises UpfitError for a file that none of the verbs wrote, or a folder that `upfit show` cannot tell of.
    """
    answers = list(zip(_names(results), map(_result, results), strict=True))
    facts, folder = describe(model).record(), find_source(model).path
    with misshapen(folder, results):
        return _story(facts, folder, answers)


def misshapen(folder: Path, results: list[Path]) -> AbstractContextManager[None]:
    """Raises UpfitError where something in the block is not what it takes the records of `folder` and `results` for."""
    files = [str(folder / provenance.FILE), *map(str, results)]
    what = "is not what Upfit writes there" if len(files) == 1 else "are not what Upfit writes there, one of them"
    return shaped(f"{' or '.join(files)} {what}")


def _story(facts: dict[str, Any], folder: Path, answers: list[tuple[str, dict[str, Any]]]) -> Story:
    steps = provenance.read(folder)
    added = [(label, answer) for label, answer in answers if "sensitivity" not in answer]
    twice = [answer["model"] for _, answer in added]  # what is recorded and given too stands under the name that was given
    recorded = [(_label(steps, index), step["measurements"]) for index, step in enumerate(steps) if step["verb"] == "evaluate"]
    recorded = [(label, measured) for label, measured in recorded if measured["model"] not in twice]
    predictions = [(label, answer["sensitivity"]) for label, answer in answers if "sensitivity" in answer]
    config = read_config(folder)
    context, sliding = most_positions(config), any(map(_slides, (config, config.get("text_config") or {})))
    return Story(facts, steps, _training(folder / METRICS), recorded + added, predictions, context, sliding)


def _slides(config: dict[str, Any]) -> bool:
    """Whether a config has layers that forget what lies far back."""
    window = config.get("sliding_window") and config.get("use_sliding_window", True)
    return bool(window or config.get("attention_chunk_size"))


def _names(paths: list[Path]) -> list[str]:
    """The files' names without endings; with the folder's name in front where two would be the same.

    Raises UpfitError when a file is given twice.
    """
    again = next((path for index, path in enumerate(paths) if path in paths[:index]), None)
    if again is not None:
        raise UpfitError(f"--results {again} is given twice; give each file once")
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names)
    ]


def _label(steps: list[dict[str, Any]], index: int) -> str:
    """`after uptrain`: the step that made what the evaluation at `index` measured; with a number from its second time on."""
    done = [step for step in steps[:index] if step["verb"] != "evaluate"]
    made_by = [_what(step) for step, after in zip(done, [*done[1:], None], strict=True) if not same_run(step, after)]
    if not made_by:
        return "as it was"
    times = made_by.count(made_by[-1])
    return f"after {made_by[-1]}" + (f" {times}" if times > 1 else "")


def same_run(step: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether both are stages of one uptraining: they then tell the same command."""
    if other is None or step["verb"] != "uptrain" or other["verb"] != "uptrain":
        return False
    return step.get("command") is not None and step["command"] == other.get("command")


def _what(step: dict[str, Any]) -> str:
    return f"{step['verb']} on answers" if step.get("stage") == "answers" else str(step["verb"])


def _result(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, RECORD_BYTES)
    except UpfitError as error:
        raise UpfitError(f"--results {error}; give a file that holds {KINDS}") from error
    try:
        answer = parse_json(text, path)
    except UpfitError as error:
        raise UpfitError(f"--results {path} is not JSON; give a file that holds {KINDS}") from error
    evaluation = isinstance(answer, dict) and isinstance(answer.get("model"), dict) and "loss" in answer["model"]
    if not evaluation and not (isinstance(answer, dict) and answer.get("sensitivity")):
        raise UpfitError(f"--results {path} holds neither losses nor predicted errors; give a file that holds {KINDS}")
    return answer


def _training(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; of a large one only every second, third, ... line, so that memory holds them."""
    if not os.path.lexists(path):
        return []
    apart = 1 + check_ordinary(path).st_size // KEPT_BYTES
    with shaped(f"{path} is not what `upfit uptrain` writes; remove it to report without it"):
        every = islice(read_lines(path, LINES_BYTES), 0, None, apart)
        lines = [parse_json(line, path) for line in every]
        return [line for line in lines if isinstance(line["tokens"], int)]


def newest_evaluation(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation of the weights as they are; None when there is none since they last changed."""
    return steps[-1]["measurements"] if steps and steps[-1]["verb"] == "evaluate" else None

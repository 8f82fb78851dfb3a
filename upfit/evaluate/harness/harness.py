"""`--tasks`: tasks of lm-evaluation-harness (extra `upfit[eval]`), loaded once and asked of every model.

One task at one length is run at a time: the harness's RULER otherwise mixes lengths, and a limit keeps the first alone. The
harness itself is imported when tasks are asked for, no sooner.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upfit.errors import UpfitError
from upfit.evaluate.harness.scores import Metric, Scores, metric
from upfit.evaluate.options import Options
from upfit.output import Meter, Output

OFFLINE = "ruler-offline"
RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
DEFAULT_LENGTHS = [4096]
SEEDS = (0, 1234, 1234)  # of `random`, of numpy and of few-shot examples: the harness's own


@dataclass(frozen=True)
class Asked:
    """One task, as the harness holds it; `length` in tokens of what RULER makes."""

    label: str
    task: Any
    length: int | None


def load(options: Options, tokenizer: Any, most: int | None, output: Output) -> list[Asked]:
    """The tasks that `options` name. RULER's texts are measured with `tokenizer`, so that all models read the same ones.

    Raises UpfitError when the harness is not installed, a name is not known, data cannot be had, or a length is too much.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UpfitError("--tasks needs lm-evaluation-harness; install it with: pip install 'upfit[eval]'") from error
    own = [str(Path(options.task_path).expanduser())] if options.task_path else []
    with hushed():
        near = TaskManager(include_path=[ruler(), *own], include_defaults=False)
    names = [item for name in options.tasks or () for item in (RULER_OFFLINE if name == OFFLINE else (name,))]
    manager = near if all(name in near.all_tasks for name in names) else _indexed(TaskManager, own, output)
    wanted = [(name, length) for name in dict.fromkeys(names) for length in _lengths(name, manager, options, most)]
    if options.task_lengths and not any(length for _, length in wanted):
        raise UpfitError(f"--task-lengths goes with tasks of RULER, such as {OFFLINE}, not with {names[0]}")
    asked: list[Asked] = []
    with _plain(tokenizer) as plain:
        for name, length in wanted:
            if length is None:
                asked += [Asked(label, task, None) for label, task in _tasks(name, manager).items()]
                continue
            output.note(f"making the texts of {name}, {length} tokens long")
            metadata = {"tokenizer": str(plain), "max_seq_lengths": [length]}
            sized = TaskManager(include_path=[ruler()], include_defaults=False, metadata=metadata)
            asked += [Asked(f"{label}, {length} tokens", task, length) for label, task in _tasks(name, sized).items()]
    return list({item.label: item for item in asked}.values())


def harness_version() -> str:
    return importlib.metadata.version("lm_eval")


def ruler() -> Path:
    """The harness's folder of RULER, whose few files are read at once; those of all tasks take some 10 s."""
    return Path(str(importlib.import_module("lm_eval.tasks").__file__)).parent / "ruler"


def _indexed(manager: Callable[..., Any], own: list[str], output: Output) -> Any:
    output.note("reading the list of all tasks of lm-evaluation-harness (some 10 s)")
    with hushed():
        return manager(include_path=own or None, include_defaults=True)


def _lengths(name: str, manager: Any, options: Options, most: int | None) -> list[int] | list[None]:
    """The lengths to make a task of RULER in; [None] for any other task."""
    if name not in manager.all_tasks:
        raise UpfitError(
            f"--tasks {name} is neither in --task-path nor in lm-evaluation-harness {harness_version()}; "
            "`lm_eval ls tasks` lists its tasks"
        )
    path = manager.task_index[name].yaml_path
    if path is None or Path(path).parent != ruler():
        return [None]
    lengths = list(dict.fromkeys(options.task_lengths or DEFAULT_LENGTHS))
    if most is not None and max(lengths) > most:
        raise UpfitError(
            f"--task-lengths {max(lengths)} (default {DEFAULT_LENGTHS[0]}) is more than the {most} positions the model takes; "
            "give shorter ones"
        )
    return lengths


def _tasks(name: str, manager: Any) -> dict[str, Any]:
    """A task, or those of a group or tag, by name, with their texts."""
    before = random.getstate(), np.random.get_state()
    try:
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        with hushed():
            tasks = dict(manager.load(name)["tasks"])
    except Exception as error:  # a task is code, and its data comes from wherever its author put it
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UpfitError(
            f"--tasks {name} does not load ({first[:200]}); without network take {OFFLINE}, or your own with --task-path"
        ) from error
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UpfitError(f"--tasks {name} runs code that the model writes, which is not done here; use lm_eval itself")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[2])
    return tasks


@contextlib.contextmanager
def _plain(tokenizer: Any) -> Iterator[Path]:
    """The tokenizer as a folder without code: RULER reads it by name, and would run what comes with it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("auto_map", None)
        path.write_text(json.dumps(settings), encoding="utf-8")
        yield Path(folder)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without the harness's bars, warnings and prints: they would stand in the middle of `--json`."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def ask(
    model: Any, tokenizer: Any, most: int | None, tasks: list[Asked], options: Options, name: str, output: Output
) -> dict[str, Scores]:
    """Run every task on a model. Raises UpfitError, before any is run, when a prompt does not fit."""
    from lm_eval import evaluate

    from upfit.evaluate.harness.model import Model

    label, loud = "", sys.stderr

    @contextlib.contextmanager
    def progress(requests: int) -> Iterator[Meter]:
        with contextlib.redirect_stderr(loud), output.progress(f"{label} of {name}", requests) as meter:
            yield meter

    scores = {}
    with hushed():
        asked = Model(model, tokenizer, options.batch, most, progress)
        for asked_task in tasks:
            asked_task.task.build_all_requests(limit=options.task_limit)
            asked.refuse_long(asked_task.task.instances)
        for asked_task in tasks:
            label = asked_task.label
            results = evaluate(
                asked, {"tasks": {asked_task.task.task_name: asked_task.task}}, limit=options.task_limit, bootstrap_iters=0
            )
            assert results is not None
            scores[label] = _scores(asked_task, results)
    return scores


def _scores(asked: Asked, results: dict[str, Any]) -> Scores:
    """What the harness tells of the documents, as numbers of ours."""
    name = asked.task.task_name
    samples = results["samples"][name]
    kinds = {key: getattr(function, "__name__", "") for key, function in asked.task.aggregation().items()}
    metrics: dict[str, Metric] = {}
    for filtered in dict.fromkeys(sample["filter"] for sample in samples):
        rows = [sample for sample in samples if sample["filter"] == filtered]
        for key in rows[0]["metrics"]:
            values = [row[key] for row in rows]
            label = key if filtered == "none" else f"{key} ({filtered})"
            value = results["results"][name].get(f"{key},{filtered}")
            if asked.length is None and isinstance(value, int | float):
                metrics[label] = metric(values, kinds.get(key, "mean"), value)
            elif key == str(asked.length):  # RULER also tells the lengths that it has no texts of
                hits = rescored(name, values)
                metrics["string_match"] = metric(hits, "mean", float(np.mean(hits)))
    documents = [sample["doc_hash"] for sample in samples if sample["filter"] == samples[0]["filter"]]
    return Scores(
        harness_version(), name, asked.length, results["versions"][name], results["n-shot"].get(name), documents, metrics
    )


def rescored(name: str, values: list[float]) -> list[float]:
    """RULER's questions on text are right when any of the reference answers is named; the harness counts the share of them."""
    return [float(value > 0) for value in values] if name.startswith("ruler_qa") else values

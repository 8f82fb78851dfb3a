"""The verb `uptrain`: a model folder and text or questions in, the trained model folder out."""

import contextlib
import gc
import shlex
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from upfit import history
from upfit.convert.folders import Source, find_source, staged
from upfit.options import as_flags
from upfit.output import Output
from upfit.uptrain.config import Config, check, dump
from upfit.uptrain.data import Data, open_data
from upfit.uptrain.export import export
from upfit.uptrain.faults import one_line, watch_for_signals
from upfit.uptrain.loop import Run, measure, train
from upfit.uptrain.models import Distiller
from upfit.uptrain.setup import check_places, find_teacher, make_accelerator, set_up
from upfit.uptrain.state import METRICS, restore

CONFIG_FILE = "uptrain.toml"


def uptrain(model: str, data: str, out: Path, config: Config, resume: bool, overwrite: bool, output: Output) -> dict[str, Any]:
    """Train the model in folder (or hub id) `model` on the folder `data` and write the result to `out`; a report.

    `data` is text, as `upfit prepare` writes it, or questions on long contexts, as `upfit synth` does: of those, the answers
    alone are learned.

    The report has `stopped` (a signal ended the run early: a checkpoint was written, `out` was not), `step`, `steps`, `tokens`,
    `skipped`, `rollbacks` (the steps done before each, and the first and the end of the steps whose data it left out),
    `seconds`, `tokens_per_second`, and `holdout` with the losses before and after in nats a token.
    Runs in one process or under torchrun; only the first process writes and tells.

    Raises UpfitError for anything a user can put right: see the messages.
    """
    check(config)
    out = out.expanduser().resolve()
    source = find_source(model)
    opened = open_data(Path(data).expanduser().resolve(), source, config)
    accelerator = make_accelerator(config, out)
    with watch_for_signals() as stop:
        report = _uptrain(accelerator, source, opened, out, config, resume, overwrite, output, stop)
    leave(accelerator)
    return report


def leave(accelerator: Accelerator) -> None:
    """End what other processes and trackers know of this run; nothing may hold its models any more.

    A wrapped model that outlives the process group would be the last to hold it. Freeing it then joins the group's thread while
    Python's lock is held, which that thread needs to end: the process would now and then hang at its very end.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def _uptrain(
    accelerator: Accelerator,
    source: Source,
    data: Data,
    out: Path,
    config: Config,
    resume: bool,
    overwrite: bool,
    output: Output,
    stop: threading.Event,
) -> dict[str, Any]:
    if not accelerator.is_main_process:
        output = Output(quiet=True)
    teacher = find_teacher(config, source, data, output)
    check_places(out, source, data, teacher, config, overwrite)
    run = set_up(source, data, teacher, out, config, accelerator, output)
    run.stop = stop
    with run.workspace.held() if accelerator.is_main_process else contextlib.nullcontext():
        report = carry_out(run, source, data, teacher, out, resume, overwrite)
    if accelerator.is_main_process and not report["stopped"]:
        run.workspace.remove()
    return report


def carry_out(
    run: Run, source: Source, data: Data, teacher: Source | None, out: Path, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Start or go on, train, measure, and write `out` unless a signal ended the run."""
    start(run, resume, overwrite)
    if run.config.track is not None:
        run.accelerator.init_trackers("upfit", config={k: v for k, v in asdict(run.config).items() if v is not None})
    if run.counters.before is None:
        run.counters.before = losses_before(run)
    if not train(run):
        run.output.note(f"stopped at step {run.counters.step} of {run.plan.steps}; go on with --resume")
        return report_of(run, {}, stopped=True)
    after = measure(run, run.distiller)
    report = report_of(run, {"before": run.counters.before, "after": after}, stopped=False)
    if run.accelerator.is_main_process:
        with one_line(run, str(out)):
            write(run, source, data, teacher, out, report)
    run.accelerator.wait_for_everyone()
    return report


def start(run: Run, resume: bool, overwrite: bool) -> None:
    """Load the newest checkpoint where there is one to resume; the first process decides for all."""
    found: list[Path | None] = [None]
    if run.accelerator.is_main_process:
        found = [run.workspace.begin(resume, overwrite)]
        if resume and found[0] is None:
            run.output.note(f"no checkpoint in {run.workspace.path}: starting anew")
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint is None:
        return
    run.counters = restore(checkpoint, run.distiller.student, run.optimizer, run.identity)
    if run.accelerator.is_main_process:
        run.workspace.truncate_metrics(run.counters.step)
    run.output.note(f"going on from step {run.counters.step} of {run.plan.steps}")


def losses_before(run: Run) -> dict[str, float]:
    """Held-out losses of the student before the first step, and of the teacher on the same rows."""
    losses = measure(run, run.distiller)
    pair, objectives = run.distiller._teacher, run.distiller.objectives
    if losses and pair is not None:
        plain = {name: replace(objective, kl_weight=0.0) for name, objective in objectives.items()}
        alone = measure(run, Distiller(pair[0], pair[1], None, plain, run.distiller.autocast))
        losses |= {f"teacher_{name}ce": alone[f"{name}ce"] for name in objectives if objectives[name].kl_weight}
    return losses


def report_of(run: Run, holdout: dict[str, Any], stopped: bool) -> dict[str, Any]:
    tokens = run.counters.tokens
    return {
        "stopped": stopped,
        "step": run.counters.step,
        "steps": run.plan.steps,
        "tokens": tokens,
        "skipped": run.counters.skipped,
        "rollbacks": [{"step": step, "data_of_steps": [first, end]} for step, first, end in run.counters.rollbacks],
        "seconds": round(run.counters.seconds, 3),
        "tokens_per_second": round(tokens / run.counters.seconds, 1) if run.counters.seconds else None,
        "holdout": holdout,
        "holdout_rows": len(run.feed.main.holdout),
    }


def write(run: Run, source: Source, data: Data, teacher: Source | None, out: Path, report: dict[str, Any]) -> None:
    """The finished folder: weights, metrics, the config in force, and the history with one step more."""
    chosen = {"length": run.plan.length, "rows_a_step": run.plan.rows, "peak_learning_rate": run.peak, "processes": run.world}
    options = {**asdict(run.config), "resolved": {**chosen, "compute_dtype": run.identity["dtype"]}}
    measurements = {name: value for name, value in report.items() if name != "stopped"}
    entry = history.step("uptrain", source.record(), options, measurements)
    entry |= {"stage": data.stage, "teacher": teacher.record() if teacher else None, "data": data.record()}
    run.journal.flush()
    words = ["upfit", "uptrain", source.name, entry["data"]["folder"], str(out), *as_flags(run.config)]
    entry["command"] = shlex.join(words)
    with staged(out) as folder:
        export(run.distiller.student, source.path, folder)
        shutil.copyfile(run.workspace.path / METRICS, folder / METRICS)
        (folder / CONFIG_FILE).write_text(dump(run.config), encoding="utf-8")
        history.write(folder, [*history.read(source.path), entry])

"""The verb `uptrain`: a model folder and text or questions in, the trained model folder out."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from upfit import provenance
from upfit.architecture.latent_fold import unfold
from upfit.checkpoint.output_folder import resolved
from upfit.checkpoint.source import Source, find_source
from upfit.checkpoint.work_folder import RESULT, WorkFolder, work_folder
from upfit.durable import remove_tree, rename_new, sync_tree
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.uptrain.config import Config, check, dump
from upfit.uptrain.data.open_data import Data, open_data
from upfit.uptrain.default_stages import default_stages
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.export import export
from upfit.uptrain.model.parallel import gathered, mesh_of
from upfit.uptrain.run.checkpointing import one_line, watch_for_signals
from upfit.uptrain.run.finished import finished_run, finished_stage, learned_answers, together
from upfit.uptrain.run.job import CONFIG_FILE, Job
from upfit.uptrain.run.loop import measure, train
from upfit.uptrain.run.result import Rollback, Uptraining
from upfit.uptrain.run.run import Run
from upfit.uptrain.run.setup import check_first, check_places, find_teacher, make_accelerator, set_up
from upfit.uptrain.run.stage_folders import StageFolder, make_way
from upfit.uptrain.run.state import METRICS
from upfit.uptrain.stages import Stage, split


def uptrain(
    model: str,
    data: str,
    out: Path,
    config: Config,
    resume: bool,
    overwrite: bool,
    output: Output,
    tables: dict[str, dict[str, Any]] | None = None,
) -> Uptraining:
    """Train the model in folder (or hub id) `model` on the folder `data` and write the result to `out`.

    `data` is text, as `upfit prepare` writes it (several folders with weights: `code=0.7,prose=0.3`), or questions on long
    contexts, as `upfit synth` does: of those, the answers alone are learned. `config.stages` names several stages, each a run
    that starts from the result of the one before; `tables` are settings of single stages, by their names.

    Runs in one process or under torchrun; only the first process writes and tells.

    Raises UpfitError for anything a user can put right: see the messages.
    """
    stages = split(check(config), tables or {}, data)
    called, out = str(out), resolved(out)
    source = find_source(model)
    provenance.read(source.path)  # it is gone on with at the very end
    opened = _open_if_there(stages, source, data, resume and not overwrite)
    on_text = opened[0].contexts is None if opened is not None else not learned_answers(out)
    named = default_stages(config, source, mesh_of(config).shards > 0) if on_text else None
    if named is not None:
        output.note(f"stages: {named} (see upfit uptrain --help; --stages names others)")
        config = replace(config, stages=named)
        stages = split(config, tables or {}, data)
        opened = opened and opened * len(stages)
    done = finished_run(out, stages, opened, source) if resume and not overwrite else None
    if done is not None:
        output.note(f"{out} is finished already, by the same run: nothing is left to do")
        return replace(done, out=called)
    opened = opened or _open(stages, source)
    check_first(out, source, stages, opened, overwrite)
    accelerator = make_accelerator(config, out)
    job = Job(source, opened[0].record()["folder"], out, config, tables or {}, resume, overwrite)
    reports: list[Uptraining] = []
    with watch_for_signals() as stop, _work(accelerator, job) as work:
        for number, (stage, folder) in enumerate(zip(stages, opened, strict=True), 1):
            if reports and reports[-1].stopped:
                break
            reports.append(one_stage(accelerator, job, stage, folder, StageFolder(out, stages, number), output, stop, work))
        leave(accelerator)
    return replace(together(reports, len(stages)), out=called)


def _open(stages: list[Stage], source: Source) -> list[Data]:
    return [open_data(stage.data, source, stage.config) for stage in stages]


def _open_if_there(stages: list[Stage], source: Source, data: str, resume: bool) -> list[Data] | None:
    """The data of each stage; None where a run is resumed, which may be finished, and they are gone."""
    try:
        return _open(stages, source)
    except UpfitError:
        if not resume or Path(data).expanduser().exists():
            raise
        return None


@contextlib.contextmanager
def _work(accelerator: Accelerator, job: "Job") -> Iterator[WorkFolder | None]:
    """OUT's work folder, which the first process alone holds; the others begin when it does."""
    with work_folder(job.out, "uptrain", job.overwrite) if accelerator.is_main_process else contextlib.nullcontext() as work:
        if work is not None:
            work.keep = True
            make_way(work.path, job.resume, job.overwrite)
        accelerator.wait_for_everyone()
        yield work


def leave(accelerator: Accelerator) -> None:
    """End what other processes and trackers know of this run; nothing may hold its models any more.

    A wrapped model that outlives the process group would be the last to hold it. Freeing it then joins the group's thread while
    Python's lock is held, which that thread needs to end: the process would now and then hang at its very end.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def one_stage(
    accelerator: Accelerator,
    job: Job,
    stage: Stage,
    data: Data,
    stage_folder: StageFolder,
    output: Output,
    stop: threading.Event,
    work: WorkFolder | None,
) -> Uptraining:
    """Train stage `stage_folder.number` and write its folder, or take the report of the one that is finished already."""
    if not accelerator.is_main_process:
        output = Output(quiet=True)
    start = job.source if stage_folder.before is None else replace(job.source, path=stage_folder.before)
    done: list[Uptraining | None] = [None]
    if job.resume and accelerator.is_main_process:
        done = [finished_stage(stage_folder, stage, data, start)]
    report = broadcast_object_list(done)[0]
    if report is not None:
        output.note(f"stage {stage_folder.title} is finished")
        return report
    if len(stage_folder.stages) > 1:
        output.note(f"stage {stage_folder.title}")
    teacher = find_teacher(stage, start, data, output)
    check_places(job.out, job.source, data, teacher, stage.config, job.overwrite)
    run = set_up(stage, start, data, teacher, stage_folder, accelerator, output, stop)
    report = carry_out(run, job, data, teacher, stage_folder, work)
    if accelerator.is_main_process and not stage_folder.last and not report.stopped:
        remove_tree(run.workspace.path)
    del run
    accelerator.free_memory()
    gc.collect()
    return report


def carry_out(
    run: Run, job: Job, data: Data, teacher: Source | None, stage_folder: StageFolder, work: WorkFolder | None
) -> Uptraining:
    """Start or go on, train, measure, and write the stage's folder unless a signal ended the run."""
    start(run, job.resume, job.overwrite)
    if job.config.track is not None and not run.accelerator.trackers:
        settings = {name: value for name, value in asdict(job.config).items() if value is not None}
        run.accelerator.init_trackers("upfit", config=settings)
    if run.counters.before is None:
        run.counters.before = losses_before(run)
    if not train(run):
        run.output.note(f"stopped at step {run.counters.step} of {run.plan.steps}; go on with --resume")
        return report_of(run, {}, stopped=True)
    after = measure(run, run.learner)
    report = report_of(run, {"before": run.counters.before, "after": after}, stopped=False)
    weights = gathered(run.learner.student, run.accelerator.is_main_process)
    if work is not None:
        with one_line(run, str(stage_folder.folder)):
            write(run, weights, job, data, teacher, stage_folder, report, work)
    run.accelerator.wait_for_everyone()
    return report


def start(run: Run, resume: bool, overwrite: bool) -> None:
    """Load the newest checkpoint where there is one to resume; the first process decides for all."""
    newest: list[Path | None] = [None]
    if run.accelerator.is_main_process:
        newest = [run.workspace.begin(resume, overwrite)]
        if resume and newest[0] is None:
            run.output.note(f"no checkpoint in {run.workspace.path}: starting anew")
    checkpoint = broadcast_object_list(newest)[0]
    if checkpoint is None:
        return
    run.progress.counters = run.saver.restore(checkpoint, run.learner.student, run.optimizer, run.identity)
    if run.accelerator.is_main_process:
        run.workspace.truncate_metrics(run.counters.step)
    run.output.note(f"going on from step {run.counters.step} of {run.plan.steps}")


def losses_before(run: Run) -> dict[str, Any]:
    """What is measured of the held-out rows before the first step, and the losses of the teacher on the same rows."""
    losses, learner = measure(run, run.learner), run.learner
    if losses and isinstance(learner, Distiller) and learner.teacher is not None:
        alone, objectives = measure(run, learner.teacher), learner.objectives
        losses |= {f"teacher_{name}ce": alone[f"{name}ce"] for name in objectives if objectives[name].kl_weight}
    return losses


def report_of(run: Run, holdout: dict[str, Any], stopped: bool) -> Uptraining:
    counters = run.counters
    return Uptraining(
        stopped=stopped,
        stage=run.stage,
        step=counters.step,
        steps=run.plan.steps,
        tokens=counters.tokens,
        skipped=counters.skipped,
        rollbacks=[Rollback(step, [first, end]) for step, first, end in counters.rollbacks],
        seconds=round(counters.seconds, 3),
        tokens_per_second=round(counters.tokens / counters.seconds, 1) if counters.seconds else None,
        holdout=holdout,
        holdout_rows=len(run.sampler.main.holdout),
    )


def write(
    run: Run,
    weights: dict[str, Tensor],
    job: Job,
    data: Data,
    teacher: Source | None,
    stage_folder: StageFolder,
    report: Uptraining,
    work: WorkFolder,
) -> None:
    """The finished folder: weights, metrics, the config in force, and the history with one step more.

    The last stage writes the types of the model that was given; what lies between two stages is float32, so that nothing is
    rounded there.
    """
    chosen = {"length": run.plan.length, "rows_a_step": run.plan.rows, "peak_learning_rate": run.peak, "processes": run.world}
    options = {**asdict(run.config), "resolved": {**chosen, "compute_dtype": run.identity["dtype"]}}
    measurements = {name: value for name, value in report.record().items() if name not in ("stopped", "stage")}
    entry = provenance.step("uptrain", job.source.record(), options, measurements)
    entry |= {"stage": run.stage, "teacher": teacher.record() if teacher else None, "data": data.record()}
    entry["command"] = job.command
    if job.beside_flags:
        entry["config"] = provenance.public(job.beside_flags)
    entry["fingerprints"] = {name: run.identity[f"{name}'s fingerprint"] for name in ("model", "teacher")}
    run.metrics_file.flush()
    before = stage_folder.before or job.source.path
    weights = unfold(run.learner.student, weights)
    folder = work.folder(RESULT if stage_folder.last else f"{stage_folder.name}.partial", clear=True)
    export(run.learner.student, weights, run.layout, job.source.path, folder, None if stage_folder.last else torch.float32)
    with open(folder / METRICS, "wb") as metrics:
        for path in ([stage_folder.before / METRICS] if stage_folder.before else []) + [run.workspace.path / METRICS]:
            metrics.write(path.read_bytes())
    (folder / CONFIG_FILE).write_text(dump(job.config, job.tables), encoding="utf-8")
    provenance.write(folder, [*provenance.read(before), entry])
    if stage_folder.last:
        work.publish(folder, job.overwrite)
    else:
        sync_tree(folder)
        rename_new(folder, stage_folder.folder)

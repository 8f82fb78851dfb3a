"""The command `convert`: from a source folder to a checked and complete folder, or to one line that says why not."""

import dataclasses
import hashlib
import json
import math
import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upfit import provenance
from upfit.architecture.grouped_class import is_grouped
from upfit.architecture.layers import Architecture, bind, open_model
from upfit.architecture.leftovers import Leftovers, settle
from upfit.architecture.loading import pick_device, unused_tensors
from upfit.architecture.planned import changed_layers, check_against_class, in_dtype, output_bytes
from upfit.architecture.quantised import check_not_quantised
from upfit.architecture.table import check_known, has_two_ways
from upfit.calibration.estimate import START_UP, Weights, Work, conversion_of, ends, this_machine
from upfit.calibration.observe import Opaque
from upfit.calibration.sample import check_texts
from upfit.checkpoint.disk_errors import disk_errors
from upfit.checkpoint.execute import Planned, outline
from upfit.checkpoint.finished_shards import JOURNAL, FinishedShards, crc_of
from upfit.checkpoint.hub_stream import HubStream, streamed
from upfit.checkpoint.output_folder import check_output
from upfit.checkpoint.plan import Plan, Rule
from upfit.checkpoint.read_back import check_places, check_written
from upfit.checkpoint.reader import Checkpoint, open_checkpoint, read_config, torch_dtype
from upfit.checkpoint.remote_code import without_code
from upfit.checkpoint.shard import Shard, split
from upfit.checkpoint.side_files import check_side_files, copy_code, copy_side_files
from upfit.checkpoint.source import Source, find_source
from upfit.checkpoint.work_folder import RESULT, WorkFolder, work_folder
from upfit.checkpoint.writer import write_shards
from upfit.convert.recipe import MERGE, Fit, FitContext, Recipe, check_dtype, find_merge, outline_of
from upfit.convert.result import Change, Conversion, Estimate, Sensitivity, Unchecked, Verification
from upfit.convert.verify import MEMORY_FACTOR, Promise, promise_of, verify
from upfit.errors import UpfitError
from upfit.examples.kinds import encoder_reads
from upfit.modeling.registry import is_own
from upfit.options import as_flags, check
from upfit.output import Output
from upfit.results import Origin
from upfit.text.files import FIELD

CODE_NOTE = "auto_map left out: code of the source does not travel, and the classes of the result need none of it"
MEASURED = ("parameters", "kv_heads", "kv_bytes_per_token", "cross_bytes_per_position")  # of a Conversion, for recipe.json
FIT_FACTOR = 4  # what a fit keeps beside OUT, in bytes of the attention's weights: it may change the MLP's as well


@dataclass(frozen=True)
class Settings:
    """The flags that all conversions share. `max_shard_bytes` None keeps the source's sharding, `dtype` None its type; `stream`
    fetches a hub model's files one at a time. `verify` checks the result, `verify_bytes` reads back what was written too."""

    dry_run: bool = False
    dtype: str | None = None
    revision: str | None = None
    max_shard_bytes: int | None = None
    verify: bool = True
    overwrite: bool = False
    stream: bool = False
    verify_bytes: bool = True


@dataclass(frozen=True)
class Job:
    """A conversion that has passed every check and can be written."""

    recipe: Recipe
    options: Any
    settings: Settings
    source: Source
    out: Path
    checkpoint: Checkpoint
    architecture: Architecture
    plan: Plan
    fit: Fit | None  # what finds the plan, where text is needed for it; `plan` is its outline until then
    planned: list[Planned]
    unused: frozenset[str]  # tensors that the source's own class does not take
    unexpected: frozenset[str]  # and what its loading calls them
    leftovers: Leftovers  # what becomes of them


def convert(recipe: Recipe, source: str, out: Path, options: Any, settings: Settings, output: Output) -> Conversion:
    """Convert `source` (folder or hub id) into the new folder `out`.

    Everything that can be refused is refused (UpfitError) before the first byte is written; `out` appears whole or not at
    all; the source is never touched.
    """
    began = time.process_time()
    check(options)
    check_texts(getattr(options, "calibration", None), getattr(options, "field", FIELD))
    with _opened(source, out, options, recipe, settings, output) as (job, context, work, stream):
        preview: Sensitivity | dict[str, Any] | None = None
        estimate = None
        if settings.dry_run:
            job, estimate = _estimated(job, context, began)
            job = _drawn(job, context)
        if job.fit is not None and not settings.dry_run:
            with disk_errors(out):
                job = _fitted(job, job.fit, context)
        elif job.fit is not None and job.fit.preview is not None:
            preview = _previewed(job.fit.preview, context)
        for note in job.plan.notes:
            output.note(note)
        conversion = dataclasses.replace(_summary(job, preview), estimate=estimate)
        if work is not None:
            verification = _write(job, conversion, output, work, stream)
            conversion = dataclasses.replace(conversion, verify=verification or Unchecked())
    return conversion


@contextmanager
def _opened(
    source: str, out: Path, options: Any, recipe: Recipe, settings: Settings, output: Output
) -> "Iterator[tuple[Job, FitContext, WorkFolder | None, HubStream | None]]":
    """The checked job, and where it works: beside OUT, or for a dry run in a folder that goes at once."""
    with ExitStack() as stack:
        work, stream, place = None, None, Path()
        if settings.dry_run:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="upfit-")))
        if settings.stream:
            check_output(out, [], 0, settings.overwrite)
            if not settings.dry_run:
                work = stack.enter_context(work_folder(out, _verb(recipe).split()[0], settings.overwrite))
                place = work.path
            stream = streamed(source, settings.revision, place / "stream")
        opened = stream.source if stream is not None else find_source(source, settings.revision)
        checkpoint = stack.enter_context(open_checkpoint(opened.path))
        job = _prepare(recipe, opened, out, options, settings, checkpoint)
        if stream is not None:
            stream.forget = checkpoint.forget
        elif not settings.dry_run:
            work = stack.enter_context(work_folder(out, _verb(recipe).split()[0], settings.overwrite))
            place = work.path
        yield job, FitContext(opened.path, job.checkpoint, job.architecture, place / "fit", output), work, stream


def merge(source: str, out: Path, settings: Settings, output: Output) -> Conversion:
    """Fold a model of one of our types into its family's own class, as `convert` does the other way.

    Raises UpfitError for a model of any other type.
    """
    if settings.stream:
        raise UpfitError("--stream is for upfit convert; merge reads the whole model, so leave it out")
    opened = find_source(source, settings.revision)
    model_type = read_config(opened.path)["model_type"]
    recipe = find_merge(model_type)
    if recipe is None:
        why = (
            "which no class of transformers can hold" if is_own({"model_type": model_type}) else "a class of transformers' own"
        )
        raise UpfitError(f"{opened.name} is of type {model_type}, {why}; there is nothing to merge")
    return convert(recipe, source, out, recipe.options(), settings, output)


def _fitted(job: Job, fit: Fit, context: FitContext) -> Job:
    """The job with the plan that the fit makes, checked again; with the fallback where the model cannot be watched."""

    context.scratch.mkdir(parents=True, exist_ok=True)
    try:
        plan, checkpoint = fit.run(context), context.checkpoint.with_fitted(context.scratch)
    except Opaque as reason:
        return _unfitted(job, fit, reason)
    return _planned(dataclasses.replace(job, checkpoint=checkpoint), plan, alone=False)


def _drawn(job: Job, context: FitContext) -> Job:
    """The job of a dry run with the outline that text decides, where one is to be looked at."""
    if job.fit is None or job.fit.drawn is None:
        return job
    try:
        return _planned(job, job.fit.drawn(context), alone=False)
    except Opaque as reason:
        return _unfitted(job, job.fit, reason)


def _unfitted(job: Job, fit: Fit, reason: Opaque) -> Job:
    """The job with the fallback's plan. Raises UpfitError where there is none."""
    if fit.fallback is None:
        choose = f"; choose {fit.otherwise}" if fit.otherwise else ""
        raise UpfitError(f"{job.source.name} cannot be fitted on text: {reason}{choose}") from reason
    return _planned(dataclasses.replace(job, fit=None), fit.fallback(str(reason)), alone=True)


def _planned(job: Job, plan: Plan, alone: bool) -> Job:
    """The job with this plan of its recipe made complete: leftovers, types, and every tensor of the result, checked.

    `alone` says that the rules look at tensors only, so that layers which the class never runs can be converted too.
    """

    def replan(architecture: Architecture) -> Plan:
        again = job.recipe.plan(architecture, job.options)
        return again.fallback("") if isinstance(again, Fit) and again.fallback else outline_of(again)

    checkpoint, present = job.checkpoint, job.unused & job.checkpoint.passing.keys()
    changed = changed_layers(job.architecture, plan)
    plan, leftovers = settle(plan, present, checkpoint.tensors, job.architecture, changed, replan if alone else None)
    leftovers = dataclasses.replace(leftovers, left_out=leftovers.left_out | (job.unused - present))
    check_dtype(job.settings.dtype)
    plan, dtype = in_dtype(checkpoint.written(plan), job.settings.dtype)
    config = without_code(plan.config)
    notes = (*plan.notes, *leftovers.notes(), *([CODE_NOTE] if config != plan.config else []))
    plan = dataclasses.replace(plan, config=config, notes=notes)
    planned = outline(plan, checkpoint, dtype)
    check_against_class(plan, planned, job.architecture, leftovers.converted)
    return dataclasses.replace(job, plan=plan, planned=planned, leftovers=leftovers)


def _previewed(
    preview: Callable[[FitContext], Sensitivity | dict[str, Any]], context: FitContext
) -> Sensitivity | dict[str, Any] | None:
    try:
        return preview(context)
    except Opaque as reason:
        context.output.note(f"no prediction: {reason}")
        return None


def _prepare(recipe: Recipe, source: Source, out: Path, options: Any, settings: Settings, checkpoint: Checkpoint) -> Job:
    if is_own(checkpoint.config) and recipe.name != MERGE and not is_grouped(checkpoint.config):
        known = checkpoint.config["model_type"]
        raise UpfitError(f"{source.name} is of type {known} already; convert the model it was made from, or merge it first")
    check_known(checkpoint.config)
    check_not_quantised(checkpoint)
    stored = checkpoint
    checkpoint, architecture, plan_or_fit = _first_way(recipe, options, stored)
    plan, fit = outline_of(plan_or_fit), plan_or_fit if isinstance(plan_or_fit, Fit) else None
    unused = unused_tensors(stored)
    job = Job(recipe, options, settings, source, out, checkpoint, architecture, plan, fit, [], *unused, Leftovers())
    job = _planned(job, plan, fit is None)
    check_side_files(source.path)
    provenance.read(source.path)
    fitted = sum(item.nbytes for item in job.planned if item.rule is not None) * FIT_FACTOR if fit else 0
    needed = 0 if settings.dry_run else output_bytes(job.planned, source.path) + fitted  # planned where it cannot run, perhaps
    if settings.stream and fit is not None:
        raise UpfitError(
            "--stream has each file of the model once, and this conversion runs the model on text; leave --stream out"
            + (f", or choose {fit.otherwise}" if fit.otherwise else "")
        )
    if settings.stream:
        needed += max(path.stat().st_size for path in checkpoint.files)
    check_output(out, [source.path] if source.permanent else [], needed, settings.overwrite)
    return job


def _first_way(recipe: Recipe, options: Any, checkpoint: Checkpoint) -> tuple[Checkpoint, Architecture, Plan | Fit]:
    """The first way of seeing this checkpoint that the recipe can be planned for: stock classes before ours."""

    def way(own: bool) -> tuple[Checkpoint, Architecture, Plan | Fit]:
        seen, architecture = open_model(checkpoint, own)
        return seen, architecture, recipe.plan(architecture, options)

    try:
        return way(own=False)
    except UpfitError:
        if not has_two_ways(checkpoint.config):
            raise
    return way(own=True)


def _write(
    job: Job, conversion: Conversion, output: Output, work: WorkFolder, stream: "HubStream | None"
) -> Verification | None:
    """Write the folder and its history, which tells of `conversion`; what was checked, None with --no-verify."""
    shards, earlier = split(job.planned, job.checkpoint, job.settings.max_shard_bytes), provenance.read(job.source.path)
    promise = promise_of(job.plan, job.planned, job.settings.dtype or "", read_config(job.source.path))
    step, verification = _step(job, conversion, promise), None
    with disk_errors(job.out):
        folder = work.folder(RESULT)
        _write_weights(job, folder, shards, output, stream)
        if "README.md" in copy_side_files(job.source.path, folder):
            step["readme_sha256"] = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()  # the card tells it apart
        copy_code(job.plan.config, folder)
        config = json.dumps(job.plan.config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8", errors="backslashreplace")
        if job.settings.verify:
            verification = _verified(job, promise, folder, shards, output, stream)
            step["measurements"]["verify"] = verification.record()
        job.checkpoint.check_unchanged()
        (folder / JOURNAL).unlink()
        provenance.write(folder, [*earlier, step])
        work.publish(folder, job.settings.overwrite)
    return verification


def _step(job: Job, conversion: Conversion, promise: Promise) -> dict[str, Any]:
    """What recipe.json will say of this conversion."""
    step = provenance.step(_verb(job.recipe), job.source.record(), conversion.options)
    step["command"] = _command(job)
    measured = {key: getattr(conversion, key) for key in MEASURED}
    step["measurements"] = {key: value for key, value in measured.items() if value is not None}
    if job.checkpoint.adapted_because:
        moved = (read_config(job.source.path)["model_type"], job.plan.config["model_type"])
        step["retarget"] = {"from": moved[0], "to": moved[1], "why": job.checkpoint.adapted_because}
    if promise.tolerance is not None:
        step["measurements"]["lossless"] = asdict(promise) if promise.tolerance or promise.dtype else True
        step["measurements"][provenance.STATE] = provenance.LOSSLESS
    if job.plan.report:
        step["measurements"] |= job.plan.report
    if job.unused:
        step["unused"] = job.leftovers.record()
    return step


def _write_weights(job: Job, folder: Path, shards: list[Shard], output: Output, stream: "HubStream | None") -> None:
    finished_shards = FinishedShards(folder, _work(job, shards), job.checkpoint.read_bytes)
    if finished_shards.verified:
        output.note(f"going on: {len(finished_shards.verified)} of {len(shards)} shards are finished already")
    with output.progress(f"converting {job.source.name}", sum(item.nbytes for item in job.planned)) as meter:
        write_shards(shards, job.plan.rules, job.checkpoint, folder, meter.advance, finished_shards, stream)


def _verified(
    job: Job, promise: Promise, folder: Path, shards: list[Shard], output: Output, stream: "HubStream | None"
) -> Verification:
    job.checkpoint.check_unchanged()
    if job.settings.verify_bytes:
        with output.progress("reading back", sum(piece.nbytes for shard in shards for piece in shard.pieces)) as meter:
            check_written(folder, shards, job.checkpoint.read_bytes, meter.advance)
        if stream is None:
            check_places(folder, shards, job.checkpoint)
    output.note("verifying ...")
    return verify(folder, job.source.path if stream is None else None, promise, job.out, job.unexpected, output)


def _work(job: Job, shards: list[Shard]) -> dict[str, Any]:
    """All that the bytes of the shards depend on: a run that finds a journal of other work does not go on with it."""
    fitted = {path.name: crc_of(path) for path in sorted({info.file for info in job.checkpoint.fitted.values()})}
    return {
        "source": job.checkpoint.identity() if job.source.permanent else [job.source.name, job.source.revision],
        "conversion": [job.recipe.name, asdict(job.options), job.settings.dtype],
        "config": job.plan.config,
        "shards": [[shard.name, shard.nbytes, zlib.crc32(shard.header)] for shard in shards],
        "fitted": fitted,
        "versions": provenance.versions(),
    }


def _summary(job: Job, sensitivity: Sensitivity | dict[str, Any] | None) -> Conversion:
    changed = bind(job.plan.config, {item.name: item for item in job.planned})
    cross = [architecture.cross_bytes_per_position for architecture in (job.architecture, changed)]
    return Conversion(
        recipe=job.recipe.name,
        source=Origin(**job.source.record()),
        out=str(job.out),
        dry_run=job.settings.dry_run,
        options=asdict(job.options) | {"dtype": job.settings.dtype},
        bytes=[job.checkpoint.nbytes, sum(item.nbytes for item in job.planned)],
        parameters=[job.checkpoint.numel, sum(math.prod(item.shape) for item in job.planned)],
        kv_heads=[job.architecture.kv_heads, changed.kv_heads],
        kv_bytes_per_token=[job.architecture.kv_bytes_per_token, changed.kv_bytes_per_token],
        cross_bytes_per_position=None if not cross[0] else cross,
        tensors=[_change(item, item.rule, job.checkpoint) for item in job.planned if item.rule is not None],
        sensitivity=sensitivity,
        reads=encoder_reads(job.checkpoint.config),
        latent=[] if job.architecture.latent else changed.latent_numbers,
    )


def _change(item: Planned, rule: Rule, checkpoint: Checkpoint) -> Change:
    before = checkpoint.passing.get(item.name)
    return Change(item.name, list(before.shape) if before else None, list(item.shape), rule.label)


def _estimated(job: Job, context: FitContext, began: float) -> tuple[Job, Estimate | None]:
    """What the conversion will take, this process's own work since `began` (and before, to start up) among it; None where that
    is not known. With the job as it will be: with the fallback where there is nothing to fit it on."""
    prepared = time.process_time()
    if job.settings.stream or (job.fit is not None and (job.fit.work is None or pick_device() != "cpu")):
        return job, None
    fit = Work()
    try:
        if job.fit is not None and job.fit.work is not None:
            fit = job.fit.work(context)
    except Opaque as reason:
        assert job.fit is not None
        job = _unfitted(job, job.fit, reason)
    read = time.process_time() - prepared  # examples, which the conversion will read too
    start = read + min(prepared, prepared - began + START_UP)
    numbers = [job.checkpoint.numel, sum(math.prod(item.shape) for item in job.planned)]
    largest = max(job.planned, key=lambda item: math.prod(item.shape))
    weights = Weights(numbers, [job.checkpoint.nbytes, sum(item.nbytes for item in job.planned)], largest.shape[0])
    machine = this_machine(torch_dtype(largest.dtype))
    compared = job.settings.verify and max(weights.nbytes) * MEMORY_FACTOR < machine.free
    seconds, memory = conversion_of(fit, weights, machine, compared, job.settings.verify_bytes)
    return job, Estimate(ends(start + seconds), int(float(f"{memory:.2g}")))


def _verb(recipe: Recipe) -> str:
    return MERGE if recipe.name == MERGE else f"convert {recipe.name}"


def _command(job: Job) -> str:
    words = ["upfit", *_verb(job.recipe).split(), job.source.name, str(job.out), *as_flags(job.options)]
    return shlex.join(words + (["--dtype", job.settings.dtype] if job.settings.dtype else []))

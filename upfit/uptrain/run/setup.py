"""Makes a run that can start from what the user gave: checks, models, optimiser, plan. Writes nothing."""

import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from transformers import PreTrainedModel

from upfit.architecture.latent_fold import check_foldable
from upfit.architecture.meta_model import read_as_class, vocabulary
from upfit.checkpoint.output_folder import check_output
from upfit.checkpoint.reader import open_checkpoint, read_config
from upfit.checkpoint.side_files import check_side_files
from upfit.checkpoint.source import Source, find_source, teacher_source
from upfit.errors import UpfitError
from upfit.options import shown
from upfit.output import Output, human_count
from upfit.text.spans import Vocabulary
from upfit.text.tokenizer import load_tokenizer
from upfit.uptrain.config import FREE, Config, default
from upfit.uptrain.data.answers import AnswerRows
from upfit.uptrain.data.dataloader import StepSampler
from upfit.uptrain.data.open_data import Data, lay_out
from upfit.uptrain.data.spans import find_vocabulary
from upfit.uptrain.default_stages import wants_care
from upfit.uptrain.model import model_traits
from upfit.uptrain.model.compiled import compile_layers
from upfit.uptrain.model.export import layout_of
from upfit.uptrain.model.layerwise import attention_paths, freeze_all_but
from upfit.uptrain.model.parallel import accelerator_for, mesh_of, prepare
from upfit.uptrain.run.components import compute_dtype, load_models, make_distiller, make_layerwise, make_optimizer
from upfit.uptrain.run.metrics_file import MetricsFile
from upfit.uptrain.run.preflight import preflight
from upfit.uptrain.run.run import Learner, Run
from upfit.uptrain.run.saver import Saver
from upfit.uptrain.run.stage_folders import StageFolder
from upfit.uptrain.run.state import METRICS
from upfit.uptrain.schedule import MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_CPU, Plan, peak_rate
from upfit.uptrain.stages import Stage

CHECKPOINT_BYTES = 12  # a parameter: float32 weight and two moments
TIMEOUT = timedelta(hours=2)  # other processes wait while the first one writes a large model


def find_teacher(stage: Stage, source: Source, data: Data, output: Output) -> Source | None:
    """The model to learn from; None (said in a note) when the run is to do without. Raises UpfitError when it is gone, or the
    stage is nothing without one.

    Answers are learned from the data: only text has a teacher.
    """
    config, needed = stage.config, stage.name in ("layerwise", "distill")
    unwanted = config.kl_weight == 0 and stage.name != "layerwise"
    if unwanted or config.teacher == "none" or not data.texts:
        if needed:
            without = "kl_weight 0" if unwanted else "--teacher none" if data.texts else f"{data.folders[0]} with questions"
            raise UpfitError(
                f"the stage {stage.name} learns from a teacher on text, and {without} leaves none; name another stage"
            )
        return None
    if config.teacher is not None:
        return find_source(config.teacher)
    teacher = teacher_source(source.path)
    if teacher is None and needed:
        complaint = f"the stage {stage.name} learns from a teacher, and {source.name} has no recipe.json that names one"
        raise UpfitError(f"{complaint}; give it with --teacher")
    if teacher is None:
        output.note(f"{source.name} has no recipe.json that names a source: training on the text alone (cross-entropy)")
    return teacher


def check_places(out: Path, source: Source, data: Data, teacher: Source | None, config: Config, overwrite: bool) -> None:
    """Raise UpfitError when `out` overlaps what is read or the disk cannot hold it and the checkpoints."""
    with open_checkpoint(source.path) as checkpoint:
        result, parameters = checkpoint.nbytes, checkpoint.numel
    needed = result + parameters * (4 + CHECKPOINT_BYTES * (config.keep + 1))
    check_output(out, [source.path, *data.folders, *([teacher.path] if teacher else [])], needed, overwrite)


def check_first(out: Path, source: Source, stages: list[Stage], opened: list[Data], overwrite: bool) -> None:
    """Raise UpfitError for what would keep a later stage from beginning, or the result from being written. What concerns the
    first stage it finds by itself, at once."""
    config = read_config(source.path)
    check_foldable(source.path)
    check_output(out, [source.path, *opened[0].folders], 0, overwrite)
    check_copies(source.path)
    if len(stages) == 1:
        return
    known, longest = vocabulary(config), getattr(read_as_class(config).get_text_config(), "max_position_embeddings", None)
    for stage, data in zip(stages[1:], opened[1:], strict=True):
        teacher = find_teacher(stage, source, data, Output(quiet=True))
        check_places(out, source, data, teacher, stage.config, overwrite)
        spans = spans_vocabulary(source, stage_name(stage, data, teacher), stage.config)
        check_tokens(data, known)
        lay_out(data, stage.config, longest, spans)


def check_copies(source: Path) -> None:
    """Raise UpfitError when a file that goes with the weights could not be copied: that would show after the last step."""
    try:
        check_side_files(source)
    except OSError as error:
        what = f"{error.filename or source} goes with the weights and cannot be copied ({error.strerror or error})"
        raise UpfitError(f"{what}; mend or remove it") from error


def check_tokens(data: Data, known: int | None) -> None:
    """Raise UpfitError when data holds a token beyond those that the model knows."""
    if known is not None and data.largest_id >= known:
        unknown = f"{data.folders[-1]} holds token {data.largest_id}, the model knows {known} tokens"
        raise UpfitError(f"{unknown}; add rows to its embedding first")


def make_accelerator(config: Config, out: Path) -> Accelerator:
    """Process state and devices; a CPU only where there is nothing else. Raises UpfitError for what this launch cannot be."""
    mesh = mesh_of(config)
    if config.track is not None:
        available = [str(name) for name in get_available_trackers()]
        if config.track not in available:
            state = "not installed" if config.track in LOGGER_TYPE_TO_CLASS else "not known"
            known = ", ".join(available) or "none"
            raise UpfitError(
                f"--track {config.track} is {state}; installed are: {known}; pip install 'upfit[track]' adds trackio"
            )
    return accelerator_for(
        mesh,
        compute_dtype(config, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")),
        log_with=config.track,
        project_dir=None if config.track is None else str(out.with_name(out.name + ".track")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )


def stage_name(stage: Stage, data: Data, teacher: Source | None) -> str:
    """What is done, where the user has not said it: what the data and the teacher allow."""
    if stage.name is None:
        return "answers" if data.contexts is not None else "lm" if teacher is None else "distill"
    if (stage.name == "answers") != (data.contexts is not None):
        kind, wanted = ("questions", "text of upfit prepare") if data.contexts else ("text", "questions of upfit synth")
        raise UpfitError(f"the stage {stage.name} needs {wanted}, and {data.folders[-1]} holds {kind}; give another folder")
    return stage.name


def spans_vocabulary(source: Source, name: str, config: Config) -> Vocabulary | None:
    """What an encoder-decoder is trained with; None for a decoder. Raises UpfitError for a stage that it cannot have, and for
    settings that would do nothing: all its logits are made at once, and nothing keeps its documents apart."""
    if not model_traits.is_seq2seq(read_config(source.path)):
        return None
    if name not in ("distill", "lm"):
        raise UpfitError(f"{source.name} is an encoder-decoder, and the stage {name} is for decoders; choose distill or lm")
    for key in ("chunk", "document_mask"):
        if getattr(config, key) != default(key):
            raise UpfitError(f"{shown(config, key)} does nothing for an encoder-decoder; leave it out")
    return find_vocabulary(load_tokenizer(str(source.path)))


def most_positions(student: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None where the model sets no limit."""
    return getattr(student.config.get_text_config(), "max_position_embeddings", None)


def set_up(
    stage: Stage,
    source: Source,
    data: Data,
    teacher: Source | None,
    stage_folder: StageFolder,
    accelerator: Accelerator,
    output: Output,
    stop: threading.Event,
) -> Run:
    """Everything the loop needs; `stop` asks for its end. Raises UpfitError when data, budget and model do not fit together."""
    config, name = stage.config, stage_name(stage, data, teacher)
    spans = spans_vocabulary(source, name, config)
    dtype = compute_dtype(config, accelerator.device)
    student, traits, pair = load_models(source, teacher, dtype, accelerator.device, config, output)
    layout = layout_of(student, source.path)
    known, hidden_size = model_traits.embedding(student).shape
    check_tokens(data, known)
    plan, sampler = lay_out(data, config, most_positions(student), spans)
    if (
        data.texts
        and config.document_mask
        and spans is None
        and not all(seen.separates_documents for seen in (traits, *([pair[1]] if pair else [])))
    ):
        output.note(f"{student.__class__.__name__} cannot keep packed documents apart: those in one row see each other")
    autocast = None if dtype == torch.float32 else dtype
    learner: Learner
    if name == "layerwise":
        assert teacher is not None and pair is not None, "the stage has refused to do without"
        learner = make_layerwise(student, pair, teacher, sampler, accelerator, autocast)
    else:
        if config.trainable == "attention":
            freeze_all_but(student, None if pair is None or accelerator.is_fsdp2 else pair[0], attention_paths(source))
        learner = make_distiller(student, traits, pair, config, data, autocast)
        preflight(learner, sampler, config, accelerator, output)
    if config.compile:
        compile_layers(learner)
    optimizer = make_optimizer(student, config)
    module, prepared = prepare(accelerator, learner, optimizer, config.shard_teacher)
    on_cpu = accelerator.device.type == "cpu"
    micro = MICRO_BATCH_TOKENS_CPU if on_cpu else MICRO_BATCH_TOKENS
    peak = peak_rate(config, hidden_size, name, healthy=wants_care(source))
    same = run_identity(config, plan, fingerprints(source, teacher, accelerator), data, dtype)
    announce(plan, sampler, peak, student, teacher, dtype, output)
    workspace = stage_folder.workspace
    saver = Saver(workspace, accelerator, accelerator.is_fsdp2, config.async_save, TIMEOUT)
    return Run(
        accelerator=accelerator,
        learner=learner,
        module=module,
        optimizer=prepared,
        sampler=sampler,
        plan=plan,
        peak=peak,
        micro_tokens=micro,
        config=config,
        workspace=workspace,
        saver=saver,
        identity=same,
        output=output,
        stage=name,
        mark=stage_folder.mark,
        layout=layout,
        metrics_file=MetricsFile(workspace.path / METRICS if accelerator.is_main_process else None),
        stop=stop,
    )


def fingerprints(source: Source, teacher: Source | None, accelerator: Accelerator) -> dict[str, str | None]:
    """Of the model and its teacher; the first process reads their files, whole, and tells the others."""
    read: dict[str, str | None] = {}
    if accelerator.is_main_process:
        read = {
            "model": model_traits.fingerprint(source.path),
            "teacher": model_traits.fingerprint(teacher.path) if teacher else None,
        }
    return broadcast_object_list([read])[0]


def run_identity(
    config: Config, plan: Plan, fingerprints: dict[str, str | None], data: Data, dtype: torch.dtype
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return {
        **settings,
        **asdict(plan),
        "dtype": str(dtype),
        "model's fingerprint": fingerprints["model"],
        "data's fingerprint": data.fingerprint,
        "teacher's fingerprint": fingerprints["teacher"],
    }


def announce(
    plan: Plan,
    sampler: StepSampler,
    peak: float,
    student: PreTrainedModel,
    teacher: Source | None,
    dtype: torch.dtype,
    output: Output,
) -> None:
    what = f"{plan.rows} rows of {plan.length} tokens"
    if isinstance(sampler.main, AnswerRows):
        what = f"{plan.rows} questions on {plan.length} tokens, on average"
    beside = f" and {plan.mix_rows} rows of {plan.mix_length} tokens of text" if plan.mix_rows else ""
    output.note(
        f"{human_count(student.num_parameters())} parameters, teacher {teacher.name if teacher else 'none'}, "
        f"{plan.steps} steps of {what}{beside} "
        f"({human_count(plan.tokens)} tokens, {sampler.passes(plan.steps)}), "
        f"learning rate {peak:.2g}, {str(dtype).removeprefix('torch.')}"
    )
    for warning in sampler.repeated(plan.steps):
        output.note(warning)

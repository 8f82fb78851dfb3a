"""From what the user gave to a run that can start: checks, models, optimiser, plan. Reads much and writes nothing."""

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel

from upfit.convert.checkpoint import open_checkpoint, read_config
from upfit.convert.folders import Source, check_output, find_source, teacher_source
from upfit.errors import UpfitError
from upfit.output import Output, human_count
from upfit.tokenizer import load_tokenizer
from upfit.uptrain import attention, models
from upfit.uptrain.answers import AnswerRows
from upfit.uptrain.config import FREE, Config
from upfit.uptrain.data import Data, lay_out
from upfit.uptrain.feed import MAIN, MIX, Feed
from upfit.uptrain.layerwise import Layerwise, attention_paths, converted_paths
from upfit.uptrain.loop import Learner, Run, tensors
from upfit.uptrain.losses import Objective
from upfit.uptrain.models import Distiller, Traits
from upfit.uptrain.parallel import accelerator_for, mesh_of, prepare
from upfit.uptrain.places import Place
from upfit.uptrain.preflight import preflight
from upfit.uptrain.saver import Saver
from upfit.uptrain.schedule import ADAM_BETAS, Plan, peak_rate
from upfit.uptrain.seq2seq import Seq2Seq
from upfit.uptrain.spans import Vocabulary, find_vocabulary
from upfit.uptrain.stages import Stage
from upfit.uptrain.state import Counters, Workspace

MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_CPU = 8192, 2048
UNIT_ROWS = 8  # of the text, on which the size of attention outputs is measured
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
            without = "--kl-weight 0" if unwanted else "--teacher none" if data.texts else f"{data.folders[0]} with questions"
            raise UpfitError(
                f"the stage {stage.name} learns from a teacher on text, and {without} leaves none; name another stage"
            )
        return None
    if config.teacher is not None:
        return find_source(config.teacher)
    teacher = teacher_source(source.path)
    if teacher is None and needed:
        told = f"the stage {stage.name} learns from a teacher, and {source.name} has no recipe.json that names one"
        raise UpfitError(f"{told}; give it with --teacher")
    if teacher is None:
        output.note(f"{source.name} has no recipe.json that names a source: training on the text alone (cross-entropy)")
    return teacher


def check_places(out: Path, source: Source, data: Data, teacher: Source | None, config: Config, overwrite: bool) -> None:
    """Raise UpfitError when `out` overlaps what is read or the disk cannot hold it and the checkpoints."""
    with open_checkpoint(source.path) as checkpoint:
        result, parameters = checkpoint.nbytes, checkpoint.numel
    needed = result + parameters * (4 + CHECKPOINT_BYTES * (config.keep + 1))
    for place in (source.path, *data.folders, *([teacher.path] if teacher else [])):
        check_output(out, place, needed, overwrite)


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


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, unless the config decides."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_models(
    source: Source, teacher: Source | None, dtype: torch.dtype, device: torch.device, output: Output
) -> tuple[PreTrainedModel, Traits, tuple[PreTrainedModel, Traits] | None]:
    """The student in float32 and the teacher, frozen, in the type it is stored in (float32 where that is computed in)."""
    student = models.load(source.path, torch.float32, device)
    traits = models.examine(student)
    pair = None
    if teacher is not None:
        stored = torch.float32 if dtype == torch.float32 else models.stored_dtype(teacher.path)
        tutor = models.load(teacher.path, stored, device).requires_grad_(False)
        pair = (tutor, models.examine(tutor))
        sizes = models.vocabulary_size(tutor), models.vocabulary_size(student)
        if sizes[0] != sizes[1]:
            raise UpfitError(
                f"the teacher {teacher.name} has {sizes[0]} tokens and the model {sizes[1]}; "
                "give one with the same vocabulary, or --teacher none"
            )
    if traits.head is None or (pair is not None and pair[1].head is None):
        output.note("the logits are more than hidden states times a matrix: they are computed whole, which needs more memory")
    student.train()
    return student, traits, pair


def make_optimizer(student: PreTrainedModel, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; only matrices decay that are not embeddings (a tied head is one) and were not added by a conversion.

    Each group's `scale` is its learning rate in units of the peak.
    """
    embedding, added = models.embedding(student), attention.added(student)
    scales = attention.rates(student, config.added_rate, config.query_rate)
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for parameter in student.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and parameter is not embedding and id(parameter) not in added
            groups.setdefault((decays, scales.get(id(parameter), 1.0)), []).append(parameter)
    listed = [
        {"params": group, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (decays, scale), group in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=0.0, betas=ADAM_BETAS, eps=1e-8, fused=True)


def make_objectives(config: Config, data: Data, with_teacher: bool) -> dict[str, Objective]:
    """What is minimised on the rows of each part: on answers their cross-entropy, on text what the settings say."""
    if with_teacher:
        text = Objective(config.ce_weight, config.kl_weight, config.temperature, config.chunk)
    else:
        text = Objective(config.ce_weight or 1.0, 0.0, 1.0, config.chunk)
    answers = Objective(1.0, 0.0, 1.0, config.chunk)
    return {MAIN: text} if data.contexts is None else {MAIN: answers, MIX: text}


def stage_name(stage: Stage, data: Data, teacher: Source | None) -> str:
    """What is done, where the user has not said it: what the data and the teacher allow."""
    if stage.name is None:
        return "answers" if data.contexts is not None else "lm" if teacher is None else "distill"
    if (stage.name == "answers") != (data.contexts is not None):
        kind, wanted = ("questions", "text of upfit prepare") if data.contexts else ("text", "questions of upfit synth")
        raise UpfitError(f"the stage {stage.name} needs {wanted}, and {data.folders[-1]} holds {kind}; give another folder")
    return stage.name


def spans_vocabulary(source: Source, name: str) -> Vocabulary | None:
    """What an encoder-decoder is trained with; None for a decoder. Raises UpfitError for a stage that it cannot have."""
    if not models.is_seq2seq(read_config(source.path)):
        return None
    if name not in ("distill", "lm"):
        raise UpfitError(f"{source.name} is an encoder-decoder, and the stage {name} is for decoders; choose distill or lm")
    return find_vocabulary(load_tokenizer(str(source.path)))


def most_positions(student: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None where the model sets no limit."""
    return getattr(student.config.get_text_config(), "max_position_embeddings", None)


def make_distiller(
    student: PreTrainedModel,
    traits: Traits,
    pair: tuple[PreTrainedModel, Traits] | None,
    config: Config,
    data: Data,
    autocast: torch.dtype | None,
) -> Distiller:
    """The student, and its teacher, who is measured by the cross-entropy alone."""
    kind = Seq2Seq if student.config.is_encoder_decoder else Distiller
    objectives = make_objectives(config, data, pair is not None)
    if pair is None:
        return kind(student, traits, None, objectives, autocast)
    alone = {name: replace(objective, kl_weight=0.0) for name, objective in objectives.items()}
    return kind(student, traits, kind(*pair, None, alone, autocast).eval(), objectives, autocast)


def make_layerwise(
    student: PreTrainedModel,
    pair: tuple[PreTrainedModel, Traits],
    teacher: Source,
    feed: Feed,
    accelerator: Accelerator,
    autocast: torch.dtype | None,
) -> Layerwise:
    """Raises UpfitError where there is nothing to learn, or the model is to be sharded: its attention runs by itself."""
    if accelerator.is_fsdp2:
        raise UpfitError("the stage layerwise trains attention alone, which is not sharded; leave --parallel out for it")
    learner = Layerwise(student, *pair, converted_paths(student, pair[0], attention_paths(teacher)), autocast)
    rows = [feed.main.at(feed.main.sample(at)) for at in range(UNIT_ROWS)]
    learner.take_units(*tensors(rows, accelerator.device)[:2])
    return learner


def set_up(
    stage: Stage, source: Source, data: Data, teacher: Source | None, place: Place, accelerator: Accelerator, output: Output
) -> Run:
    """Everything the loop needs. Raises UpfitError when data, budget and model do not fit together."""
    config, name = stage.config, stage_name(stage, data, teacher)
    vocabulary = spans_vocabulary(source, name)
    dtype = compute_dtype(config, accelerator.device)
    student, traits, pair = load_models(source, teacher, dtype, accelerator.device, output)
    known, hidden_size = models.embedding(student).shape
    if data.largest_id >= known:
        unknown = f"{data.folders[-1]} holds token {data.largest_id}, the model knows {known} tokens"
        raise UpfitError(f"{unknown}; add rows to its embedding first")
    plan, feed = lay_out(data, config, most_positions(student), vocabulary)
    if (
        data.texts
        and config.document_mask
        and vocabulary is None
        and not all(seen.separates_documents for seen in (traits, *([pair[1]] if pair else [])))
    ):
        output.note(f"{student.__class__.__name__} cannot keep packed documents apart: those in one row see each other")
    autocast = None if dtype == torch.float32 else dtype
    learner: Learner
    if name == "layerwise":
        assert teacher is not None and pair is not None, "the stage has refused to do without"
        learner = make_layerwise(student, pair, teacher, feed, accelerator, autocast)
    else:
        learner = make_distiller(student, traits, pair, config, data, autocast)
        preflight(learner, feed, config, accelerator, output)
    optimizer = make_optimizer(student, config)
    module, prepared = prepare(accelerator, learner, optimizer, config.shard_teacher)
    on_cpu = accelerator.device.type == "cpu"
    micro = MICRO_BATCH_TOKENS_CPU if on_cpu else MICRO_BATCH_TOKENS
    peak = peak_rate(config, hidden_size, name)
    same = run_identity(config, plan, source, data, teacher, dtype)
    announce(plan, feed, peak, student, teacher, dtype, output)
    workspace = Workspace(place.folder)
    saver = Saver(workspace, accelerator, accelerator.is_fsdp2, config.async_save, TIMEOUT)
    return Run(
        accelerator,
        learner,
        module,
        prepared,
        feed,
        plan,
        peak,
        micro,
        config,
        Counters(),
        workspace,
        saver,
        same,
        output,
        name,
        place.mark,
    )


def run_identity(
    config: Config, plan: Plan, source: Source, data: Data, teacher: Source | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return {
        **settings,
        **asdict(plan),
        "dtype": str(dtype),
        "model's fingerprint": models.fingerprint(source.path),
        "data's fingerprint": data.fingerprint,
        "teacher's fingerprint": models.fingerprint(teacher.path) if teacher else None,
    }


def announce(
    plan: Plan, feed: Feed, peak: float, student: PreTrainedModel, teacher: Source | None, dtype: torch.dtype, output: Output
) -> None:
    what = f"{plan.rows} rows of {plan.length} tokens"
    if isinstance(feed.main, AnswerRows):
        what = f"{plan.rows} questions on {plan.length} tokens, on average"
    beside = f" and {plan.mix_rows} rows of {plan.mix_length} tokens of text" if plan.mix_rows else ""
    output.note(
        f"{human_count(student.num_parameters())} parameters, teacher {teacher.name if teacher else 'none'}, "
        f"{plan.steps} steps of {what}{beside} "
        f"({human_count(plan.tokens)} tokens, {feed.passes(plan.steps)}), "
        f"learning rate {peak:.2g}, {str(dtype).removeprefix('torch.')}"
    )
    for warning in feed.repeated(plan.steps):
        output.note(warning)

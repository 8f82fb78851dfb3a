"""The parts of a run: models, what turns rows into a loss, and the optimiser."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from upfit.architecture.latent_fold import fold
from upfit.architecture.loading import multiplies_bfloat16_fast
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.uptrain.config import Config
from upfit.uptrain.data.dataloader import MAIN, MIX, StepSampler, tensors
from upfit.uptrain.data.open_data import Data
from upfit.uptrain.model import converted_modules, liger, model_traits
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.layerwise import Layerwise, attention_paths, converted_paths
from upfit.uptrain.model.losses import Objective
from upfit.uptrain.model.model_traits import ModelTraits
from upfit.uptrain.model.seq2seq import Seq2Seq
from upfit.uptrain.schedule import ADAM_BETAS
from upfit.uptrain.stages import check_unsharded

UNIT_ROWS = 8  # of the text, on which the size of attention outputs is measured


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, unless the config decides."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return torch.bfloat16 if multiplies_bfloat16_fast(device) else torch.float32


def load_models(
    source: Source, teacher: Source | None, dtype: torch.dtype, device: torch.device, config: Config, output: Output
) -> tuple[PreTrainedModel, ModelTraits, tuple[PreTrainedModel, ModelTraits] | None]:
    """The student in float32, its latent of ordinary size (`latent_fold.py`), and the teacher, frozen, in the type it is stored
    in (float32 where that is computed in)."""
    student = model_traits.load(source.path, torch.float32, device)
    fold(student)
    traits = model_traits.examine(student)
    pair = None
    if teacher is not None:
        stored = torch.float32 if dtype == torch.float32 else model_traits.stored_dtype(teacher.path)
        tutor = model_traits.load(teacher.path, stored, device).requires_grad_(False)
        pair = (tutor, model_traits.examine(tutor))
        sizes = model_traits.vocabulary_size(tutor), model_traits.vocabulary_size(student)
        if sizes[0] != sizes[1]:
            raise UpfitError(
                f"the teacher {teacher.name} has {sizes[0]} tokens and the model {sizes[1]}; "
                "give one with the same vocabulary, or --teacher none"
            )
    if traits.head is None or (pair is not None and pair[1].head is None):
        output.note("the logits are more than hidden states times a matrix: they are computed whole, which needs more memory")
    student.train()
    if config.liger:
        for model, known in ((student, traits), *([pair] if pair else [])):
            liger.fuse(model, known)
    return (student, *pack_all(student, traits, pair, dtype)) if config.packed else (student, traits, pair)


def pack_all(
    student: PreTrainedModel, traits: ModelTraits, pair: tuple[PreTrainedModel, ModelTraits] | None, dtype: torch.dtype
) -> tuple[ModelTraits, tuple[PreTrainedModel, ModelTraits] | None]:
    """Both models attend to packed documents one by one, or none: attention of the one may be run beside the other's."""
    autocast = None if dtype == torch.float32 else dtype
    models_and_traits = [(student, traits), *([pair] if pair else [])]
    implementations = [model.config._attn_implementation for model, _ in models_and_traits]
    packings = [seen for seen in (model_traits.pack(model, known, autocast) for model, known in models_and_traits) if seen]
    if len(packings) == len(models_and_traits):
        return packings[0], (pair[0], packings[1]) if pair else None
    for (model, _), implementation in zip(models_and_traits, implementations, strict=True):
        model.set_attn_implementation(implementation)
    return traits, pair


def make_optimizer(student: PreTrainedModel, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; only matrices decay that are not embeddings (a tied head is one) and were not added by a conversion.

    Each group's `scale` is its learning rate in units of the peak.
    """
    embedding, added = model_traits.embedding(student), converted_modules.added(student)
    scales = converted_modules.rates(student, config.added_rate, config.query_rate)
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


def make_distiller(
    student: PreTrainedModel,
    traits: ModelTraits,
    pair: tuple[PreTrainedModel, ModelTraits] | None,
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
    pair: tuple[PreTrainedModel, ModelTraits],
    teacher: Source,
    sampler: StepSampler,
    accelerator: Accelerator,
    autocast: torch.dtype | None,
) -> Layerwise:
    """Raises UpfitError where there is nothing to learn, or the model is to be sharded: its attention runs by itself."""
    check_unsharded("layerwise", accelerator.is_fsdp2)
    learner = Layerwise(student, *pair, converted_paths(student, pair[0], attention_paths(teacher)), autocast)
    rows = [sampler.main.at(sampler.main.sample(at)) for at in range(UNIT_ROWS)]
    learner.take_units(*tensors(rows, accelerator.device)[:2])
    return learner

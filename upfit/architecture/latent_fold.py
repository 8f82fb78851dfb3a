"""A stock latent in its ordinary size while it is trained: the tiny scale is taken off its rows, and put on again.

What the scale is for: `latent_scale.py`. Taken off, the norm behind the latent is left out; a constant stands in its place. So
optimiser, clipping, decay and shorter types meet ordinary weights, and a latent may become any linear map. The scale is a power
of two: it costs no bit in either direction.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upfit.architecture.latent import CACHED
from upfit.architecture.latent_scale import (
    EPS,
    FLOAT16,
    NORM,
    STILL_HOLDS,
    latent_error,
    latent_scale,
    mean_square_bound,
    scale_of,
)
from upfit.architecture.table import is_stock_latent
from upfit.checkpoint.reader import open_checkpoint
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INPUT_NORM = "input_layernorm.weight"  # of the layer that the attention is in
BIAS = CACHED.replace("weight", "bias")
STREAM_EPS, STREAM_FACTOR = "rms_norm_eps", "residual_multiplier"  # keys of configs


class FoldedNorm(nn.Module):
    """[..., r] → the same times `gain`: what a norm of a tiny latent does to one of ordinary size.

    `weight` [r] is the norm's, kept for when the scale is put on again, and not trained. `gain` is 1 but for the rounding of
    that weight, in bfloat16 5.5e-4 off.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.gain = float(self.weight[0]) * scale_of(self.weight) / math.sqrt(EPS)

    def forward(self, latent: Tensor) -> Tensor:
        return latent * self.gain


def check_foldable(folder: Path) -> None:
    """Raise UpfitError for a stock latent model in `folder` whose scale cannot be taken off: one with a norm that does
    something, with a bias, or in float16. Other models pass."""
    with open_checkpoint(folder) as checkpoint:
        if not is_stock_latent(checkpoint.config):
            return
        norms = [name for name in checkpoint.tensors if name.endswith(NORM)]
        for module, latent, before in map(_beside, norms):
            if checkpoint.info(latent).dtype == "F16":
                raise UpfitError(f"{folder} is not trained: {FLOAT16}")
            if f"{module}.{BIAS}" in checkpoint.tensors:
                raise UpfitError(f"{folder} is not trained: its latent has a bias, which no scale of ours was put on")
            try:
                check_linear(checkpoint.read(f"{module}.{NORM}"), checkpoint.read(latent), checkpoint.read(before))
            except UpfitError as error:
                kind = checkpoint.config["model_type"]
                raise UpfitError(f"this {kind} is not trained: {error}; what upfit convert or merge wrote is") from None


def fold(model: "PreTrainedModel") -> None:
    """Take the scale off every latent of `model`, in place, and its norm out; nothing is done to one without such a norm.

    Raises UpfitError where a norm is not the constant of a scaled latent.
    """
    for name, norm in list(model.named_modules()):
        if f"{name}.weight".endswith(NORM) and not isinstance(norm, FoldedNorm):
            module = name.removesuffix("." + NORM.removesuffix(".weight"))
            projection = model.get_parameter(f"{module}.{CACHED}")
            folded = FoldedNorm(norm.weight)
            with torch.no_grad():
                projection[: len(folded.weight)] /= scale_of(folded.weight)
            model.set_submodule(name, folded)


def unfold(model: "PreTrainedModel", weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, of a model that was folded, as its class wants them; those of any other model as they are.

    A latent gets the scale that it had, or where it has grown out of that the largest one that its own weights allow, whatever
    the text. What the norm's weight was rounded to stays, so the function is the one that was trained.
    """
    if not any(isinstance(module, FoldedNorm) for module in model.modules()):
        return dict(weights)
    scaled = dict(weights)
    for name in (name for name in weights if name.endswith(NORM)):
        _, latent, before = _beside(name)
        norm, rows = weights[name], weights[latent][: len(weights[name])]
        old, bound = scale_of(norm), mean_square_bound(rows, weights[before])
        new = old if latent_error(old, bound) <= STILL_HOLDS else latent_scale(bound)
        scaled[latent] = torch.cat([rows * new, weights[latent][len(norm) :]])
        scaled[name] = norm * (old / new)
    return scaled


def check_linear(norm: Tensor, latent: Tensor, before: Tensor) -> None:
    """Raise UpfitError where the weight `norm` [r] is not the constant of a scaled latent, or the latent not small enough.

    `latent` [r + 2F, E] makes it and the rotated keys, behind a norm with the weight `before` [E].
    """
    scale_of(norm)
    if latent_error(1.0, mean_square_bound(latent[: len(norm)], before)) > STILL_HOLDS:
        raise UpfitError("its latent is not below the epsilon of kv_a_layernorm, so it is not linear")


def _beside(norm: str) -> tuple[str, str, str]:
    """Of the name of a latent's norm: its module, the weight that makes the latent, and the norm before the module."""
    module = norm.removesuffix(f".{NORM}")
    return module, f"{module}.{CACHED}", f"{module.rpartition('.')[0]}.{INPUT_NORM}"


def branch_factor(student: "PretrainedConfig", teacher: "PretrainedConfig") -> float:
    """What the attention of a stock latent `student` puts out, in units of what that of its `teacher` does; 1 for other models.

    The stock class has an epsilon of its own, to which the whole residual stream was scaled, and no factor on what is added.
    """
    if not is_stock_latent(student.to_dict()) or is_stock_latent(teacher.to_dict()):
        return 1.0
    stream = math.sqrt(getattr(student, STREAM_EPS) / getattr(teacher, STREAM_EPS))
    return stream * getattr(teacher, STREAM_FACTOR, 1.0)

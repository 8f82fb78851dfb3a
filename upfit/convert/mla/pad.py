"""Latents and rotated keys as wide as GPU kernels want them, by rows and columns of zeros: the same function, more cache."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.mla.deepseek import ZERO
from upfit.convert.mla.own_config import MODEL_TYPE as OWN
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor


def read_pad(text: str) -> tuple[int, int]:
    """(width of the latent, of rotated keys) of `512+64`. Raises UpfitError for what is none."""
    match = re.fullmatch(r"(\d+)\+(\d+)", text.strip())
    if match is None:
        raise UpfitError(f"--pad got {text!r}; give the widths of latent and rotated keys, such as 512+64")
    latent, rotated = int(match[1]), int(match[2])
    if rotated % 2:
        raise UpfitError(f"--pad {text}: rotated keys are pairs of numbers; give an even width for them, such as {rotated + 1}")
    return latent, rotated


def padded(plan: Plan, widths: tuple[int, int]) -> Plan:
    """`plan`, which writes our class with one rotated key on each of the fastest pairs, with these `widths` in every layer.

    Raises UpfitError where a layer is wider already.
    """
    assert plan.config["model_type"] == OWN
    mla, (latent, rotated) = plan.config["mla"], widths
    first = mla["layers"][0]
    if latent < first["latent"] or rotated < 2 * len(first["columns"]):
        now = f"{first['latent']}+{2 * len(first['columns'])}"
        raise UpfitError(f"--pad {latent}+{rotated} is less than what the layers have, {now}; give more, or leave it out")
    columns = first["columns"] + [ZERO] * (rotated // 2 - len(first["columns"]))
    settings = first | {"latent": latent, "columns": columns}
    config = plan.config | {"mla": mla | {"layers": [settings] * len(mla["layers"])}}
    return replace(plan, config=config, rules=tuple(_padded_rule(rule, mla, first, settings) for rule in plan.rules))


def _padded_rule(rule: Rule, mla: dict[str, Any], now: dict[str, Any], then: dict[str, Any]) -> Rule:
    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        return {name: _padded(name, tensor, mla["heads"], now, then) for name, tensor in rule.apply(tensors).items()}

    return replace(rule, apply=apply)


def _padded(name: str, tensor: "Tensor", heads: int, now: dict[str, Any], then: dict[str, Any]) -> "Tensor":
    """A tensor of our class (see `modeling_upfit_mla.py`) with zeros where the wider layer has more."""
    slots, more = len(now["columns"]), len(then["columns"])
    if name.endswith("q_proj.weight"):
        rows = tensor.unflatten(0, (heads, -1))
        plain, first, second = rows.split([now["unrotated"], slots, slots], 1)
        return torch.cat([plain, _longer(first, more, 1), _longer(second, more, 1)], 1).flatten(0, 1)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        plain, first, second = tensor.split([now["latent"], slots, slots])
        return torch.cat([_longer(plain, then["latent"]), _longer(first, more), _longer(second, more)])
    return _longer(tensor, then["latent"], 1) if name.endswith("kv_b_proj.weight") else tensor


def _longer(tensor: "Tensor", size: int, dim: int = 0) -> "Tensor":
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)

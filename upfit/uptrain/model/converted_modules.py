"""Reads what converted attention modules say of themselves, without knowing any of them.

`upfit_added` names parameters that the conversion added, `upfit_rates` their learning rates, and `upfit_paired` modules whose
rows come in pairs that began as equals. `progress` is set from 0 to 1 during training, and `upfit_measures()` returns numbers
to watch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from upfit.uptrain.model.parallel import whole_modules

ANNEALED = 0.5  # the share of a run over which `progress` goes from 0 to 1


def converted(model: nn.Module, whole: bool = False) -> Iterator[Any]:
    """The attention modules that say something, in the order of the layers; with `whole`, with weights that are not sharded."""
    for module in whole_modules(model) if whole else model.modules():
        if hasattr(module, "upfit_added"):
            yield module


def rates(model: nn.Module, added_rate: float, query_rate: float) -> dict[int, float]:
    """id of a parameter → its learning rate in units of the peak, for those that have one of their own."""
    by_parameter: dict[int, float] = {}
    for module in converted(model):
        for name, parameter in module.named_parameters():
            if name in module.upfit_added:
                by_parameter[id(parameter)] = added_rate * module.upfit_rates.get(name, 1.0)
        by_parameter |= {id(p): query_rate for name in module.upfit_paired for p in module.get_submodule(name).parameters()}
    return by_parameter


def added(model: nn.Module) -> set[int]:
    """ids of the parameters that a conversion added: they do not decay."""
    return {id(p) for module in converted(model) for name, p in module.named_parameters() if name in module.upfit_added}


def set_progress(model: nn.Module, step: int, steps: int) -> None:
    """Tell the modules how far step `step` (from 0) of `steps` is."""
    for module in converted(model):
        module.progress = min(1.0, step / max(1.0, ANNEALED * steps))


@torch.no_grad()
def measures(model: nn.Module) -> dict[str, list[float]]:
    """Each measure, one number a layer."""
    measured: dict[str, list[float]] = {}
    if not list(converted(model)):
        return measured
    for module in converted(model, whole=True):
        for name, value in module.upfit_measures().items():
            measured.setdefault(name, []).append(round(value, 6))
    return measured

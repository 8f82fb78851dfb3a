"""Measures a model without one part of its attention: does what a conversion added make a difference?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from upfit.errors import UpfitError


def known(model: Any) -> set[str]:
    """What can be taken from this model: its attention modules say it, in `upfit_ablations`."""
    return {name for module in model.modules() for name in getattr(module, "upfit_ablations", ())}


@contextmanager
def ablated(model: Any, what: str, name: str) -> Iterator[None]:
    """Inside the block, the parameters that `what` stands for are zero. Raises UpfitError for what `name` does not have."""
    if what not in known(model):
        raise UpfitError(f"--ablate {what}: {name} has no such part; it has {', '.join(sorted(known(model))) or 'none'}")
    parameters = [
        module.get_parameter(parameter)
        for module in model.modules()
        for parameter in getattr(module, "upfit_ablations", {}).get(what, ())
    ]
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, originals, strict=True):
                parameter.copy_(before)

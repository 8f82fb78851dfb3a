"""`torch.compile`, layer by layer. All layers share one compilation, which therefore takes seconds and not minutes.

They are compiled in place: names of weights, hooks, checkpointing and sharding stay as they are.
"""

import warnings

import torch
from torch import nn

from upfit.errors import UpfitError
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.layerwise import Layerwise
from upfit.uptrain.model.parallel import layer_classes


def compile_layers(learner: Distiller | Layerwise) -> None:
    """Compile what runs in each step: the layers of student and teacher, or the attention that a layerwise stage trains.

    Raises UpfitError where torch.compile does not work on this machine, or the class does not tell what its layers are.
    """
    check()
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf"
    )  # where attention parts a graph
    for module in repeated(learner):
        module.compile()


def repeated(learner: Distiller | Layerwise) -> list[nn.Module]:
    if isinstance(learner, Layerwise):  # hooks listen to the teacher's attention, which is inside its layers
        return [learner.student.get_submodule(path) for path in learner.paths]
    models = [learner.student, *([learner.teacher.student] if learner.teacher is not None else [])]
    layers = []
    for model in models:
        names = layer_classes(model)
        if not names:
            raise UpfitError(f"compile: {type(model).__name__} does not name the class of its layers; leave it out")
        layers += [module for module in model.modules() if type(module).__name__ in names]
    return layers


def check() -> None:
    """Compile something small: without a C++ compiler, or a Triton that fits the GPU, it would fail in the first step."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.compile(lambda tensor: tensor.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # inductor, Triton and the compilers below them raise anything
        line = str(error).strip().partition("\n")[0]
        raise UpfitError(f"compile: torch.compile does not work here ({type(error).__name__}: {line}); leave it out") from error

"""Norms and gated feed-forward layers by Liger's fused Triton kernels (Hsu et al. 2024, arXiv 2410.10989): the extra `liger`.

Logits and losses stay ours, because they are summed in float32. So do rotations, which Liger would replace for every model of
the process. Whether the kernels run here, and compute what the model computes, is found by trying.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upfit.errors import UpfitError
from upfit.uptrain.model.model_traits import ModelTraits, alike, embedding, hidden_states, probe

LEFT_OUT = ("rope", "cross_entropy", "fused_linear_cross_entropy")


def fuse(model: PreTrainedModel, traits: ModelTraits) -> None:
    """Let `model` use Liger's kernels, in place.

    Raises UpfitError where Liger is not installed, has none for the family, or where they do not run or compute something else:
    hidden states, and of a model that learns the gradient of its embedding.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise UpfitError(f"liger cannot load Liger ({error}); pip install 'upfit[liger]', or leave it out") from error
    family = getattr(model.config, "base_model_type", model.config.model_type)
    if family not in known:
        raise UpfitError(f"liger: Liger has no kernels for {family} models; leave it out")
    change = known[family]
    taken = inspect.signature(change).parameters
    before = _computed(model, traits)
    try:
        with _family_kept(model):
            change(model=model, **{name: False for name in LEFT_OUT if name in taken})
        same = all(alike(new, old, model.dtype) for new, old in zip(_computed(model, traits), before, strict=True))
    except Exception as error:  # Triton, the compilers below it and the driver raise anything
        line = str(error).strip().partition("\n")[0]
        raise UpfitError(
            f"liger: its kernels do not run here ({type(error).__name__}: {line}); they need a GPU, leave it out"
        ) from error
    if not same:
        raise UpfitError(f"liger: with its kernels {type(model).__name__} computes something else; leave it out")


def _computed(model: PreTrainedModel, traits: ModelTraits) -> list[Tensor]:
    ids, positions, _ = probe(model)
    weight, was_training = embedding(model), model.training
    model.eval()  # dropout would compare nothing
    with torch.set_grad_enabled(weight.requires_grad):
        states = hidden_states(model, ids, positions, traits)
        results = [states.detach().clone()]
        if weight.requires_grad:
            results += torch.autograd.grad(states.square().mean(), weight)
    model.train(was_training)
    return results


@contextmanager
def _family_kept(model: PreTrainedModel) -> Iterator[None]:
    """Liger also puts its classes in the place of the family's, for models to come; here those are to be what they were."""
    families = {kind.__module__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")}
    contents = {name: dict(vars(sys.modules[name])) for name in families}
    yield
    for name, names in contents.items():
        vars(sys.modules[name]).update(names)

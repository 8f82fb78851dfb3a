"""Layerwise distillation: every converted attention learns to return what the teacher's returns, on the teacher's own inputs.

The teacher runs once. Wherever one of its attention modules has run, the student's module at the same place runs on the same
arguments, but for angles: a student of another class, which may turn by other ones, is given its own. No gradient passes from
layer to layer, and no logits are computed. Only the student's attention is used; its other weights are frozen, and share the
teacher's memory where they are equal. Puzzle (arXiv 2411.19146) and MOHAWK (arXiv 2408.10189) also distil single blocks before
the whole model.

Legend: B rows, T tokens a row, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upfit.architecture.latent_fold import branch_factor
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.model_traits import ModelTraits, hidden_states

ROTATION, ANGLES = "rotary_emb", "position_embeddings"  # transformers' names for what makes cosines and sines, and for these


def attention_paths(source: Source) -> list[str]:
    """Where the attention modules of the model in a folder lie, as names of its class.

    Raises UpfitError for a model of a family that is converted as another one.
    """
    with open_checkpoint(source.path) as checkpoint:
        architecture, model_type = bind(checkpoint.config, checkpoint.tensors), checkpoint.config["model_type"]
    if architecture.config["model_type"] != model_type:
        raise UpfitError(
            f"{source.name} is of type {model_type}, which is converted as {architecture.config['model_type']}; its attention "
            f"cannot be trained by itself or set beside another's; make it one too (upfit convert gqa {source.name} OUT "
            f'--kv-heads {architecture.kv_heads}), or leave out the stage layerwise and trainable = "attention"'
        )
    return [layer.path for layer in architecture.layers]


def converted_paths(student: PreTrainedModel, tutor: PreTrainedModel, paths: list[str]) -> list[str]:
    """Those of `paths` at which student and teacher have attention of other weights.

    Raises UpfitError when there are none, or the student has no module at one of them.
    """
    for path in paths:
        try:
            student.get_submodule(path)
        except AttributeError as error:
            raise UpfitError(
                f"the teacher has an attention at {path} and the model has none, so that neither can be set beside the other; "
                "leave the stage layerwise out"
            ) from error
    changed = [path for path in paths if not same(student.get_submodule(path), tutor.get_submodule(path))]
    if not changed:
        raise UpfitError("the model's attention is that of its teacher already; leave the stage layerwise out")
    return changed


def own_rotation(student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
    """What makes cosines and sines of positions in a student that has another class for it than the teacher."""
    ours, theirs = (dict(model.base_model.named_children()).get(ROTATION) for model in (student, teacher))
    return None if type(ours) is type(theirs) else ours


def same(module: nn.Module, other: nn.Module) -> bool:
    first, second = dict(module.named_parameters()), dict(other.named_parameters())
    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


def equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor.float(), other.float())


def freeze_all_but(student: PreTrainedModel, tutor: PreTrainedModel | None, paths: list[str]) -> None:
    """Leave only the modules at `paths` to be trained; what is equal to the teacher's shares its memory."""
    theirs = {} if tutor is None else dict(tutor.named_parameters())
    for name, parameter in student.named_parameters():
        if not name.startswith(tuple(path + "." for path in paths)):
            parameter.requires_grad_(False)
            if name in theirs and equal(parameter, theirs[name]):
                parameter.data = theirs[name].data


class Layerwise(nn.Module):
    """(ids, positions, labels), all [B, T] → (loss, error of each layer), summed over the tokens whose label counts.

    The error of a layer is the squared distance of the two outputs, in units of the mean square of the teacher's (measured
    once, by `take_units`): 0 where they are equal, about 1 for an output of zeros. The loss is the mean over the layers.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        traits: ModelTraits,
        paths: list[str],
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student, self.traits, self.paths, self.autocast = student, traits, paths, autocast
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        self._modules_of_student = {path: student.get_submodule(path) for path in paths}
        self._rotation = (own_rotation(student, teacher),)
        self._factor = branch_factor(student.config, teacher.config)
        self.units = torch.ones(len(paths), device=student.device)
        freeze_all_but(student, teacher, paths)

    @property
    def values(self) -> int:
        return len(self.paths)

    def metrics(self, means: list[float]) -> dict[str, Any]:
        """What metrics.jsonl says of the mean errors."""
        return {"attention_error": sum(means) / len(means), "attention_errors": [round(mean, 6) for mean in means]}

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor, name: str = "") -> tuple[Tensor, ...]:
        counted = labels != IGNORE
        errors = [pair[counted].sum() / unit for pair, unit in zip(self._distances(ids, positions), self.units, strict=True)]
        return (torch.stack(errors).mean(), *(error.detach() for error in errors))

    @torch.no_grad()
    def take_units(self, ids: Tensor, positions: Tensor) -> None:
        """Measure the teacher's outputs on some rows."""
        with self._listening(positions) as outputs:
            self._run_teacher(ids, positions)
        self.units = torch.stack([theirs.float().square().sum(-1).mean() for theirs, _ in outputs])

    def _distances(self, ids: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """The squared distance of the two outputs of each layer, [B, T]."""
        with self._listening(positions) as outputs:
            self._run_teacher(ids, positions)
        for theirs, ours in outputs:
            yield (ours.float() / self._factor - theirs.float()).square().sum(-1)

    def _run_teacher(self, ids: Tensor, positions: Tensor) -> None:
        with torch.no_grad(), torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden_states(self._teacher[0], ids, positions, self.traits)

    @contextmanager
    def _listening(self, positions: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """A list that gets the outputs [B, T, H] of the teacher's and the student's module, layer by layer."""
        grads, outputs, (rotation,) = torch.is_grad_enabled(), [], self._rotation

        def beside(path: str) -> Any:
            def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                if rotation is not None:
                    named = named | {ANGLES: rotation(named[ANGLES][0], positions)}
                with torch.set_grad_enabled(grads):
                    outputs.append((_first(output), _first(self._modules_of_student[path](*arguments, **named))))

            return hook

        hooks = [
            self._teacher[0].get_submodule(path).register_forward_hook(beside(path), with_kwargs=True) for path in self.paths
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output

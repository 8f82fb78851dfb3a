"""Runs two models side by side through the same layers: the source, and the converted model as far as it is done."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Call
from upfit.calibration.ridge import Moments, augmented, ridge_linear
from upfit.calibration.traits import Residual
from upfit.checkpoint.reader import Checkpoint


@dataclass
class PairedBatch:
    """One batch of windows in both models: hidden states [B, T, E] before the next layer."""

    held: bool
    calls: list[Call]
    student_calls: list[Call]
    teacher: Tensor
    student: Tensor
    tokens: int

    def middle(self, attended: Tensor, residual: Residual | None) -> Tensor:
        """The teacher's stream [B, T, E] after the attention gave out `attended`; that itself where the stream has another
        form."""
        if residual is None:
            return self.teacher if self.teacher.shape == attended.shape else attended
        return self.teacher + residual.attention * attended


def paired_batches(model: LayerwiseModel, held: list[bool]) -> Iterator[PairedBatch]:
    """The model's batches, teacher and student at the first layer; `held` says which of them are held back."""
    for batch, back in zip(model.batches, held, strict=True):
        memo: dict[int, Any] = {}

        def own(value: Any, memo: dict[int, Any] = memo) -> Any:
            """Dictionaries that layers write to (keys and values shared between layers) belong to one stream."""
            return memo.setdefault(id(value), dict(value)) if isinstance(value, dict) else value

        copies = [Call(tuple(map(own, c.arguments)), {k: own(v) for k, v in c.keywords.items()}) for c in batch.calls]
        assert batch.hidden is not None
        yield PairedBatch(back, batch.calls, copies, batch.hidden, batch.hidden, batch.ids.shape[1])


def token_weights(stream: Tensor, power: float) -> Tensor:
    """[B, T]: 1 / rms of each token's stream to `power`."""
    return stream.square().mean(-1).clamp_min(1e-12) ** (-power / 2)


def add_rows(sums: Moments, z: Tensor, wanted: Tensor, stream: Tensor, module: nn.Module, power: float) -> None:
    """Add rows `z` [B, T, Z] and `wanted` [B, T, E]; a token weighs 1 / rms of `stream` [B, T, E] to `power`."""
    rows = augmented(z.flatten(0, 1), z.shape[-1] + (module.bias is not None))
    sums.add(rows, wanted.flatten(0, 1), token_weights(stream, power).flatten())


def put(module: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give the module at `path` in `module` this weight and bias."""
    target = module.get_submodule(path)
    target._parameters["weight"] = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        target._parameters["bias"] = nn.Parameter(bias.float().contiguous(), requires_grad=False)


@dataclass(frozen=True)
class MlpEnd:
    """The Linear that ends a layer's MLP: its path in the layer, and the names of its weight and bias in the checkpoint."""

    path: str
    names: tuple[str, str | None]


def mlp_end(
    model: LayerwiseModel, index: int, module: nn.Module, residual: Residual | None, checkpoint: Checkpoint
) -> MlpEnd | None:
    """The end of the MLP in `module`, the student's layer at `index`; None where one Linear of the checkpoint is not it."""
    if residual is None or residual.down is None:
        return None
    linear = module.get_submodule(residual.down)
    path = f"{model.blocks[index].path}.{residual.down}"
    names = [model.weights.sources.get(f"{path}.{kind}") for kind in ("weight", "bias")]
    if not isinstance(linear, nn.Linear) or not _is_plain(names, linear, checkpoint) or names[0] is None:
        return None
    return MlpEnd(residual.down, (names[0][0], names[1][0] if names[1] else None))


def _is_plain(names: list[list[str] | None], module: nn.Linear, checkpoint: Checkpoint) -> bool:
    """Each of the module's parameters is one tensor of the checkpoint, as it is."""
    for stored, parameter in zip(names, (module.weight, module.bias), strict=True):
        if parameter is not None and (stored is None or len(stored) != 1):
            return False
        if parameter is not None and stored and checkpoint.tensors[stored[0]].shape != tuple(parameter.shape):
            return False
    return True


def refit_mlp(
    module: nn.Module,
    end: MlpEnd,
    share: float,
    batches: list[PairedBatch],
    outputs: list[Tensor],
    rest: Callable[[int, PairedBatch], tuple[Tensor, Tensor]],
    power: float,
) -> dict[str, Tensor]:
    """Fit the Linear that ends the student's MLP to the teacher's `outputs` [B, T, E] of the layer; the new tensors by name.

    `rest` gives, of a batch, the Linear's inputs [B, T, Z] and the student's stream after the layer without what it adds:
    `share` times its output. A token weighs 1 / rms of the teacher's stream to `power`.
    """
    linear = module.get_submodule(end.path)
    assert isinstance(linear, nn.Linear)
    sums = {False: Moments(), True: Moments()}
    for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
        z, without = rest(number, batch)
        add_rows(sums[batch.held], z, (output - without) / share, output, linear, power)
    solved = ridge_linear(sums, linear)
    put(module, end.path, *solved)
    return {name: tensor for name, tensor in zip(end.names, solved, strict=True) if name and tensor is not None}


def stream_error(batches: list[PairedBatch]) -> float:
    """|student − teacher|² / |teacher|², mean over held-back tokens."""
    shares = [
        ((batch.student - batch.teacher).square().sum(-1) / batch.teacher.square().sum(-1).clamp_min(1e-12)).flatten()
        for batch in batches
        if batch.held
    ]
    return float(torch.cat(shares).mean())

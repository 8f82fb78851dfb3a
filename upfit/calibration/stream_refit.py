"""Fits of the converted model to the teacher's stream: of its inputs, of the output projection and of the end of the MLP.

The converted model's inputs differ from those on which its heads were fitted: a drift map brings them back (`drifts_of`). What
an attention and an MLP add is then fitted by ridges to what is missing to the teacher's stream (`refit_stream`).
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from upfit.calibration.between import PLAIN
from upfit.calibration.observe import knowing, tapped
from upfit.calibration.residual import Residual
from upfit.calibration.ridge import ridge_linear
from upfit.calibration.teacher_student import LayerPair, MlpEnd, PairedBatch, mlp_end, put, refit_mlp, row_sums
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits

DRIFT_RIDGE = 1e-3  # of the mean power of an input: directions that the text hardly has stay small
NEGLIGIBLE = 1e-9  # a share of the energy that is rounding: inputs that differ by no more have not drifted


def adopt(student: nn.Module, teacher: nn.Module) -> None:
    """The student's layer shares every weight of the teacher's that has the same shape."""
    theirs = dict(teacher.named_modules())
    for path, module in student.named_modules():
        for kind in ("_parameters", "_buffers"):
            own, other = getattr(module, kind), getattr(theirs.get(path), kind, {})
            for name, tensor in own.items():
                known = other.get(name)
                if tensor is not None and known is not None and known.shape == tensor.shape:
                    own[name] = known


def student_inputs(pair: LayerPair, views: list[View]) -> list[tuple[Tensor, Tensor]]:
    """What the student's projections of queries and of keys are given, of each batch."""
    of_queries = [pair.run_until(pair.path("q"), view.batch) for view in views]
    if not views[0].cross:
        return [(x, x) for x in of_queries]
    of_keys = [pair.run_until(pair.path("k"), view.batch) for view in views]
    # A projection that runs twice, on both streams one after the other (T5Gemma 2), is not ours to follow.
    same = all(x.shape == view.key_inputs.shape for x, view in zip(of_keys, views, strict=True))
    return list(zip(of_queries, of_keys if same else [view.key_inputs for view in views], strict=True))


Drifts = tuple[Tensor | None, Tensor | None]  # of the inputs of queries and of keys


def drifts_of(inputs: list[tuple[Tensor, Tensor]], views: list[View]) -> Drifts:
    of_queries = _drift([q for q, _ in inputs], views)
    return of_queries, _drift([k for _, k in inputs], views, of_keys=True) if views[0].cross else of_queries


def _drift(inputs: list[Tensor], views: list[View], of_keys: bool = False) -> Tensor:
    """M [E, E] that best takes what the student sees to what the teacher saw: W M x_student ≈ W x_teacher."""
    wanted = [view.key_inputs if of_keys else view.inputs for view in views]
    gap = sum(float((x - aim).square().sum()) for x, aim in zip(inputs, wanted, strict=True))
    if gap <= NEGLIGIBLE * sum(float(aim.square().sum()) for aim in wanted):
        return torch.eye(inputs[0].shape[-1], device=inputs[0].device)
    own = cross = torch.zeros((), dtype=torch.float64)
    for view, *pair in zip(views, inputs, wanted, strict=True):
        if not view.batch.held:
            counted = None if of_keys else view.batch.counted
            flat, aim = (x.flatten(0, 1) if counted is None else x[counted] for x in pair)
            own, cross = own + (flat.T @ flat).double(), cross + (aim.T @ flat).double()
    ridge = DRIFT_RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own + ridge, (cross + ridge).T).T.float()


def mapped(weight: Tensor, drift: Tensor | None) -> Tensor:
    """`weight` [heads, D, E'] on inputs that `drift` [E, E] brings back; a bias column stays."""
    return weight if drift is None else torch.cat([weight[..., : len(drift)] @ drift, weight[..., len(drift) :]], -1)


def refit_stream(pair: LayerPair, traits: AttentionTraits, views: list[View], token_power: float) -> dict[str, Tensor]:
    """Ridges for the output projection and for the last matrix of the MLP; moves the student on. The new tensors by name."""
    new, attended = _refit_output(pair, traits.residual, views, token_power)
    end = mlp_end(pair, traits.residual) if pair.last else None
    if traits.residual is not None and end is not None:
        totals = [view.total for view in views]
        return new | _refit_mlp(pair, traits, end, attended, totals, token_power)
    if pair.last:
        for batch in pair.batches:
            batch.student = pair.run(batch)
    return new


def _refit_output(
    pair: LayerPair, residual: Residual | None, views: list[View], token_power: float
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The output projection, fitted to the teacher's stream after the attention; of each batch too its inputs [B, T, Z] and the
    student's stream [B, T, E] that it adds to."""
    path, names, attended, befores = pair.path("o"), pair.layer.names, list[Tensor](), list[Tensor]()

    def rows(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor, Tensor]:
        z, before = pair.run_to(path, batch, residual)
        attended.append(z)
        befores.append(before)
        middle = batch.middle(views[number].attended, residual, views[number].before)
        wanted = views[number].attended if residual is None else (middle - before) / residual.attention
        return z, wanted, middle

    projection = pair.linear(path)
    weight, bias = ridge_linear(row_sums(projection, pair.batches, rows, token_power), projection)
    put(pair.student, path, weight, bias)
    new = {names["o.weight"]: weight} | ({} if bias is None else {names["o.bias"]: bias})
    return new, list(zip(attended, befores, strict=True))


def _refit_mlp(
    pair: LayerPair,
    traits: AttentionTraits,
    end: MlpEnd,
    attended: list[tuple[Tensor, Tensor]],
    outputs: list[Tensor],
    token_power: float,
) -> dict[str, Tensor]:
    """The last matrix of the MLP, fitted to the teacher's stream after the layer (before a norm that follows the sum), to which
    the student moves on."""
    assert traits.residual is not None
    residual, parts = traits.residual, list[tuple[Tensor, Tensor]]()

    def rest(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        if residual.normed:
            return _normed_parts(pair, residual, end, batch)
        parts.append(_parts(pair, traits, end, batch, *attended[number]))
        return parts[number]

    new = refit_mlp(pair.student, end, residual.mlp, pair.batches, outputs, rest, token_power)
    for number, batch in enumerate(pair.batches):
        if residual.normed:
            batch.student = pair.run(batch)
        else:
            inner, middle = parts[number]
            batch.student = middle + residual.mlp * pair.linear(end.path)(inner)
    return new


def _parts(
    pair: LayerPair, traits: AttentionTraits, end: MlpEnd, batch: PairedBatch, z: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """What the MLP's last matrix is given, and the student's stream that it adds to; the attention's own part is known."""
    assert traits.residual is not None
    own = pair.student.get_submodule(pair.place.at)
    with knowing(own, z) if traits.gated == PLAIN else nullcontext():  # else z is not what the attention gave out
        inner = pair.run_until(end.path, batch)
    return inner, before + traits.residual.attention * pair.linear(pair.path("o"))(z)


def _normed_parts(pair: LayerPair, residual: Residual, end: MlpEnd, batch: PairedBatch) -> tuple[Tensor, Tensor]:
    """The same where the MLP adds to what a norm gives out."""
    assert residual.mlp_base is not None
    with tapped({residual.mlp_base: pair.student.get_submodule(residual.mlp_base)}) as taps:
        inner = pair.run_until(end.path, batch)
    return inner, taps[residual.mlp_base][1]

"""Runs a plan over a checkpoint, or over meta tensors, which is the dry run: the same code, without the values.

A tensor that no rule writes or drops passes through untouched.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upfit.checkpoint.plan import Plan, Rule
from upfit.checkpoint.reader import Checkpoint, safetensors_dtype, torch_dtype
from upfit.checkpoint.safetensors_header import ITEM_BYTES
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Planned:
    """One tensor of the result. `rule` is None for a tensor that passes through; `source` names it in the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: str
    rule: Rule | None
    cast: bool = False  # passes through, but in another type

    @property
    def untouched(self) -> bool:
        """Whether its bytes are those of the source."""
        return self.rule is None and not self.cast


def outline(plan: Plan, checkpoint: Checkpoint, dtype: str | None) -> list[Planned]:
    """Every tensor of the result, found by running the plan on meta tensors.

    `dtype` (a safetensors name such as `BF16`) recasts all floating tensors; None keeps what the checkpoint has.
    Raises ValueError when a rule reads what is not there, writes what another one writes, or not what it says.
    """
    planned: dict[str, Planned] = {}
    dropped: set[str] = set()
    known = checkpoint.tensors.keys() | checkpoint.fitted.keys() | checkpoint.passing.keys()
    for rule in plan.rules:
        missing = [name for name in rule.reads if name not in known]
        if missing:
            raise ValueError(f"rule {rule.label!r} reads {missing[0]!r}, which the checkpoint does not have")
        written = rule.apply({name: checkpoint.meta(name) for name in rule.reads})
        if set(written) != set(rule.writes):
            raise ValueError(f"rule {rule.label!r} wrote {sorted(written)}, it promised {sorted(rule.writes)}")
        for name, tensor in written.items():
            if name in planned:
                raise ValueError(f"{name!r} is written twice, the second time by rule {rule.label!r}")
            planned[name] = _computed(name, tensor, rule, checkpoint, dtype)
        dropped.update(rule.drops)
    for name, info in checkpoint.passing.items():
        if name in planned or name in dropped:
            continue
        cast = dtype is not None and info.dtype in FLOATS and info.dtype != dtype
        kind = dtype if cast and dtype else info.dtype
        planned[name] = Planned(name, kind, info.shape, info.numel * ITEM_BYTES[kind], name, None, cast)
    return list(planned.values())


FLOATS = ("F16", "BF16", "F32", "F64")


def _computed(name: str, tensor: "Tensor", rule: Rule, checkpoint: Checkpoint, dtype: str | None) -> Planned:
    kind = dtype or safetensors_dtype(tensor.dtype)
    known = checkpoint.tensors
    source = name if name in checkpoint.passing else next(read for read in rule.reads if read in known)
    return Planned(name, kind, tuple(tensor.shape), tensor.numel() * ITEM_BYTES[kind], source, rule)


def compute(rule: Rule, checkpoint: Checkpoint, planned: dict[str, Planned]) -> dict[str, "Tensor"]:
    """Run one rule on real tensors; the results have the planned shape and type and are finite.

    Raises UpfitError when a result is not finite (the source already was not, or the arithmetic overflowed its type).
    """
    results = {}
    for name, tensor in rule.apply({name: checkpoint.read(name) for name in rule.reads}).items():
        results[name] = finish(tensor, planned[name])
    return results


def finish(tensor: "Tensor", item: Planned) -> "Tensor":
    """Cast to the planned type and check that the values are finite."""

    tensor = tensor.to(torch_dtype(item.dtype)).contiguous()
    assert tuple(tensor.shape) == item.shape, f"{item.name} was planned as {item.shape}, computed as {tuple(tensor.shape)}"
    if not tensor.isfinite().all():
        raise UpfitError(f"tensor {item.name!r} is not finite as {item.dtype}; check the source, or choose another --dtype")
    return tensor

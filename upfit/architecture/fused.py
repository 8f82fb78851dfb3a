"""Queries, keys and values that a family stores as one tensor: how its rows are arranged, and a module that separates them.

There are two arrangements: the rows of all queries, all keys, all values (`by = "model"`); or, for each key/value head, the
rows of its queries, its key and its value (`by = "group"`). Either may be stored transposed, as Conv1D does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from upfit.errors import UpfitError

By = Literal["model", "group"]
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Fused:
    """The arrangement of one fused projection of `heads` query heads and `kv_heads` key/value heads, all of width
    `head_dim`."""

    by: By
    heads: int
    kv_heads: int
    head_dim: int
    transposed: bool = False

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [H·D, ...], k [K·D, ...] and v [K·D, ...] of a weight [(H + 2K)·D, E] ([E, (H + 2K)·D] if transposed) or bias
        [(H + 2K)·D]."""
        rows = fused.T if self.transposed and fused.ndim > 1 else fused
        parts = rows.unflatten(0, (self._chunks, -1)).split(self._rows, dim=1)
        q, k, v = (part.flatten(0, 1) for part in parts)
        return q, k, v

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inverse of `split`."""
        parts = [part.unflatten(0, (self._chunks, -1)) for part in (q, k, v)]
        rows = torch.cat(parts, dim=1).flatten(0, 1)
        return (rows.T if self.transposed and rows.ndim > 1 else rows).contiguous()

    @property
    def _chunks(self) -> int:
        return self.kv_heads if self.by == "group" else 1

    @property
    def _rows(self) -> list[int]:
        """Rows of q, k and v in a chunk."""
        q, k = self.heads * self.head_dim // self._chunks, self.kv_heads * self.head_dim // self._chunks
        return [q, k, k]


class Apart(nn.Module):
    """Takes the place of a fused projection: the same function, with q, k and v as Linear modules of their own."""

    def __init__(self, fused: nn.Module, arrangement: Fused) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.spread = getattr(fused, "spread", None)  # of a class of ours: what makes of few heads as many as its family has
        weight, bias = fused.weight, fused.bias
        pieces = dict(zip(PARTS, arrangement.split(weight.detach()), strict=True))  # type: ignore[operator]
        biases = arrangement.split(bias.detach()) if isinstance(bias, Tensor) else (None, None, None)
        for (part, piece), values in zip(pieces.items(), biases, strict=True):
            linear = nn.Linear(piece.shape[1], piece.shape[0], bias=values is not None, device="meta")
            linear._parameters["weight"] = nn.Parameter(piece, requires_grad=weight.requires_grad)  # type: ignore[arg-type]
            if values is not None:
                linear._parameters["bias"] = nn.Parameter(values, requires_grad=bias.requires_grad)  # type: ignore[arg-type]
            self.add_module(part, linear)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(part)(hidden).movedim(-1, 0) for part in PARTS)
        shape = self.arrangement
        joined = Fused(shape.by, shape.heads, shape.kv_heads, shape.head_dim).join(q, k, v).movedim(0, -1)
        return joined if self.spread is None else self.spread(joined)


class Turned(nn.Linear):
    """Takes the place of a projection whose weight is stored transposed, [E, Z]: the same function as a Linear."""

    def __init__(self, stored: nn.Module) -> None:
        weight, bias = cast(Tensor, stored.weight), stored.bias
        super().__init__(weight.shape[0], weight.shape[1], bias=isinstance(bias, Tensor), device="meta")
        self._parameters["weight"] = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
        if isinstance(bias, Tensor):
            self._parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)


def set_apart(model: nn.Module, module: str, output: str, by: By, transposed: bool) -> None:
    """Put `Apart` in the place of every child `module` of an attention that has a child `output` beside it; where that is
    stored transposed, `Turned` in the place of every other projection that is.

    Raises UpfitError where the sizes are not those of q, k and v of one head width.
    """
    for path, attention, fused in list(_found(model, module, output)):
        attention.add_module(module, Apart(fused, _arrangement(path, attention, fused, output, by, transposed)))
    for path, stored in list(model.named_modules()) if transposed else []:
        if type(stored).__name__ == "Conv1D":  # transformers' own, which only few families have
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner).add_module(name, Turned(stored))


def _found(model: nn.Module, module: str, output: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    for path, attention in model.named_modules():
        children = dict(attention.named_children())
        if module in children and output in children:
            yield path, attention, children[module]


def _arrangement(path: str, attention: Any, fused: Any, output: str, by: By, transposed: bool) -> Fused:
    width, rows = attention.head_dim, fused.weight.shape[1 if transposed else 0]
    width_out = getattr(attention, output).weight.shape[0 if transposed else 1]
    heads, over = divmod(width_out, width)
    kv_heads, odd = divmod(rows - width_out, 2 * width)
    if over or odd or kv_heads < 1 or heads % kv_heads:
        raise UpfitError(f"{path}: {rows} rows are not queries, keys and values of heads of width {width}; check config.json")
    return Fused(by, heads, kv_heads, width, transposed)

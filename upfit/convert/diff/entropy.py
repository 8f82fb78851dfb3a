"""Which heads attend to few tokens and which to many: DEX changes those that attend to most (arXiv 2505.16333)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.calibration.statistics import sample_rows
from upfit.calibration.traits import watch
from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.fitting import LayerFit, Task, Walk, fit_layers, read_calibration

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

ROWS = 24  # sampled query positions of every 512 of a window


def entropy(seen: Seen, rows: Tensor, keys: int) -> Tensor:
    """[H]: Σ over rows of the attention weights' entropy, as a share of the most there could be with as many keys."""
    _, weights = seen.scores(rows, keys)
    share = -(weights * weights.clamp_min(1e-30).log()).sum(-1) / (rows + 1).clamp_min(2).log()
    return share.sum((0, 2))


def with_spread_heads(context: "FitContext", plan: Plan, sources: tuple[list[str] | None, str | None, int | None]) -> Plan:
    """`plan` with `dex_heads` 1 for the half of each layer's heads with the highest entropy on calibration text, else 0."""
    calibration = read_calibration(context, *sources)
    task = Task(
        title="watching heads",
        label="",
        settings={"recipe": "diff", "config": plan.config, "variant": "dex"},
        layers=list(context.architecture.layers),
        begin=lambda walk: lambda index, layer: _spread(walk, index, layer),
        note=lambda record: str(record["layer"]),
        alone=True,
    )
    records = fit_layers(context, calibration, task).records
    layers, chosen = {layer.path: layer for layer in context.architecture.layers}, {}
    for record in records:
        chosen[record["layer"]] = torch.zeros(layers[record["layer"]].geometry.heads)
        chosen[record["layer"]][record["heads"]] = 1
    rules = tuple(_with_heads(rule, layers, chosen) for rule in plan.rules)
    return replace(plan, rules=rules, report={"layers": records})


def _spread(walk: Walk, index: int, layer: "Layer") -> LayerFit:
    """The half of a layer's heads with the highest entropy."""
    block, spread = walk.model.blocks[index], torch.zeros(())
    for number, batch in enumerate(walk.batches):
        watched = watch(block, batch.teacher, batch.calls[index], ())
        for sampled in sample_rows(batch.tokens, ROWS, index, number, batch.teacher.device):
            spread = spread + entropy(watched.seen, sampled.at, sampled.keys).cpu()
        assert watched.output is not None
        batch.teacher = watched.output
    heads = spread.argsort(descending=True)[: (len(spread) + 1) // 2].sort().values.tolist()
    return LayerFit(layer.path, {"layer": layer.path, "heads": heads}, {})


def _with_heads(rule: Rule, layers: "dict[str, Layer]", chosen: dict[str, Tensor]) -> Rule:
    names = {layer.stem + "dex_heads": chosen[path] for path, layer in layers.items() if path in chosen}

    def apply(tensors: Tensors) -> dict[str, Tensor]:
        written = rule.apply(tensors)
        return {name: names[name].to(tensor) if name in names else tensor for name, tensor in written.items()}

    return replace(rule, apply=apply)

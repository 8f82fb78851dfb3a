"""Which heads attend to few tokens and which to many: DEX changes those that attend to most (arXiv 2505.16333)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.calibration.teacher_student import LayerPair
from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.fitting import LayerFits, read_calibration

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

ROWS = 24  # sampled query positions of every 512 of a window


def entropy(seen: Seen, rows: Tensor, keys: int) -> Tensor:
    """[H]: Σ over rows of the attention weights' entropy, as a share of the most there could be with as many keys."""
    _, weights = seen.scores(rows, keys)
    share = -(weights * weights.clamp_min(1e-30).log()).sum(-1) / (rows + 1).clamp_min(2).log()
    return share.sum((0, 2))


def with_spread_heads(context: "FitContext", plan: Plan, sources: tuple[list[str] | None, str | None, int | None, str]) -> Plan:
    """`plan` with `dex_heads` 1 for the half of each layer's heads with the highest entropy on calibration text, else 0."""
    layers = {layer.path: layer for layer in context.architecture.layers}
    settings = {"recipe": "diff", "config": plan.config, "variant": "dex"}
    fits = LayerFits(
        context, read_calibration(context, *sources), "watching heads", settings, list(layers.values()), alone=True
    )
    for pair in fits:
        fits.store(pair, {"layer": pair.layer.path, "heads": _spread_heads(pair)}, {})
    chosen = {}
    for record in fits.records:
        chosen[record["layer"]] = torch.zeros(layers[record["layer"]].geometry.heads)
        chosen[record["layer"]][record["heads"]] = 1
    rules = tuple(_with_heads(rule, layers, chosen) for rule in plan.rules)
    return replace(plan, rules=rules, report={"layers": fits.records})


def _spread_heads(pair: LayerPair) -> list[int]:
    """The half of a layer's heads with the highest entropy."""
    spread = torch.zeros(())
    for batch, watched, rows in pair.watch(rows=ROWS):
        for sampled in rows:
            spread = spread + entropy(watched.seen, sampled.at, sampled.keys).cpu()
        batch.teacher = watched.output
    return spread.argsort(descending=True)[: (len(spread) + 1) // 2].sort().values.tolist()


def _with_heads(rule: Rule, layers: "dict[str, Layer]", chosen: dict[str, Tensor]) -> Rule:
    names = {layer.stem + "dex_heads": chosen[path] for path, layer in layers.items() if path in chosen}

    def apply(tensors: Tensors) -> dict[str, Tensor]:
        written = rule.apply(tensors)
        return {name: names[name].to(tensor) if name in names else tensor for name, tensor in written.items()}

    return replace(rule, apply=apply)

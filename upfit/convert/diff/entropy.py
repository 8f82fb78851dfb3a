"""Which heads look at little and which at everything: DEX changes those whose attention is most spread (arXiv 2505.16333)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upfit.convert.calibrate import pick_device, sample_for
from upfit.convert.facts import watch
from upfit.convert.recipe import Plan, Rule, Tensors
from upfit.convert.statistics import sample_rows
from upfit.convert.stream import Seen, Stream

if TYPE_CHECKING:
    from upfit.convert.attention import Layer
    from upfit.convert.recipe import Bench

ROWS = 24  # sampled query positions of every 512 of a window


def entropy(seen: Seen, rows: Tensor, keys: int) -> Tensor:
    """[H]: Σ over rows of the attention weights' entropy, as a share of the most there could be with as many keys."""
    _, weights = seen.scores(rows, keys)
    told = -(weights * weights.clamp_min(1e-30).log()).sum(-1) / (rows + 1).clamp_min(2).log()
    return told.sum((0, 2))


def with_spread_heads(bench: "Bench", plan: Plan, sources: tuple[list[str] | None, str | None, int | None]) -> Plan:
    """`plan` with `dex_heads` 1 for the half of each layer's heads with the highest entropy on calibration text, else 0."""
    sample = sample_for(bench.folder, bench.checkpoint, *sources, bench.output)
    pieces, _ = sample.batches()
    stream = Stream(bench.checkpoint, bench.architecture, pieces, pick_device())
    layers, told, chosen = {layer.path: layer for layer in bench.architecture.layers}, [], {}
    with bench.output.progress("watching heads", len(stream.blocks)) as meter:
        for index, block in enumerate(stream.blocks):
            stream.load(index)
            spread: Tensor | float = 0.0
            for number, batch in enumerate(stream.batches):
                assert batch.hidden is not None
                watched = watch(block, batch.hidden, batch.calls[index], ()) if block.attention else None
                if watched is None or watched.output is None:
                    continue
                for some in sample_rows(batch.ids.shape[1], ROWS, index, number, batch.hidden.device):
                    spread = spread + entropy(watched.seen, some.at, some.keys)
                batch.hidden = watched.output
            stream.empty(block.module)
            meter.advance(1)
            if isinstance(spread, Tensor):
                heads = torch.zeros(len(spread))
                heads[spread.cpu().argsort(descending=True)[: (len(spread) + 1) // 2]] = 1
                chosen[block.attention_path] = heads
                told.append({"layer": block.attention_path, "heads": heads.nonzero().flatten().tolist()})
    rules = tuple(_with_heads(rule, layers, chosen) for rule in plan.rules)
    return replace(plan, rules=rules, fit=None, report={"layers": told})


def _with_heads(rule: Rule, layers: "dict[str, Layer]", chosen: dict[str, Tensor]) -> Rule:
    names = {layer.stem + "dex_heads": chosen[path] for path, layer in layers.items() if path in chosen}

    def apply(tensors: Tensors) -> dict[str, Tensor]:
        written = rule.apply(tensors)
        return {name: names[name].to(tensor) if name in names else tensor for name, tensor in written.items()}

    return replace(rule, apply=apply)

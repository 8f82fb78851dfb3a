"""Chooses which old key/value heads share a new one: the partition into groups of one size that costs least.

The cost of a group is the sum over its pairs of heads of what merging the two would lose, by the calibration statistics.
Beginning with neighbours, heads are exchanged between groups as long as that helps.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from upfit.calibration.reduction import powers
from upfit.calibration.traits import AttentionTraits

STARTS = 16  # exchanging heads finds a near optimum, so several random beginnings are tried beside the contiguous one


def partition(costs: Tensor, groups: int) -> list[list[int]]:
    """`costs` [K, K], symmetric. Groups of equal size, each ascending, by their first head. Contiguous where nothing is
    better."""
    count = costs.shape[0]
    costs = costs.double() - torch.diag(costs.diagonal().double())
    contiguous = torch.arange(count) // (count // groups)
    generator = torch.Generator().manual_seed(0)
    starts = [contiguous, *(contiguous[torch.randperm(count, generator=generator)] for _ in range(STARTS))]
    best, least = contiguous, _cost(costs, contiguous)
    for start in starts:
        label = _exchanged(costs, start.clone(), groups)
        if _cost(costs, label) < least * (1 - 1e-9):  # by more than rounding, so that every machine finds the same
            best, least = label, _cost(costs, label)
    return sorted((torch.nonzero(best == group).flatten().tolist() for group in range(groups)), key=lambda heads: heads[0])


def head_order(groups: list[list[int]], share: int) -> list[int]:
    """The query heads, `share` of them to an old key/value head, in the order in which `groups` put them."""
    return [head for group in groups for old in group for head in range(old * share, (old + 1) * share)]


def _cost(costs: Tensor, label: Tensor) -> float:
    return float(costs[label[:, None] == label[None]].sum())


def _exchanged(costs: Tensor, label: Tensor, groups: int) -> Tensor:
    """Exchange the two heads that gain most, as long as some do."""
    heads = torch.arange(len(label))
    for _ in range(len(label) ** 2):
        to_group = torch.stack([costs[:, label == group].sum(1) for group in range(groups)], 1)  # [K, groups]
        own = to_group[heads, label]
        there = to_group[:, label]  # of head i to the group of head j
        gain = own[:, None] + own[None] - there - there.T + 2 * costs
        gain[label[:, None] == label[None]] = 0
        first, second = divmod(int(gain.argmax()), len(label))
        if float(gain[first, second]) <= 1e-9 * float(costs.sum()):  # rounding: it would go round in circles
            break
        label[[first, second]] = label[[second, first]]
    return label


def pair_costs(traits: AttentionTraits, sums: Mapping[str, Tensor], metric: Tensor) -> Tensor:
    """[K, K]: what merging two heads would lose, the share of the layer's key energy plus that of its value energy.

    `sums` are the layer's statistics; keys or values that they do not hold do not count. `metric` [K, V, V] is the output
    projection's of each head.
    """
    costs = torch.zeros(len(metric), len(metric), dtype=torch.float64)
    if "key_pairs" in sums and "queries" in sums and traits.pairs and traits.factors:
        costs += _turned_costs(torch.view_as_complex(sums["key_pairs"].contiguous()), sums["queries"], traits.pairs)
    elif "keys" in sums and not traits.pairs and traits.factors:
        costs += _joint_costs(sums["keys"], sums["queries"].unflatten(0, (len(metric), -1)).sum(1))
    if "value_dimensions" in sums:
        share = len(sums["value_dimensions"]) // len(metric)
        energy = metric.diagonal(dim1=1, dim2=2).repeat_interleave(share, 0) / share
        costs += _single_costs((sums["value_dimensions"] * energy[:, :, None, None]).sum(0))
    return costs + _joint_costs(sums["values"], metric) if "values" in sums else costs


def _turned_costs(pairs: Tensor, queries: Tensor, count: int) -> Tensor:
    """Of keys on `count` rotated pairs, each to be one complex number: `pairs` complex [H, P, K, K], `queries` [H, D, D]."""
    diagonal = queries.diagonal(dim1=1, dim2=2)
    energy = diagonal[:, :count] + diagonal[:, count : 2 * count]
    return _single_costs((pairs * energy[:, :, None, None]).sum(0))


def _single_costs(moment: Tensor) -> Tensor:
    """Of numbers of which each two heads are to keep one: `moment` [P, K, K]."""
    power = moment.diagonal(dim1=1, dim2=2).real
    first, second, cross = power[:, :, None], power[:, None], moment.abs()
    smaller = (first + second) / 2 - (((first - second) / 2).square() + cross.square()).sqrt()
    return smaller.sum(0) / power.sum()


def _joint_costs(moment: Tensor, metric: Tensor) -> Tensor:
    """Of vectors that any linear map may take to one: `moment` [K·W, K·W] of all heads together, `metric` [K, W, W] of each."""
    count, width = metric.shape[:2]
    blocks, costs = moment.reshape(count, width, count, width), torch.zeros(count, count, dtype=torch.float64)
    total = sum(float((blocks[j, :, j] * metric[j]).sum()) for j in range(count))
    for a in range(count):
        for b in range(a):
            joint = torch.cat([torch.cat([blocks[i, :, j] for j in (a, b)], 1) for i in (a, b)])
            root = _root(torch.block_diag(metric[a], metric[b]) + 1e-9 * metric[a].diagonal().mean() * torch.eye(2 * width))
            lost = torch.linalg.eigvalsh(root.T @ joint @ root)[:width].clamp_min(0).sum()
            costs[a, b] = costs[b, a] = float(lost) / total
    return costs


def _root(metric: Tensor) -> Tensor:
    """R with R Rᵀ = `metric`; of one that rounding has made negative in a direction (queries that never go there), near it."""
    factor, failed = torch.linalg.cholesky_ex(metric)
    return factor if not int(failed) else powers(metric)[0]

"""Heads merged into one are a special case of a latent: the same closed forms, where both make the same choice."""

import pytest
import torch
from torch import Tensor

from upfit.convert.gqa.closed_form import merge_values, output_metric
from upfit.convert.mla.latent import separate, together

HEADS, KV_HEADS, V, E = 6, 3, 5, 26


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [1, V, KV_HEADS * V])
@pytest.mark.parametrize("seed", range(3))
def test_a_latent_of_values_alone_is_their_merge(seed: int, width: int) -> None:
    """What both make of the inputs for every head, by values of E inputs and outputs of every head."""
    values, outputs, x = drawn(KV_HEADS * V, E, seed=seed), drawn(HEADS, E, V, seed=seed + 1), drawn(200, E, seed=seed + 2)
    moment, owners = x.T @ x, torch.arange(HEADS) // (HEADS // KV_HEADS)
    metric = output_metric(outputs, owners, KV_HEADS)
    merged = merge_values(values @ moment @ values.T, metric, width)
    # Keys see other inputs, of which their part of the latent is not made.
    of_keys = torch.diag(drawn(E, seed=seed + 3).square() + 0.1)
    root = torch.linalg.cholesky(metric).T
    done = separate(drawn(4, E), root @ values, together(of_keys, moment), 0, width)
    ours = torch.linalg.solve(root, done.values @ done.down)
    torch.testing.assert_close(ours, merged.outputs.flatten(0, 1) @ merged.values @ values, rtol=1e-7, atol=1e-7)
    assert done.lost[1] == pytest.approx(merged.lost, abs=1e-9)

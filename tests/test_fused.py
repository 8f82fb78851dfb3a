"""Fused queries, keys and values: taken apart and joined again they are what they were, for weights, biases and outputs."""

import pytest
import torch
from torch import nn

from upfit.architecture.fused import Apart, By, Fused


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by", ["model", "group"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_apart_is_the_same_function(by: By, kv_heads: int, transposed: bool) -> None:
    fused = nn.Linear(6, (4 + 2 * kv_heads) * 3)
    hidden = torch.randn(2, 5, 6)
    expected = fused(hidden)
    if transposed:
        fused.weight = nn.Parameter(fused.weight.T.contiguous())
    arrangement = Fused(by, 4, kv_heads, 3, transposed)
    assert torch.equal(arrangement.join(*arrangement.split(fused.weight)), fused.weight)
    assert torch.allclose(Apart(fused, arrangement)(hidden), expected, atol=1e-6)


def test_a_group_is_its_queries_its_key_and_its_value() -> None:
    """Falcon's and GPT-NeoX's rows: [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    q, k, v = Fused("group", 4, 2, 1).split(torch.arange(8.0))
    assert q.tolist() == [0, 1, 4, 5] and k.tolist() == [2, 6] and v.tolist() == [3, 7]

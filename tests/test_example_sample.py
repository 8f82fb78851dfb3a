"""Which examples are held back from a fit."""

import pytest
import torch

from upfit.calibration.example_sample import hold_back
from upfit.examples import Example, Examples


def examples_of(sizes: list[int]) -> Examples:
    """As many documents as there are `sizes`, of so many examples each."""
    ids = torch.zeros(1, dtype=torch.int64)
    named = [Example({}, ids, ids, "", f"document {number}") for number, size in enumerate(sizes) for _ in range(size)]
    return Examples("text pairs", named, {})


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([1] * 16, [1, 1]),  # a document each
        ([16], [2]),  # one document alone
        ([8, 8], [2]),  # a whole one would be half of all
        ([1, 8, 7], [1, 1]),  # the smallest whole, and what is missing of the next
        ([20, 2, 2], [2, 1]),
        ([2], [1]),  # at least one
    ],
)
def test_one_example_of_eight_is_held_back_of_the_smallest_documents(sizes: list[int], held: list[int]) -> None:
    sample = hold_back(examples_of(sizes), {}, {})
    names = [example.document for example in sample.held]
    assert [names.count(name) for name in dict.fromkeys(names)] == held
    assert len(sample.held) + len(sample.fitted) == sum(sizes)
    assert not {id(example) for example in sample.held} & {id(example) for example in sample.fitted}

"""Multi-query attention is a latent with values alone in it: what one function makes of keys, the other makes too."""

import pytest
import torch

from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa import closed_form as heads
from upfit.convert.mla import slots
from upfit.convert.mla.layer import closed_form, metrics_of
from upfit.convert.mla.test_mathematics import HEADS, KV_HEADS, OWNERS, PAIRS, TOKENS, E, drawn, random_source, random_sums


@pytest.mark.parametrize("cut", [2, 1])
def test_keys_are_those_of_heads_that_are_merged_into_one(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of every query head against the one key, on the same sums, pair by pair of positions that stand still."""
    for room in (heads, slots):
        monkeypatch.setattr(room, "ALTERNATIONS", 2000)
    source = random_source()
    width, share = 2 * PAIRS, torch.ones(HEADS, dtype=torch.float64)
    source = type(source)(source.q[:, :width], source.k[:, :width], source.v, source.o, PAIRS, source.scaling)
    sums = random_sums(source, drawn(TOKENS, E, seed=31)) | {"share": share}
    latent = closed_form(source, sums, metrics_of(sums), [1] * PAIRS, 5, 1.0, cut)
    traits = AttentionTraits(True, True, False, True, True, PAIRS, tuple(range(width)), (1.0,) * PAIRS, None)
    joint = source.k.flatten(0, 1)
    moment = joint @ sums["keys"] @ joint.T
    merged = heads.merge_keys(traits, moment, sums["pairs"], sums["queries"], OWNERS, cut)
    assert latent.key.shape == (width + 5, E) and len(source.k) == KV_HEADS
    for head in range(HEADS):
        ours = latent.q[head].T @ latent.key[:width]
        theirs = (merged.queries[head] @ source.q[head]).T @ (merged.keys @ joint)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))

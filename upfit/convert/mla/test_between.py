"""Layers with something between their projections and the attention, or between that and o_proj, are given no latent."""

import pytest

from tests.watching import watch_type
from upfit.calibration.observe import Opaque
from upfit.convert.mla.watch_layer import check_projections


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "a gate or a norm lies between its attention and o_proj"),
        ("laguna", "a gate or a norm lies between its attention and o_proj"),
        ("bitnet", "a gate or a norm lies between its attention and o_proj"),
        ("gemma4_text", "its values are normed"),
    ],
)
def test_what_a_latent_does_not_have_is_refused(model_type: str, reason: str) -> None:
    for pair, traits, _ in watch_type(model_type):
        assert traits is not None and traits.values
        with pytest.raises(Opaque, match=f"{pair.layer.path}: {reason}"):
            check_projections(pair, traits)


def test_plain_layers_are_not() -> None:
    for pair, traits, _ in watch_type("qwen3"):
        assert traits is not None
        check_projections(pair, traits)

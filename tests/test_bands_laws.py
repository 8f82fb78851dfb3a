"""The laws of aligned merging over every supported type, by what its layers allow: keys that nothing turns, pairs that turn,
norms and gates that lie between.

Heads that are one merge without loss, even when each is in a basis of its own; of heads that have nothing in common the closed
form keeps more than their mean, in every layer.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.aligning import disguised, inputs_of, layer_errors, mean, merge, written
from tests.test_aligned_laws import architecture_of, equal_heads
from tests.tiny import BUILDABLE, tiny_model
from tests.watching import watch_folder
from upfit.architecture.attention import Attention
from upfit.architecture.layers import Architecture
from upfit.architecture.listing import watched_bands
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.plan import Plan
from upfit.convert.gqa.recipe import PARTS

# Keys that turn, that are free, both, behind norms with and without scales; values before gates of dimensions or heads, a norm.
OFTEN = ("llama", "gpt2", "phi", "qwen3", "llama4_text", "qwen3_next", "laguna", "bitnet", "gemma4_text", "t5")
ALIGNED = [name for name, bands in watched_bands().items() if bands]
NORMED_OUTPUT = ("bitnet",)
EXACT = 1e-6  # a share of the energy, in float32


def sampled(name: str) -> Any:
    return name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)


def saved(model_type: str, folder: Path) -> tuple[list[Any], int]:
    """A tiny model in `folder`/source; three batches of inputs, and the next smaller number of key/value heads."""
    if model_type not in BUILDABLE:
        pytest.skip(f"the installed transformers has no {model_type}")
    model = tiny_model(model_type)
    model.save_pretrained(folder / "source")
    fewer = architecture_of(folder / "source").allowed_kv_heads()[:-1]
    if not fewer:
        pytest.skip("its tiny model has one key/value head already")
    return [inputs_of(model, seed) for seed in range(4)], fewer[-1]


@pytest.mark.parametrize("model_type", map(sampled, ALIGNED))
def test_disguised_heads_are_found_again_by_what_a_layer_allows(model_type: str, tmp_path: Path) -> None:
    inputs, fewer = saved(model_type, tmp_path)
    equal_heads(tmp_path / "source", tmp_path / "equal", fewer)
    traits = {pair.layer.path: traits for pair, traits, _ in watch_folder(tmp_path / "equal", inputs[0])}
    generator = torch.Generator().manual_seed(0)

    def plan(architecture: Architecture, options: Any) -> Plan:
        changed = [layer for layer in architecture.layers if layer.geometry.kv_heads > fewer and traits.get(layer.path)]
        wanted = (*PARTS, "q", "o", "q_bias")
        return Plan(
            architecture.config, tuple(layer.rule(wanted, _change(traits[layer.path]), "disguised") for layer in changed)
        )

    def _change(own: AttentionTraits | None) -> Any:
        def change(attention: Attention) -> Attention:
            return attention if own is None else disguised(attention, own, generator, model_type not in NORMED_OUTPUT)

        return change

    written(plan, tmp_path / "equal", tmp_path / "disguised")
    same = layer_errors(tmp_path / "equal", tmp_path / "disguised", inputs[3])
    assert max(same.values()) < EXACT, "the disguise is no disguise"
    records = merge(tmp_path / "disguised", tmp_path / "merged", inputs[:3], fewer)
    if model_type in OFTEN:  # of others, cross-attention in all, scores may hardly vary, and their error is a share of that
        assert max([record["merged_error"] or 0 for record in records.values()]) < EXACT, "its scores are not the layer's"
    mean(tmp_path / "disguised", tmp_path / "mean", fewer)
    merged, averaged = (layer_errors(tmp_path / "equal", tmp_path / name, inputs[3]) for name in ("merged", "mean"))
    assert max(merged.values()) < EXACT, merged
    assert min(averaged[path] for path, own in traits.items() if own and own.values and path in averaged) > 100 * EXACT


@pytest.mark.parametrize("model_type", map(sampled, ALIGNED))
def test_every_layer_loses_less_than_by_the_mean(model_type: str, tmp_path: Path) -> None:
    """Of random weights, whose heads have nothing in common; before any refit, on inputs that were not fitted."""
    inputs, fewer = saved(model_type, tmp_path)
    records = merge(tmp_path / "source", tmp_path / "merged", inputs[:3], fewer)
    mean(tmp_path / "source", tmp_path / "mean", fewer)
    merged, averaged = (layer_errors(tmp_path / "source", tmp_path / name, inputs[3]) for name in ("merged", "mean"))
    assert records and all(merged[path] < averaged[path] for path in records if path in merged), (merged, averaged)

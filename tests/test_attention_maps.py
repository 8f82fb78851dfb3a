"""Attention maps: those that are kept are those that reach the values, of the heads that look at the answer, in every form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.folders import save_tiny
from tests.records import evaluate
from tests.tiny import tiny_model
from upfit import provenance
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.evaluate.probes.attention_maps import (
    all_maps,
    choose,
    head_maps,
    places,
    record_by_head,
    record_maps,
    watching,
)
from upfit.output import Output, to_json
from upfit.provenance import head_order

QUIET = Output(quiet=True)
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("gqa", {"kv_heads": 2, "method": "mean"}),
    ("mqa", {"method": "mean"}),
    ("diff", {"variant": "v2"}),
    ("diff", {"variant": "dex"}),
    ("cope", {"positions": 6, "span": 20, "gates": "constant"}),
]
TOLERANCE = 1e-5  # float32, two orders of summation


def converted(folder: Path, recipe: str, options: dict[str, Any]) -> tuple[Path, Path]:
    source, found = save_tiny(folder / "source"), find_recipes()[recipe]
    out = folder / "out"
    convert(found, str(source), out, found.options(**options), Settings(verify=False), QUIET)
    return source, out


def shaken(model: nn.Module) -> Any:
    """Away from its start, where what a conversion adds does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_as_eager(model: Any) -> None:
    """The maps that were watched are those that the model itself says it used."""
    ids = torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(0))
    watched = all_maps(model, ids.numpy())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(ids[None], use_cache=False, output_attentions=True).attentions
    assert len(watched) == len(told) > 0
    for ours, theirs in zip(watched, told, strict=True):
        assert ours.shape == theirs[0].shape
        assert torch.allclose(ours, theirs[0].float(), atol=TOLERANCE)


@pytest.mark.parametrize("recipe, options", FORMS)
def test_maps_of_converted_models_are_those_that_reach_the_values(tmp_path: Path, recipe: str, options: dict[str, Any]) -> None:
    _, out = converted(tmp_path, recipe, options)
    assert_as_eager(shaken(AutoModelForCausalLM.from_pretrained(out)))


def test_a_row_of_the_maps_is_that_query_s_with_its_own_lambda(tmp_path: Path) -> None:
    """λ of a differential pair depends on the token: the map of one query position takes that position's."""
    _, out = converted(tmp_path, "diff", {"variant": "v2"})
    model = shaken(AutoModelForCausalLM.from_pretrained(out))
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))

    def maps(row: int | None) -> list[torch.Tensor]:
        watched: list[torch.Tensor] = []
        with torch.no_grad(), watching(model, lambda seen: watched.append(head_maps(seen, row))):
            model(input_ids=ids, use_cache=False)
        return watched

    rows, whole = maps(17), maps(None)
    assert len(rows) == len(whole) > 0
    for row, layer in zip(rows, whole, strict=True):
        torch.testing.assert_close(row[:, 0], layer[:, 17], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_are_in_the_maps(model_type: str) -> None:
    assert_as_eager(shaken(tiny_model(model_type)))


def test_the_heads_with_most_are_chosen_and_kept_to_the_diagonal() -> None:
    by_head = record_by_head([[[0.1, 0.5], [0.3, 0.3, 0.00001]], [[0.3, 0.7], [0.3, 0.3, 0.0]]])
    assert by_head == [[0.2, 0.6], [0.3, 0.3, 0.0]]
    assert choose(by_head, 3) == [(0, 1), (1, 0), (1, 1)]
    maps = [torch.tensor([[[1.0, 0.0], [-0.000001, 0.123456]]])]
    told = {"layer": 0, "head": 0, "own_head": 0, "weights": [[1.0], [0.0, 0.1235]]}
    assert record_maps(maps, [(0, 0), (0, 1), (1, 0)], [[0]]) == [told]


def test_heads_are_followed_through_merging(tmp_path: Path) -> None:
    """Aligned merging sorts heads by groups: where one went, the history says; a head's number stays that of the source."""
    step = {"verb": "convert gqa", "measurements": {"layers": [{"groups": [[0, 2], [1, 3]]}, {"groups": None}]}}
    by_head = [[0.0] * 8, [0.0] * 8]
    assert places([step], by_head) == [[0, 1, 4, 5, 2, 3, 6, 7], list(range(8))]
    again = {"verb": "convert mqa", "measurements": {"layers": [{"groups": [[1, 0]]}, {}]}}
    assert places([step, {"verb": "uptrain", "measurements": {}}, again], by_head)[0] == [4, 5, 0, 1, 6, 7, 2, 3]
    for told_by in ([step], [again], [step, again]):  # the older way to say it, and today's, of the recipe itself
        newer = [{"verb": one["verb"], "measurements": {"head_order": head_order(one, [8, 8])}} for one in told_by]
        assert places(newer, by_head) == places(told_by, by_head)
    for damaged in ([[0, 0, 1, 2, 3, 4, 5, 6], None], [[7, 6, 5, 4, 3, 2, 1, 0]], "none", [["0"] * 8, {}]):
        told: dict[str, Any] = {"verb": "convert mine", "measurements": {"head_order": damaged}}
        assert places([told], by_head) == [list(range(8))] * 2
    source, out = converted(tmp_path, *FORMS[0])
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    steps = provenance.read(out)
    for layer in model.model.layers:  # the same function, its key/value heads and their query heads in another order
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.data = weight.data.view(4, 8, -1)[[0, 2, 1, 3]].flatten(0, 1)
        weight = layer.self_attn.o_proj.weight
        weight.data = weight.data.view(-1, 4, 8)[:, [0, 2, 1, 3]].flatten(1)
    save_tiny(out, model)
    steps[0]["measurements"]["layers"] = [{"groups": [[0, 2], [1, 3]]}] * 2
    provenance.write(out, steps)
    text = tmp_path / "text.txt"
    text.write_text("some words and more of them, again and again. " * 40, encoding="utf-8")
    asked = Options(against=str(source), data=[str(text)], length=64, windows=2, probe=["needle"], attention_maps=4)
    result = evaluate(str(out), Options(**{**vars(asked), "probe_samples": 2, "probe_length": [90]}), QUIET)
    after, before = (result[key]["probes"]["needle"] for key in ("model", "against"))
    assert np.allclose(after["attention_by_head"], before["attention_by_head"], atol=2e-4)
    for ours, theirs in zip(after["maps"]["heads"], before["maps"]["heads"], strict=True):
        assert [0, 2, 1, 3][theirs["head"]] == ours["own_head"] and ours["head"] == theirs["head"] == theirs["own_head"]
        assert np.allclose(np.concatenate(ours["weights"]), np.concatenate(theirs["weights"]), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, options", [FORMS[0], FORMS[2]])
def test_the_verb_keeps_the_same_heads_before_and_after(tmp_path: Path, recipe: str, options: dict[str, Any]) -> None:
    source, out = converted(tmp_path, recipe, options)
    text = tmp_path / "text.txt"
    text.write_text("some words and more of them, again and again. " * 40, encoding="utf-8")
    asked = Options(against=str(source), data=[str(text)], length=64, windows=2, probe=["needle"], probe_samples=3)
    asked = Options(**{**vars(asked), "probe_length": [100], "attention_maps": 3})
    told = evaluate(str(out), asked, QUIET)
    after, before = (told[key]["probes"]["needle"] for key in ("model", "against"))
    heads = [[(one["layer"], one["head"]) for one in side["maps"]["heads"]] for side in (after, before)]
    assert heads[0] == heads[1] == choose(before["attention_by_head"], 3)
    assert np.mean(before["attention_by_head"]) == pytest.approx(before["attention_on_answer"]["mean"], abs=1e-4)
    shown = before["maps"]
    first, last = shown["needle"]
    said = "".join(shown["tokens"])
    assert len(shown["tokens"]) <= 96 and shown["tokens"][first:last] == shown["tokens"][shown["asks"] + 1 :]
    assert f"is{''.join(shown['tokens'][first:last])}." in said
    weights = shown["heads"][0]["weights"]
    assert [len(row) for row in weights] == list(range(1, len(shown["tokens"]) + 1))
    assert sum(weights[-1]) == pytest.approx(1.0, abs=0.01)
    assert "maps" not in evaluate(str(out), Options(**{**vars(asked), "attention_maps": 0}), QUIET)["model"]["probes"]["needle"]


def test_maps_without_a_needle_are_refused() -> None:
    with pytest.raises(UpfitError, match="--attention-maps .* add --probe needle"):
        evaluate("nowhere", Options(attention_maps=2), QUIET)


def test_json_has_a_row_of_numbers_on_one_line() -> None:
    value = {"a": [[1, -2.5], [1e-9, None]], "b": ["1,\n 2", "x"], "c": [], "d": [{"e": [3]}], "f": "[\n 1\n]"}
    text = to_json(value)
    assert json.loads(text) == value
    assert "[1, -2.5]" in text and "[1e-09, null]" in text and '"e": [3]' in text

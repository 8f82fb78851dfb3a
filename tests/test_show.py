"""What `upfit show` says of a model: nothing that is refused, and what its layers see."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, T5GemmaConfig

from tests.tiny import tiny_model
from upfit import api
from upfit.convert.describe import sliding_windows
from upfit.convert.recipe import find_recipes
from upfit.convert.result import Conversion
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.results import Origin


def described(folder: Path, model_type: str, **changes: Any) -> api.Any:
    tiny_model(model_type, **changes).save_pretrained(folder)
    return api.describe(folder)


def test_an_odd_number_of_heads_is_offered_diffllama_only_as_it_goes(tmp_path: Path) -> None:
    odd = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    (line,) = [line for line in described(tmp_path / "odd", "llama", **odd).can_become if line.startswith("diff")]
    assert line == "diff --variant v2|v2-static|dex|split, or --variant diffllama --exact"
    even = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (line,) = [line for line in described(tmp_path / "even", "llama", **even).can_become if line.startswith("diff")]
    assert line == "diff --variant v2|v2-static|dex|split|diffllama"


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("llama", {}, {}),
        ("mistral", {"sliding_window": 16, "num_hidden_layers": 2}, {"16": 2}),
        ("mistral", {"sliding_window": None}, {}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, {}),
        (
            "gemma2",
            {"sliding_window": 8, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
            {"8": 1},
        ),
    ],
)
def test_sliding_windows_are_told(tmp_path: Path, model_type: str, changes: dict[str, Any], windows: dict[str, int]) -> None:
    told = described(tmp_path, model_type, **changes)
    assert told.sliding_windows == windows
    rows = [line for line in str(told).splitlines() if line.startswith("sliding window")]
    assert rows == [f"sliding window    {int(w):,} tokens in {n} of {told.layers} layers" for w, n in windows.items()]


def test_sliding_windows_are_the_decoders() -> None:
    """Of a config with two parts, not the encoder's, and of a text model inside another, its own."""
    part = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    both = T5GemmaConfig(encoder={**part, "sliding_window": 8}, decoder={**part, "sliding_window": 16})
    assert sliding_windows(both.to_dict()) == {"16": 2}
    inner = Gemma3Config(text_config={**part, "sliding_window": 32})
    assert sliding_windows(inner.to_dict()) == {"32": 2}


def test_one_key_value_head_is_not_made_one_again(tmp_path: Path) -> None:
    """And `show` does not offer it."""
    told = described(tmp_path / "one", "llama", num_key_value_heads=1)
    assert not any(line.startswith("mqa") for line in told.can_become)
    with pytest.raises(UpfitError, match="has one key/value head already, so mqa would copy it"):
        api.convert(tmp_path / "one", tmp_path / "out", to="mqa", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"] and "mqa" in find_recipes()


def test_a_copy_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = described(tmp_path / "model", "llama").kv_heads[0]
    api.convert(tmp_path / "model", tmp_path / "out", to="gqa", kv_heads=heads, verify=False)
    assert f"the model has {heads} key/value heads already: its weights are copied as they are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("added", "words"), [(0, "2.0 k parameters, "), (1500, "3.5 k parameters (+1.5 k), "), (-500, "1.5 k parameters, ")]
)
def test_what_was_added_is_told(added: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    origin = Origin("model", None, None)
    Conversion("gqa", origin, "out", False, {}, [8000, 8000], [2000, 2000 + added], [4, 2], [64, 32], []).show(Output())
    told = capsys.readouterr().out
    assert words in told and ("(+" in told) == (added > 0)


def test_windows_are_those_of_the_text_and_of_its_decoder() -> None:
    text = {"model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text |= {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    assert sliding_windows({"model_type": "gemma3", "text_config": text}) == {"16": 2}

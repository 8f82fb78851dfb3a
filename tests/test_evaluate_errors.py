"""What `upfit evaluate` cannot measure is told in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
)

from tests.records import evaluate
from tests.test_evaluate import POSITIONS, documents, quiet, settings, tiny_llama, tiny_tokenizer
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.evaluate.load import check_model, load_tokenizer, pick_device
from upfit.evaluate.loss import token_losses


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models and a data file, by name."""
    root = tmp_path_factory.mktemp("models")
    for name, model in {"a": tiny_llama(), "near": tiny_llama(noise=0.01), "grouped": tiny_llama(kv_heads=2)}.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    tiny_llama().save_pretrained(root / "other tokens")
    tiny_tokenizer(merges=5, bos=True).save_pretrained(root / "other tokens")
    tiny_llama().save_pretrained(root / "no tokenizer")
    (root / "text.txt").write_text("\n".join(document.text for document in documents()))
    (root / "short.txt").write_text("Too short.")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("nowhere/at/all", {}, "no model folder"),
        ("no tokenizer", {}, "no tokenizer has no tokenizer|has no tokenizer"),
        ("a", {"against": "no tokenizer"}, "has no tokenizer"),
        ("a", {"data": ["/nowhere.txt"]}, "not here"),
        ("a", {"data": "short.txt"}, "too short"),
        ("a", {"data": "a/model.safetensors"}, "not UTF-8|zero bytes"),
        ("a", {"length": POSITIONS + 1}, f"give at most {POSITIONS}"),
        ("a", {"length": 1}, "--length got 1"),
        ("a", {"speed": True, "speed_repeats": 1}, "--speed-repeats got 1"),
        ("a", {"speed": True, "speed_steps": 500}, "leaves no room"),
        ("a", {"dtype": "int8"}, "--dtype 'int8'"),
        ("a", {"device": "cuda:99"}, "--device cuda:99"),
        ("text.txt", {}, "is a file"),
    ],
)
def test_errors_are_one_line(folders: dict[str, str], model: str, changes: dict[str, Any], message: str) -> None:
    if isinstance(changes.get("data"), str):
        changes = changes | {"data": [str(Path(folders["a"]).parent / changes["data"])]}
    if changes.get("against") in folders:
        changes = changes | {"against": folders[changes["against"]]}
    with pytest.raises(UpfitError, match=message) as caught:
        evaluate(folders.get(model, model), settings(folders, **changes), quiet())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "line"), [(RuntimeError("no such thing\nand a stack"), "no such thing"), (AssertionError(), "AssertionError")]
)
def test_of_an_error_the_first_line_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UpfitError) as caught:
        pick_device("cpu")
    assert str(caught.value) == f"--device cpu cannot be used here ({line}); try cpu or auto"


def fails(model: Any, folder: Path, folders: dict[str, str]) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(UpfitError) as caught:
        evaluate(str(folder), settings(folders), quiet())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    config = BertConfig(
        vocab_size=330, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    assert "not a causal language model" in fails(BertLMHeadModel(config), tmp_path, folders)


@pytest.mark.parametrize("ids", [[5, 6, 7, 8], [5, 6, 7, 5], [63, 6, 7, 63]])
def test_another_last_token_is_another(ids: list[int]) -> None:
    """Also where the last token is the first one, or the last of the vocabulary too: what looks ahead is seen to."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    with pytest.raises(UpfitError, match="a later token changes what it predicts before it"):
        check_model(BertLMHeadModel(config).eval(), torch.tensor(ids), "model")
    check_model(tiny_llama(), torch.tensor(ids), "model")


def test_a_model_whose_cache_is_broken_still_has_a_loss() -> None:
    def without_cache(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        assert keywords["use_cache"] is False

    model, ids = tiny_llama(), torch.arange(3, 20)
    whole = token_losses(model, ids[None])
    model.register_forward_pre_hook(without_cache, with_kwargs=True)
    check_model(model, ids, "model")
    assert (token_losses(model, ids[None]) == whole).all()


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("nan")
    assert "not finite in 12 of 12 windows" in fails(model, tmp_path, folders)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(2)))
    assert "1 missing keys, e.g. model.layers.1.mlp.up_proj.weight" in fails(model, tmp_path, folders)


def test_an_id_outside_the_embedding_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(100)
    assert "embeds 100 tokens but its tokenizer gives id" in fails(model, tmp_path, folders)


@pytest.mark.parametrize(("words", "line"), [(["no merges\nat all\n"], "no merges"), ([], "ValueError")])
def test_a_tokenizer_that_does_not_load_is_told_by_its_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError(*words)

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(UpfitError, match=f"model has a tokenizer that does not load: {line}$"):
        load_tokenizer(Source(tmp_path, "model"))


def test_options_import_no_torch() -> None:
    code = "import sys, upfit.evaluate.options; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

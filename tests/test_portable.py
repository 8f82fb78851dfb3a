"""What is pushed or reported tells no place of the machine it was made on: searched for in every byte."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny
from tests.hub import Hub
from tests.records import evaluate, push, report
from tests.test_push import REPO, hub  # noqa: F401 - the fixture
from tests.uptraining import QUIET, config, text
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.portable import known_places, portable
from upfit.publish.options import Options
from upfit.publish.portable import sent, settings, words
from upfit.publish.push import pack
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"calibration": ["../my texts/a.txt", "./b", "data/deep/c.jsonl", "~/d"]},
         {"calibration": ["a.txt", "b", "c.jsonl", "d"]}),
        ({"against": "org/model@main", "tokenizer": "../t", "teacher": "none"},
         {"against": "org/model@main", "tokenizer": "t", "teacher": "none"}),
        ({"folder": "/a b/code=0.7,/a b/prose=0.3"}, {"folder": "code=0.7,prose=0.3"}),
        ({"name": ".", "path": "/home/me/my model", "revision": None}, {"name": "my model", "revision": None}),
        ({"name": "x", "path": "/srv/my models/x", "why": "read /srv/my models/x, not /srv/my models/y"},
         {"name": "x", "why": "read x, not y"}),
        ({"command": "upfit convert gqa '../my models/src' ./out --calibration 'file:///home/me/a%20b.txt'"},
         {"command": "upfit convert gqa src out --calibration 'a b.txt'"}),
        ({"command": "it's broken /home/me/x"}, {"command": "it's broken x"}),
        (["file:///home/me/x.txt", "see file://host/a/b.", "C:\\Users\\me\\x", "c:/Users/me/x y", "\\\\host\\share\\x.bin"],
         ["x.txt", "see b.", "x", "x y", "x.bin"]),
        (["at ~/models/x, ../y/z and ./w", "in '/home/m e/b' there", "PYTHONPATH=/a/b:/c/d", "1 / 2", "and/or", "km/h"],
         ["at x, z and w", "in 'b' there", "PYTHONPATH=b:d", "1 / 2", "and/or", "km/h"]),
        (["https://a.b/c/d", "s3://bucket/key", "org/model", "3/4 of it", "tokens/s"],
         ["https://a.b/c/d", "s3://bucket/key", "org/model", "3/4 of it", "tokens/s"]),
        ({"/home/me/file": 1}, {"file": 1}),
    ],
)  # fmt: skip
def test_paths_of_every_kind_become_names(given: Any, wanted: Any) -> None:
    assert portable(given) == wanted
    assert portable(portable(given)) == portable(given)


def test_what_somebody_wrote_is_searched_for_places_alone() -> None:
    places = known_places({"path": "/data/my models/source"})
    for same in (
        "load('/path/to/model')",
        "<|/think|>",
        "{% if '/no_think' in x %}",
        "https://x.y/home/z",
        "and/or",
        "~5 tokens",
    ):
        assert words(same, places) == same
    assert words("from /data/my models/source, /home/me/x.txt, file:///c/d.", places) == "from source, x.txt, d."
    assert settings({"_name_or_path": "../up/model", "a": {"vocab_file": "/x/vocab.json"}}, places) == {
        "_name_or_path": "model",
        "a": {"vocab_file": "vocab.json"},
    }
    assert settings({"_name_or_path": "org/model", "chat_template": "{{ '/x' }}"}, places) == {
        "_name_or_path": "org/model",
        "chat_template": "{{ '/x' }}",
    }


def test_files_that_tell_no_place_go_as_they_are(tmp_path: Path) -> None:
    for name, content in (
        ("config.json", '{"a":1}'),
        ("metrics.jsonl", '{"tokens":1}\r\n'),
        ("tokenizer.json", '{"x":"/home/me"}'),
        ("LICENSE", "x"),
    ):
        (tmp_path / name).write_text(content)
        assert sent(name, tmp_path / name, []) is None
    (tmp_path / "metrics.jsonl").write_text('{"tokens":1}\n{"tokens":2,"note":"/home/me/x"}\n')
    assert sent("metrics.jsonl", tmp_path / "metrics.jsonl", []) == b'{"tokens":1}\n{"tokens": 2, "note": "x"}\n'


def test_weights_that_tell_a_place_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt", "from": "/home/me/x/y"})
    with pytest.raises(UpfitError, match="header of model.safetensors"):
        sent("model.safetensors", tmp_path / "model.safetensors", [])


def dirtied(model: Path, root: Path) -> None:
    """What other tools leave in a folder."""
    for name, more in (
        ("config.json", {"_name_or_path": str(model), "made_from": f"file://{root}/x y"}),
        ("tokenizer_config.json", {"name_or_path": str(model), "special_tokens_map_file": f"{root}/a b/special.json"}),
        ("generation_config.json", {"_from": f"{root}/x"}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    card = f"---\nbase_model: {model}\nlicense: mit\n---\n# Tuned\n\nA version of [{model}](https://huggingface.co/{model}).\n"
    (model / "README.md").write_text(card)


@pytest.mark.slow
def test_no_byte_of_a_push_or_a_report_tells_where_it_was_made(
    tmp_path: Path,
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model in a folder whose name has a space, called by a relative path: converted, uptrained, measured, pushed."""
    root = tmp_path / "my secret place"
    (root / "models").mkdir(parents=True)
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    model = save_tiny(root / "models" / "the model")
    dirtied(model, root)
    (root / "models" / "some text.txt").write_text("\n".join(text(seed) for seed in range(60)))
    recipe, source = find_recipes()["gqa"], "../models/the model"
    options = recipe.options(
        kv_heads=2, calibration=["../models/some text.txt"], calibration_tokens="1k", calibration_length=32
    )
    convert(recipe, source, Path("small one"), options, Settings(), QUIET)
    prepare(["../models/some text.txt"], Path("../to kens"), source, "text", QUIET)
    uptrain("./small one", "../to kens", Path("better one"), config(tokens="512", stages="distill"), False, False, QUIET)
    measured = EvaluateOptions(
        against=source, data=["../models/some text.txt"], length=32, windows=4, record=True, dtype="float32"
    )
    evaluate("./better one", measured, QUIET)
    with open("better one/metrics.jsonl", "a") as file:
        file.write(json.dumps({"tokens": 9, "note": f"kept in {root}/a b"}) + "\n")
    push("./better one", REPO, Options(license="mit"), None, QUIET)
    report("./better one", Path("page.html"), [], None, False)
    told = {**hub.files(REPO), "page.html": Path("page.html").read_bytes()}
    assert {"recipe.json", "README.md", "config.json", "tokenizer_config.json", "metrics.jsonl"} <= set(told)
    secrets = [str(tmp_path), "my secret place", "my%20secret", "../", "/tmp", "/home/", os.path.expanduser("~") + "/", "file:"]
    for name, content in told.items():
        if name == "tokenizer.json":
            secrets = [secret for secret in secrets if secret != "../"]
        for secret in secrets:
            assert secret.encode() not in content, (name, secret, content[max(0, content.find(secret.encode()) - 99) :][:199])
    recipe_told = json.loads(told["recipe.json"])["steps"]
    assert [step["source"]["name"] for step in recipe_told[:2]] == ["the model", "small one"]
    assert recipe_told[0]["options"]["calibration"] == ["some text.txt"]


def test_a_published_folder_can_be_packed_again(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    recipe = find_recipes()["gqa"]
    options = recipe.options(kv_heads=2, method="mean")
    convert(recipe, str(tmp_path / "m"), tmp_path / "o", options, Settings(), QUIET)
    first = pack(tmp_path / "o", REPO, Options(license="mit")).files
    for name, part in first.items():
        if isinstance(part, bytes):
            (tmp_path / "o" / name).write_bytes(part)
    again = pack(tmp_path / "o", REPO, Options(license="mit")).files
    assert {name: part for name, part in again.items() if isinstance(part, bytes)} == {
        name: part for name, part in first.items() if isinstance(part, bytes)
    }

"""Every verb that takes text sees the same documents of the same files, whatever the form and the name of the field."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.folders import save_tiny
from upfit import api
from upfit.architecture.layers import open_model
from upfit.checkpoint.reader import open_checkpoint
from upfit.cli import app
from upfit.convert.recipe import Fit, FitContext, get_recipe
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text import file_documents
from upfit.text.files import local_inputs, named_files

TEXTS = ["one\ntwo", "Größe 東京", "three"]
FIELDS = ("text", "body")  # of every row; the other one has other text


class Seen(UpfitError):
    """Ends a verb where it has its documents."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__("seen")
        self.texts = texts


def show(texts: Iterator[Any], *words: Any) -> None:
    """What stands at the place of the first function that a verb gives its documents to."""
    raise Seen([text if isinstance(text, str) else getattr(text, "text", None) or text[0] for text in texts])


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("uptrain.data.prepare.batches", "evaluate.evaluate.make_windows", "calibration.sample.make_sample"):
        monkeypatch.setattr(f"upfit.{place}", show)
    monkeypatch.setattr("upfit.longcontext.synth.write_segments", lambda folder, texts, *words: show(texts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def context(model: Path) -> Iterator[FitContext]:
    with open_checkpoint(model) as checkpoint:
        yield FitContext(model, *open_model(checkpoint), model.parent / "fit", Output(quiet=True))


CONVERSIONS: dict[str, dict[str, Any]] = {
    "gqa": {"kv_heads": 2},
    "mqa": {},
    "diff split": {"variant": "split"},
    "diff diffllama": {"variant": "diffllama"},
    "diff dex": {"variant": "dex", "heads": "entropy"},
    "cope": {},
}
VERBS = ["prepare", "synth", "evaluate", "calibrate", "predict", *CONVERSIONS]


def run(verb: str, name: str, field: str, context: FitContext, out: Path) -> None:
    """The verb up to its documents. Conversions begin where the model has been opened."""
    words: dict[str, Any] = {"field": field, "progress": False}
    model = context.folder
    if verb == "prepare":
        api.prepare(name, out, tokenizer=model, **words)
    elif verb == "synth":
        api.synth(name, out, tokenizer=model, **words)
    elif verb == "evaluate":
        api.evaluate(model, data=[name], **words)
    elif verb == "calibrate":
        api.calibrate(model, name, out.with_suffix(".safetensors"), **words)
    else:
        recipe = get_recipe("gqa" if verb == "predict" else verb.split()[0])
        options = recipe.options(**CONVERSIONS["gqa" if verb == "predict" else verb], calibration=[name], field=field)
        fit = recipe.plan(context.architecture, options)
        assert isinstance(fit, Fit)
        if verb == "predict":
            assert fit.preview is not None
            fit.preview(context)
        else:
            fit.run(context)


def seen(verb: str, name: str, field: str, context: FitContext, out: Path) -> list[str]:
    with pytest.raises(Seen) as caught:
        run(verb, name, field, context, out)
    return caught.value.texts


def rows(texts: list[str | None], field: str) -> bytes:
    (other,) = set(FIELDS) - {field}
    return b"".join(json.dumps({other: "other", field: text}).encode() + b"\n" for text in texts)


def written(folder: Path, form: str, field: str) -> list[str]:
    """Write a file `text.FORM`, or what its name stands for; the documents that it holds."""
    texts: list[str | None] = list(TEXTS)
    kind, _, special = form.partition(" ")
    if special == "null":
        texts.insert(1, None)
    whole = "\n".join(TEXTS).encode()
    content = whole if kind.startswith(("txt", "md")) else rows(texts, field)
    if special == "mark":
        content = b"\xef\xbb\xbf" + content
    path = folder / f"text.{kind}"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pydict({"other": ["other"] * len(texts), field: texts}), path)
    else:
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    return ["\n".join(TEXTS)] if kind.startswith(("txt", "md")) else TEXTS


PLAIN = ["txt", "md", "txt.gz", "txt mark"]
ROWS = ["jsonl", "json", "jsonl.gz", "parquet", "jsonl null", "parquet null", "jsonl mark"]


@pytest.mark.parametrize("form", [*PLAIN, *ROWS])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("stopped")
def test_every_verb_sees_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: FitContext, verb: str, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for field in FIELDS[: 1 + (form in ROWS)]:
        (tmp_path / field).mkdir()
        texts = written(tmp_path / field, form, field)
        name = f"~/{field}/text.{form.split()[0]}"
        assert seen(verb, name, field, context, tmp_path / f"out-{field}") == texts
        assert seen(verb, str(tmp_path / field), field, context, tmp_path / f"folder-{field}") == texts


@pytest.mark.parametrize("verb", VERBS)
def test_a_field_that_cannot_be_is_told_in_one_line(tmp_path: Path, context: FitContext, verb: str) -> None:
    for form in ("txt", "jsonl", "parquet"):
        written(tmp_path, form, "body")
        with pytest.raises(UpfitError) as caught:
            run(verb, str(tmp_path / f"text.{form}"), "words", context, tmp_path / "out")
        line = str(caught.value)
        assert "\n" not in line and ("; leave it out" if form == "txt" else "name the field with --field") in line
        assert ("is for .jsonl, .ndjson, .json, .parquet files" if form == "txt" else "(found: ") in line


def test_plain_text_may_stand_beside_files_that_have_the_field(tmp_path: Path) -> None:
    texts = [*written(tmp_path, "jsonl", "body"), *written(tmp_path, "txt", "body")]
    names = [str(tmp_path / "text.jsonl"), str(tmp_path / "text.txt")]
    assert local_inputs(names, "body") == named_files(names, "--data", "body") == [Path(name) for name in names]
    assert [document.text for document in file_documents(names, 10**6, field="body")] == texts
    assert local_inputs(["org/name", names[1]], "body") == [Path(names[1])]  # the hub's rows have fields


COMMANDS = {
    "prepare": "prepare TEXT out --tokenizer MODEL",
    "synth": "synth TEXT out --tokenizer MODEL",
    "evaluate": "evaluate MODEL --data TEXT",
    "calibrate": "calibrate MODEL TEXT s.safetensors",
    "predict": "convert gqa MODEL out --kv-heads 2 --calibration TEXT --dry-run",
    "gqa": "convert gqa MODEL out --kv-heads 2 --calibration TEXT",
    "mqa": "convert mqa MODEL out --calibration TEXT",
    "diff": "convert diff MODEL out --variant split --calibration TEXT",
    "cope": "convert cope MODEL out --calibration TEXT",
}


def command(words: str, **named: Path) -> Any:
    """What `upfit` raises for these words and `--field body`."""
    spelled = [str(named.get(word, word)) for word in words.split()]
    return CliRunner().invoke(app, [*spelled, "--field", "body", "-q"]).exception


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.usefixtures("stopped")
def test_every_verb_has_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "jsonl", "body")
    told = command(words, MODEL=model, TEXT=tmp_path / "text.jsonl")
    assert isinstance(told, Seen) and told.texts == TEXTS
    written(tmp_path, "txt", "body")
    assert "--field body is for .jsonl" in str(command(words, MODEL=model, TEXT=tmp_path / "text.txt"))


def test_what_knows_no_field_refuses_one(tmp_path: Path, model: Path) -> None:
    for words in ("evaluate MODEL", "convert gqa MODEL out --kv-heads 2", "convert diff MODEL out", "convert cope MODEL out"):
        told = str(command(words, MODEL=model))
        assert told.startswith(f"--field goes with --{'data' if words.startswith('evaluate') else 'calibration'}; add"), told
    told = str(command("convert gqa MODEL out --kv-heads 2 --calibration s.safetensors", MODEL=model))
    assert told.startswith("--field body is for .jsonl")


def test_the_field_is_kept_with_the_text(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows(["some words of text " * 20] * 20, "body"))
    (tmp_path / "b.jsonl").write_bytes(rows(["some words of text " * 20] * 20, "text"))
    sizes: dict[str, Any] = {"calibration_tokens": "1k", "calibration_length": 64}
    calibrated = api.calibrate(model, tmp_path / "a.jsonl", tmp_path / "s.safetensors", field="body", progress=False, **sizes)
    words = [{"calibration": [str(tmp_path / "a.jsonl")], "field": "body", **sizes}, {"calibration": [calibrated.out]}]
    words.append({"calibration": [str(tmp_path / "b.jsonl")], **sizes})
    told, weights = [], []
    for number, options in enumerate(words):
        api.convert(model, tmp_path / str(number), to="gqa", kv_heads=2, progress=False, verify=False, **options)
        step = json.loads((tmp_path / str(number) / "recipe.json").read_text())["steps"][-1]
        told.append((step["measurements"]["calibration"].get("field"), "--field body" in step["command"]))
        weights.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert told == [("body", True), ("body", False), (None, False)] and weights[0] == weights[1] == weights[2]

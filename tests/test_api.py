"""`upfit.api` and the command line are two doors of one house: the same record, the same text, the same errors."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from tests.folders import save_tiny
from tests.json_schemas import ANSWERS, FOLDER, schema
from tests.uptraining import make_workshop, text
from upfit import api
from upfit.cli import app
from upfit.convert.recipe import find_recipes
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.probes.summaries import Depths, Needle, Position, SyntheticTask
from upfit.options import as_kind
from upfit.results import Part, Result

ROOT = Path(__file__).parent.parent
LONGEST_IMPORT = 0.3  # seconds; of several tries the best, since other tests run beside this one
TIMED = {"seconds", "tokens_per_second", "date", "median", "low", "high", "memory"}
BUDGET: dict[str, Any] = {"tokens": 512, "length": 32, "batch_tokens": 128, "holdout": 4, "dtype": "float32"}
MEASURE: dict[str, Any] = {"length": 32, "windows": 4, "dtype": "float32"}
PROBES = ["needle", "position", "counting", "key-value"]
SLOW = {"uptrain", "uptrain: stages", "convert"}
ASK: dict[str, Any] = {"probe": PROBES, "probe_samples": 4, "probe_depths": 2, "attention_maps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases need: teacher, student (converted), data (token shards), text, a recorded and a foldable model."""
    folder = tmp_path_factory.mktemp("place")
    make_workshop(folder)
    (folder / "text.txt").write_text(" ".join(text(seed) for seed in range(40)), encoding="utf-8")
    (folder / "run.toml").write_text('holdout = 4\ndtype = "float32"\n', encoding="utf-8")
    silent: dict[str, Any] = {"progress": False}
    api.convert(folder / "teacher", folder / "dex", to="diff", variant="dex", **silent)
    api.convert(folder / "teacher", folder / "small", to="gqa", kv_heads=2, method="mean", **silent)
    api.evaluate(folder / "small", against=folder / "teacher", data=folder / "text.txt", record=True, **MEASURE, **silent)
    return folder


Case = tuple[str, Callable[[Path], Result]]
CASES: dict[str, Case] = {  # the words of a command, and the same as a call
    "convert": (
        "convert gqa P/teacher out --kv-heads 2 --calibration P/text.txt --calibration-tokens 2k --max-shard-size 20KB",
        lambda p: api.convert(
            p / "teacher",
            "out",
            to="gqa",
            kv_heads=2,
            calibration=p / "text.txt",
            calibration_tokens="2k",
            max_shard_size=20_000,
            progress=False,
        ),
    ),
    "convert: tried": (
        "convert gqa P/teacher out --kv-heads 2 --calibration P/text.txt --calibration-tokens 2k --dry-run",
        lambda p: api.convert(
            str(p / "teacher"),
            Path("out"),
            to="gqa",
            kv_heads=np.int64(2),
            calibration=[p / "text.txt"],
            calibration_tokens="2k",
            dry_run=True,
            progress=False,
        ),
    ),
    "convert: unchecked": (
        "convert mqa P/teacher out --method first --no-verify",
        lambda p: api.convert(p / "teacher", "out", to="mqa", method="first", verify=False, progress=False),
    ),
    "merge": ("merge P/dex out", lambda p: api.merge(p / "dex", "out", progress=False)),
    "calibrate": (
        "calibrate P/teacher P/text.txt out.safetensors --calibration-tokens 2k",
        lambda p: api.calibrate(p / "teacher", p / "text.txt", "out.safetensors", calibration_tokens=2000, progress=False),
    ),
    "prepare": (
        "prepare P/text.jsonl out --tokenizer P/teacher --tokens 1k",
        lambda p: api.prepare(p / "text.jsonl", "out", tokenizer=p / "teacher", tokens=1000, progress=False),
    ),
    "synth": (
        f"synth {Path(json.__file__).parent} out --tokenizer {embedded_model()} --items 20 --min-tokens 512 --max-tokens 1024",
        lambda p: api.synth(
            Path(json.__file__).parent,
            "out",
            tokenizer=embedded_model(),
            items=20,
            min_tokens=512,
            max_tokens=1024,
            progress=False,
        ),
    ),
    "synth: a part": (
        f"synth {Path(json.__file__).parent} out --tokenizer {embedded_model()} --items 20 --shard 0/2",
        lambda p: api.synth(
            Path(json.__file__).parent, "out", tokenizer=embedded_model(), items=20, shard="0/2", progress=False
        ),
    ),
    "plan": (
        "plan P/small --share 5% --original-tokens 2T --length 64 --stages layerwise=10%,distill",
        lambda p: api.plan(
            p / "small", share=0.05, original_tokens=2_000_000_000_000, length=64, stages="layerwise=10%,distill"
        ),
    ),
    "uptrain": (
        "uptrain P/student P/data out --tokens 512 --length 32 --batch-tokens 128 --config P/run.toml",
        lambda p: api.uptrain(p / "student", p / "data", "out", progress=False, **BUDGET),
    ),
    "uptrain: stages": (
        "uptrain P/student P/data out --tokens 512 --length 32 --batch-tokens 128 --config P/run.toml "
        "--stages layerwise=50%,distill",
        lambda p: api.uptrain(p / "student", p / "data", "out", stages="layerwise=50%,distill", progress=False, **BUDGET),
    ),
    "evaluate": (
        "evaluate P/small --against P/teacher --data P/text.txt --length 32 --windows 4 --dtype float32 --speed "
        "--speed-lengths 16 --speed-steps 2 --speed-repeats 3",
        lambda p: api.evaluate(
            p / "small",
            against=p / "teacher",
            data=p / "text.txt",
            speed=True,
            speed_lengths=16,
            speed_steps=2,
            speed_repeats=3,
            progress=False,
            **MEASURE,
        ),
    ),
    "report": (
        "report P/small out.html --png plots",
        lambda p: api.report(p / "small", "out.html", png="plots"),
    ),
    "compare": ("compare P/small P/teacher", lambda p: api.compare([p / "small", str(p / "teacher")])),
    "push": (
        "push P/small alice/small --dry-run",
        lambda p: api.push(p / "small", "alice/small", dry_run=True, progress=False),
    ),
    "push: all": (
        "push P alice/x --all --dry-run --license mit",
        lambda p: api.push(p, "alice/x", all=True, dry_run=True, license="mit", progress=False),
    ),
    "show": ("show P/small", lambda p: api.describe(p / "small")),
}


def timeless(value: Any, folder: Path) -> Any:
    """A record without what differs from run to run: times, and the folder in which it was made."""
    if isinstance(value, dict):
        return {key: 0 if key in TIMED else timeless(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [timeless(part, folder) for part in value]
    return value.replace(str(folder), "HERE") if isinstance(value, str) else value


def said(printed: str, folder: Path) -> str:
    """A text without its times, and with one space for many: columns of times have widths."""
    printed = re.sub(r"in \d+ s|\d+ tokens/s|(?<=Would take ).*", "TIMED", printed.replace(str(folder), "HERE"))
    printed = re.sub(r"(?m)^(.*(model|against|ratio) +│ +16 │).*$", r"\1", printed)
    return re.sub(r"[ ━─]+", " ", printed).strip()


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_both_doors_tell_the_same(case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words, call = CASES[case]
    command = re.sub(r"(?<!\S)P(?=/|\s)", str(place), words).split()
    folders = [tmp_path / name for name in ("json", "text", "call")]
    for folder in folders:
        folder.mkdir()

    def run(folder: Path, *more: str) -> str:
        monkeypatch.chdir(folder)
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.stdout

    told, printed = run(folders[0], "--json"), run(folders[1])
    monkeypatch.chdir(folders[2])
    answer = call(place)
    record = timeless(answer.record(), folders[2])
    assert json.dumps(record) == json.dumps(timeless(json.loads(told), folders[0])), "in the same order, too"
    assert said(str(answer), folders[2]) == said(printed, folders[1]) and repr(answer) == str(answer)
    validate(case, told)
    if isinstance(answer.record(), dict):
        beside = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer) if "beside" in field.metadata}
        assert type(answer).read(answer.record(), **beside) == answer


def validate(case: str, told: str) -> None:
    wanted = json.loads((FOLDER / f"{case.split(':')[0]}.json").read_text(encoding="utf-8"))
    Draft202012Validator(wanted).validate(json.loads(told))


@pytest.mark.slow
def test_probes_are_objects_and_as_frozen(place: Path, tmp_path: Path) -> None:
    embedded = embedded_model()
    answer = api.evaluate(
        embedded, against=embedded, data=place / "text.txt", probe_length=400, **MEASURE | {"length": 96}, **ASK, progress=False
    )
    kinds = {name: type(found) for name, found in (answer.model.probes or {}).items()}
    assert kinds == {"needle": Needle, "position": Position, "counting": SyntheticTask, "key-value": Depths}
    validate("evaluate", json.dumps(answer.record()))
    assert "A needle in text" in str(answer) and "Key-value" in str(answer) and "Loss by position" in str(answer)


@pytest.mark.parametrize("verb", ANSWERS)
def test_the_json_of_a_verb_stays_what_it_is(verb: str) -> None:
    assert schema(ANSWERS[verb]) == json.loads((FOLDER / f"{verb}.json").read_text(encoding="utf-8"))
    assert {path.stem for path in FOLDER.iterdir()} == set(ANSWERS)


def parts(kind: type[Part] = Part) -> list[type[Part]]:
    return [one for child in kind.__subclasses__() for one in (child, *parts(child))]


@pytest.mark.parametrize("kind", sorted(parts(), key=str))
def test_every_field_is_explained(kind: type[Part]) -> None:
    """By a line `name: what it is` of the class's docstring, in the order of the fields."""
    explained = re.findall(r"(?m)^    (\w+): \S", kind.__doc__ or "")
    assert explained == [field.name for field in dataclasses.fields(kind)]
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_every_verb_is_a_function() -> None:
    assert set(api.__all__) == {"describe" if verb == "show" else verb for verb in ANSWERS}
    for name in api.__all__:
        function = getattr(api, name)
        assert function.__doc__ and inspect.signature(function).return_annotation is not None


def test_settings_are_in_the_signature_and_the_help() -> None:
    signature = inspect.signature(api.uptrain)
    assert signature.parameters["learning_rate"].default is None and signature.parameters["keep"].default == 2
    assert "    learning_rate: peak learning rate" in (api.uptrain.__doc__ or "")
    assert inspect.signature(api.synth).parameters["tokenizer"].default is inspect.Parameter.empty


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an option of a recipe": (
        lambda: api.convert("a", "b", to="gqa", kv_head=4),
        r"^api.convert to 'gqa' got an unknown keyword 'kv_head'; did you mean kv_heads\? allowed are method, .*, dry_run",
    ),
    "one of another recipe": (lambda: api.convert("a", "b", to="mqa", kv_heads=4), "unknown keyword 'kv_heads'"),
    "a setting": (lambda: api.uptrain("a", "b", "c", learning_rat=1.0), "did you mean learning_rate"),
    "of evaluate": (lambda: api.evaluate("a", probes="needle"), "did you mean probe"),
    "of plan": (lambda: api.plan("a", token="5M"), "did you mean tokens"),
    "of synth": (lambda: api.synth("a", "b", tokenizers="c"), "did you mean tokenizer"),
    "of push": (lambda: api.push("a", "b/c", privat=True), "did you mean private"),
    "nothing alike": (lambda: api.push("a", "b/c", xyzzy=1), "unknown keyword 'xyzzy'; allowed are private, branch"),
    "one that is missing": (lambda: api.convert("a", "b", to="gqa"), r"^api.convert to 'gqa' needs the keyword kv_heads: key"),
    "a recipe": (lambda: api.convert("a", "b", to="gqq"), "no recipe named 'gqq'; choose one of"),
    "a value": (lambda: api.convert("a", "b", to="gqa", kv_heads="two"), "--kv-heads got 'two'; it takes int"),
    "a size": (lambda: api.convert("a", "b", to="mqa", max_shard_size="5 parsecs"), "500MB or 5GB"),
    "no size": (lambda: api.merge("a", "b", max_shard_size=0), "--max-shard-size got 0"),
    "a count": (lambda: api.plan(embedded_model(), tokens="many"), "--tokens got 'many'"),
    "a model": (lambda: api.describe("./nowhere"), "no model folder at ./nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(UpfitError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_values_become_what_a_field_wants() -> None:
    assert as_kind(50_000_000, str | None) == "50000000" and as_kind("50M", str | None) == "50M"
    assert as_kind(np.int64(3), int) == 3 and type(as_kind(np.int64(3), int)) is int
    assert as_kind(Path("a b"), str) == "a b" and as_kind("c", Path | None) == Path("c")
    assert as_kind("a", list[str] | None) == ["a"] and as_kind((Path("a"), "b"), list[str] | None) == ["a", "b"]
    assert as_kind(16, list[int] | None) == [16] and as_kind(None, list[int] | None) is None
    assert as_kind(True, str) is True, "a mistake stays one"


@pytest.mark.slow
def test_progress_is_told_or_not(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"to": "gqa", "kv_heads": 2, "method": "mean"}
    answer = api.convert(place / "teacher", tmp_path / "loud", **settings)
    told = capfd.readouterr()
    assert "verifying" in told.err and told.out == ""
    assert api.convert(place / "teacher", tmp_path / "quiet", progress=False, **settings).bytes == answer.bytes
    assert capfd.readouterr() == ("", "")


def test_fields_have_the_values_of_the_record(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    answer = api.convert(source, tmp_path / "out", to="gqa", kv_heads=2, method="mean", progress=False)
    assert (answer.kv_heads, answer.kv_bytes_per_token, answer.source.path) == ([4, 2], [512, 256], str(source))
    assert answer.tensors[0].before == [32, 32] and answer.verify and answer.verify.record()["equal"] is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.out = "elsewhere"  # type: ignore[misc]


def test_importing_takes_no_time_and_nothing_heavy() -> None:
    code = "import sys, upfit.api; print({'torch', 'transformers', 'numpy', 'typer', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-X", "importtime", "-c", code]
    taken = []
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout == "set()\n"
        (line,) = re.findall(r"(?m)\| +(\d+) \| upfit\.api$", done.stderr)
        taken.append(int(line) / 1e6)
    assert min(taken) < LONGEST_IMPORT


def test_a_recipe_has_no_option_of_the_name_of_a_keyword() -> None:
    keywords = set(inspect.signature(api.convert).parameters)
    for recipe in find_recipes().values():
        assert not keywords & {field.name for field in dataclasses.fields(recipe.options)}

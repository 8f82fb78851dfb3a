"""Whatever an input can cause leaves the command line as one line and exit 1; defects of ours in one recognisable way."""

import errno
import gzip
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.folders import letter_tokenizer, save_tiny
from upfit.cli import main
from upfit.cli.boundary import Terminated, is_of_input, line

PANIC: Any = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def upfit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: what it says on the descriptors, so that libraries in other languages count too."""

    def run(*words: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["upfit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words and more of them. " * 100)
    return shutil.copytree(made, tmp_path / "model")


def one_line(ended: Ended, *parts: str) -> None:
    assert ended.code == 1 and "Traceback" not in ended.err, ended
    assert ended.err.startswith("upfit: ") and ended.err.count("\n") == 1 and ended.out == "", ended.err
    assert not [part for part in parts if part not in ended.err], ended.err
    assert "defect" not in ended.err or "a defect of upfit, please report it" in parts, ended.err


def test_names_that_no_file_can_have(upfit: Run, model: Path) -> None:
    text, out = model.parent / "text.txt", model.parent / "out"
    for name in ("a" * 300, "a\0b", "\udcff"):
        shown = name.replace("\0", "\\x00").replace("\udcff", "\\udcff")[:100]
        one_line(upfit("show", name), shown)
        one_line(upfit("evaluate", name), shown)
        one_line(upfit("prepare", text, out, "--tokenizer", name), shown)
        one_line(upfit("plan", name, "--tokens", "5M"), shown)
    for name in ("a" * 300, "a\0b"):
        ended = upfit("convert", "gqa", model, model.parent / name, "--kv-heads", 2, "--method", "mean")
        assert ended.code in (1, 2) and "Traceback" not in ended.err and "defect" not in ended.err


STRANGE = ["config.json", "recipe.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("what", ["pipe", "zero", "folder", "nothing"])
def test_what_stands_where_a_file_belongs(upfit: Run, model: Path, name: str, what: str) -> None:
    path = model / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "zero" else model.parent / "gone")
    harmless = what in ("folder", "nothing") and name.startswith("tokenizer")
    for verb in (["show", model], ["convert", "gqa", model, model.parent / "out", "--kv-heads", 2, "--method", "mean"]):
        if not harmless:
            one_line(upfit(*verb), str(model))
    one_line(upfit("report", model, model.parent / "page.html")) if not harmless else None
    assert not (model.parent / "page.html").exists() or harmless


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"format": 1, "steps": ' + "[" * 100_000, "{", "\xff", '{"format": 1, "steps": 5}', '{"format": 1e999}',
     '{"format": 1, "steps": [{"verb": "convert gqa"}]}', '{"format": 1, "steps": [{"verb": "uptrain", "measurements": []}]}',
     '{"format": 1, "steps": [{"verb": "convert gqa", "source": {"name": "x"}, "measurements": {"kv_bytes_per_token": 7}}]}'],
    ids=range(9),
)  # fmt: skip
def test_recipes_of_any_shape(upfit: Run, model: Path, content: str) -> None:
    (model / "recipe.json").write_bytes(content.encode("latin-1"))
    one_line(upfit("report", model, model.parent / "page.html"), "recipe.json")
    one_line(upfit("push", model, "me/it", "--dry-run"), "recipe.json")


@pytest.mark.parametrize("edit", [{"model_type": "\ud83d"}, {"architectures": ["\ud83d"]}, {"vocab_size": 10**400},
                                  {"hidden_act": "\x1b[31m"}, {"rope_parameters": "\ud83d"}])  # fmt: skip
def test_strange_values_of_a_config(upfit: Run, model: Path, edit: dict[str, Any]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    ended = upfit("show", model)
    if "architectures" not in edit:
        one_line(ended)
    assert "\x1b" not in ended.err + ended.out and "Traceback" not in ended.err


FLAGS: list[list[object]] = [
    ["convert", "gqa", "MODEL", "OUT", "--kv-heads", 10**30, "--method", "mean"],
    ["convert", "gqa", "MODEL", "OUT", "--kv-heads", "9" * 300, "--method", "mean"],
    ["convert", "cope", "MODEL", "OUT", "--positions", 10**30],
    ["convert", "gqa", "MODEL", "OUT", "--kv-heads", 2, "-q", "--calibration-tokens", "1e400"],
    ["convert", "gqa", "MODEL", "OUT", "--kv-heads", 2, "--calibration-length", 10**30],
    ["prepare", "TEXT", "OUT", "--tokenizer", "MODEL", "--tokens", "1e400"],
    ["prepare", "TEXT", "OUT", "--tokenizer", "MODEL", "--tokens", "nan"],
    ["evaluate", "MODEL", "--data", "TEXT", "--length", 10**30],
    ["evaluate", "MODEL", "--data", "TEXT", "--windows", 10**30],
    ["plan", "MODEL", "--tokens", "inf"],
    ["plan", "MODEL", "--tokens", "1e200"],
    ["uptrain", "MODEL", "TEXT", "OUT", "--tokens", "1k", "--learning-rate", "nan"],
    ["uptrain", "MODEL", "TEXT", "OUT", "--tokens", "1k", "--learning-rate", "inf"],
    ["uptrain", "MODEL", "TEXT", "OUT", "--tokens", "1k", "--seed", 10**30],
    ["synth", "TEXT", "OUT", "--tokenizer", "MODEL", "--items", 10**30],
    ["synth", "TEXT", "OUT", "--tokenizer", "MODEL", "--temperature", "nan"],
]


@pytest.mark.parametrize("words", FLAGS, ids=lambda words: " ".join(map(str, [words[0], *words[-2:]]))[:40])
def test_numbers_that_no_flag_takes(upfit: Run, model: Path, words: list[object]) -> None:
    places = {"MODEL": model, "OUT": model.parent / "out", "TEXT": model.parent / "text.txt"}
    flag = next(str(word) for word in reversed(words) if str(word).startswith("--") and word != "--method")
    one_line(upfit(*(places.get(str(word), word) for word in words)), flag)
    assert not (model.parent / "out").exists()


def tokenizer_that(model: Path, what: str) -> None:
    path = model / "tokenizer.json"
    told = json.loads(path.read_text())
    if what == "panics":
        told["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": 5}
    elif what == "is cut":
        path.write_text(path.read_text()[:-100])
        return
    else:
        told["model"]["type"] = "nonsense"
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("what", ["panics", "is cut", "is of no kind"])
def test_a_tokenizer_that_cannot_be_read(upfit: Run, model: Path, what: str) -> None:
    tokenizer_that(model, what)
    text, out = model.parent / "text.txt", model.parent / "out"
    for words in (
        ["prepare", text, out, "--tokenizer", model],
        ["evaluate", model, "--data", text],
        ["synth", text, out, "--tokenizer", model, "--items", 5, "--min-tokens", 64, "--max-tokens", 100],
    ):
        one_line(upfit(*words), "tokenizer", str(model))


def test_a_chat_template_that_raises(upfit: Run, model: Path) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not for you') }}"
    tokenizer.save_pretrained(model)
    words = ["--tokenizer", model, "--items", 5, "--min-tokens", 64, "--max-tokens", 100, "--format", "chat"]
    one_line(upfit("synth", model.parent / "text.txt", model.parent / "out", *words), "not for you")


def test_text_that_is_damaged(upfit: Run, model: Path) -> None:
    packed = gzip.compress(b'{"text": "some words"}\n' * 500)
    for name, content in (
        ("cut.jsonl.gz", packed[:-20]),
        ("none.jsonl.gz", b"{}"),
        ("flipped.jsonl.gz", packed[:40] + b"!!!!" * 9),
    ):
        path = model.parent / name
        path.write_bytes(content)
        one_line(upfit("prepare", path, model.parent / "out", "--tokenizer", model), str(path))


def test_settings_and_results_of_any_shape(upfit: Run, model: Path) -> None:
    other = model.parent / "other"
    for content in (b"\xff", b"a = [" * 50_000, b"tokens = 1979-05-27", b'tokens = "5M"\nlength = 99999999999999999999999'):
        other.write_bytes(content)
        one_line(upfit("uptrain", model, model.parent / "text.txt", model.parent / "out", "--config", other))
    for text in (
        "[" * 99_999,
        '{"model": {"loss": 5}}',
        '{"sensitivity": 5}',
        '{"model": {"loss": {}, "name": []}, "data": {}}',
    ):
        other.write_text(text)
        one_line(upfit("report", model, model.parent / "page.html", "--results", other), str(other))
    other.unlink()
    os.mkfifo(other)
    one_line(upfit("report", model, model.parent / "page.html", "--results", other), "not an ordinary file")
    one_line(upfit("uptrain", model, other, model.parent / "out", "--config", other, "--tokens", "1k"), "not an ordinary file")


def test_a_disk_that_is_full(upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    one_line(upfit("report", model, model.parent / "page.html"), "the disk is full")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(upfit: Run, model: Path) -> None:
    (model / "config.json").chmod(0)
    one_line(upfit("show", model), "permission denied")
    model.chmod(0)
    one_line(upfit("show", model), "permission denied")
    model.chmod(0o700)


OF_INPUTS: list[BaseException] = [
    PermissionError(errno.EACCES, "Permission denied", "/some/file"),
    OSError("a library's own words\nand more"),
    OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
    ValueError("embedded null byte"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    OverflowError("int too large to convert to float"),
    zlib.error("Error -3 while decompressing data"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("Could not determine home directory."),
    PANIC("range end index 7 out of range"),
    Exception("data did not match any variant of untagged enum ModelWrapper\nat line 1"),
]


@pytest.mark.parametrize("error", OF_INPUTS, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_of_an_input_is_one_line(
    upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("upfit.convert.describe.describe", fail)
    ended = upfit("show", model)
    one_line(ended, str(getattr(error, "filename", None) or model)[:200])
    assert len(ended.err) < 700
    assert "Traceback" in upfit("--debug", "show", model).err


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("no"), AssertionError(), AttributeError("y"), NameError("z")])
def test_defects_are_told_as_ours(upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("upfit.convert.describe.describe", fail)
    one_line(upfit("show", model), "a defect of upfit, please report it", type(error).__name__, "api.py:", "--debug")
    ended = upfit("--debug", "show", model)
    assert ended.code == 1 and "Traceback" in ended.err and type(error).__name__ in ended.err


def test_no_secret_is_told_with_or_without_debug(upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("https://me:opensesame@host/v1?key=opensesame does not answer, nor does hf_opensesame123")

    monkeypatch.setattr("upfit.convert.describe.describe", fail)
    for words in (["show", model], ["--debug", "show", model]):
        ended = upfit(*words)
        assert ended.code == 1 and "opensesame" not in ended.err and "https://host/v1" in ended.err


def test_a_signal_ends_in_one_line(upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    def interrupted(*_: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("two of four shards are kept; the same command goes on")
        raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("upfit.convert.describe.describe", stopped)
    assert upfit("show", model) == (143, "", "upfit: stopped; nothing unfinished stands at the output\n")
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr("upfit.convert.describe.describe", interrupted)
    assert upfit("show", model) == (130, "", "upfit: stopped; two of four shards are kept; the same command goes on\n")
    assert isinstance(Terminated(), KeyboardInterrupt)


def test_a_reader_that_leaves_is_no_error(upfit: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("upfit.convert.describe.describe", fail)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # put back afterwards
    assert upfit("show", model) == (141, "", "")
    sys.stdout.close()


def test_usage_errors_exit_2(upfit: Run) -> None:
    for words in ([], ["nonsense"], ["convert", "gqa", "a", "b"], ["convert", "gqa", "a", "b", "--kv-heads", "9" * 5000]):
        ended = upfit(*words)
        assert ended.code == 2 and "Traceback" not in ended.err


def test_libraries_are_told_by_their_names() -> None:
    import jinja2
    import yaml

    assert is_of_input(jinja2.TemplateError("x")) and is_of_input(yaml.YAMLError()) and not is_of_input(KeyError())
    assert line(jinja2.TemplateError("not\nfor you"), []) == "TemplateError: not"

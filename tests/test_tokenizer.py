"""A tokenizer that fails at a text, by an exception or by a panic of its library, is told of in one line with that text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.folders import letter_tokenizer, save_tiny
from tests.uptraining import QUIET
from upfit.convert.verify import sample_ids
from upfit.errors import UpfitError
from upfit.longcontext import segments
from upfit.longcontext.wording import Wording
from upfit.text.tokenizer import encode_texts
from upfit.text.windows import encode
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.tokenise import token_ids

PANIC: Any = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
FAILURES = [
    PANIC("byte index 1 is not a char boundary\nat lib.rs"),
    Exception("no\nvariant"),
    RuntimeError("fancy"),
    KeyError("x"),
]
SPOILT = "spoilt " * 40


class Failing:
    """A tokenizer of letters that raises `error` at texts with the word "spoilt"."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.inner = error, letter_tokenizer()

    def __call__(self, texts: Any, **options: Any) -> Any:
        if "spoilt" in str(texts):
            raise self.error
        return self.inner(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def __len__(self) -> int:
        return len(self.inner)

    def __deepcopy__(self, _: Any) -> "Failing":
        return Failing(self.error)


WAYS: list[Callable[[Any, list[str]], object]] = [
    lambda tokenizer, texts: encode(tokenizer, texts),
    lambda tokenizer, texts: token_ids(texts, tokenizer, "uint16"),
    lambda tokenizer, texts: Wording(tokenizer, "plain")._ids(texts),
    lambda tokenizer, texts: list(segments._segmented(iter(texts), tokenizer, 10)),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", WAYS)
def test_the_text_that_a_tokenizer_fails_at_is_told(way: Callable[[Any, list[str]], object], error: BaseException) -> None:
    tokenizer = Failing(error)
    with pytest.raises(UpfitError, match=f"'{SPOILT[:30]}") as caught:
        way(tokenizer, ["a good text " * 9, SPOILT, "another " * 9])
    assert type(error).__name__ in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    way(tokenizer, ["a good text " * 9])


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_while_a_tokenizer_is_at_work_is_ctrl_c(way: Callable[[Any, list[str]], object]) -> None:
    with pytest.raises(KeyboardInterrupt):
        way(Failing(KeyboardInterrupt()), [SPOILT])


def test_ctrl_c_while_the_text_is_looked_for_is_ctrl_c() -> None:
    errors: Iterator[BaseException] = iter([PANIC("of all"), KeyboardInterrupt()])

    def tokenizer(_: list[str], **__: Any) -> None:
        raise next(errors)

    with pytest.raises(KeyboardInterrupt):
        encode_texts(tokenizer, ["a", "b"])


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_prepare_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("upfit.uptrain.data.prepare.load_tokenizer", lambda _: Failing(error))
    (tmp_path / "a.txt").write_text("a good text")
    (tmp_path / "b.txt").write_text(SPOILT)
    with pytest.raises(UpfitError, match="fails at the text that begins with 'spoilt"):
        prepare([str(tmp_path / name) for name in ("a.txt", "b.txt")], tmp_path / "out", "letters", "text", QUIET, workers=2)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", "letters", "text", QUIET).documents == 1


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_verify_compares_on_random_ids_where_the_tokenizer_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    folder = save_tiny(tmp_path / "model")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: fail)
    ids, of_text = sample_ids(folder)
    assert ids is not None and not of_text
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sample_ids(folder)

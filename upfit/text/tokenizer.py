"""Loads the tokenizer of a model, and tells whether two tokenizers are the same."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.addresses import id_and_revision
from upfit.bounded import reason
from upfit.errors import UpfitError
from upfit.model_files import check_model_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PANIC = "PanicException"  # of libraries in Rust; no Exception, and said on stderr too before it is raised
SHOWN = 60  # characters of a text in an error
PROBE = "def f(x):\n    return  x + 1  # Größe, 東京, 🙂\n<|endoftext|></s>"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id (`id@revision`). Raises UpfitError when there is none, or no end token."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_files(folder)
    hub_id, revision = (str(folder), None) if folder.is_dir() else id_and_revision(name)
    try:
        with no_panic(name):
            tokenizer = AutoTokenizer.from_pretrained(hub_id, revision=revision, trust_remote_code=False)
    except UpfitError:
        raise
    except Exception as error:  # its parsers raise whatever they like on a broken file
        raise UpfitError(f"no tokenizer at {name}: {reason(error)}; give a model folder or a hub id") from error
    if tokenizer.eos_token_id is None:
        raise UpfitError(f"the tokenizer of {name} has no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


@contextmanager
def no_panic(name: str) -> Iterator[None]:
    """Raise UpfitError, and nothing else is said, where reading the tokenizer of `name` ends in a panic of its library."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as panic:
        os.dup2(panic.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            panic.truncate(0)
            raise UpfitError(f"the tokenizer of {name} is damaged ({reason(error)}); fetch its files again") from error
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            panic.seek(0)
            os.write(2, panic.read())


def encode_texts(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """What `tokenizer` makes of `texts`, without special tokens unless `options`, which are its own, ask for them.

    Raises UpfitError, which tells how the text begins that the tokenizer fails at, for any exception or panic of its library.
    """
    options = {"add_special_tokens": False, "verbose": False, **options}
    try:
        return tokenizer(texts, **options)
    except BaseException as error:
        if not _is_of_library(error):
            raise
        text = next((candidate for candidate in texts if _fails(tokenizer, candidate, options)), "".join(texts[:1]))
        complaint = f"the tokenizer fails at the text that begins with {text[:SHOWN]!r} ({reason(error)})"
        raise UpfitError(f"{complaint}; leave that text out, or take a tokenizer that can read it") from error


def _fails(tokenizer: Any, text: str, options: dict[str, Any]) -> bool:
    try:
        tokenizer([text], **options)
    except BaseException as error:
        if not _is_of_library(error):
            raise
        return True
    return False


def _is_of_library(error: BaseException) -> bool:
    """Whether it is an exception or a panic; what the user or the system wants, such as Ctrl-C, is neither."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC


def identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What must agree between data and model: a hash of the vocabulary and of how a probe text is cut, and special tokens."""
    ids = encode_texts(tokenizer, [PROBE])["input_ids"][0]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids], ensure_ascii=True)
    return {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": begin_token(tokenizer),
    }


def begin_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that this tokenizer puts before a text by itself, if any: its model has always seen it there."""
    ids = encode_texts(tokenizer, ["a"], add_special_tokens=True)["input_ids"][0]
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None

"""The tokenizer of a model: loaded, and told apart from others."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.bounded import reason
from upfit.errors import UpfitError
from upfit.model_files import check_model_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PANIC = "PanicException"  # of libraries in Rust; no Exception, and said on stderr too before it is raised
PROBE = "def f(x):\n    return  x + 1  # Größe, 東京, 🙂\n<|endoftext|></s>"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id (`id@revision`). Raises UpfitError when there is none, or no end token."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_files(folder)
    hub_id, _, revision = (str(folder), "", "") if folder.is_dir() else name.partition("@")
    try:
        with no_panic(name):
            tokenizer = AutoTokenizer.from_pretrained(hub_id, revision=revision or None, trust_remote_code=False)
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
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            said.truncate(0)
            raise UpfitError(f"the tokenizer of {name} is damaged ({reason(error)}); fetch its files again") from error
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            os.write(2, said.read())


def identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What must agree between data and model: a hash of the vocabulary and of how a probe text is cut, and special tokens."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids], ensure_ascii=True)
    return {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": begin_token(tokenizer),
    }


def begin_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that this tokenizer puts before a text by itself, if any: its model has always seen it there."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None

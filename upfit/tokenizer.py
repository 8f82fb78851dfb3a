"""The tokenizer of a model: loaded, and told apart from others."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.errors import UpfitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "def f(x):\n    return  x + 1  # Größe, 東京, 🙂\n<|endoftext|></s>"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id (`id@revision`). Raises UpfitError when there is none, or no end token."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    hub_id, _, revision = (str(folder), "", "") if folder.is_dir() else name.partition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_id, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UpfitError(f"no tokenizer at {name}: {reason}; give a model folder or a hub id") from error
    if tokenizer.eos_token_id is None:
        raise UpfitError(f"the tokenizer of {name} has no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


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

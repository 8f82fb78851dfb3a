"""Cleans addresses and error messages before they are shown: no password, no token, no key. Takes hub names apart."""

import os
import re

# scheme://user:password@host/path?query#fragment. A password may hold what ends an address elsewhere: after a name and a colon
# that no port follows, all up to the last @ tells who asks.
ADDRESS = re.compile(
    r"""(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.\-]*://)
        (?:[^\s/?\#'"<>]*@ | [^\s/?\#'"<>:]*:(?!\d+(?:[/?\#\s]|$))[^\s'"<>]*@)?
        (?P<rest>[^\s?\#'"<>]*)
        (?:[?\#][^\s'"<>]*)?""",
    re.VERBOSE,
)
# As the hub (`hf_quant_config.json` is none), OpenAI and GitHub write theirs, and as HTTP sends any.
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|(?:sk-|gh[pousr]_|github_pat_)[A-Za-z0-9_\-]{6,})|(?<=\bBearer )[^\s'\",}]+")
SECRET_NAMES = re.compile(r"(^|_)(TOKEN|(API)?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
LEAST_SECRET = 8  # characters: shorter ones are words like "true"
HIDDEN = "***"


def id_and_revision(name: str) -> tuple[str, str | None]:
    """A hub model's `id` or `id@revision` as its two parts; None where no revision is named."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def public(address: str) -> str:
    """An address without user, password, query and fragment; what is none stays as it is."""
    return ADDRESS.sub(lambda match: match["scheme"] + match["rest"], address)


def redacted(text: str) -> str:
    """`text` with every address in it as `public` shows it, and without tokens and what the environment keeps secret."""
    text = TOKEN.sub(HIDDEN, public(text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    known = {value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= LEAST_SECRET}
    return sorted((value for value in known if not value.startswith("/")), key=len, reverse=True)  # not the places of keys

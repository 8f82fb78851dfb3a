"""Escapes text from elsewhere, so that Markdown shows it as it is: no markup, no HTML, no link, no line of its own.

A template puts everything into a card through `plain`, except what was made here and is marked so (`Markup`).
"""

import re
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

# What would begin or end something. Single underscores inside words and brackets of intervals are no markup.
MARKS = re.compile(r"[`\\*|]|(?<!\w)_|_(?!\w)|~~|!(?=\[)|\](?=[(\[:])")
FIRST = re.compile(r"^(?:[#>+=\-]|\d+(?=[.)]\s))")  # what begins a heading, a quotation, a list or a rule
IN_CODE = re.compile(r"[\w .,:/@=+()'%{}\-]*")  # what a code span may hold without a second thought
REPO = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*")
# In somebody's README: elements that run or load something, what listens to events, and addresses that are programs.
RUNS = re.compile(
    r"<(?=/?\s*(?:script|style|iframe|frame|frameset|object|embed|applet|form|input|button|textarea|select|meta|link|base|svg|math"
    r"|template|noscript|audio|video|portal|dialog)\b)",
    re.IGNORECASE,
)
LISTENS = re.compile(r"(<[a-z][^>]*?[\s\"'/])on(?=\w+\s*=)", re.IGNORECASE)
PROGRAM = re.compile(
    r"(?:j\s*a\s*v\s*a|v\s*b|l\s*i\s*v\s*e)\s*s\s*c\s*r\s*i\s*p\s*t\s*(?::|&colon;|&#0*58;|&#x0*3a;)"
    r"|\bdata\s*:(?=\s*(?:text/html|image/svg))",
    re.IGNORECASE,
)
CODE = re.compile(
    r"(^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*[ \t]*$|(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))", re.M | re.S
)


def plain(value: Any) -> Markup:
    """`value` as one line of text that means only itself; what is marked as made here stays."""
    if isinstance(value, Markup):
        return value
    text = str(escape(" ".join(str(value).split()))).replace("&#39;", "'").replace("&#34;", '"')
    text = MARKS.sub(lambda match: "".join(f"&#{ord(mark)};" for mark in match[0]), text)
    return Markup(FIRST.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", text))


def unmarked(text: str) -> str:
    """`text` for the front matter, where nothing is escaped: without what HTML and Markdown are made of, on one line."""
    return " ".join(re.sub(r"[<>`|\[\]\\]+", " ", text).split())


def code(value: Any) -> Markup:
    """The same as code: a code span, and where something in it could end one, an element."""
    text = " ".join(str(value).split())
    if text and IN_CODE.fullmatch(text):
        return Markup(f"`{text}`")
    return Markup(f"<code>{plain(text)}</code>")


def model_link(repo: str) -> Markup:
    """A model of the hub by its id, as a link there; what is no id, as code."""
    if not REPO.fullmatch(repo):
        return code(repo)
    return Markup(f"[{plain(repo)}](https://huggingface.co/{quote(repo)})")


def harmless(text: str) -> str:
    """Somebody's Markdown, in which nothing runs: code stays as it is, HTML too but for what loads or runs something."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts += [_tamed(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, _tamed(text[end:])])


def _tamed(text: str) -> str:
    text = RUNS.sub("&lt;", text)
    while LISTENS.search(text):
        text = LISTENS.sub(r"\1off-", text)
    return PROGRAM.sub("no-program:", text)

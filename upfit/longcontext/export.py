"""Writes examples as text, for other trainers. Contexts are made one at a time; the file is as large as all of them."""

import json
from collections.abc import Callable
from typing import Any

from upfit.longcontext.contexts import Contexts
from upfit.longcontext.items import Item
from upfit.longcontext.wording import Wording

FILE = "examples.jsonl"


def trl(wording: Wording, item: Item, context: str) -> dict[str, Any]:
    """TRL's prompt-completion form."""
    return {"prompt": wording.prompt(context, item.question), "completion": item.answer}


def messages(wording: Wording, item: Item, context: str) -> dict[str, Any]:
    """A conversation, as most trainers of chat models read it."""
    prompt = f"{context}\n\n{item.question}"
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": item.answer}]}


def film(wording: Wording, item: Item, context: str) -> dict[str, Any]:
    """The fields that FILM's prompt is filled with."""
    return {"context": context, "instruction": item.question, "output": item.answer}


EXPORTS: dict[str, Callable[[Wording, Item, str], dict[str, Any]]] = {"trl": trl, "messages": messages, "film": film}


def write_export(contexts: Contexts, form: str) -> None:
    """`examples.jsonl` beside the recipes, one line an example, with its family and pattern."""
    with open(contexts.folder / FILE, "w", encoding="utf-8") as file:
        for index in range(len(contexts)):
            item = contexts.item(index)
            row = EXPORTS[form](contexts.wording, item, contexts.text(index)) | {"family": item.family, "pattern": item.pattern}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

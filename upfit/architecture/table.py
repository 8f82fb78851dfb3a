"""Where q, k, v and o live for each model type: the rows of `table.toml`."""

import functools
import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Protocol

from upfit.errors import UpfitError
from upfit.modeling.registry import family

if TYPE_CHECKING:
    from upfit.architecture.fused import By


class Described(Protocol):
    """What is known of a tensor without reading it: of one in a file, or of one that is only planned."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Entry:
    """One row of the table. `q`, `k`, ... are module names inside the attention module; `kv_heads` are config paths.

    `own` says how the family's code is written, where it needs our class to have fewer key/value heads (`grouped_class.py`).
    """

    model_type: str
    kv_heads: tuple[str, ...]
    q: str
    k: str
    v: str
    o: str
    q_norm: str
    k_norm: str
    layout: str
    kv_heads_multiple: int
    nested: str  # config key of the language model inside, whose own type tells the rest; empty for a language model
    kv_heads_flag: bool  # the config key says whether there is one, not how many
    fused: str  # the module that holds q, k and v in one; they are then seen as its children
    fused_by: "By"
    fused_transposed: bool
    own: str
    heads: str
    inside: str


@dataclass(frozen=True)
class Table:
    entries: dict[str, Entry]
    refused: dict[str, str]  # model type -> reason
    retargets: dict[str, tuple[str, ...]]  # model type -> the types that it is converted as


@functools.cache
def table() -> Table:
    """The supported model types, the refused ones, and those that are converted as another one."""
    content = tomllib.loads(resources.files(__package__).joinpath("table.toml").read_text(encoding="utf-8"))
    entries = {}
    for group in content["group"]:
        row = {**content["default"], **{key: value for key, value in group.items() if key != "types"}}
        row["kv_heads"] = (KV_HEADS,) if row["own"] else tuple(row["kv_heads"])
        row |= {part: f"{row['fused']}.{part}" for part in "qkv" if row["fused"]}
        entries.update({name: Entry(name, **row) for name in group["types"]})
    refused = {name: group["reason"] for group in content["refused"] for name in group["types"]}
    retargets = {name: tuple(group["to"]) for group in content["retarget"] for name in group["types"]}
    return Table(entries, refused, retargets)


def find_entry(model_type: str) -> Entry:
    """Raises UpfitError, with the reason, for a model type that cannot be converted."""
    known = table()
    if model_type in known.entries:
        return known.entries[model_type]
    if model_type in known.refused:
        raise UpfitError(f"{model_type} cannot be converted: {known.refused[model_type]}")
    raise UpfitError(f"unknown architecture {model_type!r}; `upfit list` shows the {len(known.entries)} that can be converted")


def entry_for(config: dict[str, Any]) -> Entry:
    """The row for this `config.json`; where a language model is nested in it, that model's row with the outer model's name.

    Raises UpfitError, with the reason, for a model type that cannot be converted.
    """
    entry = find_entry(family(config))
    if not entry.nested:
        return entry
    inside = config.get(entry.nested)
    model_type = inside.get("model_type") if isinstance(inside, dict) else None
    known = table()
    if model_type in known.refused:
        raise UpfitError(
            f"this {entry.model_type} cannot be converted, for its language model is {model_type}: {known.refused[model_type]}"
        )
    if model_type in known.retargets:
        raise UpfitError(
            f"this {entry.model_type} cannot be converted, for its language model is {model_type}, which would have to change "
            "its type, and only a model that stands alone can"
        )
    inner = known.entries.get(str(model_type), entry)  # one that is only ever nested has no row of its own
    if inner.own:
        raise UpfitError(
            f"this {entry.model_type} cannot be converted, for its language model is {model_type}, which needs a class of ours "
            "and cannot have it inside another model"
        )
    return replace(inner, model_type=entry.model_type, kv_heads=tuple(f"{entry.nested}.{key}" for key in inner.kv_heads))


def family_entry(config: dict[str, Any]) -> Entry:
    """The row of the family of this `config.json`; an empty one where the family cannot be converted."""
    known, name = table(), family(config)
    if name in known.entries:
        return known.entries[name]
    empty = dict.fromkeys(("q", "k", "v", "o", "q_norm", "k_norm", "layout", "nested", "fused", "own", "heads", "inside"), "")
    return Entry(name, (), kv_heads_multiple=1, kv_heads_flag=False, fused_by="model", fused_transposed=False, **empty)


def check_known(config: dict[str, Any]) -> None:
    """Raise UpfitError, with the reason, for a config whose model type cannot be converted, whatever its tensors are."""
    if config["model_type"] not in table().retargets:
        entry_for(config)


LATENT_WIDTH = "kv_lora_rank"  # the key in DeepSeek's configs


def is_stock_latent(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a class of transformers' own that caches a latent: to be measured, and folded into."""
    return LATENT_WIDTH in config


def has_two_ways(config: dict[str, Any]) -> bool:
    """Whether a checkpoint can become another family's and, where that has no place for it, our own class."""
    known = table()
    return config["model_type"] in known.retargets and config["model_type"] in known.entries


MODEL_TYPE = "upfit_gqa"
KV_HEADS = "gqa.kv_heads"  # where its config counts them


def known_entry(config: dict[str, Any]) -> "Entry | None":
    try:
        return entry_for(config)
    except UpfitError:  # models that cannot be converted can still be built
        return None

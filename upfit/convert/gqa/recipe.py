"""Grouped-query attention: fewer key/value heads, each shared by a contiguous group of query heads; multi-query is one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upfit.convert.recipe import Plan, Recipe, Rule
from upfit.errors import UpfitError
from upfit.options import option

if TYPE_CHECKING:
    from upfit.convert.architectures import Architecture
    from upfit.convert.attention import Attention, Layer

Method = Literal["mean", "first", "random"]
GQA_PAPER = "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv 2305.13245"
MQA_PAPER = "Shazeer 2019, Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150"
PARTS = ("k", "v", "k_bias", "v_bias", "k_norm")  # what belongs to a key/value head; queries and output stay untouched


@dataclass(frozen=True)
class Options:
    """Flags of `upfit convert gqa`."""

    kv_heads: int = option(help="key/value heads of the result; must divide the checkpoint's own number")
    method: Method = option("mean", help="how the heads of a group become one: their mean, the first, or drawn anew")
    seed: int = option(0, help="seed of --method random")


def plan(architecture: "Architecture", options: Options) -> Plan:
    """Merge the heads of every layer that has more than `kv_heads`; with its own number of heads nothing changes.

    Raises UpfitError when `kv_heads` does not divide a layer's key/value heads or is above them.
    """
    check_kv_heads(options.kv_heads, architecture)
    changed = [layer for layer in architecture.layers if layer.geometry.kv_heads > options.kv_heads]
    rules = tuple(_rule(layer, options, architecture.initializer_range) for layer in changed)
    notes = []
    kept = len(architecture.layers) - len(changed)
    if changed and kept:
        notes.append(f"{kept} layers already have {options.kv_heads} key/value heads or fewer and stay as they are")
    return Plan(architecture.with_kv_heads(options.kv_heads), rules, exact=not rules, notes=tuple(notes))


def check_kv_heads(kv_heads: int, architecture: "Architecture") -> None:
    """Raise UpfitError unless every layer can be merged to `kv_heads`."""
    allowed = architecture.allowed_kv_heads()
    if kv_heads in allowed:
        return
    has = " and ".join(map(str, sorted({layer.geometry.kv_heads for layer in architecture.layers})))
    choose = f"choose one of {', '.join(map(str, allowed))}"
    if kv_heads > architecture.kv_heads:
        raise UpfitError(f"--kv-heads {kv_heads} is above the checkpoint's {has} key/value heads; {choose}")
    raise UpfitError(f"--kv-heads {kv_heads} does not divide the checkpoint's {has} key/value heads; {choose}")


def _rule(layer: "Layer", options: Options, initializer_range: float) -> Rule:
    from upfit.convert.gqa.merge import merge

    def change(attention: "Attention") -> "Attention":
        return merge(attention, options.kv_heads, options.method, options.seed + layer.index, initializer_range)

    return layer.rule(PARTS, change, f"{layer.geometry.kv_heads} → {options.kv_heads} key/value heads, {options.method}")


def _trials(architecture: "Architecture") -> list[Options]:
    """The next smaller number of heads; `first` is tried by mqa."""
    return [Options(architecture.allowed_kv_heads()[-2:][0], "mean")]


def _offers(architecture: "Architecture") -> str:
    fewer = architecture.allowed_kv_heads()[:-1]
    return f"--kv-heads {'|'.join(map(str, fewer))}" if fewer else ""


def _can_be_one(architecture: "Architecture") -> bool:
    return 1 in architecture.allowed_kv_heads()[:-1]


@dataclass(frozen=True)
class MultiQueryOptions:
    """Flags of `upfit convert mqa`."""

    method: Method = option("mean", help="how all heads become one: their mean, the first, or drawn anew")
    seed: int = option(0, help="seed of --method random")


def plan_multi_query(architecture: "Architecture", options: MultiQueryOptions) -> Plan:
    """One key/value head in every layer."""
    return plan(architecture, Options(1, options.method, options.seed))


RECIPES = (
    Recipe(
        name="gqa",
        summary="fewer key/value heads, each shared by a group of query heads",
        paper=GQA_PAPER,
        options=Options,
        plan=plan,
        identity=lambda architecture: Options(architecture.kv_heads),
        trials=_trials,
        offers=_offers,
    ),
    Recipe(
        name="mqa",
        summary="one key/value head shared by all query heads",
        paper=MQA_PAPER,
        options=MultiQueryOptions,
        plan=plan_multi_query,
        identity=lambda architecture: MultiQueryOptions() if architecture.kv_heads == 1 else None,
        trials=lambda architecture: [MultiQueryOptions("first")] if _can_be_one(architecture) else [],
        offers=lambda architecture: "(one key/value head)" if _can_be_one(architecture) else "",
    ),
)

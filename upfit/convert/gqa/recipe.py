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
    counts = sorted({layer.geometry.kv_heads for layer in architecture.layers})
    check_kv_heads(options.kv_heads, counts)
    changed = [layer for layer in architecture.layers if layer.geometry.kv_heads > options.kv_heads]
    rules = tuple(_rule(layer, options, architecture.initializer_range) for layer in changed)
    notes = []
    if len(counts) > 1 and len(changed) < len(architecture.layers):
        kept = len(architecture.layers) - len(changed)
        notes.append(f"{kept} layers already have {options.kv_heads} key/value heads or fewer and stay as they are")
    return Plan(architecture.with_kv_heads(options.kv_heads), rules, exact=not rules, notes=tuple(notes))


def check_kv_heads(kv_heads: int, counts: list[int]) -> None:
    """Raise UpfitError unless layers with these head counts can be merged to `kv_heads`."""
    allowed = [n for n in range(1, max(counts) + 1) if all(count % n == 0 for count in counts if count > n)]
    if kv_heads in allowed:
        return
    has = " and ".join(map(str, counts))
    choose = f"choose one of {', '.join(map(str, allowed))}"
    if kv_heads > max(counts):
        raise UpfitError(f"--kv-heads {kv_heads} is above the checkpoint's {has} key/value heads; {choose}")
    raise UpfitError(f"--kv-heads {kv_heads} does not divide the checkpoint's {has} key/value heads; {choose}")


def _rule(layer: "Layer", options: Options, initializer_range: float) -> Rule:
    from upfit.convert.gqa.merge import merge

    def change(attention: "Attention") -> "Attention":
        return merge(attention, options.kv_heads, options.method, options.seed + layer.index, initializer_range)

    return layer.rule(PARTS, change, f"{layer.geometry.kv_heads} → {options.kv_heads} key/value heads, {options.method}")


def _trials(architecture: "Architecture") -> list[Options]:
    """Half the heads, by every method."""
    half = max(1, architecture.kv_heads // 2)
    return [Options(half, "mean"), Options(half, "first"), Options(half, "random")]


def _offers(architecture: "Architecture") -> str:
    counts = sorted({layer.geometry.kv_heads for layer in architecture.layers})
    fewer = [n for n in range(1, max(counts)) if all(count % n == 0 for count in counts if count > n)]
    return f"--kv-heads {'|'.join(map(str, fewer))}" if fewer else ""


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
        trials=lambda architecture: [MultiQueryOptions("first")],
        offers=lambda architecture: "" if architecture.kv_heads == 1 else "one head",
    ),
)

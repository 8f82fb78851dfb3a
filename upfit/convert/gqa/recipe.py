"""Grouped-query attention: fewer key/value heads, each shared by a contiguous group of query heads; multi-query is one."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from upfit.checkpoint.plan import Plan, Rule
from upfit.convert.recipe import Fit, FitContext, Recipe, outline_of
from upfit.errors import UpfitError
from upfit.options import option
from upfit.provenance import BLIND, METHOD_RAN, NOT_ALIGNED, STATE
from upfit.text.files import FIELD, FIELD_HELP

if TYPE_CHECKING:
    from upfit.architecture.attention import Attention, Geometry, Layer
    from upfit.architecture.layers import Architecture
    from upfit.calibration.estimate import Work
    from upfit.convert.gqa.choice import Choice
    from upfit.convert.result import Sensitivity

Method = Literal["auto", "aligned", "mean", "first", "random"]
GQA_PAPER = "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv 2305.13245"
MQA_PAPER = "Shazeer 2019, Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150"
PARTS = ("k", "v", "k_bias", "v_bias", "k_norm")  # what belongs to a key/value head; queries and output stay untouched


METHOD_HELP = (
    "how the heads of a group become one: aligned on calibration text, their mean, the first, drawn anew; auto: aligned where "
    "the model can be watched on text, else mean"
)


ALIGNED = ("method", "auto", "aligned")


@dataclass(frozen=True, kw_only=True)
class MultiQueryOptions:
    """Flags of `upfit convert mqa`."""

    method: Method = option("auto", help=METHOD_HELP)
    calibration: list[str] | None = option(
        None,
        goes_with=ALIGNED,
        help="text files or folders (pairs of texts, a folder of recordings or of images where the model takes that), or "
        "one statistics file of `upfit calibrate`; default: Python's standard library",
    )
    field: str = option(FIELD, goes_with=("calibration",), help=FIELD_HELP)
    calibration_tokens: str | None = option(
        None, goes_with=ALIGNED, help="tokens of calibration text to use, such as 64k (the default)"
    )
    calibration_length: int | None = option(
        None,
        goes_with=ALIGNED,
        help="tokens of a calibration window: the length to be served; default: 2048, or what the model allows",
    )
    refit: bool = option(
        True, goes_with=ALIGNED, help="after the merge fit Q, K, O and the MLP's last matrix to the source, layer by layer"
    )
    seed: int = option(0, help="seed of --method random")


@dataclass(frozen=True)
class Options(MultiQueryOptions):
    """Flags of `upfit convert gqa`."""

    kv_heads: int = option(
        help="key/value heads of the result: a divisor of the checkpoint's own number, or a multiple (heads are repeated)"
    )


def plan(architecture: "Architecture", options: Options) -> Plan | Fit:
    """Merge the heads of every layer that has more than `kv_heads`; with its own number of heads nothing changes, with a
    multiple of it every head is repeated, which is the same function.

    Raises UpfitError when `kv_heads` neither divides a layer's key/value heads nor is a multiple of them that divides its
    query heads, or when flags of one method are given with another.
    """
    check_kv_heads(options.kv_heads, architecture)
    if options.kv_heads > architecture.kv_heads:
        return _repeated(architecture, options.kv_heads)
    changed = [layer for layer in architecture.layers if layer.geometry.kv_heads > options.kv_heads]
    notes = []
    unchanged = len(architecture.layers) - len(changed)
    if changed and unchanged:
        notes.append(f"{unchanged} layers already have {options.kv_heads} key/value heads or fewer and stay as they are")
    if not changed:
        notes.append(f"the model has {options.kv_heads} key/value heads already: its weights are copied as they are")
    config = architecture.with_kv_heads(options.kv_heads)
    method = "mean" if options.method == "auto" else options.method
    aligned = options.method in ("auto", "aligned")
    if aligned and changed:
        rules = tuple(_aligned_rule(layer, options) for layer in changed)
        may_average = options.method == "auto" and not options.calibration
        fallback = partial(_averaged, architecture, options) if may_average else None
        return _fit(options, Plan(config, rules, notes=tuple(notes)), fallback)
    rules = tuple(_rule(layer, replace(options, method=method), architecture.initializer_range) for layer in changed)
    report = {METHOD_RAN: method, STATE: BLIND} if rules else None
    return Plan(config, rules, exact=not rules, notes=tuple(notes), report=report)


def _averaged(architecture: "Architecture", options: Options, why: str) -> Plan:
    """What becomes of a model that cannot be aligned, because of `why`."""
    averaged = outline_of(plan(architecture, Options(options.kv_heads, method="mean", seed=options.seed)))
    note = f"not aligned: {why}; the heads are averaged instead"
    return replace(averaged, notes=(note, *averaged.notes), report={**(averaged.report or {}), NOT_ALIGNED: why})


def _repeated(architecture: "Architecture", kv_heads: int) -> Plan:
    from upfit.convert.gqa.reparametrise import expand_heads

    def change(attention: "Attention") -> "Attention":
        return expand_heads(attention, kv_heads)

    label = f"{architecture.kv_heads} → {kv_heads} key/value heads, repeated"
    rules = tuple(layer.rule(PARTS, change, label) for layer in architecture.layers)
    return Plan(architecture.with_kv_heads(kv_heads), rules, close=True)


def _fit(options: Options, outline: Plan, fallback: "Callable[[str], Plan] | None") -> Fit:
    def choice() -> "Choice":
        from upfit.convert.gqa.choice import Choice

        how = (options.calibration_tokens, options.calibration_length, options.field)
        return Choice(options.kv_heads, options.refit, options.calibration, *how)

    def run(context: FitContext) -> Plan:
        from upfit.convert.gqa.fit import fit

        return fit(context, choice(), outline)

    def preview(context: FitContext) -> "Sensitivity":
        from upfit.convert.gqa.sensitivity import predict

        return predict(context, choice())

    def work(context: FitContext) -> "Work":
        from upfit.convert.gqa import cost

        return cost.work(context, choice())

    shown = preview if options.calibration is not None else None
    return Fit(outline, run, fallback, shown, otherwise="--method mean", work=work)


def _aligned_rule(layer: "Layer", options: Options) -> Rule:
    from upfit.convert.gqa.fit import shapes

    label = f"{layer.geometry.kv_heads} → {options.kv_heads} key/value heads, aligned" + (", refitted" if options.refit else "")
    return layer.rule((*PARTS, "q", "o", "q_bias"), shapes(options.kv_heads), label)


def check_kv_heads(kv_heads: int, architecture: "Architecture") -> None:
    """Raise UpfitError unless every layer can be merged to `kv_heads`."""
    allowed = architecture.allowed_kv_heads() + architecture.more_kv_heads()
    if kv_heads in allowed:
        return
    has = " and ".join(map(str, sorted({layer.geometry.kv_heads for layer in architecture.layers})))
    choose = f"choose one of {', '.join(map(str, allowed))}"
    if kv_heads > architecture.kv_heads:
        raise UpfitError(f"--kv-heads {kv_heads} is above the checkpoint's {has} key/value heads; {choose}")
    raise UpfitError(f"--kv-heads {kv_heads} does not divide the checkpoint's {has} key/value heads; {choose}")


def _rule(layer: "Layer", options: Options, initializer_range: float) -> Rule:
    from upfit.convert.gqa.pooling import pool_heads

    def change(attention: "Attention") -> "Attention":
        return pool_heads(attention, options.kv_heads, options.method, options.seed + layer.index, initializer_range)

    return layer.rule(PARTS, change, f"{layer.geometry.kv_heads} → {options.kv_heads} key/value heads, {options.method}")


def _trials(architecture: "Architecture") -> list[Options]:
    """The next smaller number of heads; `first` is tried by mqa."""
    return [Options(architecture.allowed_kv_heads()[-2:][0], method="mean")]


def _offers(architecture: "Architecture") -> str:
    fewer, more = architecture.allowed_kv_heads()[:-1], architecture.more_kv_heads()
    offers = [f"--kv-heads {'|'.join(map(str, fewer))}"] if fewer else []
    offers += [f"--kv-heads {'|'.join(map(str, more))} (repeated heads, the same function)"] if more else []
    return ", or ".join(offers)


def _shapes(architecture: "Architecture", options: Options) -> "list[Geometry]":
    """With more key/value heads than the model has, every layer has as many; with fewer, those layers that had more."""
    repeated, shapes = options.kv_heads > architecture.kv_heads, [layer.geometry for layer in architecture.layers]
    return [replace(s, kv_heads=options.kv_heads if repeated else min(options.kv_heads, s.kv_heads)) for s in shapes]


def _can_be_one(architecture: "Architecture") -> bool:
    return 1 in architecture.allowed_kv_heads()[:-1]


def plan_multi_query(architecture: "Architecture", options: MultiQueryOptions) -> Plan | Fit:
    """One key/value head in every layer. Raises UpfitError for a model that has no more already."""
    if architecture.kv_heads == 1:
        raise UpfitError("the model has one key/value head already, so mqa would copy it; there is nothing to convert")
    return plan(architecture, Options(1, **asdict(options)))


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
        shapes=_shapes,
    ),
    Recipe(
        name="mqa",
        summary="one key/value head shared by all query heads",
        paper=MQA_PAPER,
        options=MultiQueryOptions,
        plan=plan_multi_query,
        identity=lambda architecture: None,
        trials=lambda architecture: [MultiQueryOptions(method="first")] if _can_be_one(architecture) else [],
        offers=lambda architecture: "(one key/value head)" if _can_be_one(architecture) else "",
        shapes=lambda architecture, options: _shapes(architecture, Options(1)),
    ),
)

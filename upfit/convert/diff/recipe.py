"""Differential attention: a second softmax map is subtracted from the first, so that noise common to both cancels."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from upfit.architecture.decoder_check import check_decoder, class_shapes
from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.diff.family import MODEL_TYPE, doubled, own_config, sinks_rule
from upfit.convert.diff.merge import plan_merge
from upfit.convert.recipe import MERGE, Fit, FitContext, NoOptions, Recipe, possible
from upfit.errors import UpfitError
from upfit.options import flag, option
from upfit.text.files import FIELD, FIELD_HELP

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.attention import Attention, Geometry, Layer
    from upfit.architecture.layers import Architecture

PAPER = "Ye et al. 2024, Differential Transformer, arXiv 2410.05258, and its V2 (2026); DEX: Kong et al. 2025, arXiv 2505.16333"
QUERY_PARTS = ("q", "q_bias", "q_norm", "o")
Variant = Literal["v2", "v2-static", "dex", "split", "diffllama"]


FITTED_VARIANTS = ("variant", "split", "diffllama", "dex")
CALIBRATION = ("calibration", "calibration_tokens", "calibration_length")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `upfit convert diff`."""

    variant: Variant = option(
        "v2",
        help="v2: query heads in pairs, one λ a token and head; v2-static: the same as a plain model of the source's class, "
        "with twice the query heads; dex: heads minus a learned linear map of themselves, folded away by `upfit merge`; "
        "split: each head halved into a pair, nothing added; diffllama: transformers' class of the paper's form",
    )
    lambdas: Literal["token", "head"] = option(
        "token",
        goes_with=("variant", "v2"),
        help="λ from each token's hidden state, or one a head (which `upfit merge` can fold away)",
    )
    noise: float = option(
        0.0,
        at_least=0,
        at_most=1,
        goes_with=("variant", "v2", "v2-static"),
        help="noise on the second query of each pair, in standard deviations; 0 is exact",
    )
    heads: Literal["all", "entropy"] = option(
        "all",
        goes_with=("variant", "dex"),
        help="change all heads, or in each layer the half whose attention is most spread on calibration text",
    )
    exact: bool = option(
        False, goes_with=("variant", "diffllama"), help="lose nothing, at twice the attention's parameters and cache"
    )
    naive: bool = option(
        False, goes_with=("variant", "split"), help="cut every head in the middle, without calibration; loses far more"
    )
    calibration: list[str] | None = option(
        None,
        goes_with=FITTED_VARIANTS,
        help="text files or folders; with dex for --heads entropy; default: Python's standard library",
    )
    field: str = option(FIELD, goes_with=("calibration",), help=FIELD_HELP)
    calibration_tokens: str | None = option(
        None, goes_with=FITTED_VARIANTS, help="tokens of calibration text to use, such as 64k (the default)"
    )
    calibration_length: int | None = option(
        None, goes_with=FITTED_VARIANTS, help="tokens of a calibration window; default: 2048, or what the model allows"
    )
    refit: bool = option(
        True,
        goes_with=("variant", "split", "diffllama"),
        help="fit O and the MLP's last matrix in the converted model's stream",
    )
    seed: int = option(0, help="seed of --noise")


def plan(architecture: "Architecture", options: Options) -> Plan | Fit:
    """The plan of a variant.

    Raises UpfitError for a family that the variant cannot be made of, and for flags of another variant.
    """
    _check_flags(options)
    if architecture.entry.model_type == "diffllama":
        raise UpfitError("diffllama is differential already; nothing to convert")
    check_decoder(architecture)
    make = {"dex": _plan_dex, "split": _plan_split, "diffllama": _plan_diffllama}.get(options.variant, _plan_pairs)
    return make(architecture, options)


def _check_flags(options: Options) -> None:
    calibrated = [name for name in CALIBRATION if getattr(options, name) is not None]
    unused = options.exact or options.naive or (options.variant == "dex" and options.heads == "all")
    if calibrated and unused:
        raise UpfitError(f"{flag(calibrated[0])} is for variants that are fitted, and this one is not; leave it out")


def _plan_pairs(architecture: "Architecture", options: Options) -> Plan | Fit:
    config = doubled(architecture)
    rules = [_pair_rule(layer, options) for layer in architecture.layers]
    rules += [sinks_rule(layer.names["sinks"]) for layer in architecture.layers if "sinks" in layer.names]
    exact = options.noise == 0
    if options.variant == "v2-static":
        return Plan(config, tuple(rules), close=exact)
    rules += [_lambda_rule(layer, options.lambdas) for layer in architecture.layers]
    config = own_config(architecture, config, "v2", options.lambdas)
    notes = () if exact else ("--noise changes the model from the first step; the loss below says by how much",)
    summed = exact and _sums_over_heads(architecture)
    return Plan(config, tuple(rules), exact=exact and not summed, close=summed, notes=notes)


def _sums_over_heads(architecture: "Architecture") -> bool:
    """Whether queries are normed over all heads at once: a mean over twice as many has the same value, in another order."""
    shapes = class_shapes(architecture.config)
    norms = [(layer, f"{layer.path}.{architecture.entry.q_norm}.weight") for layer in architecture.layers]
    return any(shapes.get(norm, (0,))[0] == layer.geometry.heads * layer.geometry.head_dim for layer, norm in norms)


def _pair_rule(layer: "Layer", options: Options) -> Rule:
    import torch

    from upfit.convert.diff.pairs import HALF, duplicate, scale_output, spread_output

    def change(attention: "Attention") -> "Attention":
        paired = scale_output(duplicate(attention, options.noise, options.seed + layer.index), 1 / (1 - HALF))
        if options.variant == "v2":
            return paired
        return spread_output(paired, torch.full((layer.geometry.heads,), HALF))

    label = "queries twice, output doubled" if options.variant == "v2" else "queries twice, outputs [2 o, −o]"
    return layer.rule(QUERY_PARTS, change, label)


def _lambda_rule(layer: "Layer", lambdas: str) -> Rule:
    query, heads = layer.names["q.weight"], layer.geometry.heads
    name = layer.stem + ("lambda_proj.weight" if lambdas == "token" else "lambda_logit")

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        like = tensors[query]
        return {name: like.new_zeros((heads, like.shape[1]) if lambdas == "token" else (heads,))}

    return Rule((query,), (name,), apply, "λ = sigmoid(0) = 0.5")


def _plan_dex(architecture: "Architecture", options: Options) -> Plan | Fit:
    rules = tuple(_dex_rule(layer) for layer in architecture.layers)
    outline = Plan(own_config(architecture, architecture.config, "dex", "head"), rules, exact=True)
    if options.heads == "all":
        return outline

    def run(context: FitContext) -> Plan:
        from upfit.convert.diff.entropy import with_spread_heads

        return with_spread_heads(context, outline, _sources(options))

    return Fit(outline, run)


def _sources(options: Options) -> tuple[list[str] | None, str | None, int | None, str]:
    return options.calibration, options.calibration_tokens, options.calibration_length, options.field


def _plan_split(architecture: "Architecture", options: Options) -> Plan | Fit:
    widths = {layer.geometry.head_dim for layer in architecture.layers}
    if any(width % 4 for width in widths):
        raise UpfitError(f"heads of width {sorted(widths)} cannot be halved into rotated pairs; choose --variant v2")
    rules = tuple(_split_rule(layer) for layer in architecture.layers)
    config = own_config(architecture, architecture.config, "split", "head")
    if options.naive:
        return Plan(config | {"diff_cut": "middle"}, rules)
    outline = Plan(config, rules)

    def run(context: FitContext) -> Plan:
        from upfit.convert.diff.fit import Fitting, fit
        from upfit.convert.diff.split import choose, groups_of_two

        fitting = Fitting(
            "split", lambda layer, traits, views: [choose(views, groups_of_two(traits.order, traits.pairs))], options.refit
        )
        return fit(context, fitting, replace(outline, rules=()), _sources(options))

    return Fit(outline, run)


def _split_rule(layer: "Layer") -> Rule:
    query, shape = layer.names["q.weight"], layer.geometry
    names = (layer.stem + "split_scale", layer.stem + "lambda_logit")

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        from upfit.convert.diff.split import naive

        like, cut = tensors[query], naive(shape.heads, shape.head_dim, layer.index)
        return {names[0]: cut.scale.to(like), names[1]: cut.lambdas.logit().to(like)}

    return Rule((query,), names, apply, "each query in two halves")


def _plan_diffllama(architecture: "Architecture", options: Options) -> Plan | Fit:
    from upfit.convert.diff import diffllama

    diffllama.check(architecture, options.exact)
    config, hidden = diffllama.config_of(architecture, options.exact), architecture.config["hidden_size"]
    if options.exact:
        notes = ("twice the key/value heads: the cache doubles. The norm is made linear by constants in the values' bias",)
        rules = tuple(diffllama.exact_rule(layer, hidden) for layer in architecture.layers)
        return Plan(config, rules, close=True, notes=notes)
    biases = tuple(rule for layer in architecture.layers for rule in diffllama.bias_rules(layer, config, hidden))
    outline = Plan(config, (*biases, *(diffllama.outline_rule(layer) for layer in architecture.layers)))

    def run(context: FitContext) -> Plan:
        from upfit.convert.diff.fit import Fitting, fit
        from upfit.convert.diff.paper import candidates

        eps = float(config["rms_norm_eps"])
        fitting = Fitting("diffllama", lambda layer, traits, views: candidates(layer.index, views, eps), options.refit)
        return fit(context, fitting, replace(outline, rules=biases), _sources(options))

    return Fit(outline, run)


def _dex_rule(layer: "Layer") -> Rule:
    query, shape = layer.names["q.weight"], layer.geometry
    names = tuple(layer.stem + name for name in ("dex_weight", "dex_lambda", "dex_heads"))

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        from upfit.modeling.modeling_upfit_diff import DEX_LAMBDA

        like = tensors[query]
        weight = like.new_zeros(shape.v_head_dim, shape.v_head_dim)
        values = (weight, like.new_full((), DEX_LAMBDA), like.new_ones(shape.heads))
        return dict(zip(names, values, strict=True))

    return Rule((query,), names, apply, "head − λ · head · W, W = 0")


def _trials(architecture: "Architecture") -> list[Options]:
    variants: list[Options] = [
        Options(),
        Options(variant="v2-static"),
        Options(variant="dex"),
        Options(variant="split", naive=True),
        Options(variant="diffllama", exact=True),
    ]
    return [options for options in variants if possible(plan, architecture, options)]


def _offers(architecture: "Architecture") -> str:
    variants = [name for name in get_args(Variant) if possible(plan, architecture, Options(variant=name))]
    exact = "diffllama" not in variants and possible(plan, architecture, Options(variant="diffllama", exact=True))
    offers = [f"--variant {'|'.join(variants)}"] if variants else []
    return ", or ".join([*offers, *(["--variant diffllama --exact"] if exact else [])])


def _shapes(architecture: "Architecture", options: Options) -> "list[Geometry]":
    """A stock class has two query heads for a pair; DiffLlama, where nothing is lost, two key/value heads as well."""
    doubled = options.variant == "diffllama" and options.exact
    heads, kv_heads = 2 if doubled or options.variant == "v2-static" else 1, 2 if doubled else 1
    shapes = [layer.geometry for layer in architecture.layers]
    return [replace(shape, heads=heads * shape.heads, kv_heads=kv_heads * shape.kv_heads) for shape in shapes]


RECIPES = (
    Recipe(
        name="diff",
        summary="query heads in pairs whose attention maps are subtracted (differential attention)",
        paper=PAPER,
        options=Options,
        plan=plan,
        identity=lambda architecture: Options() if possible(plan, architecture, Options()) else None,
        trials=_trials,
        offers=_offers,
        shapes=_shapes,
    ),
)
MERGES = {
    MODEL_TYPE: Recipe(
        name=MERGE,
        summary="fold what a differential model has learned into the source's own class",
        paper=PAPER,
        options=NoOptions,
        plan=plan_merge,
        identity=lambda architecture: None,
        trials=lambda architecture: [],
    )
}

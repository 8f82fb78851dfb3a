"""Latent attention: keys and values of all heads made of one cached vector a token, and of rotated keys that heads share."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from upfit.checkpoint.plan import Plan
from upfit.convert.recipe import MERGE, Fit, FitContext, NoOptions, Recipe, possible
from upfit.errors import UpfitError
from upfit.options import option
from upfit.text.files import FIELD, FIELD_HELP

if TYPE_CHECKING:
    from upfit.architecture.layers import Architecture

PAPER = "DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434; from finished models: TransMLA, Meng et al. 2025, arXiv 2502.07864"


STOCK, OWN = "deepseek_v3", "upfit_mla"
Target = Literal["auto", "deepseek_v3", "upfit_mla"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `upfit convert mla`."""

    cache: str | None = option(None, help="a share of the source's cache, such as 50%, or numbers a token and layer")
    latent: int | None = option(None, help="width of the latent, with --rope-dim, in place of --cache")
    rope_dim: int | None = option(None, help="numbers of rotated keys that all heads share, with --latent")
    target: Target = option(
        "auto",
        help="class of the result: deepseek_v3, one of transformers' own, or ours, which can have several rotated keys a pair; "
        "auto: deepseek_v3 where it can hold the model",
    )
    pad: str | None = option(
        None, help="with deepseek_v3: zeros up to these widths of latent and rotated keys, such as 512+64, for GPU kernels"
    )
    calibration: list[str] | None = option(None, help="text files or folders; default: Python's standard library")
    field: str = option(FIELD, goes_with=("calibration",), help=FIELD_HELP)
    calibration_tokens: str | None = option(None, help="tokens of calibration text to use, such as 64k (the default)")
    calibration_length: int | None = option(
        None, help="tokens of a calibration window: the length to be served; default: 2048, or what the model allows"
    )
    refit: bool = option(True, help="after the replacement fit queries, keys, O and the MLP's last matrix, layer by layer")


def plan(architecture: "Architecture", options: Options) -> Fit:
    """A latent in every layer. Raises UpfitError for widths that are none, and for a model that cannot have one."""
    from upfit.architecture.names import name_map
    from upfit.convert.mla.deepseek import why_not
    from upfit.convert.mla.fit import Choice, fit, label, own_note, stock_note
    from upfit.convert.mla.own_config import check, has_bias, outline, own_config
    from upfit.convert.mla.pad import padded, read_pad
    from upfit.convert.mla.sizes import Asked, layer_settings, possible_sizes, rotated_pairs
    from upfit.convert.mla.stock_plan import stock_plan

    _check_options(options)
    check(architecture)
    first, pairs, bias = architecture.layers[0], rotated_pairs(architecture), has_bias(architecture)
    inputs = architecture.tensors[first.names["q.weight"]].shape[1] + bias
    asked = Asked(options.cache, options.latent, options.rope_dim)
    pad = None if options.pad is None else read_pad(options.pad)
    reason, sizes = None, possible_sizes(first.geometry, inputs, pairs, options.target == OWN, asked)

    def drawn(stock: bool) -> Plan:
        """The plan as far as it is known before the fit."""
        middle = sizes[len(sizes) // 2]
        settings = layer_settings(middle, list(range(pairs)))
        rules = tuple(outline(layer, middle, bias, label(architecture, middle, options.refit)) for layer in architecture.layers)
        own = Plan(own_config(architecture, [settings] * len(rules), 1.0), rules)
        if not stock:
            return own
        return stock_plan(own if pad is None else padded(own, pad), architecture)

    name_map(drawn(stock=False).config)  # which our class may refuse
    if options.target != OWN:
        reason = why_not(drawn(stock=False).config)
        if reason is not None and options.target == STOCK:
            raise UpfitError(f"--target {STOCK}: {reason}; leave it out for a class of ours")
        if reason is not None:
            sizes = possible_sizes(first.geometry, inputs, pairs, True, asked)
    stock = options.target != OWN and reason is None
    if pad is not None and not stock:
        raise UpfitError(f"--pad is for {STOCK}, and the result is of our class{f': {reason}' if reason else ''}; leave it out")

    def run(context: FitContext) -> Plan:
        how = (options.calibration, options.calibration_tokens, options.calibration_length, options.field)
        return fit(context, Choice(tuple(sizes), stock, reason, pad, options.refit, *how))

    outlined = drawn(stock)
    return Fit(replace(outlined, notes=(stock_note(outlined.config) if stock else own_note(reason),)), run)


def _check_options(options: Options) -> None:
    widths = (options.latent, options.rope_dim)
    if options.cache is not None and widths != (None, None):
        raise UpfitError("--cache decides --latent and --rope-dim; give one or the others")
    if options.cache is None and None in widths:
        raise UpfitError("give --cache, such as --cache 50%, or both --latent and --rope-dim")
    if any(name.endswith(".safetensors") for name in options.calibration or []):
        raise UpfitError("--calibration takes text here; a statistics file of upfit calibrate has not the sums of a latent")


def plan_merge(architecture: "Architecture", options: object) -> Plan:
    """A checkpoint of our class as one of the stock class, the same function. Raises UpfitError where that cannot hold it."""
    from upfit.convert.mla.stock_plan import stock_plan

    return replace(stock_plan(Plan(architecture.config, ()), architecture), close=True)


def _offers(architecture: "Architecture") -> str:
    return "--cache 50%" if possible(plan, architecture, Options(cache="50%")) else ""


RECIPES = (
    Recipe(
        name="mla",
        summary="one latent a token for the keys and values of all heads, beside rotated keys that they share",
        paper=PAPER,
        options=Options,
        plan=plan,
        identity=lambda architecture: None,
        trials=lambda architecture: [],
        offers=_offers,
    ),
)

MERGES = {
    "upfit_mla": Recipe(
        name=MERGE,
        summary="our latent attention as a stock DeepseekV3ForCausalLM",
        paper=PAPER,
        options=NoOptions,
        plan=plan_merge,
        identity=lambda architecture: None,
        trials=lambda architecture: [NoOptions()],
    )
}

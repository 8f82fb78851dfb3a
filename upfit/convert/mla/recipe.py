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
    from upfit.calibration.estimate import Work

PAPER = "DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434; from finished models: TransMLA, Meng et al. 2025, arXiv 2502.07864"


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
    from upfit.convert.mla.fit import Choice, choose_sizes, fit
    from upfit.convert.mla.outline import Outline, choose_target, middle
    from upfit.convert.mla.own_config import check
    from upfit.convert.mla.pad import read_pad
    from upfit.convert.mla.sizes import Asked, rotated_pairs

    _check_options(options)
    check(architecture)
    pairs = rotated_pairs(architecture)
    pad = None if options.pad is None else read_pad(options.pad)
    outline, asked = Outline(architecture, pairs, pad, options.refit), Asked(options.cache, options.latent, options.rope_dim)
    target = choose_target(outline, asked, options.target)
    how = (options.calibration, options.calibration_tokens, options.calibration_length, options.field)
    choice = Choice(target.possible, target.stock, target.reason, pad, options.refit, *how)

    def run(context: FitContext) -> Plan:
        return fit(context, choice)

    def drawn(context: FitContext) -> Plan:
        return outline.plan(choose_sizes(context, choice)[0], target.stock, target.reason)

    def work(context: FitContext) -> "Work":
        from upfit.convert.mla import cost

        return cost.work(context, choice)

    known = outline.plan(middle(target.possible), target.stock, target.reason)
    undecided = options.calibration is not None and len(target.possible) > 1
    return Fit(known, run, drawn=drawn if undecided else None, work=work)


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

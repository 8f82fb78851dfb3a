"""Latent attention: keys and values of all heads made of one cached vector a token, and of rotated keys that heads share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upfit.checkpoint.plan import Plan
from upfit.convert.recipe import Fit, FitContext, Recipe
from upfit.errors import UpfitError
from upfit.options import option
from upfit.text.files import FIELD, FIELD_HELP

if TYPE_CHECKING:
    from upfit.architecture.attention import Geometry
    from upfit.architecture.layers import Architecture

PAPER = "DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434; from finished models: TransMLA, Meng et al. 2025, arXiv 2502.07864"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `upfit convert mla`."""

    cache: str | None = option(None, help="a share of the source's cache, such as 50%, or numbers a token and layer")
    latent: int | None = option(None, help="width of the latent, with --rope-dim, in place of --cache")
    rope_dim: int | None = option(None, help="numbers of rotated keys that all heads share, with --latent")
    calibration: list[str] | None = option(None, help="text files or folders; default: Python's standard library")
    field: str = option(FIELD, goes_with=("calibration",), help=FIELD_HELP)
    calibration_tokens: str | None = option(None, help="tokens of calibration text to use, such as 64k (the default)")
    calibration_length: int | None = option(
        None, help="tokens of a calibration window: the length to be served; default: 2048, or what the model allows"
    )
    refit: bool = option(True, help="after the replacement fit queries, keys, O and the MLP's last matrix, layer by layer")


def plan(architecture: "Architecture", options: Options) -> Fit:
    """A latent in every layer. Raises UpfitError for widths that are none, and for a model that cannot have one."""
    from upfit.convert.mla.own_config import check, has_bias, outline, own_config
    from upfit.convert.mla.sizes import layer_settings, rotated_pairs, sizes

    if (options.cache is None) == (options.latent is None or options.rope_dim is None):
        raise UpfitError("give --cache, such as --cache 50%, or both --latent and --rope-dim")
    if options.cache is not None and (options.latent is not None or options.rope_dim is not None):
        raise UpfitError("--cache decides --latent and --rope-dim; give one or the others")
    check(architecture)
    pairs, shape = rotated_pairs(architecture), architecture.layers[0].geometry
    chosen = sizes(shape, pairs, True, options.cache, options.latent, options.rope_dim)
    whole = shape.kv_heads * (shape.head_dim + shape.v_head_dim)
    label = f"{whole} → {chosen.latent} latent + {2 * chosen.slots} rotated numbers a token" + (", refitted" * options.refit)
    bias, settings = has_bias(architecture), layer_settings(chosen, list(range(pairs)))
    rules = tuple(outline(layer, chosen, bias, label) for layer in architecture.layers)
    drawn = Plan(own_config(architecture, [settings] * len(rules), 1.0), rules)

    def run(context: FitContext) -> Plan:
        from upfit.convert.mla.fit import Choice, fit

        how = (options.calibration, options.calibration_tokens, options.calibration_length, options.field)
        return fit(context, Choice(chosen, options.refit, *how), drawn, label)

    return Fit(drawn, run)


def _shapes(architecture: "Architecture", options: Options) -> "list[Geometry]":
    return [layer.geometry for layer in architecture.layers]


RECIPES = (
    Recipe(
        name="mla",
        summary="one latent a token for the keys and values of all heads, beside rotated keys that they share",
        paper=PAPER,
        options=Options,
        plan=plan,
        identity=lambda architecture: None,
        trials=lambda architecture: [],
        shapes=_shapes,
    ),
)

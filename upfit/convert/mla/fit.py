"""From calibration text to a plan whose rules take latents that were fitted beforehand."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import LayerFits, read_calibration
from upfit.convert.mla.choose import choose
from upfit.convert.mla.convert_layers import Settings, convert_layers
from upfit.convert.mla.deepseek import why_not
from upfit.convert.mla.own_config import dropped, own_config
from upfit.convert.mla.pad import padded
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.stock_plan import stock_plan
from upfit.provenance import FITTED, STATE

if TYPE_CHECKING:
    from upfit.architecture.layers import Architecture
    from upfit.convert.recipe import FitContext


VLLM_CACHES = (320, 512, 576)  # numbers a token and layer; on a CPU 512 + 64 alone (vLLM 0.32, see docs/serving.md)


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `stock`: the result is to be of the stock class, where all layers turn out to be alike;
    `why_own`: why it is not to be, if there is a reason. `pad`: widths of latent and rotated keys that it gets by zeros."""

    possible: tuple[Sizes, ...]
    stock: bool
    why_own: str | None
    pad: tuple[int, int] | None
    refit: bool
    calibration: list[str] | None
    tokens: str | None
    length: int | None
    field: str


def fit(context: "FitContext", choice: Choice) -> Plan:
    """Choose the sizes, fit every layer, and plan to write what was found.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be watched on it.
    """
    calibration = read_calibration(context, choice.calibration, choice.tokens, choice.length, choice.field)
    architecture, possible = context.architecture, [asdict(sizes) for sizes in choice.possible]
    identity = {"recipe": "mla", "config": architecture.config, "possible": possible}
    identity |= asdict(Settings(choice.possible[0], choice.refit)) | {"sizes": None}
    fits = LayerFits(context, calibration, "fitting latents", identity, list(architecture.layers))
    sizes, tried = _chosen(fits, choice)
    settings = Settings(sizes, choice.refit)
    convert_layers(fits, lambda layers, scaling: own_config(architecture, layers, scaling), settings)
    records = fits.records
    config = own_config(architecture, [record["settings"] for record in records], records[0]["scaling"])
    report: dict[str, Any] = {
        STATE: FITTED,
        "calibration": calibration.record(),
        "sizes": asdict(sizes),
        "tried": tried,
        "layers": records,
    }
    plan = Plan(config, fits.rules(label(architecture, sizes, choice.refit), dropped), report=report)
    reason = why_not(config) if choice.stock else choice.why_own
    if choice.stock and reason is None:
        wide = plan if choice.pad is None else padded(plan, choice.pad)
        stock = stock_plan(wide, architecture)
        return replace(stock, notes=(stock_note(stock.config),))
    return replace(plan, notes=(own_note(reason),))


def choose_sizes(context: "FitContext", choice: Choice) -> tuple[Sizes, list[dict[str, Any]]]:
    """The best of the possible sizes, and what was tried, best first, for recipe.json. Raises Opaque as `choose` does."""
    sizes, tried = choose(context, choice.calibration, choice.length, choice.field, list(choice.possible))
    return sizes, [{"rotated_pairs": pairs(one.sizes), "slots": one.sizes.slots, "error": one.error} for one in tried]


def _chosen(fits: LayerFits, choice: Choice) -> tuple[Sizes, list[dict[str, Any]]]:
    """The same, chosen once for a fit, however often it is stopped."""
    if len(choice.possible) == 1:
        return choice.possible[0], []

    def decide() -> dict[str, Any]:
        sizes, tried = choose_sizes(fits.context, choice)
        return {"at": choice.possible.index(sizes), "tried": tried}

    decided = fits.decided(decide)
    return choice.possible[decided["at"]], decided["tried"]


def stock_note(config: dict[str, Any]) -> str:
    """What is said of a result of the stock class with this `config.json`: what it is, and what vLLM wants of its widths."""
    latent, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    stock = "the result is a stock DeepseekV3ForCausalLM, a class of transformers' own"
    if (latent, rotated) == (512, 64):
        return stock
    way = (
        "--pad 512+64" if latent <= 512 and rotated <= 64 else "a latent up to 512 and rotated keys up to 64, then --pad 512+64"
    )
    if latent + rotated in VLLM_CACHES:
        return f"{stock}; vLLM on a CPU wants {way}"
    caches = "320, 512 or 576 numbers a token and layer"
    return f"{stock}; vLLM has latent caches of {caches}, and this is {latent + rotated}: for vLLM give {way}"


def own_note(reason: str | None) -> str:
    """What is said of a result of our class; `reason`: why it is not of the stock class."""
    return f"the result is of our class upfit_mla, which transformers loads from the folder{f': {reason}' if reason else ''}"


def pairs(sizes: Sizes) -> int:
    """How many pairs keep a rotation."""
    return sum(count > 0 for count in sizes.counts)


def label(architecture: "Architecture", sizes: Sizes, refit: bool) -> str:
    """What a dry run says of a layer."""
    shape = architecture.layers[0].geometry
    whole = shape.kv_heads * (shape.head_dim + shape.v_head_dim)
    keys = f"{2 * sizes.slots} of rotated keys" if sizes.slots else "no rotated key"
    return f"{whole} → {sizes.numbers} cached numbers a token: latent {sizes.latent}, {keys}" + (", refitted" if refit else "")

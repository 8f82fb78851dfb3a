"""From calibration text to a plan whose rules take latents that were fitted beforehand."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import LayerFits, read_calibration
from upfit.convert.mla.convert_layers import Settings, convert_layers
from upfit.convert.mla.own_config import dropped, own_config
from upfit.convert.mla.sizes import Sizes
from upfit.provenance import FITTED, STATE

if TYPE_CHECKING:
    from upfit.convert.recipe import FitContext


@dataclass(frozen=True)
class Choice:
    """What the user asked for."""

    sizes: Sizes
    refit: bool
    calibration: list[str] | None
    tokens: str | None
    length: int | None
    field: str


def fit(context: "FitContext", choice: Choice, plan: Plan, label: str) -> Plan:
    """Fit every layer and give `plan` the config and rules of what was found.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be watched on it.
    """
    calibration = read_calibration(context, choice.calibration, choice.tokens, choice.length, choice.field)
    settings, architecture = Settings(choice.sizes, choice.refit), context.architecture
    identity = {"recipe": "mla", "config": architecture.config} | asdict(settings)
    fits = LayerFits(context, calibration, "fitting latents", identity, list(architecture.layers))
    convert_layers(fits, lambda layers, scaling: own_config(architecture, layers, scaling), settings)
    records = fits.records
    config = own_config(architecture, [record["settings"] for record in records], records[0]["scaling"])
    report: dict[str, Any] = {STATE: FITTED, "calibration": calibration.record(), "layers": records}
    return Plan(config, fits.rules(label, dropped), notes=plan.notes, report=report)

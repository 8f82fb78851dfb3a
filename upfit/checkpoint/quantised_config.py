"""What a checkpoint says of its own quantisation, in its config or a file beside it; see architecture/quantised.py too."""

from pathlib import Path
from typing import Any

from upfit.errors import UpfitError

FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
METHOD_KEYS = ("quant_method", "quant_algo", "mode", "w_bit", "bits")


def of_config(config: dict[str, Any]) -> str | None:
    """The method that a `config.json`, or a config nested in it, tells of; None where it tells of none."""
    for key, value in config.items():
        mlx = key == "quantization" and isinstance(value, dict) and "bits" in value
        if value and (key in ("quantization_config", "compression_config") or mlx):
            return method_of(value) or "unknown"
        inside = of_config(value) if isinstance(value, dict) else None
        if inside:
            return inside
    return None


def method_of(value: Any) -> str:
    """What a description of a quantisation calls its method, however deep; empty where it does not say."""
    if not isinstance(value, dict):
        return ""
    methods = [str(value[key]) for key in METHOD_KEYS if isinstance(value.get(key), str | int)]
    return methods[0] if methods else next(filter(None, map(method_of, value.values())), "")


def refusal(folder: Path, what: str) -> UpfitError:
    return UpfitError(f"{folder} is quantised ({what}); convert the checkpoint it was made from, then quantise the result")

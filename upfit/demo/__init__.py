"""`upfit demo`: the embedded model, and every step of Upfit on it."""

from importlib import resources
from pathlib import Path


def embedded_model() -> Path:
    """The folder of the small multi-head Llama that ships inside the package."""
    return Path(str(resources.files(__package__).joinpath("model")))

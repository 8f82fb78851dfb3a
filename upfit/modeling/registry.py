"""The model types that Upfit brings itself: one `modeling_<model type>.py` each.

Where upfit is imported, transformers' auto classes know them, so that such a folder needs no `trust_remote_code`. Nothing heavy
is imported for it before somebody asks for one.
"""

import importlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import ItemsView, Sequence, ValuesView
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

CONFIGS = "transformers.models.auto.configuration_auto"  # every use of an auto class begins here
PREFIX = "modeling_"
ROOM = Path(__file__).parent


def code_files() -> dict[str, Path]:
    """Model type → the modelling file that ships with its checkpoints."""
    return {path.stem.removeprefix(PREFIX): path for path in sorted(ROOM.glob(f"{PREFIX}*.py"))}


def shipped(model_type: str) -> list[Path]:
    """The files that go into a folder of one of our model types: its modelling file and what that imports beside itself."""
    files = [code_files()[model_type]]
    for path in files:
        names = re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
        files += [other for other in (ROOM / f"{name}.py" for name in names) if other not in files]
    return files


def is_own(config: dict[str, Any]) -> bool:
    return config.get("model_type") in code_files()


def family(config: dict[str, Any]) -> str:
    """The stock model type: of one of our configs, the one it is built on."""
    return str(config["base_model_type"] if is_own(config) else config["model_type"])


def register() -> None:
    """Make transformers' auto classes know our model types."""
    from transformers import AutoConfig

    for model_type, path in code_files().items():
        module: Any = importlib.import_module(f"{__package__}.{path.stem}")
        AutoConfig.register(model_type, module.CONFIG, exist_ok=True)
        for auto, model in module.MODELS.items():
            auto.register(module.CONFIG, model, exist_ok=True)


def announce() -> None:
    """Tell transformers of our model types, now or as soon as it is loaded; they are registered when first asked for."""
    if CONFIGS in sys.modules:
        _announce(sys.modules[CONFIGS])
    else:
        sys.meta_path.insert(0, _Finder())


def _announce(module: ModuleType) -> None:
    known = module.CONFIG_MAPPING
    known._extra_content = _Late(known._extra_content, **dict.fromkeys(code_files()))


class _Late(dict[str, Any]):
    """Registered config classes by model type; ours are None until they are asked for.

    Importing them any earlier would be in the middle of transformers' own imports.
    """

    def __getitem__(self, key: str) -> Any:
        if super().__getitem__(key) is None:
            register()
        return super().__getitem__(key)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        register()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        register()
        return super().items()


class _Finder(importlib.abc.MetaPathFinder):
    """Lets transformers' config module be found as always, and follows its loading with `_announce`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != CONFIGS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        _announce(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

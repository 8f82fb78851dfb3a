"""Which files beside the weights are copied: tokenizer, licence, code of ours. Code of others and pickles never are."""

import os
import shutil
from pathlib import Path
from typing import Any

from upfit.checkpoint.remote_code import side_file
from upfit.errors import UpfitError
from upfit.modeling.registry import is_own, shipped

# What travels with the weights. Code (*.py) and pickles never do.
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICEN[SC]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
NEVER_COPIED = {".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors"}


def check_side_files(source: Path) -> dict[str, Path]:
    """The side files of a model folder, sorted: names within it, and the files behind them.

    Raises UpfitError for what cannot be copied: a link out of the folder or to nothing, what is no ordinary file, what may not
    be read.
    """
    files: dict[str, Path] = {}
    for pattern in SIDE_FILES:
        for beginning in source.glob(pattern):
            for path in beginning.rglob("*") if beginning.is_dir() else [beginning]:
                if path.suffix not in NEVER_COPIED and not path.is_dir():
                    files[str(path.relative_to(source))] = _ordinary(path, source)
    return dict(sorted(files.items()))


def _ordinary(path: Path, source: Path) -> Path:
    real = contained(path, source)
    if not real.exists():
        raise UpfitError(f"{path} is a link to nothing; fetch the file again, or remove the link")
    if not real.is_file():
        raise UpfitError(f"{path} is no ordinary file and cannot be copied; remove it")
    if not os.access(real, os.R_OK):
        raise UpfitError(f"no permission to read {path}, which goes with the weights; change it, or remove the file")
    return real


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation settings, chat templates, licence and README; the names that were copied, sorted.

    Raises UpfitError as `check_side_files` does.
    """
    files = check_side_files(source)
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(side_file(path))
    return list(files)


def copy_code(config: dict[str, Any], target: Path) -> None:
    """The modelling files of one of our model types, from this installation and never from the source folder."""
    if is_own(config):
        for path in shipped(config["model_type"]):
            shutil.copyfile(path, target / path.name)


def contained(path: Path, folder: Path) -> Path:
    """The real file behind `path`, which must lie in `folder` or, for a hub cache snapshot, in that repository's blobs.

    Raises UpfitError when a link leads anywhere else.
    """
    real, folder = path.resolve(), folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(place in real.parents for place in allowed):
        raise UpfitError(f"{path} is a link to {real}, outside the model folder; copy the file into the folder")
    return real

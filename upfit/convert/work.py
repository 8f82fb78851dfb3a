"""Work folders: what is half done stays in a sibling of the output, for the same command to go on with."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upfit.convert.folders import sync_path
from upfit.errors import UpfitError

SETTINGS, LOCK = "settings.json", "lock"


@contextmanager
def held(work: Path) -> Iterator[None]:
    """Keep other processes out of the folder `work`, which is made; raises UpfitError when one is already there."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UpfitError(f"another process is working in {work}; wait for it or choose another output") from error
        yield


def claim(work: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Make `work` the work folder of these settings.

    Raises UpfitError when it holds work of others (settings alone are no work); with `overwrite` that is removed.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, text = work / SETTINGS, json.dumps(settings, indent=2) + "\n"
    begun = [entry for entry in work.iterdir() if entry.name not in (SETTINGS, LOCK)]
    if path.exists() and begun:
        if path.read_text(encoding="utf-8") == text:
            return
        if not overwrite:
            raise UpfitError(f"{work} holds work begun with other settings; give those again, or remove the folder")
        for entry in begun:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing of it, whenever the process or the machine stops."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    sync_path(partial)
    os.replace(partial, path)

"""A fit that can be stopped: its finished layers, and its state before the next one, in a folder that outlives the process.

`fit.json` is written last and names files that are whole, with their hashes. So the next run finds the state after some layer,
or none. At most two states are on the disk at any time.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upfit.checkpoint.content import file_hash
from upfit.checkpoint.output_folder import RESERVE_BYTES
from upfit.durable import sync_path

FORMAT = 1
FILE = "fit.json"
NEW = ".new"  # of a file that is being written
OURS = re.compile(rf"({re.escape(FILE)}|layer-\d{{5}}\.safetensors|before-\d{{5}}\.state)({re.escape(NEW)})?")


@dataclass(frozen=True)
class Entry:
    """A finished layer: its path, what recipe.json and the plan are told of it, the names of its tensors, and their file with
    its hash (None for a layer that got no tensors)."""

    layer: str
    record: dict[str, Any]
    extra: dict[str, Any]
    names: list[str]
    file: str | None
    sha256: str | None


@dataclass
class Progress:
    """`next` of `total` layers of the model is to be done next; `state` is the file before it, with its hash; `decided` is what
    was settled before the first layer."""

    next: int = 0
    total: int = 0
    state: str | None = None
    sha256: str | None = None
    layers: list[Entry] = field(default_factory=list)
    decided: dict[str, Any] | None = None


class FitWork:
    """The folder of one fit. Work of another identity that lies there is begun anew; of the folder's files only those are
    touched whose names this class makes."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        self.progress = self._read() or Progress()
        self._clear()

    @property
    def finished(self) -> bool:
        return self.progress.total > 0 and self.progress.next == self.progress.total

    def _read(self) -> Progress | None:
        """What an earlier run left, if it was this fit and all of it is as it was written."""
        try:
            content = json.loads((self.folder / FILE).read_text("utf-8"))
            if (content["format"], content["identity"]) != (FORMAT, self.identity):
                return None
            progress = Progress(**{**content["progress"], "layers": [Entry(**e) for e in content["progress"]["layers"]]})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        files = [(progress.state, progress.sha256), *((entry.file, entry.sha256) for entry in progress.layers)]
        named = [(self.folder / name, sha256) for name, sha256 in files if name is not None]
        return progress if all(path.is_file() and file_hash(path) == sha256 for path, sha256 in named) else None

    def _clear(self) -> None:
        """Remove what was being written, and what belongs to another fit."""
        needed = {self.progress.state, *(entry.file for entry in self.progress.layers)}
        needed |= {FILE} if self.progress != Progress() else set()
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in needed:
                path.unlink()

    def state(self) -> dict[str, Tensor]:
        """What the layers before the next one have left, in memory of its own, laid out as it was."""
        assert self.progress.state is not None
        with safe_open(self.folder / self.progress.state, framework="pt") as file:
            strides = json.loads(file.metadata()["strides"])
            return {name: _laid_out(file.get_tensor(name), strides[name]) for name in file.keys()}  # noqa: SIM118

    def settle(self, decided: dict[str, Any]) -> None:
        """Before the first layer: what the next run need not decide again."""
        self.progress.decided = decided
        self._write_progress()

    def _write_progress(self) -> None:
        content = {"format": FORMAT, "identity": self.identity, "progress": asdict(self.progress)}
        self._write(FILE, lambda path: path.write_text(json.dumps(content), "utf-8"))

    def add(self, layer: str, record: dict[str, Any], extra: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """A layer was fitted: write its tensors. The next run knows of it after `keep`."""
        name = f"layer-{len(self.progress.layers):05d}.safetensors" if tensors else None
        sha256 = self._write(name, lambda path: save_file(tensors, path)) if name else None
        self.progress.layers.append(Entry(layer, record, extra, list(tensors), name, sha256))

    def keep(self, index: int, total: int, state: dict[str, Tensor] | None) -> None:
        """From now on the next run begins with layer `index` of `total`: `state` is what stands before it, None after the last.

        Where the disk has no room for it, the earlier state stays what the next run goes on from.
        """
        name = sha256 = None
        if state is not None:
            if not self._has_room(state, total - index):
                return
            name = f"before-{index:05d}.state"
            try:
                sha256 = self._write_state(name, state)
            except (OSError, SafetensorError):  # others took the room meanwhile; the fit itself lacks nothing
                (self.folder / (name + NEW)).unlink(missing_ok=True)
                return
        before, self.progress.state, self.progress.sha256 = self.progress.state, name, sha256
        self.progress.next, self.progress.total = index, total
        self._write_progress()
        if before is not None:
            (self.folder / before).unlink(missing_ok=True)

    def _write_state(self, name: str, state: dict[str, Tensor]) -> str:
        strides = {name: list(torch.empty_like(tensor, device="meta").stride()) for name, tensor in state.items()}
        stored = _storable(state)
        return self._write(name, lambda path: save_file(stored, path, metadata={"strides": json.dumps(strides)}))

    def _has_room(self, state: dict[str, Tensor], layers: int) -> bool:
        """Whether the disk holds `state` and still the layers to come, which the conversion cannot do without."""
        largest = max((self.folder.joinpath(e.file).stat().st_size for e in self.progress.layers if e.file), default=0)
        needed = sum(tensor.nbytes for tensor in state.values()) + largest * layers
        return shutil.disk_usage(self.folder).free >= needed + RESERVE_BYTES

    def _write(self, name: str, write: Callable[[Path], object]) -> str:
        """The file appears under its name when it is on the disk; its hash."""
        path = self.folder / (name + NEW)
        write(path)
        sync_path(path)
        sha256 = file_hash(path)
        os.replace(path, self.folder / name)
        sync_path(self.folder)
        return sha256


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: on the CPU, contiguous, no two in the same memory."""
    stored: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        stored[name] = plain.clone() if plain.untyped_storage().data_ptr() in places else plain
        places.add(stored[name].untyped_storage().data_ptr())
    return stored


def _laid_out(tensor: Tensor, strides: list[int]) -> Tensor:
    """A copy with these strides: how a tensor lies in memory decides which kernel reads it, and so its results' last bits."""
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)

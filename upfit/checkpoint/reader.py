"""A checkpoint folder, read one tensor at a time: `config.json`, and `model.safetensors` or shards with an index.

The headers of the files say which tensors there are; the index is only compared with them. Nothing is unpickled.
"""

import dataclasses
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.bounded import read_json
from upfit.checkpoint.disk_errors import naming
from upfit.checkpoint.identity import Identity, sampled
from upfit.checkpoint.quantised_config import of_config, refusal
from upfit.checkpoint.safetensors_header import TensorInfo, read_exactly, read_header
from upfit.checkpoint.side_files import contained
from upfit.errors import UpfitError
from upfit.modeling.registry import is_own

if TYPE_CHECKING:
    import torch

    from upfit.checkpoint.plan import Plan

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[\w.\-]+\.safetensors")
MAX_JSON_BYTES = 64 * 2**20  # far above the largest known index
CHANGED = "has changed since it was first read; start again on a folder at rest"


def torch_dtype(name: str) -> "torch.dtype":
    """The torch type of a safetensors type name, e.g. `BF16`."""
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32",
        "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
    }  # fmt: skip
    return getattr(torch, names[name])


def safetensors_dtype(dtype: "torch.dtype") -> str:
    """The safetensors type name of a torch floating type."""
    return {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. `tensors` holds every tensor by name, `files` the weight files in order. `fitted` holds tensors that do
    not belong to the model: what a fit has prepared for the rules of its plan."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    fitted: dict[str, TensorInfo] = field(default_factory=dict)
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _identities: dict[Path, Identity] = field(default_factory=dict, repr=False)  # of what was read of the folder

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @property
    def stored(self) -> "Checkpoint":
        """The checkpoint as its files have it."""
        return self

    @property
    def passing(self) -> dict[str, TensorInfo]:
        """The tensors that are written as they are, unless a rule writes or drops them."""
        return self.tensors

    @property
    def adapted_because(self) -> str:
        """Why what recipes see is of another architecture than the files; empty where it is not."""
        return ""

    def written(self, plan: "Plan") -> "Plan":
        """A plan made for these tensors, as rules that write tensors of a file."""
        return plan

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name] if name in self.tensors else self.fitted[name]

    def files_of(self, name: str) -> set[Path]:
        """The files that have to be there to read this tensor."""
        return {self.info(name).file}

    def with_fitted(self, folder: Path) -> "Checkpoint":
        """The same opened folder, with the tensors of every safetensors file in `folder` to be read by rules."""
        fitted = {info.name: info for path in sorted(folder.glob("*.safetensors")) for info in read_header(path)}
        return dataclasses.replace(self, fitted=fitted)

    def descriptor(self, path: Path) -> int:
        """An open file descriptor of a weight file; each is opened once, so a file cannot be swapped in between.

        Raises UpfitError when it is not the file any more whose header was read.
        """
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
                self._compare(path, os.fstat(self._descriptors[path]))
            return self._descriptors[path]

    def _compare(self, path: Path, status: os.stat_result) -> None:
        if self._identities.get(path, Identity.of(status)) != Identity.of(status):
            raise UpfitError(f"{path} {CHANGED}")

    def check_unchanged(self) -> None:
        """Raise UpfitError when a file that was read of the folder has been written to or replaced since."""
        for path in list(self._identities):
            try:
                self._compare(path, path.stat())
            except FileNotFoundError as error:
                raise UpfitError(f"{path} {CHANGED}") from error

    def identity(self) -> list[list[Any]]:
        """The weight files, as JSON can hold them, so that a later run can tell whether they are the same: names, what the
        system says of them, and samples of their bytes."""
        described = []
        for path in self.files:
            descriptor = self.descriptor(path)
            described.append([path.name, *Identity.of(os.fstat(descriptor)).record(), sampled(descriptor)])
        return described

    def read_bytes(self, file: str, nbytes: int, start: int) -> bytearray:
        """Bytes of a weight file of the folder. Raises UpfitError when the file ends before."""
        with naming(self.folder / file):
            return read_exactly(self.descriptor(self.folder / file), nbytes, start)

    def read(self, name: str) -> "torch.Tensor":
        """One tensor, read into memory of its own."""
        import torch

        info = self.info(name)
        dtype = torch_dtype(info.dtype)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        with naming(info.file):
            buffer = read_exactly(self.descriptor(info.file), info.nbytes, info.start)
        return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)

    def meta(self, name: str) -> "torch.Tensor":
        """The tensor's shape and type without its values."""
        import torch

        info = self.info(name)
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")

    def forget(self, path: Path) -> None:
        """The file at `path` is another one now: it is opened anew when it is wanted again."""
        with self._lock:
            self._identities.pop(path, None)
            descriptor = self._descriptors.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and headers of `folder`; no weight is read yet.

    Raises UpfitError for anything missing, damaged, quantised, pickled, or pointing outside the folder.
    """
    small = [path for path in (folder / "config.json", folder / INDEX) if path.exists()]
    identities = {path: Identity.of(path.stat()) for path in small}
    config = read_config(folder)
    files = _weight_files(folder)
    identities |= {path: Identity.of(path.stat()) for path in files}
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for info in read_header(path):
            if info.name in tensors:
                raise UpfitError(f"tensor {info.name!r} is in both {tensors[info.name].file.name} and {path.name}; remove one")
            tensors[info.name] = info
    _check_index(folder, tensors)
    checkpoint = Checkpoint(folder, config, tensors, tuple(files), _identities=identities)
    checkpoint.check_unchanged()
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it is. Raises UpfitError when it is missing, damaged, or tells of a quantised checkpoint."""
    if not folder.is_dir():
        raise UpfitError(f"no model folder at {folder}; give an existing folder or a hub id")
    path = folder / "config.json"
    if not path.exists():
        raise UpfitError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    config = read_object(contained(path, folder))
    if not isinstance(config.get("model_type"), str):
        raise UpfitError(f"{path} names no model_type; give the folder of a transformers model")
    if is_own(config) and not isinstance(config.get("base_model_type"), str):
        raise UpfitError(f"{path} has model_type {config['model_type']!r} but names no base_model_type; fetch it again")
    method = of_config(config)
    if method is not None:
        raise refusal(folder, method)
    return config


def most_positions(config: dict[str, Any]) -> int | None:
    """The longest input that `config.json` tells of, in tokens; None where it tells of none."""
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def config_dtypes(config: dict[str, Any]) -> set[str]:
    """The types that a config, and those nested in it, name for the weights."""
    dtypes = {value for key, value in config.items() if key in ("dtype", "torch_dtype") and isinstance(value, str)}
    return dtypes.union(*(config_dtypes(value) for value in config.values() if isinstance(value, dict)))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UpfitError when it is too large, damaged, or something else."""
    try:
        content = read_json(path, MAX_JSON_BYTES)
    except UpfitError as error:
        raise UpfitError(f"{error}; fetch it again") from error
    if not isinstance(content, dict):
        raise UpfitError(f"{path} is not a JSON object; fetch it again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise UpfitError(f"{folder} has both {SINGLE} and {INDEX}, and loaders differ in which they take; remove the stale one")
    if single.exists() or single.is_symlink():
        contained(single, folder)
        return [single]
    if not index.exists():
        raise UpfitError(_no_weights(folder))
    return [_shard(folder, name) for name in named_files(folder)]


def named_files(folder: Path) -> list[str]:
    """The weight files that the folder's index names, sorted. Raises UpfitError for an index or a name that is not read."""
    names = sorted(set(_weight_map(folder / INDEX, folder).values()))
    strange = [name for name in names if not SHARD_NAME.fullmatch(name)]
    if strange:
        raise UpfitError(f"{folder / INDEX} names the file {strange[0]!r}; only plain names ending in .safetensors are read")
    return names


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} holds only pickled weights, which can run code when they are read; save the model as safetensors first "
            "(from_pretrained, then save_pretrained)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; give the folder of a model saved as safetensors"


def _weight_map(index: Path, folder: Path) -> dict[str, str]:
    weight_map = read_object(contained(index, folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UpfitError(f"{index} has no weight_map from tensor names to file names; fetch it again")
    return weight_map


def _shard(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists() and not path.is_symlink():
        raise UpfitError(f"{folder / INDEX} names {name}, which is not in the folder; fetch it again")
    contained(path, folder)
    if not path.exists():
        raise UpfitError(f"{path} is a link to nothing; fetch the file again")
    return path


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    if not (folder / INDEX).exists():
        return
    indexed = _weight_map(folder / INDEX, folder)
    actual = {name: info.file.name for name, info in tensors.items()}
    if indexed != actual:
        name = min(set(indexed.items()) ^ set(actual.items()))[0]
        raise UpfitError(
            f"{folder / INDEX} and the shards disagree on tensor {name!r} (index: {indexed.get(name)}, "
            f"shards: {actual.get(name)}); fetch the folder again"
        )

"""The file in which `upfit calibrate` keeps its statistics and the text they were gathered on.

It is an ordinary safetensors file. Its metadata names the model and the text. Its tensors are the windows (`windows.512` [n,
512] int32 ..., the first `held.512` of them held back) and, for each attention layer, what `statistics.py` lists, as
`PATH/keys` and so on, in float32. It is accepted only for the model and the tokenizer it was made with.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfit.bounded import parse_json, shaped
from upfit.calibration.example_sample import PREFIX, ExampleSample, examples_stored
from upfit.calibration.observe import Opaque
from upfit.calibration.residual import Residual
from upfit.calibration.sample import Sample, fast_tokenizer
from upfit.calibration.statistics_check import check_layer, check_traits, check_windows
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.content import tensors_hash
from upfit.checkpoint.reader import Checkpoint, torch_dtype
from upfit.checkpoint.safetensors_header import TensorInfo, read_header, read_metadata
from upfit.errors import UpfitError
from upfit.text.tokenizer import identity

FORMAT = "2"


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the config and of every tensor's name, type, shape and bytes; reads all of the weights."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return hashlib.sha256(f"{config} {tensors_hash(checkpoint)}".encode()).hexdigest()


def traits_from(record: Mapping[str, Any]) -> AttentionTraits:
    """The inverse of `dataclasses.asdict` for AttentionTraits, from JSON."""
    values = _with_tuples(record)
    values["residual"] = Residual(**_with_tuples(record["residual"])) if record["residual"] else None
    return AttentionTraits(**values)


def _with_tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


@dataclass(frozen=True)
class Statistics:
    """What a statistics file holds, read one layer at a time."""

    path: Path
    model: str  # the fingerprint of what it was made of
    sample: Sample | ExampleSample
    traits: dict[str, AttentionTraits | str]  # by attention path; a string says why a layer could not be watched
    rows: int
    infos: dict[str, TensorInfo]

    def layer(self, path: str) -> tuple[AttentionTraits, dict[str, Tensor]] | None:
        """Traits and float32 statistics of the attention at `path`; None for a layer that could not be watched.

        Raises UpfitError where the file has nothing of that layer, or values that are not finite.
        """
        traits = self.traits.get(path)
        if traits is None:
            raise UpfitError(f"{self.path} has no statistics of {path}; make them again with `upfit calibrate`")
        if isinstance(traits, str):
            return None
        tensors = {name: _read(info) for name, info in _infos_of(path, self.infos).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UpfitError(f"{self.path} is damaged: {path}/{name} is not finite; make it again with `upfit calibrate`")
        return traits, tensors


def _infos_of(path: str, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the layer at `path` by their names in it."""
    return {name.removeprefix(path + "/"): info for name, info in infos.items() if name.startswith(path + "/")}


def _read(info: TensorInfo) -> Tensor:

    with info.file.open("rb") as file:
        file.seek(info.start)
        return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch_dtype(info.dtype)).reshape(info.shape)


def metadata(
    model: str, sample: Sample | ExampleSample, traits: Mapping[str, AttentionTraits | str], rows: int
) -> dict[str, str]:
    """What the header of a statistics file says; `model` is its fingerprint."""
    records = {path: value if isinstance(value, str) else asdict(value) for path, value in traits.items()}
    examples = sample if isinstance(sample, ExampleSample) else None
    return {
        "format": "pt",
        "upfit": FORMAT,
        "model": model,
        "tokenizer": json.dumps(sample.tokenizer),
        "text": json.dumps(sample.text),
        "held": json.dumps(len(sample.held) if isinstance(sample, ExampleSample) else sample.held),
        **({} if examples is None else {"kind": examples.kind}),
        "rows": str(rows),
        "facts": json.dumps(records),
    }


def check_statistics(path: Path) -> None:
    """Raise UpfitError when `path` is not a statistics file of `upfit calibrate`, of any version."""
    try:
        if not path.is_file() or "upfit" not in (read_header(path) and read_metadata(path)):
            raise UpfitError("it has no mark of upfit calibrate")
    except UpfitError as error:
        raise UpfitError(
            f"{path} is no statistics file of upfit calibrate, so it is not replaced; choose another name"
        ) from error


def open_statistics(path: Path, checkpoint: Checkpoint) -> Statistics:
    """Raises UpfitError when `path` is not a statistics file, or not one of this model with the tokenizer of its folder."""
    if not path.exists():
        raise UpfitError(f"no statistics file at {path}; make one with `upfit calibrate MODEL TEXT {path.name}`")
    infos = {info.name: info for info in read_header(path)}
    header = read_metadata(path)
    if header.get("upfit") != FORMAT:
        raise UpfitError(f"{path} is not a statistics file of this version; make one with `upfit calibrate`")
    if header.get("model") != fingerprint(checkpoint):
        raise UpfitError(f"{path} holds the statistics of another model; make those of this one with `upfit calibrate`")
    with shaped(f"{path} is not what `upfit calibrate` writes; make it again"):
        statistics = _taken_apart(path, header, infos, checkpoint.config)
    _check_tokenizer(statistics, checkpoint.folder)
    return statistics


def _taken_apart(path: Path, header: dict[str, str], infos: dict[str, TensorInfo], config: dict[str, Any]) -> Statistics:
    """Raises ValueError, or what taking apart something else raises, for what `upfit calibrate` does not write."""
    names = ("held", "facts", "text", "tokenizer")
    parts = {name: parse_json(header[name], f"{path}: what it says of {name}") for name in names}
    traits = {layer: value if isinstance(value, str) else traits_from(value) for layer, value in parts["facts"].items()}
    for layer, known in traits.items():
        if not isinstance(known, str):
            check_traits(known)
            check_layer(known, _infos_of(layer, infos))
    kind = header.get("kind")
    sample = _windows(parts, infos) if kind is None else _examples(parts, infos, kind, config)
    return Statistics(path, header["model"], sample, traits, int(header["rows"]), infos)


def _windows(parts: dict[str, Any], infos: dict[str, TensorInfo]) -> Sample:
    windows = {int(name.split(".")[1]): _read(info).long() for name, info in infos.items() if name.startswith("windows.")}
    held = {int(length): count for length, count in parts["held"].items()}
    check_windows(windows, held)
    return Sample(windows, held, dict(parts["text"]), parts["tokenizer"])


def _examples(parts: dict[str, Any], infos: dict[str, TensorInfo], kind: str, config: dict[str, Any]) -> ExampleSample:
    tensors = {name: _read(info) for name, info in infos.items() if name.startswith(PREFIX)}
    return examples_stored(tensors, int(parts["held"]), kind, dict(parts["text"]), config, parts["tokenizer"])


def _check_tokenizer(statistics: Statistics, folder: Path) -> None:
    """Raise UpfitError when the folder's tokenizer is another than the one that made the windows. One without a tokenizer has
    nothing that could disagree."""
    try:
        tokenizer = fast_tokenizer(folder)
    except Opaque:
        return
    if identity(tokenizer) != statistics.sample.tokenizer:
        raise UpfitError(
            f"{statistics.path} was made with another tokenizer than {folder} has now; make statistics anew with "
            "`upfit calibrate`"
        )

"""The verb `calibrate`: runs a model over text, one layer in memory at a time, and keeps statistics of each attention layer.

It can be stopped at any moment: the work folder beside STATS holds the finished layers and the hidden states before the next
one, and the same command goes on from there.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from upfit.architecture.layers import Architecture, open_model
from upfit.architecture.quantised import check_not_quantised
from upfit.architecture.table import check_known
from upfit.calibration.example_sample import ExampleSample, stored_examples
from upfit.calibration.gather import LayerSums, gather_layer
from upfit.calibration.observe import Opaque
from upfit.calibration.result import Calibration
from upfit.calibration.sample import Sample, check_texts
from upfit.calibration.sample_for import sample_for
from upfit.calibration.statistics import ROWS
from upfit.calibration.statistics_file import check_statistics, fingerprint, metadata, traits_from
from upfit.calibration.teacher_student import open_pair
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.output_folder import check_place, resolved
from upfit.checkpoint.reader import Checkpoint, open_checkpoint, safetensors_dtype
from upfit.checkpoint.safetensors_header import encode_header, read_header
from upfit.checkpoint.source import find_source
from upfit.checkpoint.work_folder import work_folder
from upfit.durable import write_whole
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text.files import FIELD


def calibrate(
    model: str,
    texts: list[str],
    out: Path,
    tokens: str,
    length: int | None,
    revision: str | None,
    overwrite: bool,
    output: Output,
    field: str = FIELD,
) -> Calibration:
    """Write the statistics of `model` on `texts`, whose JSON and parquet have it in `field`, to the file `out`.

    Raises UpfitError for anything that cannot be read, an `out` that exists, or a model that cannot be run on what it is given.
    """
    called, out = str(out), out.expanduser()
    if out.suffix != ".safetensors":
        raise UpfitError(f"STATS {out} must end in .safetensors, for that is what it is")
    out = resolved(out)
    if out.exists():
        if not overwrite:
            raise UpfitError(f"{out} exists; choose another name or pass --overwrite")
        check_statistics(out)
    if not out.parent.is_dir():
        raise UpfitError(f"there is no folder {out.parent}; make it first")
    check_texts(texts, field)
    source, began = find_source(model, revision), time.monotonic()
    check_place(out, [source.path, *map(Path, texts)], 0)
    with open_checkpoint(source.path) as stored:
        check_known(stored.config)
        check_not_quantised(stored)
        checkpoint, architecture = open_model(stored)
        try:
            sample = sample_for(source.path, checkpoint, texts, tokens, length, output, field)
        except Opaque as reason:
            raise UpfitError(f"{model} cannot be calibrated: {reason}") from reason
        output.note(f"calibrating on {sample.tokens:,} tokens in {_shown(sample)}")
        model_hash = fingerprint(checkpoint)
        settings = {"model": model_hash, "text": sample.text, "rows": ROWS}
        with work_folder(out, "calibrate", overwrite, check=check_statistics) as work:
            work.claim(settings, overwrite)
            layers = FinishedLayers(work.folder("layers"))
            work.keep = bool(layers.read()["next"])
            try:
                traits = _gather(checkpoint, architecture, sample, layers, output)
            except Opaque as reason:
                raise UpfitError(f"{model} cannot be calibrated: {reason}") from reason
            result = work.path / "result.safetensors"
            _join(layers, result, sample, metadata(model_hash, sample, traits, ROWS))
            work.publish(result, overwrite)
    opaque = {path: value for path, value in traits.items() if isinstance(value, str)}
    return Calibration(
        out=str(out),
        bytes=out.stat().st_size,
        tokens=sample.tokens,
        windows={} if isinstance(sample, ExampleSample) else {length: len(rows) for length, rows in sample.windows.items()},
        layers=len(traits) - len(opaque),
        not_watched=opaque,
        seconds=time.monotonic() - began,
        called=called,
    )


def _shown(sample: Sample | ExampleSample) -> str:
    if isinstance(sample, ExampleSample):
        return f"{len(sample.fitted) + len(sample.held)} examples"
    return f"windows of {' and '.join(map(str, sorted(sample.windows)))}"


class FinishedLayers:
    """What of a calibration is done: in `folder`, one file for each finished layer, and the hidden states before the next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state.json"
        if not self.state.exists():
            self._write({"next": 0, "facts": {}})

    def _write(self, content: dict[str, Any]) -> None:
        write_whole(self.state, json.dumps(content))

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.state.read_text("utf-8"))
        return content

    def layer_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def hidden_file(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.safetensors"

    def keep(self, index: int, attentions: list[LayerSums], hidden: list[Tensor]) -> None:
        """Layer `index` is done. Whatever is killed in here, `state.json` names files that are whole."""
        content = self.read()
        if attentions:
            sums = {f"{each.path}/{name}": tensor for each in attentions for name, tensor in each.sums.items()}
            save_file(sums, self.layer_file(index))
        for each in attentions:
            content["facts"][each.path] = each.traits if isinstance(each.traits, str) else asdict(each.traits)
        save_file({str(number): tensor.contiguous() for number, tensor in enumerate(hidden)}, self.hidden_file(index + 1))
        self._write(content | {"next": index + 1})
        self.hidden_file(index).unlink(missing_ok=True)

    def hidden(self, index: int) -> list[Tensor]:
        stored = load_file(self.hidden_file(index))
        return [stored[str(number)] for number in range(len(stored))]


def _gather(
    checkpoint: Checkpoint,
    architecture: Architecture,
    sample: Sample | ExampleSample,
    work: FinishedLayers,
    output: Output,
) -> dict[str, AttentionTraits | str]:
    model, batches = open_pair(checkpoint, architecture, sample)
    start = work.read()["next"]
    if start:
        output.note(f"going on from layer {start} of {len(model.blocks)}")
        for batch, hidden in zip(batches, work.hidden(start), strict=True):
            batch.teacher = hidden.to(batch.teacher.device)
    with output.progress("calibrating", len(model.blocks)) as meter:
        meter.start_at(start)
        for index in range(start, len(model.blocks)):
            attentions = gather_layer(model, architecture, index, batches)
            work.keep(index, attentions, [batch.teacher for batch in batches])
            meter.advance(1, attentions[-1].path if attentions else "")
    traits = work.read()["facts"]
    return {path: value if isinstance(value, str) else traits_from(value) for path, value in traits.items()}


def _join(work: FinishedLayers, result: Path, sample: Sample | ExampleSample, header: dict[str, str]) -> None:
    """Put what was shown and layers into the file `result`, a tensor at a time."""
    shown = (
        stored_examples(sample)
        if isinstance(sample, ExampleSample)
        else {f"windows.{length}": rows.int() for length, rows in sorted(sample.windows.items())}
    )
    infos = [info for path in sorted(work.folder.glob("layer-*.safetensors")) for info in read_header(path)]
    listed = [(name, safetensors_dtype_of(rows), tuple(rows.shape), rows.nbytes) for name, rows in shown.items()]
    listed += [(info.name, info.dtype, info.shape, info.nbytes) for info in infos]
    with result.open("wb") as file:
        file.write(encode_header(listed, header))
        for rows in shown.values():
            file.write(rows.contiguous().numpy().tobytes())
        for info in infos:
            for piece in _pieces(info.file, info.start, info.end):
                file.write(piece)


def safetensors_dtype_of(tensor: Tensor) -> str:
    integers = {torch.int32: "I32", torch.int64: "I64"}
    return integers.get(tensor.dtype) or safetensors_dtype(tensor.dtype)


def _pieces(path: Path, start: int, end: int, size: int = 16 * 2**20) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(size, end - start))
            start += len(piece)
            yield piece

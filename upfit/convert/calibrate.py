"""The verb `calibrate`: runs a model over text, one layer in memory at a time, and keeps statistics of each attention layer.

It can be stopped at any moment: `STATS.partial` holds the finished layers and the hidden states before the next one, and the
same command goes on from there.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from upfit.convert.architectures import Architecture, bind
from upfit.convert.calibration import (
    LENGTH,
    TOKENS,
    Sample,
    check_texts,
    facts_from,
    fingerprint,
    make_sample,
    metadata,
    read_documents,
)
from upfit.convert.checkpoint import Checkpoint, most_positions, open_checkpoint, safetensors_dtype
from upfit.convert.facts import Facts, understand, watch
from upfit.convert.folders import find_source, sync_path
from upfit.convert.lens import see
from upfit.convert.safetensors_file import encode_header, read_header
from upfit.convert.skeleton import quiet_transformers, vocabulary
from upfit.convert.statistics import ROWS, add, observe, sample_rows
from upfit.convert.stream import Opaque, Stream, run_block
from upfit.errors import UpfitError
from upfit.options import parse_count
from upfit.output import Output


@dataclass(frozen=True)
class LayerSums:
    """One attention layer: its facts and float32 statistics, or why it could not be watched."""

    path: str
    facts: Facts | str
    sums: dict[str, Tensor]


def calibrate(
    model: str,
    texts: list[str],
    out: Path,
    tokens: str,
    length: int | None,
    revision: str | None,
    overwrite: bool,
    output: Output,
) -> dict[str, Any]:
    """Write the statistics of `model` on `texts` to the file `out`; the answer for `--json`.

    Raises UpfitError for anything that cannot be read, an `out` that exists, or a model that cannot be run on plain text.
    """
    out = out.expanduser()
    if out.suffix != ".safetensors":
        raise UpfitError(f"STATS {out} must end in .safetensors, for that is what it is")
    if out.exists() and not overwrite:
        raise UpfitError(f"{out} exists; choose another name or pass --overwrite")
    if not out.parent.is_dir():
        raise UpfitError(f"there is no folder {out.parent}; make it first")
    check_texts(texts)
    source, began = find_source(model, revision), time.monotonic()
    with open_checkpoint(source.path) as checkpoint:
        checkpoint = see(checkpoint)
        architecture = bind(checkpoint.config, checkpoint.tensors)
        try:
            sample = sample_for(source.path, checkpoint, texts, tokens, length, output)
        except Opaque as reason:
            raise UpfitError(f"{model} cannot be calibrated: {reason}") from reason
        output.note(f"calibrating on {sample.tokens:,} tokens in windows of {' and '.join(map(str, sorted(sample.windows)))}")
        partial = out.with_name(out.name + ".partial")
        work = Partial(partial, {"model": fingerprint(checkpoint), "text": json.dumps(sample.text), "rows": str(ROWS)})
        try:
            facts = _gather(checkpoint, architecture, sample, work, output)
        except Opaque as reason:
            raise UpfitError(f"{model} cannot be calibrated: {reason}") from reason
        _join(work, out, sample, metadata(checkpoint, sample, facts, ROWS))
    shutil.rmtree(partial)
    opaque = {path: value for path, value in facts.items() if isinstance(value, str)}
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "tokens": sample.tokens,
        "windows": {length: len(some) for length, some in sample.windows.items()},
        "layers": len(facts) - len(opaque),
        "not_watched": opaque,
        "seconds": time.monotonic() - began,
    }


def sample_for(
    folder: Path,
    checkpoint: Checkpoint,
    texts: list[str] | None,
    tokens: str | None,
    length: int | None,
    output: Output | None = None,
) -> Sample:
    """Windows of calibration text for this model. What is left out of the text is noted on `output`.

    Raises UpfitError for text or sizes that cannot be used, Opaque when the model's folder has no tokenizer of its own.
    """
    from transformers import AutoTokenizer

    count = parse_count(tokens or str(TOKENS), "--calibration-tokens")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not tokenizer.is_fast:
                raise ValueError("it is not a fast one")
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise Opaque("it has no fast tokenizer that can be loaded here") from error
    longest = most_positions(checkpoint.config)
    if length is not None and length < 8:
        raise UpfitError(f"--calibration-length got {length}; give at least 8 tokens")
    if length is not None and longest is not None and length > longest:
        raise UpfitError(f"--calibration-length {length} is above the model's {longest} positions; give at most {longest}")
    length = length or min(LENGTH, longest or LENGTH)
    told = {"files": texts or "the standard library of Python", "length": length}
    sample = make_sample(read_documents(texts, count, output), tokenizer, count, length, told)
    known = vocabulary(checkpoint.config)
    if known is not None and max(int(some.max()) for some in sample.windows.values()) >= known:
        raise Opaque(f"its tokenizer has more than the model's {known} ids, so it belongs to another model")
    return sample


class Partial:
    """The work folder of a calibration: one file for each finished layer, and the hidden states before the next."""

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity
        told = folder / "work.json"
        if folder.exists() and (not told.exists() or json.loads(told.read_text("utf-8")).get("identity") != identity):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        if not told.exists():
            self._write({"identity": identity, "next": 0, "facts": {}})

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.folder / "work.json.new"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        sync_path(temporary)
        temporary.rename(self.folder / "work.json")

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "work.json").read_text("utf-8"))
        return content

    def layer_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def hidden_file(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.safetensors"

    def keep(self, index: int, found: LayerSums | None, hidden: list[Tensor]) -> None:
        """Layer `index` is done. Whatever is killed in here, `work.json` names files that are whole."""
        content = self.read()
        if found is not None:
            save_file({f"{found.path}/{name}": tensor for name, tensor in found.sums.items()}, self.layer_file(index))
            content["facts"][found.path] = found.facts if isinstance(found.facts, str) else asdict(found.facts)
        save_file({str(number): tensor.contiguous() for number, tensor in enumerate(hidden)}, self.hidden_file(index + 1))
        self._write(content | {"next": index + 1})
        self.hidden_file(index).unlink(missing_ok=True)

    def hidden(self, index: int) -> list[Tensor]:
        stored = load_file(self.hidden_file(index))
        return [stored[str(number)] for number in range(len(stored))]


def _gather(
    checkpoint: Checkpoint, architecture: Architecture, sample: Sample, work: Partial, output: Output
) -> dict[str, Facts | str]:
    device = pick_device()
    pieces, held = sample.batches()
    stream = Stream(checkpoint, architecture, pieces, device)
    start = work.read()["next"]
    if start:
        output.note(f"going on from layer {start} of {len(stream.blocks)}")
        for batch, hidden in zip(stream.batches, work.hidden(start), strict=True):
            batch.hidden = hidden.to(device)
    with output.progress("calibrating", len(stream.blocks)) as meter:
        meter.advance(start)
        for index in range(start, len(stream.blocks)):
            found = gather_layer(stream, architecture, index, held)
            work.keep(index, found, [batch.hidden for batch in stream.batches if batch.hidden is not None])
            meter.advance(1, found.path if found else "")
    facts = work.read()["facts"]
    return {path: value if isinstance(value, str) else facts_from(value) for path, value in facts.items()}


def gather_layer(stream: Stream, architecture: Architecture, index: int, held: list[bool]) -> LayerSums | None:
    """Run one layer over every batch of the stream, which moves on; its statistics, or None for one without key/value heads."""
    block = stream.blocks[index]
    stream.load(index)
    layer = {layer.path: layer for layer in architecture.layers}.get(block.attention_path) if block.attention else None
    facts: Facts | str = "no attention"
    sums: dict[str, Tensor] = {}
    if layer is not None:
        longest = max(stream.batches, key=lambda batch: batch.ids.shape[1])
        assert longest.hidden is not None
        try:
            facts, _ = understand(block, architecture.entry, layer.geometry, longest.hidden, longest.calls[index])
        except Opaque as reason:
            facts = str(reason)
    for number, (batch, back) in enumerate(zip(stream.batches, held, strict=True)):
        assert batch.hidden is not None
        if isinstance(facts, str) or back:
            batch.hidden = run_block(block.module, batch.hidden, batch.calls[index])
            continue
        watched = watch(block, batch.hidden, batch.calls[index], ())
        rows = sample_rows(batch.ids.shape[1], ROWS, index, number, batch.hidden.device)
        add(sums, observe(watched.seen, facts, rows))
        batch.hidden = watched.output
    stream.empty(block.module)
    if layer is None:
        return None
    return LayerSums(layer.path, facts, {name: tensor.float().cpu().contiguous() for name, tensor in sums.items()})


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _join(work: Partial, out: Path, sample: Sample, told: dict[str, str]) -> None:
    """Put windows and layers into one file, a tensor at a time, which appears under its name when it is whole."""
    windows = {f"windows.{length}": some.int() for length, some in sorted(sample.windows.items())}
    infos = [info for path in sorted(work.folder.glob("layer-*.safetensors")) for info in read_header(path)]
    listed = [(name, safetensors_dtype_of(some), tuple(some.shape), some.nbytes) for name, some in windows.items()]
    listed += [(info.name, info.dtype, info.shape, info.nbytes) for info in infos]
    temporary = work.folder / "joined.safetensors"
    with temporary.open("wb") as file:
        file.write(encode_header(listed, told))
        for some in windows.values():
            file.write(some.contiguous().numpy().tobytes())
        for info in infos:
            for piece in _pieces(info.file, info.start, info.end):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out)
    sync_path(out.parent)


def safetensors_dtype_of(tensor: Tensor) -> str:
    return "I32" if tensor.dtype == torch.int32 else safetensors_dtype(tensor.dtype)


def _pieces(path: Path, start: int, end: int, size: int = 16 * 2**20) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(size, end - start))
            start += len(piece)
            yield piece

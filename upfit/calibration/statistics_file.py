"""Calibration text: from files to windows of token ids, some of them held back; and the statistics file that keeps all of it.

A statistics file is an ordinary safetensors file. Its metadata says which model and text it was made of; its tensors are the
windows (`windows.512` [n, 512] int32 …, the first `held.512` of them held back) and, for each attention layer, what
`statistics.py` lists, as `PATH/keys` and so on, in float32. It is taken only for the model and the tokenizer it was made of.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.meta_model import quiet_transformers
from upfit.bounded import parse_json, shaped
from upfit.calibration.layerwise import Opaque
from upfit.calibration.statistics_check import check_facts, check_layer, check_windows
from upfit.calibration.traits import Facts, Residual
from upfit.checkpoint.content import tensors_hash
from upfit.checkpoint.reader import Checkpoint
from upfit.checkpoint.safetensors_header import TensorInfo, read_header, read_metadata
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text import Document, file_documents, find_files, library_documents
from upfit.text.plain import pieces
from upfit.text.tokenizer import identity, no_panic
from upfit.text.windows import encode, prefix_ids

FORMAT = "2"
TOKENS = 64_000
LENGTH = 2048
SHORT = 512  # half of the tokens stand in windows of this length, whatever the length to be served
HELD_SHARE = 8  # one window of so many is held back
BATCH_TOKENS = 4096
SEED = 20240229
BYTES_PER_TOKEN = 8  # read at most so much text for each token wanted
FLAG = "--calibration"
USERS = "text"  # the kind of documents of files; those of Python are drawn as figures were measured with


@dataclass(frozen=True)
class Sample:
    """Windows of token ids by their length, [n, length] int64 each, the first `held[length]` of them held back."""

    windows: dict[int, Tensor]
    held: dict[int, int]
    text: dict[str, Any]  # where it came from, for recipe.json
    tokenizer: dict[str, Any]  # what made ids of it, as `upfit.text.tokenizer.identity` tells it

    @property
    def tokens(self) -> int:
        return sum(some.numel() for some in self.windows.values())

    def batches(self) -> tuple[list[Tensor], list[bool]]:
        """Windows of one length and one purpose, together in pieces of at most BATCH_TOKENS; and which pieces are held back."""
        pieces, purposes = [], []
        for length, some in sorted(self.windows.items()):
            size = max(1, BATCH_TOKENS // length)
            for part, back in ((some[: self.held[length]], True), (some[self.held[length] :], False)):
                for at in range(0, len(part), size):
                    pieces.append(part[at : at + size])
                    purposes.append(back)
        return pieces, purposes


def read_documents(texts: list[str] | None, tokens: int, output: Output | None = None) -> list[Document]:
    """The files `texts`, or without any the standard library of the running Python. What is left out is noted on `output`."""
    if texts:
        return file_documents(texts, 2 * tokens * BYTES_PER_TOKEN, FLAG, output)
    return library_documents()


def check_texts(texts: list[str] | None) -> None:
    """A cheap look before a model is read. Raises UpfitError when one of the files and folders `texts` is not there."""
    if texts and not any(map(is_statistics, texts)):
        for name in texts:
            find_files(name, FLAG)


def make_sample(documents: list[Document], tokenizer: Any, tokens: int, length: int, text: dict[str, Any]) -> Sample:
    """About `tokens` tokens in windows of `length` and, where that is longer, as many in windows of SHORT.

    Documents are put one after the other in a random but fixed order, kinds in turn, and cut into windows; each window begins
    as the tokenizer begins a text. Raises UpfitError when there is too little text for two windows of each length.
    """
    prefix = prefix_ids(tokenizer)
    lengths = sorted({length, min(length, SHORT)}, reverse=True)
    wanted = {size: max(2, tokens // len(lengths) // size) for size in lengths}
    needed = sum(count * size for size, count in wanted.items())
    size = max((needed + length) // 16, 2 * SHORT)
    if all(document.kind == USERS for document in documents):
        size = max(size, length)
        documents = _in_pieces(documents, tokenizer, size)
    ids = _running_ids(documents, tokenizer, needed + length, size)
    have = len(ids)
    if have < needed:
        scale = have / needed
        wanted = {size: max(2, int(count * scale)) for size, count in wanted.items()}
        if sum(count * size for size, count in wanted.items()) > have:
            raise UpfitError(
                f"the calibration text has {have} tokens, too few for windows of {length}; give more text, or a smaller "
                "--calibration-length"
            )
    blocks = [size for size, count in wanted.items() for _ in range(count)]
    random.Random(SEED).shuffle(blocks)
    windows: dict[int, list[list[int]]] = {size: [] for size in lengths}
    at = 0
    for size in blocks:
        body = size - len(prefix)
        windows[size].append(prefix + ids[at : at + body])
        at += body
    made = {size: torch.tensor(some, dtype=torch.int64) for size, some in windows.items()}
    held = {size: max(1, len(some) // HELD_SHARE) for size, some in made.items()}
    digest = hashlib.sha256(b"".join(some.numpy().tobytes() for _, some in sorted(made.items()))).hexdigest()
    return Sample(made, held, {**text, "sha256": digest}, identity(tokenizer))


def _in_pieces(documents: list[Document], tokenizer: Any, size: int) -> list[Document]:
    """The documents in pieces of about `size` tokens at most: a long one is drawn as often as its length makes up for."""
    text = "\n".join(document.text[:2000] for document in documents[:: -(-len(documents) // 32) or 1])
    nbytes = max(1, len(text.encode("utf-8")) * size // max(1, len(encode(tokenizer, [text])[0][0])))
    return [replace(document, text=piece) for document in documents for piece in pieces(document.text, nbytes)]


def _running_ids(documents: list[Document], tokenizer: Any, enough: int, size: int) -> list[int]:
    """About `enough` tokens of the documents, pieces of `size` one after the other (fewer where there are no more).

    Kinds take turns; documents come in random but fixed order, at first one piece of each, then what is left of them.
    """
    draw = random.Random(SEED)
    kinds = sorted({document.kind for document in documents})
    queues: dict[str, list[Document | list[int]]] = {kind: [d for d in documents if d.kind == kind] for kind in kinds}
    for queue in queues.values():
        draw.shuffle(queue)
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    counts = dict.fromkeys(kinds, 0)
    while any(queues.values()) and len(ids) < enough:
        kind = min((kind for kind in kinds if queues[kind]), key=lambda kind: counts[kind])
        found = queues[kind].pop(0)
        if isinstance(found, Document):
            whole = encode(tokenizer, [found.text])[0][0]
            pieces: list[Document | list[int]] = [whole[at : at + size] for at in range(0, len(whole), size)] or [[]]
            chosen = pieces.pop(draw.randrange(len(pieces)))
            assert isinstance(chosen, list)
            queues[kind] += pieces
            found = chosen
        counts[kind] += len(found)
        ids += found + separator
    return ids


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the config and of every tensor's name, type, shape and bytes; reads all of the weights."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return hashlib.sha256(f"{config} {tensors_hash(checkpoint)}".encode()).hexdigest()


def fast_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer. Raises Opaque when the folder has none that can be loaded here, or only a slow one."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), no_panic(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not tokenizer.is_fast:
                raise ValueError("it is not a fast one")
    except UpfitError:
        raise
    except Exception as error:  # its parsers raise whatever they like on a broken file
        raise Opaque("it has no fast tokenizer that can be loaded here") from error
    return tokenizer


def facts_from(record: Mapping[str, Any]) -> Facts:
    """The inverse of `dataclasses.asdict` for Facts, from JSON."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    values["residual"] = Residual(**record["residual"]) if record["residual"] else None
    return Facts(**values)


@dataclass(frozen=True)
class Statistics:
    """What a statistics file holds, read one layer at a time."""

    path: Path
    model: str  # the fingerprint of what it was made of
    sample: Sample
    facts: dict[str, Facts | str]  # by attention path; a string says why a layer could not be watched
    rows: int
    infos: dict[str, TensorInfo]

    def layer(self, path: str) -> tuple[Facts, dict[str, Tensor]] | None:
        """Facts and float32 statistics of the attention at `path`; None for a layer that could not be watched.

        Raises UpfitError where the file has nothing of that layer, or values that are not finite.
        """
        facts = self.facts.get(path)
        if facts is None:
            raise UpfitError(f"{self.path} has no statistics of {path}; make them again with `upfit calibrate`")
        if isinstance(facts, str):
            return None
        found = {name: _read(info) for name, info in _infos_of(path, self.infos).items()}
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise UpfitError(f"{self.path} is damaged: {path}/{name} is not finite; make it again with `upfit calibrate`")
        return facts, found


def _infos_of(path: str, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the layer at `path` by their names in it."""
    return {name.removeprefix(path + "/"): info for name, info in infos.items() if name.startswith(path + "/")}


def _read(info: TensorInfo) -> Tensor:
    from upfit.checkpoint.reader import torch_dtype

    with info.file.open("rb") as file:
        file.seek(info.start)
        return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch_dtype(info.dtype)).reshape(info.shape)


def metadata(model: str, sample: Sample, facts: Mapping[str, Facts | str], rows: int) -> dict[str, str]:
    """What the header of a statistics file says; `model` is its fingerprint."""
    told = {path: value if isinstance(value, str) else asdict(value) for path, value in facts.items()}
    return {
        "format": "pt",
        "upfit": FORMAT,
        "model": model,
        "tokenizer": json.dumps(sample.tokenizer),
        "text": json.dumps(sample.text),
        "held": json.dumps(sample.held),
        "rows": str(rows),
        "facts": json.dumps(told),
    }


def is_statistics(name: str) -> bool:
    return name.endswith(".safetensors")


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
        statistics = _taken_apart(path, header, infos)
    _check_tokenizer(statistics, checkpoint.folder)
    return statistics


def _taken_apart(path: Path, header: dict[str, str], infos: dict[str, TensorInfo]) -> Statistics:
    """Raises ValueError, or what taking apart something else raises, for what `upfit calibrate` does not write."""
    names = ("held", "facts", "text", "tokenizer")
    parts = {name: parse_json(header[name], f"{path}: what it says of {name}") for name in names}
    windows = {int(name.split(".")[1]): _read(info).long() for name, info in infos.items() if name.startswith("windows.")}
    held = {int(length): count for length, count in parts["held"].items()}
    check_windows(windows, held)
    facts = {layer: value if isinstance(value, str) else facts_from(value) for layer, value in parts["facts"].items()}
    for layer, known in facts.items():
        if not isinstance(known, str):
            check_facts(known)
            check_layer(known, _infos_of(layer, infos))
    sample = Sample(windows, held, dict(parts["text"]), parts["tokenizer"])
    return Statistics(path, header["model"], sample, facts, int(header["rows"]), infos)


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

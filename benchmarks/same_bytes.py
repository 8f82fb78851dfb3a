"""Whether two files hold the same, but for what differs from one run to the next of one and the same code.

That is the list MASKS, and nothing else. No mask takes away a weight, a loss or a size.
"""

import pickle
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch.distributed.checkpoint.metadata import Metadata

CHECKPOINT = ".metadata"  # of torch's distributed checkpoints: what tensors lie where, and a random name of its own
SHOWN = 70  # characters of each side around the first difference
NUMBER = r"-?\d[\d.]*(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Mask:
    """What `pattern` finds in a text becomes `into` before it is compared, in files whose names end in `ending`."""

    pattern: str
    into: str
    reason: str
    ending: str = ""


MASKS = (
    Mask(r'"date": "[^"]*"', '"date": "2026-01-01T00:00:00+00:00"', "when a step was done"),
    Mask(r'"seconds": \[[^\]]*\],\s*"memory": \d+', '"seconds": [1.5], "memory": 1', "what it would take"),
    Mask(r"Would take about .*", "Would take", "what it would take"),
    Mask(rf'"(seconds|tokens_per_second)": {NUMBER}', r'"\1": 1.5', "how long it took"),
    Mask(r'"(\w+_tokens_per_s)": \{[^{}]*\}', r'"\1": {}', "how long prefill and decoding took"),
    Mask(r" in [\d.]+ s\b(?:, [\d.]+(?: [kMB])? tokens/s)?", " in 0 s", "how long it took, in words"),
    Mask(r"(?m)^\S.*: \d+%.*\n", "", "progress, told every 30 s", ".stderr"),
    Mask(r'("\.metadata": \[\s*\d+,\s*")[0-9a-f]+', r"\1", "the hash of a file with a random name in it, see _described"),
    Mask(
        r"nanobind: leaked (?:.*\n)*?See https://nanobind\S*\n?", "", "addresses that Triton tells when a fork ends", ".stderr"
    ),
)


def masked(text: str, name: str, places: dict[str, str]) -> str:
    """The `text` of the file `name` without what MASKS find, and with the folders `places` called as they are there."""
    for place, called in places.items():
        text = text.replace(place, called)
    for mask in MASKS:
        text = re.sub(mask.pattern, mask.into, text) if name.endswith(mask.ending) else text
    return text


def difference(old: Path, new: Path, old_places: dict[str, str], new_places: dict[str, str]) -> str | None:
    """What differs first between two files; None where nothing does."""
    for path, missing in ((old, "OLD"), (new, "NEW")):
        if not path.is_file():
            return f"not there with {missing}"
    modes = [stat.filemode(path.stat().st_mode) for path in (old, new)]
    if modes[0] != modes[1]:
        return f"{modes[0]} / {modes[1]}"
    one, other = old.read_bytes(), new.read_bytes()
    if one == other:
        return None
    if old.suffix == ".safetensors":
        (head, tensors), (other_head, other_tensors) = _parted(one), _parted(other)
        if tensors == other_tensors:  # statistics tell of what text they are
            return _of_texts(masked(head, old.name, old_places), masked(other_head, new.name, new_places))
        return _of_tensors(load(one), load(other)) or _of_bytes(one, other)
    if old.name == CHECKPOINT:
        return None if _described(one) == _described(other) else _of_bytes(one, other)
    try:
        texts = masked(one.decode(), old.name, old_places), masked(other.decode(), new.name, new_places)
    except UnicodeDecodeError:
        return _of_bytes(one, other)
    return _of_texts(*texts)


def _parted(content: bytes) -> tuple[str, bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].decode(), content[end:]


def _described(content: bytes) -> Metadata:
    """A checkpoint's `.metadata` without the name and the folder that it was saved under."""
    found: Metadata = pickle.loads(content)
    found.storage_meta = None
    return found


def _of_bytes(old: bytes, new: bytes) -> str:
    at = next((i for i, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), min(len(old), len(new)))
    return f"byte {at:,} of {len(old):,} / {len(new):,}"


def _of_texts(old: str, new: str) -> str | None:
    if old == new:
        return None
    ones, others = old.splitlines(), new.splitlines()
    pairs = zip([*ones, "(end)"], [*others, "(end)"], strict=False)
    number, (one, other) = next(((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (0, ("", "")))
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, at - SHOWN // 3)
    return f"line {number}: {one[begin : begin + SHOWN]!r} / {other[begin : begin + SHOWN]!r}"


def _of_tensors(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> str | None:
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"tensor {name}: not there with {'OLD' if name not in old else 'NEW'}"
        one, other = old[name], new[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"tensor {name}: {one.dtype} {list(one.shape)} / {other.dtype} {list(other.shape)}"
        if not torch.equal(one, other):
            return f"tensor {name}: up to {float((one.double() - other.double()).abs().max()):.3g} apart"
    return None

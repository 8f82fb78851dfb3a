"""Hostile checkpoints: headers, indexes and configs that were damaged at random, each refused in one line or converted.

    python benchmarks/fuzz_convert.py SCRATCH --inputs 100000 --results benchmarks/results/NAME.json
    python benchmarks/fuzz_convert.py SCRATCH --atheris          # guided by coverage, for as long as you like

Each input is a tiny checkpoint (two shards, an index) of which one file was changed: bytes flipped, cut or repeated, or its
JSON changed with knowledge of what is in it (numbers, names, types, offsets, nesting, keys of other families). It goes as far
as it gets: opened, planned, and one in ten of the planned really converted, which ends in a verified folder. Anything but
UpfitError or a result is a failure, and so is more than --memory beyond what the process began with, or a file outside
SCRATCH that was opened for writing. Inputs that fail are kept in SCRATCH/failures.
"""

import argparse
import contextlib
import copy
import json
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from upfit.architecture.adapter import adapt
from upfit.architecture.layers import bind
from upfit.checkpoint.execute import outline
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe, outline_of
from upfit.environment import environment
from upfit.errors import UpfitError
from upfit.output import Output

SHARE_CONFIG = 0.15  # of the inputs; a changed config means building a class
CONVERTED = 0.1  # of the inputs that can be planned
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**70, -(2**40), 1e308, 0.5, 10**9)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "x" * 300,
    "../../etc/passwd",
    [],
    {},
    [[]],
    [1, 2],
    {"a": {}},
    float("inf"),
    "BF16",
    "F99",
    "llama",
)
KEYS = (
    "num_kv_heads",
    "quantization_config",
    "auto_map",
    "text_config",
    "model_type",
    "head_dim",
    "layer_types",
    "__metadata__",
)
TYPES = ("mistral", "qwen3", "gpt2", "t5", "phi3", "gpt_neox", "deepseek_v3", "mamba", "upfit_gqa", "upfit_diff", "nonsense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=500, help="MB that a run may grow by")
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.scratch, ignore_errors=True)
    target = Target(args.scratch)
    if args.atheris:
        return guided(target)
    draw, began = random.Random(args.seed), time.monotonic()
    with written_files(args.scratch) as outside:
        for number in range(200):
            target.try_one(random.Random(-1 - number))  # caches of classes fill before memory is looked at
        target.ends.clear()
        first = psutil.Process().memory_full_info().uss
        most = first
        for number in range(args.inputs):
            target.try_one(random.Random(draw.getrandbits(64)))
            if number % 500 == 0:
                most = max(most, psutil.Process().memory_full_info().uss)
                print(number, dict(target.ends), f"{(most - first) / 1e6:.0f} MB", file=sys.stderr, flush=True)
    told: dict[str, Any] = {"inputs": args.inputs, "seed": args.seed, "ends": dict(target.ends.most_common())}
    told |= {"failures": target.failures, "written_outside": sorted(outside), "growth_mb": round((most - first) / 1e6, 1)}
    told |= {"refusals": len(target.reasons), "seconds": round(time.monotonic() - began), "environment": environment()}
    if args.results:
        args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: told[key] for key in ("ends", "failures", "written_outside", "growth_mb", "seconds")}))
    sys.exit(bool(target.failures or outside or (most - first) / 1e6 > args.memory))


class Target:
    """A small checkpoint in memory, and what becomes of its damaged copies."""

    def __init__(self, scratch: Path) -> None:
        self.folder, self.out, self.kept = scratch / "input", scratch / "out", scratch / "failures"
        scratch.mkdir(parents=True)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
        sizes["num_attention_heads"] = 4
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(self.folder, max_shard_size="4KB")
        (self.folder / "generation_config.json").unlink(missing_ok=True)
        self.files = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        self.ends, self.reasons, self.failures, self.changed = Counter[str](), set[str](), 0, str(next(iter(self.files)))

    def try_one(self, draw: random.Random) -> None:
        shards = [name for name in self.files if name.endswith(".safetensors")]
        name = "config.json" if draw.random() < SHARE_CONFIG else draw.choice([*shards, "model.safetensors.index.json"])
        self.run(name, damaged(self.files[name], name, draw), draw.random() < CONVERTED)

    def run(self, name: str, content: bytes, really: bool) -> None:
        (self.folder / self.changed).write_bytes(self.files[self.changed])
        (self.folder / name).write_bytes(content)
        self.changed = name
        try:
            self.ends[f"{_kind(name)}: {self._as_far_as_it_goes(really)}"] += 1
        except UpfitError as error:
            self.ends[f"{_kind(name)}: refused"] += 1
            self.reasons.add(str(error)[:40])
            if "\n" in str(error):
                self._failed(name, content, "a refusal of more than one line")
        except Exception:
            self._failed(name, content, traceback.format_exc())

    def _as_far_as_it_goes(self, really: bool) -> str:
        recipe = get_recipe("gqa")
        options = recipe.options(kv_heads=2, method="mean")
        if really:
            shutil.rmtree(self.out, ignore_errors=True)
            convert(recipe, str(self.folder), self.out, options, Settings(), Output(quiet=True))
            return "converted and verified"
        with open_checkpoint(self.folder) as stored:
            checkpoint = adapt(stored)
            architecture = bind(checkpoint.config, checkpoint.tensors)
            outline(checkpoint.written(outline_of(recipe.plan(architecture, options))), checkpoint, None)
        return "planned"

    def _failed(self, name: str, content: bytes, why: str) -> None:
        self.failures += 1
        self.ends[f"{_kind(name)}: FAILED"] += 1
        place = self.kept / f"{self.failures:05d}"
        place.mkdir(parents=True)
        (place / name).write_bytes(content)
        (place / "why.txt").write_text(why, encoding="utf-8")


def _kind(name: str) -> str:
    return "header" if name.endswith(".safetensors") else name


def damaged(content: bytes, name: str, draw: random.Random) -> bytes:
    """The file with one to three changes, in its bytes or in its JSON."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = _bytes_changed(content, name, draw) if draw.random() < 0.3 else _json_changed(content, name, draw)
    return content


def _bytes_changed(content: bytes, name: str, draw: random.Random) -> bytes:
    data = bytearray(content)
    end = min(len(data), 600 if name.endswith(".safetensors") else len(data)) or 1  # weights may be anything
    at, size = draw.randrange(end), draw.randrange(1, 40)
    way = draw.randrange(4)
    if way == 0 and data:
        data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
    elif way == 1:
        del data[at : at + size]
    elif way == 2:
        data[at:at] = draw.randbytes(size)
    else:
        data[at:at] = data[at : at + size]
    return bytes(data)


def _json_changed(content: bytes, name: str, draw: random.Random) -> bytes:
    header = name.endswith(".safetensors")
    length = int.from_bytes(content[:8], "little") if header else len(content)
    text, rest = (content[8 : 8 + length], content[8 + length :]) if header else (content, b"")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return content
    told = _changed(told, draw)
    made = json.dumps(told).encode()
    if header and draw.random() < 0.1:
        return draw.choice((2**63, 2**40, 0, len(made) + 1, 100_000_001)).to_bytes(8, "little") + made + rest
    return len(made).to_bytes(8, "little") + made + rest if header else made


def _changed(told: Any, draw: random.Random) -> Any:
    """One place of a JSON value changed: a value, a key, an order, or one more or less of something."""
    if isinstance(told, dict) and told and draw.random() < 0.85:
        told, key = copy.copy(told), draw.choice(list(told))
        way = draw.randrange(8)
        if way == 0:
            del told[key]
        elif way == 1:
            told[draw.choice((*KEYS, *told, "x", ""))] = draw.choice((told[key], *VALUES))
        elif way == 2:
            other = draw.choice(list(told))
            told[key], told[other] = told[other], told[key]
        elif key == "model_type" and way < 6:
            told[key] = draw.choice(TYPES)
        else:
            told[key] = _changed(told[key], draw)
        return told
    if isinstance(told, list) and told and draw.random() < 0.85:
        told, at = list(told), draw.randrange(len(told))
        told[at] = _changed(told[at], draw)
        return told if draw.random() < 0.8 else told + told[-1:]
    if isinstance(told, int) and not isinstance(told, bool) and draw.random() < 0.6:
        return told + draw.choice((-8, -2, -1, 1, 2, 4, 64, told))
    return draw.choice(VALUES)


@contextlib.contextmanager
def written_files(scratch: Path) -> Iterator[set[str]]:
    """Paths outside `scratch` that this process opens for writing while the block runs."""
    outside, inside, active = set[str](), str(scratch.resolve()), [True]

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(given[0], str | bytes) and isinstance(given[2], int) and given[2] & 3:
            path = str(Path(given[0].decode() if isinstance(given[0], bytes) else given[0]).resolve())
            if not path.startswith((inside, "/dev/")):
                outside.add(path)

    sys.addaudithook(watch)
    try:
        yield outside
    finally:
        active.clear()


def guided(target: Target) -> None:
    """Inputs from atheris, which looks at what the code does with them. Raises at the first failure."""
    import atheris

    def one(data: bytes) -> None:
        source = atheris.FuzzedDataProvider(data)
        name = source.PickValueInList(sorted(target.files))
        target.run(name, source.ConsumeBytes(len(data)) or b"", False)
        if target.failures:
            raise AssertionError(f"see {target.kept}")

    atheris.instrument_all()
    atheris.Setup([sys.argv[0]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What the uptraining tests share: a tiny teacher, a student converted from it, and token shards, all in a temporary place."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.folders import save_tiny, tiny_llama
from upfit import provenance
from upfit.output import Output
from upfit.uptrain.config import Config
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.run.result import Uptraining
from upfit.uptrain.train import uptrain

QUIET = Output(quiet=True)
WORDS = "the workshop puts a new body on a finished chassis and drives it until it is good again"
BASE: dict[str, Any] = {
    "length": 32,
    "batch_tokens": "128",
    "tokens": "1536",
    "holdout": 4,
    "learning_rate": 3e-3,
    "save_every": "4",
    "dtype": "float32",  # on every machine: the laws are of sums, not of rounding
}


@dataclass(frozen=True)
class Workshop:
    """Folders of a teacher (4 key/value heads), its student (2, mean-pooled) and the text as shards."""

    teacher: Path
    student: Path
    data: Path

    def run(
        self, out: Path, resume: bool = False, overwrite: bool = False, output: Output = QUIET, **changes: Any
    ) -> Uptraining:
        return uptrain(str(self.student), str(self.data), out, config(**changes), resume, overwrite, output)


def config(**changes: Any) -> Config:
    return Config(**{**BASE, **changes})


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS.split(), k=words)) + ".\n"


def pooled(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the teacher with its four key/value heads of 8 averaged in pairs."""
    student = tiny_llama(num_key_value_heads=2)
    weights = teacher.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.view(2, 2, 8, -1).mean(1).reshape(16, -1)
    student.load_state_dict(weights)
    return student


def make_workshop(folder: Path, documents: int = 60) -> Workshop:
    teacher = save_tiny(folder / "teacher")
    student = save_tiny(folder / "student", pooled(tiny_llama()))
    source = {"name": "teacher", "revision": None, "path": str(teacher)}
    provenance.write(student, [provenance.step("convert gqa", source, {"kv_heads": 2})])
    lines = [json.dumps({"text": text(seed)}) for seed in range(documents)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "text.jsonl")], folder / "data", str(teacher), "text", QUIET)
    return Workshop(teacher, student, folder / "data")


@contextmanager
def one_thread() -> Iterator[None]:
    """With more, sums are added up in an order that may change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

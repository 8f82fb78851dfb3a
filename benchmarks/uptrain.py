"""Is `upfit uptrain` as fast as transformers' Trainer, and does it need no more memory?

    python -m benchmarks.uptrain SCRATCH --models MODEL... [--length 512] [--rows 4] [--steps 8] --results RESULTS.json

Same model, rows of text, precision, optimiser (fused AdamW), batch and clipping, on the GPU where there is one. Each arm runs
in a process of its own, in turn, `--rounds` times: the Trainer's cross-entropy, ours, and ours with KL (the model as its own
teacher, a forward pass more). A step lasts from the end of the one before to its own; the first two are left out, the median
is told. On a busy CPU seconds of the process (one thread, `OMP_NUM_THREADS=1`) say more than those of the clock; both are told.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.warm_python import warm_python
from upfit.checkpoint.reader import read_config
from upfit.environment import environment
from upfit.output import Meter, Output
from upfit.plan.hardware import GPUS
from upfit.plan.options import Options
from upfit.plan.plan import TracedStage, flops_a_token
from upfit.plan.trace import trace
from upfit.uptrain.config import Config
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import TextRows
from upfit.uptrain.data.shards import Shards
from upfit.uptrain.train import uptrain

ARMS = ("trainer, CE", "upfit, CE", "upfit, KL")
LEFT_OUT = 2  # steps, in which memory is asked for
RATE = 1e-5
TEXTS = [Path(json.__file__).parent.parent / name for name in ("argparse.py", "typing.py", "tarfile.py", "inspect.py")]


class Clock(Output):
    """Reads the clocks at the end of each step."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ends: list[tuple[float, float]] = []

    def read(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        meter = Meter(label, total, True, None)
        meter.advance = lambda amount, note="": self.read() if note else None  # type: ignore[method-assign]
        yield meter


def with_upfit(model: str, data: Path, scratch: Path, args: argparse.Namespace, teacher: str) -> Clock:
    clock = Clock()
    tokens = args.rows * args.length
    config = Config(
        tokens=str(args.steps * tokens),
        length=args.length,
        batch_tokens=str(tokens),
        micro_batch=args.micro_batch,
        learning_rate=RATE,
        warmup=0.0,
        decay=0.0,
        holdout=0,
        document_mask=False,
        teacher=teacher,
        dtype=args.dtype,
    )
    uptrain(model, str(data), scratch / "out", config, False, True, clock)
    return clock


def with_trainer(model: str, data: Path, scratch: Path, args: argparse.Namespace) -> Clock:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    clock, on_gpu = Clock(), torch.cuda.is_available()
    rows = TextRows(Shards(data), args.length, 0, 0, document_mask=False)
    taken = [rows.at(rows.sample(index)) for index in range(args.steps * args.rows)]
    ids = [torch.from_numpy(row.input_ids) for row in taken]

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.read()

    settings = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rows // args.micro_batch,
        max_steps=args.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=args.dtype == "bfloat16",
        use_cpu=not on_gpu,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dataset: Any = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(student, settings, train_dataset=dataset, callbacks=[Ends()]).train()
    return clock


def measure(arm: str, model: str, data: Path, scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the largest memory this process ever had."""
    if arm == "trainer, CE":
        clock = with_trainer(model, data, scratch, args)
    else:
        clock = with_upfit(model, data, scratch, args, model if arm == "upfit, KL" else "none")
    steps = list(zip(clock.ends[LEFT_OUT - 1 :], clock.ends[LEFT_OUT:], strict=False))
    wall, own = ([after[at] - before[at] for before, after in steps] for at in (0, 1))
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(wall), "own_seconds": statistics.median(own), "peak_memory": float(memory)}


def child(python: str, arm: str, model: str, data: Path, args: argparse.Namespace) -> dict[str, float]:
    words = [python, "-m", "benchmarks.upfit-work", str(args.scratch), "--models", model, "--arm", arm]
    words += ["--data", str(data), "--results", os.devnull, "--dtype", args.dtype, "--steps", str(args.steps)]
    words += ["--length", str(args.length), "--rows", str(args.rows), "--micro-batch", str(args.micro_batch)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def compared(python: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    data = args.scratch / f"tokens-{Path(model).name}"
    if not data.exists():
        prepare([str(text) for text in TEXTS], data, model, "text", Output(quiet=True))
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _, arm in product(range(args.rounds), ARMS):
        rounds[arm].append(child(python, arm, model, data, args))
        print(Path(model).name, arm, rounds[arm][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    arms = {arm: summary(told, args.rows * args.length) for arm, told in rounds.items()}
    first = rounds["trainer, CE"]
    for arm, told in rounds.items():
        for name in ("seconds", "own_seconds", "peak_memory"):
            ratios = [trainer[name] / ours[name] for trainer, ours in zip(first, told, strict=True)]
            arms[arm][f"trainer_over_it_in_{name}"] = {"median": statistics.median(ratios), "each": ratios}
        arms[arm] |= utilisation(model, arm, arms[arm]["tokens_per_second"], args)
    return {"model": model if not Path(model).is_absolute() else Path(model).name, "arms": arms}


def summary(told: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    best = {name: statistics.median(one[name] for one in told) for name in told[0]}
    return {"tokens_per_second": tokens / best["seconds"], "tokens_per_own_second": tokens / best["own_seconds"],
            "peak_memory": best["peak_memory"], "rounds": told}  # fmt: skip


def utilisation(model: str, arm: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Share of the GPU's dense peak, empty where that is not known. FLOPs are as `upfit plan` counts them: attention is causal,
    a backward pass is twice its forward pass, nothing is computed again; with the teacher's forward pass and without."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    gpu = next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)
    if gpu is None:
        return {}
    traced = trace(read_config(Path(model)), args.length, args.dtype)
    flops = flops_a_token(TracedStage("", 1.0, traced, traced if arm == "upfit, KL" else None), Options())
    share = rate / gpu.peak(args.dtype)
    return {"mfu": (flops["total"] - flops["teacher"]) * share, "mfu_with_teacher": flops["total"] * share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--arm", choices=ARMS, help="measure this one here (what the script starts itself)")
    parser.add_argument("--data", type=Path, help="with --arm: its token shards")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.arm is not None:
        scratch = args.scratch / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        print(json.dumps(measure(args.arm, args.models[0], args.data, scratch, args)))
        return
    settings = {name: getattr(args, name) for name in ("length", "rows", "micro_batch", "steps", "rounds", "dtype")}
    # Forks of a Python that has imported everything: on the GPU they would share a context, so there each imports for itself.
    with nullcontext(sys.executable) if torch.cuda.is_available() else warm_python(dict(os.environ)) as python:
        told: dict[str, Any] = {"settings": settings, "models": [compared(python, model, args) for model in args.models]}
    told |= {"load_average": os.getloadavg()[0], "environment": environment()}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

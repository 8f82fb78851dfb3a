"""Time and memory of contextual positions: the equations as listed in the paper, row chunks, fused kernels (GPU), and SDPA.

    python benchmarks/cope_attention.py --lengths 1k 4k 16k --results benchmarks/results/NAME.json
    python benchmarks/cope_attention.py --decode --lengths 4k 16k

Each case runs in a process of its own, forward and backward, on random inputs: `saturated` gates reach the last position
after about four times the positions, `open` ones never do. With `--decode` one query looks at cached keys, without gradients.
Memory is the peak beyond what was there before the first call: resident on a CPU, allocated on a GPU. What would need more than
there is is left out and said so. Ratios are to SDPA, which has no positions at all, in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from upfit.environment import environment

LISTED_TENSORS = 14  # of [B, H, N, N] that the listing and its gradients hold at once, in float32, two of them int64
CASES = ("listing", "chunked", "fused", "sdpa")
SETTINGS = ("heads", "kv_heads", "width", "positions", "repeats", "decode")
DECODING = ("newest", "chunked", "sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", default=["1k", "4k", "16k"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", action="store_true", help="one query, as many cached keys as the length says")
    parser.add_argument("--gates", nargs="+", choices=["saturated", "open"], default=["saturated", "open"])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case))))
        return
    rows = []
    for length in args.lengths:
        for gates in args.gates:
            of_length = [
                _row(args, name, gates, int(length.removesuffix("k")) * 1024) for name in (DECODING if args.decode else CASES)
            ]
            plain = next((row for row in of_length if row["case"] == "sdpa" and "seconds" in row), None)
            for row in of_length:
                if plain and "seconds" in row:
                    row["over_sdpa"] = round(row["seconds"] / plain["seconds"], 2)
                print(json.dumps(row), flush=True)
            rows += of_length
    if args.results:
        settings = {name: getattr(args, name) for name in SETTINGS}
        args.results.write_text(json.dumps({**settings, "rows": rows, "environment": environment()}, indent=1) + "\n")


def _row(args: argparse.Namespace, name: str, gates: str, length: int) -> dict[str, Any]:
    shape = {key: getattr(args, key) for key in SETTINGS}
    case = {"case": name, "gates": gates, "length": length, **shape}
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    told = {"case": name, "gates": gates, "length": length}
    if done.returncode:
        return told | {"left_out": (done.stderr.strip().splitlines() or ["killed"])[-1][:160]}
    return told | json.loads(done.stdout.splitlines()[-1])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds (median) of a forward pass, and of a backward one where there is any; peak memory in GB; or why left out."""
    import psutil
    import torch

    from upfit.modeling import cope_equations as cope
    from upfit.modeling.cope_attention import fused
    from upfit.modeling.cope_chunks import chunked, newest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, heads, width = case["length"], case["heads"], case["width"]
    queries = 1 if case["decode"] else length
    if case["case"] == "fused" and device == "cpu":
        return {"left_out": "no GPU"}
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if case["case"] == "listing" and LISTED_TENSORS * 4 * heads * length**2 > room:
        return {"left_out": f"needs about {LISTED_TENSORS * 4 * heads * length**2 / 1e9:.0f} GB"}
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(*size: int) -> Any:
        return torch.randn(*size, device=device, dtype=dtype).requires_grad_()

    kv = case["kv_heads"]
    level = -1.1 if case["gates"] == "saturated" else -12.0
    given = cope.Inputs(
        random(1, heads, queries, width),
        random(1, kv, length, width),
        random(1, kv, length, width),
        torch.randn(1, heads, queries, case["positions"], device=device).requires_grad_(),
        torch.full((heads,), level, device=device).requires_grad_(),
        random(1, heads, queries, width),
        (random(1, kv, length, width) * width**-0.5).detach().requires_grad_(),
        scaling=width**-0.5,
    )
    sight = cope.Sight(queries, length)

    def sdpa() -> Any:
        causal = not case["decode"]
        return torch.nn.functional.scaled_dot_product_attention(given.q, given.k, given.v, is_causal=causal, enable_gqa=True)

    run = {
        "listing": lambda: cope.reference(given, sight),
        "chunked": lambda: chunked(given, sight),
        "fused": lambda: fused(given, sight),
        "newest": lambda: newest(given, sight),
        "sdpa": sdpa,
    }[case["case"]]
    before = _memory(device)
    times = []
    for _ in range(case["repeats"] + (device == "cuda")):
        start = time.perf_counter()
        with torch.set_grad_enabled(not case["decode"]):
            output = run()
        if output.requires_grad:
            output.float().square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        for name in cope.TENSORS:
            if isinstance(tensor := getattr(given, name), torch.Tensor):
                tensor.grad = None
    return {
        "seconds": round(statistics.median(times[-case["repeats"] :]), 5),
        "gigabytes": round((_memory(device) - before) / 1e9, 3),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _memory(device: str) -> int:
    """Peak so far, in bytes."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

"""Time and memory of converting a Llama-2-7B-shaped checkpoint (13.5 GB of random float16), beside `cp` of the same folder.

    python benchmarks/convert_scale.py SCRATCH [--rounds 3] [--small]

SCRATCH needs 40 GB. The runs alternate, cp first; before each the page cache is dropped where the system allows it, after
each everything is synced and that is part of its time. Memory is the largest sum of anonymous pages (RssAnon) seen while
the process ran. Prints JSON: medians, minima and maxima in seconds, and the ratio of the medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from upfit.convert.safetensors_file import encode_header
from upfit.environment import environment

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 32000}
SHARD_BYTES = 10 * 10**9


def shapes(config: dict) -> dict[str, list[int]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": [vocab, hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = [hidden, inner]
        found |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}


def make(folder: Path, sizes: dict) -> None:
    """A folder as transformers would save it, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": sizes["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    groups: list[list[tuple[str, list[int], int]]] = [[]]
    for name, shape in shapes(sizes).items():
        nbytes = 2 * torch.Size(shape).numel()
        if sum(entry[2] for entry in groups[-1]) + nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append((name, shape, nbytes))
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for index, group in enumerate(groups):
        file_name = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        with open(folder / file_name, "wb") as file:
            file.write(encode_header([(name, "F16", tuple(shape), nbytes) for name, shape, nbytes in group], {"format": "pt"}))
            for name, shape, _ in group:
                file.write((torch.randn(shape, generator=generator) * 0.02).half().numpy().tobytes())
                weight_map[name] = file_name
    if len(groups) > 1:
        index_file = {"metadata": {"total_size": sum(e[2] for g in groups for e in g)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def timed(command: list[str]) -> dict[str, float]:
    cold = drop_caches()
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    os.sync()
    if process.returncode:
        sys.exit(f"{command[0]} failed with {process.returncode}")
    return {"seconds": time.monotonic() - began, "anonymous_mb": peak / 1e6, "cold": cold}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a 60 MB model, to try the script")
    args = parser.parse_args()
    source = args.scratch / "source"
    if not source.exists():
        make(source, SMALL if args.small else SEVEN_B)
    upfit = [sys.executable, "-m", "upfit", "convert", "gqa", str(source), str(args.scratch / "out")]
    kv_heads = min(args.kv_heads, 2) if args.small else args.kv_heads
    commands = {
        "cp": ["cp", "-r", str(source), str(args.scratch / "out")],
        "upfit": [*upfit, "--kv-heads", str(kv_heads), "--no-verify", "-q"],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            shutil.rmtree(args.scratch / "out", ignore_errors=True)
            runs[name].append(timed(command))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    shutil.rmtree(args.scratch / "out", ignore_errors=True)
    seconds = {name: [run["seconds"] for run in rows] for name, rows in runs.items()}
    report = {
        "source_gb": sum(file.stat().st_size for file in source.iterdir()) / 1e9,
        "kv_heads": kv_heads,
        "seconds": {n: {"median": statistics.median(s), "min": min(s), "max": max(s)} for n, s in seconds.items()},
        "ratio_to_cp": statistics.median(seconds["upfit"]) / statistics.median(seconds["cp"]),
        "peak_anonymous_mb": max(run["anonymous_mb"] for run in runs["upfit"]),
        "cold_cache": all(run["cold"] for rows in runs.values() for run in rows),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

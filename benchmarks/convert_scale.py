"""Time and memory of converting a Llama-2-7B-shaped checkpoint (13.5 GB of random float16), beside `cp -r` of the same folder.

    python benchmarks/convert_scale.py SCRATCH [--rounds 5] [--others 2] [--small]

SCRATCH needs 28 GB. The runs alternate, cp first; before each the page cache is dropped where the system allows it, after
each everything is synced and that is part of its time. Conversions are whole processes, imports included. In the first
`--others` rounds the same folder also goes through safetensors (load and save, shard by shard), through transformers
(from_pretrained, save_pretrained) and, where `mergekit-yaml` is on the path, through mergekit's passthrough: these change
nothing, they only copy. Memory is the largest anonymous memory (RssAnon) seen while the process ran, and the disk's is what it
had less of afterwards: on a file system with reflinks, what was not shared. Then the plan (dry run) of
a Llama-2-70B-shaped checkpoint of sparse files is timed. Prints JSON: medians, minima and maxima in seconds, and the ratio of
the medians.
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

from upfit.checkpoint.safetensors_header import encode_header
from upfit.environment import environment

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SEVENTY_B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA_3 = {"num_key_value_heads": 8, "rope_theta": 5e5, "max_position_embeddings": 8192}
LLAMA_3_8B = {**LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_70B = {**LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 32000}
SHARD_BYTES = 10 * 10**9


def shapes(config: dict) -> dict[str, list[int]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config.get("num_key_value_heads", config["num_attention_heads"])
    found = {"model.embed_tokens.weight": [vocab, hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qo"}
        found |= {f"{prefix}self_attn.{name}_proj.weight": [narrow, hidden] for name in "kv"}
        found |= {f"{prefix}mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = [hidden, inner]
        found |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}


def make(folder: Path, sizes: dict, sparse: bool = False, dtype: str = "float16") -> None:
    """A folder as transformers would save it, one tensor in memory at a time; `sparse`: headers only, before a hole. `dtype`:
    float16 or bfloat16."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": sizes["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
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
            kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
            file.write(encode_header([(name, kind, tuple(shape), nbytes) for name, shape, nbytes in group], {"format": "pt"}))
            for name, shape, nbytes in group:
                weight_map[name] = file_name
                if sparse:
                    file.truncate(file.seek(nbytes, os.SEEK_CUR))
                    continue
                drawn = (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
                file.write(drawn.view(torch.int16).numpy().tobytes())
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


SAFETENSORS = """
import pathlib, shutil, sys
from safetensors.torch import load_file, save_file
source, out = map(pathlib.Path, sys.argv[1:])
out.mkdir()
for path in sorted(source.iterdir()):
    if path.suffix == ".safetensors":
        save_file(load_file(path), out / path.name, metadata={"format": "pt"})
    else:
        shutil.copy(path, out)
"""
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
MERGEKIT = """merge_method: passthrough
dtype: float16
models:
  - model: {source}
"""


def copiers(source: Path, out: Path, scratch: Path) -> dict[str, list[str]]:
    """Programs that read and write the whole checkpoint without changing it."""
    found = {
        "safetensors load_file, save_file": [sys.executable, "-c", SAFETENSORS, str(source), str(out)],
        "transformers from_pretrained, save_pretrained": [sys.executable, "-c", TRANSFORMERS, str(source), str(out)],
    }
    if shutil.which("mergekit-yaml"):
        recipe = scratch / "mergekit.yaml"
        recipe.write_text(MERGEKIT.format(source=source))
        found["mergekit passthrough"] = ["mergekit-yaml", str(recipe), str(out)]
    return found


def convert_command(source: Path, out: Path, kv_heads: int, *more: str) -> list[str]:
    command = [sys.executable, "-m", "upfit", "convert", "gqa", str(source), str(out), "--kv-heads", str(kv_heads)]
    return [*command, "--method", "mean", "-q", *more]


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    seconds = [row["seconds"] for row in rows]
    told = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    told |= {"new_gb": statistics.median(row["new_gb"] for row in rows)}
    return told | {"peak_anonymous_mb": max(row["anonymous_mb"] for row in rows), "runs": len(rows)}


def plan_of_70b(scratch: Path) -> dict[str, float]:
    folder = scratch / "seventy"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, SEVENTY_B, sparse=True)
    told = timed(convert_command(folder, scratch / "out", 1, "--dry-run"))
    claimed = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    shutil.rmtree(folder)
    return {"claimed_gb": claimed, "seconds": told["seconds"], "anonymous_mb": told["anonymous_mb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", type=int, default=2, help="rounds in which the other programs run too")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a 60 MB model, to try the script")
    args = parser.parse_args()
    source, out = args.scratch / "source", args.scratch / "out"
    if not source.exists():
        make(source, SMALL if args.small else SEVEN_B)
    kv_heads = min(args.kv_heads, 2) if args.small else args.kv_heads
    commands = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "upfit": convert_command(source, out, kv_heads, "--no-verify"),
    }
    others = copiers(source, out, args.scratch)
    runs: dict[str, list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for name, command in (commands | (others if turn < args.others else {})).items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            used = shutil.disk_usage(args.scratch).used
            runs.setdefault(name, []).append(timed(command) | {"new_gb": (shutil.disk_usage(args.scratch).used - used) / 1e9})
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    told = {name: summary(rows) for name, rows in runs.items()}
    report = {
        "source_gb": sum(file.stat().st_size for file in source.iterdir()) / 1e9,
        "kv_heads": kv_heads,
        "programs": told | ({} if "mergekit passthrough" in told else {"mergekit passthrough": "not installed"}),
        "ratio_to_cp": told["upfit"]["median_s"] / told["cp -r"]["median_s"],
        "plan_of_70b": plan_of_70b(args.scratch),
        "cold_cache": all(run["cold"] for rows in runs.values() for run in rows),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

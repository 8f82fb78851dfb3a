"""What is within reach of a model in a long context, and of the same weights when each layer sees only a window of it?

    python benchmarks/probes.py MODEL --scratch DIR --results benchmarks/results/NAME.json
        [--lengths 1024 2048 4096 8192] [--samples 40] [--depths 8] [--window 256] [--probes val-document ...]

MODEL is a folder with a plain Llama. It is asked the long-context probes, and so is a copy whose config makes it a Mistral with
a sliding window, on the same prompts: probes that see no gap there would see none anywhere. Each probe and length is kept once
it is done; a run that was broken off goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from upfit.environment import environment
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options
from upfit.output import Output

PROBES = ["val-document", "val-code", "val-database", "key-value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=40, help="questions at each length: contexts times depths")
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--probes", nargs="+", default=PROBES)
    args = parser.parse_args()
    settings = {"samples": args.samples, "depths": args.depths, "window": args.window, "model": args.model.name}
    told: dict[str, Any] = {"settings": settings, "environment": environment(), "seconds": {}}
    told |= {"model": {"probes": {}}, "window": {"probes": {}}, "differences": {}}
    if args.results.exists():
        told = json.loads(args.results.read_text(encoding="utf-8"))
        if told["settings"] != settings:
            raise SystemExit(f"{args.results} is of another run: {told['settings']}; give another --results")
    windowed = _windowed(args.model, args.scratch / f"window-{args.window}", args.window)
    for length in args.lengths:
        for probe in args.probes:
            if f"{probe} {length}" not in told["seconds"]:
                _measure(args, windowed, probe, length, told)
                args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _windowed(model: Path, folder: Path, window: int) -> Path:
    """The same weights, as links, under a config whose class knows windows."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"{model} is a {config['model_type']}, not a llama; its weights are not put under another class here")
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _measure(args: argparse.Namespace, windowed: Path, probe: str, length: int, told: dict[str, Any]) -> None:
    """One probe at one length, of both models, into `told`."""
    began = time.monotonic(), time.process_time()
    options = Options(
        against=str(windowed),
        windows=1,
        length=256,
        probe=[probe],
        probe_length=[length],
        probe_samples=args.samples,
        probe_depths=args.depths,
    )
    result = evaluate(str(args.model), options, Output(quiet=True)).record()
    for key, subject in (("model", result["model"]), ("window", result["against"])):
        new = subject["probes"][probe]
        kept = told[key]["probes"].setdefault(probe, {**new, "lengths": {}})
        kept["lengths"] |= new["lengths"]
        row = new["lengths"][str(length)]
        nats, gap, null = row["answer_nats_per_token"]["mean"], row["nats_gap"]["mean"], row["nats_null_gap"]["p95"]
        said = f"score {row['average']['mean']:.3f}, {nats:.3f} nats, gap of nats {gap:.2f}, null {null:.2f}"
        print(f"{probe} {length} {key}: {said}", flush=True)
    told["differences"].setdefault(probe, {})[str(length)] = result["probe_differences"][probe]["lengths"][str(length)]
    wall, processor = time.monotonic() - began[0], time.process_time() - began[1]
    told["seconds"][f"{probe} {length}"] = {"wall": wall, "processor": processor}


if __name__ == "__main__":
    main()

"""What each way of merging key/value heads costs before any training: loss on prose and code, short and long, paired intervals.

    python -m benchmarks.aligned MODEL SCRATCH --kv-heads 1 --calibration TEXT --results benchmarks/results/NAME.json

The loss is measured on Upfit's default text (the language reference and a fixed list of standard-library files), which must not
be in TEXT: what the two share all the same is counted, and stands in the results. Ridges and steps of the refit are chosen by
Upfit on windows of TEXT that it holds back, so nothing is chosen on what is reported. Conversions whose folder stands in
SCRATCH already are not done again.
"""

import argparse
import dataclasses
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.parts import read_documents, shared_runs, windows_record
from upfit import provenance
from upfit.architecture.attention import Attention, Layer
from upfit.architecture.layers import Architecture
from upfit.calibration.calibrate import calibrate
from upfit.calibration.statistics_file import open_statistics
from upfit.checkpoint.plan import Plan
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import Source, find_source
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.recipe import Options
from upfit.convert.recipe import Recipe, get_recipe
from upfit.environment import environment
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.load import load_model, load_tokenizer, pick_device
from upfit.evaluate.loss import PARTS, Losses, window_losses
from upfit.output import Output
from upfit.text import python_documents
from upfit.text.windows import Window, make_windows

METHODS = ("aligned", "mean", "first", "random", "procrustes", "aligned-no-refit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", default="64k")
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 2048))
    parser.add_argument("--windows", type=int, default=48, help="of the shorter length; as many tokens of the longer one")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    output, source = Output(), find_source(args.model)
    windows = _windows(source, args.lengths, args.windows)
    original = _losses(source.path, windows)
    table: dict[str, Any] = {"original": {str(n): _row(windows[n], one, None) for n, one in original.items()}}
    seconds, refits = {}, {}
    for method in args.methods:
        folder = args.scratch / f"kv{args.kv_heads}-{method}"
        began = time.monotonic()
        if not folder.exists():
            _convert(source, folder, method, args, output)
            seconds[method] = time.monotonic() - began
        found = _losses(folder, windows)
        table[method] = {str(n): _row(windows[n], one, original[n]) for n, one in found.items()}
        if "aligned" in method:
            told = provenance.read(folder)[-1]
            refits[method] = {"options": told["options"], **told["measurements"]}
        for length in args.lengths:
            print(method, length, json.dumps(table[method][str(length)]["all"]), flush=True)
    results = {
        "kv_heads": args.kv_heads,
        "text": {str(n): windows_record(some, n) for n, some in windows.items()},
        "shared_with_calibration": shared_runs(python_documents(), read_documents([args.calibration])),
        "table": table,
        "seconds": seconds,
        "aligned": _without_places(refits),
        "environment": environment(),
    }
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _windows(source: Source, lengths: list[int], count: int) -> dict[int, list[Window]]:
    tokenizer, documents = load_tokenizer(source), python_documents()
    return {n: make_windows(documents, tokenizer, n, max(4, count * lengths[0] // n)) for n in lengths}


def _losses(folder: Path, windows: dict[int, list[Window]]) -> dict[int, Losses]:
    device = pick_device("auto")
    model = load_model(find_source(str(folder)), "float32", device)
    with Output(quiet=True).progress("", 1) as meter:
        found = {n: window_losses(model, some, 2, str(folder), meter) for n, some in windows.items()}
    del model
    gc.collect()
    return found


def _row(windows: list[Window], losses: Losses, against: Losses | None) -> dict[str, Any]:
    """Losses, or their paired differences, of all windows, of each kind, and (all) by position in the window.

    `loss` and `difference` have intervals over windows; those over documents are wider where windows of one are alike.
    """
    documents = np.unique([window.document for window in windows], return_inverse=True)[1]

    def by_document(values: np.ndarray) -> np.ndarray:
        return np.bincount(documents[some], values)[np.unique(documents[some])]

    kinds = np.array([window.kind for window in windows])
    rows: dict[str, Any] = {}
    costs, tokens = losses.nats.sum(1), losses.tokens.sum(1).astype(float)
    for kind in ("all", *sorted(set(kinds))):
        some = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        rows[kind] = {"loss": mean_interval(costs[some], tokens[some]).record()}
        if against is not None:
            other = against.nats.sum(1)[some]
            rows[kind]["difference"] = difference_interval(costs[some], tokens[some], other, tokens[some]).record()
            mine, theirs, lengths = (by_document(values) for values in (costs[some], other, tokens[some]))
            rows[kind]["difference_by_document"] = difference_interval(mine, lengths, theirs, lengths).record()
    if against is not None:
        gap = (losses.nats.sum(0) - against.nats.sum(0)) / losses.tokens.sum(0)
        rows["by_position"] = {f"part {part + 1} of {PARTS}": float(value) for part, value in enumerate(gap)}
    return rows


def _convert(source: Source, folder: Path, method: str, args: argparse.Namespace, output: Output) -> None:
    options: dict[str, Any] = {"kv_heads": args.kv_heads, "method": method}
    recipe = get_recipe("gqa")
    if method == "procrustes":
        recipe = _procrustes_recipe(source, folder.with_name("statistics.safetensors"), args, output)
        options["method"] = "mean"
    elif "aligned" in method:
        options |= {"method": "aligned", "refit": method == "aligned", "calibration": [args.calibration]}
        options |= {"calibration_tokens": args.calibration_tokens, "calibration_length": max(args.lengths)}
    convert(recipe, str(source.path), folder, Options(**options), Settings(verify=False), output)


def _procrustes_recipe(source: Source, path: Path, args: argparse.Namespace, output: Output) -> Recipe:
    """The aligned mean of Jin et al. (arXiv 2412.20677): plane rotations for keys, orthogonal maps for values."""
    if not path.exists():
        tokens, length = args.calibration_tokens, max(args.lengths)
        calibrate(str(source.path), [args.calibration], path, tokens, length, None, False, output)
    with open_checkpoint(source.path) as checkpoint:
        statistics = open_statistics(path, checkpoint)

    def plan(architecture: Architecture, options: Any) -> Plan:
        config = architecture.with_kv_heads(options.kv_heads)
        parts = ("q", "k", "v", "o")
        rules = tuple(layer.rule(parts, change(layer, options.kv_heads), "aligned mean") for layer in architecture.layers)
        return Plan(config, rules)

    def change(layer: Layer, kv_heads: int) -> Any:
        found = statistics.layer(layer.path)
        assert found is not None
        facts, sums = found
        return lambda attention: _aligned_mean(attention, facts.order, facts.pairs, sums, kv_heads)

    return dataclasses.replace(get_recipe("gqa"), name="procrustes", plan=plan)


def _aligned_mean(attention: Attention, order: Any, pairs: int, sums: dict[str, Tensor], kv_heads: int) -> Attention:
    assert attention.q is not None and attention.k is not None and attention.v is not None and attention.o is not None
    if attention.k.device.type == "meta":
        return dataclasses.replace(attention, k=attention.k[:kv_heads], v=attention.v[:kv_heads])
    q, k, v, o = (tensor.double().clone() for tensor in (attention.q, attention.k, attention.v, attention.o))
    first, second = list(order[:pairs]), list(order[pairs : 2 * pairs])
    group, per = k.shape[0] // kv_heads, q.shape[0] // k.shape[0]
    cross = torch.view_as_complex(sums["key_pairs"].double().contiguous()).sum(0)  # [P, K, K]: k_i conj(k_j)
    moment = sums["values"].double().reshape(k.shape[0], v.shape[1], k.shape[0], v.shape[1])
    keys, values = [], []
    for start in range(0, k.shape[0], group):
        heads = range(start, start + group)
        turns = torch.ones(group, pairs, dtype=torch.complex128)
        maps = torch.eye(v.shape[1], dtype=torch.float64).repeat(group, 1, 1)
        for _ in range(5):
            for i, j in enumerate(heads):  # turn of head j to the mean of the others, as they are turned now
                mean = sum(turns[n].conj() * cross[:, j, m] for n, m in enumerate(heads) if m != j)
                turns[i] = (mean / mean.abs().clamp_min(1e-30)).conj()  # type: ignore[union-attr]
                target = sum(maps[n] @ moment[m, :, j] for n, m in enumerate(heads) if m != j)
                left, _, right = torch.linalg.svd(target)
                maps[i] = left @ right
        for i, j in enumerate(heads):
            complex_key = torch.complex(k[j, first], k[j, second]) * turns[i][:, None]
            k[j, first], k[j, second] = complex_key.real, complex_key.imag
            v[j] = maps[i] @ v[j]
            for h in range(j * per, (j + 1) * per):
                complex_query = torch.complex(q[h, first], q[h, second]) * turns[i][:, None]
                q[h, first], q[h, second] = complex_query.real, complex_query.imag
                o[:, h] = o[:, h] @ maps[i].T
        keys.append(k[start : start + group].mean(0))
        values.append(v[start : start + group].mean(0))
    dtype = attention.q.dtype
    return dataclasses.replace(
        attention, q=q.to(dtype), k=torch.stack(keys).to(dtype), v=torch.stack(values).to(dtype), o=o.to(dtype)
    )


def _without_places(refits: dict[str, Any]) -> dict[str, Any]:
    """No folder of this machine in a result."""
    for told in refits.values():
        told["options"] = {**told["options"], "calibration": "TEXT"}
        told["calibration"] = {**told["calibration"], "files": "TEXT"}
    return refits


if __name__ == "__main__":
    main()

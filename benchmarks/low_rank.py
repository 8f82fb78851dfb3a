"""Low-rank keys and values at the cache bytes of fewer heads, by decompositions alone: what aligned merging stands beside.

    python -m benchmarks.low_rank MODEL --kv-heads 1 --calibration TEXT --results benchmarks/results/NAME.json

k_proj and v_proj become products of two matrices, cut where C^½ Wᵀ has its smallest singular values, C the second moment of
their inputs: the best rank for what they give out (as CARE, arXiv 2603.17946, and SVD-LLM V2, arXiv 2503.12340, cut them). The
cache would hold the latents; keys are made of them again and rotated at every step, which no stock class or engine does. All
layers the same rank for keys and for values ("uniform", CARE-U), one latent for both ("joint"), or ranks taken where they save
most of the relative loss, over all layers ("by loss", as CARE-E and SVD-LLM V2 spread theirs, in our words). Losses in nats a
token over the source on the windows of `aligned.py`, by document; nothing is refitted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.aligned import _row, _windows
from benchmarks.parts import read_documents
from upfit.checkpoint.source import find_source
from upfit.environment import environment
from upfit.evaluate.load import load_model, load_tokenizer
from upfit.evaluate.loss import window_losses
from upfit.output import Output
from upfit.text.windows import make_windows

WAYS = ("uniform", "joint", "by loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--kv-heads", type=int, required=True, help="at whose cache bytes")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 2048))
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    source = find_source(args.model)
    model: Any = load_model(source, "float32", torch.device("cpu"))
    windows = _windows(source, args.lengths, args.windows)
    documents, length = read_documents([args.calibration]), args.lengths[0]
    sample = make_windows(documents, load_tokenizer(source), length, args.calibration_tokens // length)
    pairs = [(layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in model.model.layers]
    roots = [root(moment) for moment in moments(model, [k for k, _ in pairs], [window.ids for window in sample])]
    rank = args.kv_heads * model.config.head_dim
    own = {n: measured(model, part) for n, part in windows.items()}
    weights = [tuple(linear.weight.data.clone() for linear in pair) for pair in pairs]
    table: dict[str, Any] = {"source": {str(n): _row(windows[n], losses, None)["all"] for n, losses in own.items()}}
    for way in WAYS:
        for pair, new in zip(pairs, cut(weights, roots, rank, way), strict=True):
            for linear, weight in zip(pair, new, strict=True):
                linear.weight.data = weight
        found = {n: measured(model, part) for n, part in windows.items()}
        table[way] = {str(n): _row(windows[n], losses, own[n])["all"] for n, losses in found.items()}
        print(way, {n: round(row["difference_by_document"]["mean"], 3) for n, row in table[way].items()}, flush=True)
    record = {"kv_heads": args.kv_heads, "floats_a_token_and_layer": 2 * rank, "calibration_tokens": args.calibration_tokens}
    if args.results:
        text = json.dumps(record | {"table": table, "environment": environment()}, indent=1)
        args.results.write_text(text + "\n", encoding="utf-8")


def measured(model: Any, windows: list[Any]) -> Any:
    with Output(quiet=True).progress("", 1) as meter:
        return window_losses(model, windows, 2, "low rank", meter)


@torch.no_grad()
def moments(model: Any, linears: list[nn.Linear], rows: list[Any]) -> list[Tensor]:
    """Σ x xᵀ [E, E] float64 of the inputs of each Linear."""
    sums = [torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64) for linear in linears]

    def add(place: int, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        sums[place] += (flat.T @ flat).double()

    hooks = [
        linear.register_forward_pre_hook(lambda module, inputs, place=place: add(place, inputs[0]))
        for place, linear in enumerate(linears)
    ]
    for row in rows:
        model(input_ids=torch.as_tensor(row)[None], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return sums


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of a moment, its smallest eigenvalues raised to 1e-6 of the mean."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-6 * float(values.mean())).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def cut(weights: list[Any], roots: list[tuple[Tensor, Tensor]], rank: int, way: str) -> list[tuple[Tensor, ...]]:
    """The weights of keys and values of every layer, cut to 2·`rank` floats a token in the mean."""
    parts = [(torch.cat(pair),) if way == "joint" else pair for pair in weights]
    svds = [
        [torch.linalg.svd(w.double() @ up, full_matrices=False) for w in part]
        for part, (up, _) in zip(parts, roots, strict=True)
    ]
    ranks = [[2 * rank // len(part)] * len(part) for part in parts]
    if way == "by loss":
        shares = [[s.square() / s.square().sum() for _, s, _ in layer] for layer in svds]
        flat = torch.cat([share for layer in shares for share in layer])
        least = flat.sort(descending=True).values[2 * rank * len(parts) - 1]
        ranks = [[int((share >= least).sum()) for share in layer] for layer in shares]
    result = []
    for layer, own, (_, down), pair in zip(svds, ranks, roots, weights, strict=True):
        new = [((u[:, :r] * s[:r]) @ vt[:r] @ down).float() for (u, s, vt), r in zip(layer, own, strict=True)]
        result.append(tuple(new[0].split([len(w) for w in pair])) if way == "joint" else tuple(new))
    return result


if __name__ == "__main__":
    main()

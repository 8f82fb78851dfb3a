"""A grouped checkpoint as a true multi-head one, whose heads look different and are not.

Every key/value head is repeated for each query head, then changed by random exact re-bases: the function is the same. Merging
back must find the exact merge again.

    python benchmarks/disguise.py MODEL OUT
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.side_files import copy_side_files
from upfit.convert.gqa.reparametrise import expand_heads, rebase_values, scale_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    disguise(args.model, args.out)


def disguise(model: Path, out: Path) -> None:
    """Only for models with plain half-split rotary attention, such as Llama's, in one safetensors file."""
    out.mkdir(parents=True)
    with open_checkpoint(model) as checkpoint:
        architecture = bind(checkpoint.config, checkpoint.tensors)
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in architecture.layers:
        stored = {part: weights[name].double() for part, name in layer.names.items()}
        layout = LAYOUTS[layer.layout]
        changed = layout.pack(_other(layout.unpack(stored, layer.geometry), generator), layer.geometry)
        weights |= {layer.names[part]: tensor.float().contiguous() for part, tensor in changed.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.config | {"num_key_value_heads": architecture.heads}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_side_files(model, out)


def _other(attention: Attention, generator: torch.Generator) -> Attention:
    assert attention.q is not None and attention.k is not None and attention.v is not None
    heads, width, half = attention.q.shape[0], attention.v.shape[1], attention.k.shape[1] // 2
    many = expand_heads(attention, heads)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    factors = torch.polar(0.5 + uniform(heads, half), 6.2832 * uniform(heads, half))
    turned = scale_pairs(many, factors, range(half), range(half, 2 * half))
    basis = torch.linalg.qr(torch.randn(heads, width, width, generator=generator, dtype=torch.float64)).Q
    return rebase_values(turned, basis * (0.5 + uniform(heads, 1, width)))


if __name__ == "__main__":
    main()

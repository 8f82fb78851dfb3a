"""How close a model is that was made of another family's: random models, with all their heads, in four types.

    python -m benchmarks.retargets [MODEL ...] [--results benchmarks/results/NAME.json]

Widths and head counts are those of small published models, layers and vocabulary are fewer; norms have scales from 0.1 to 1.5
and shifts. Told is the largest difference of logits over 2 x 64 random tokens as a share of the largest logit, whether 8 greedy
tokens after them are the same, and `own`: how far the source itself in that type is from the same weights run in float64. What
changes no more than rounding stays below or near `own`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from upfit.architecture.retarget.retarget import retarget
from upfit.checkpoint.reader import open_checkpoint
from upfit.environment import environment

IDS = torch.randint(3, 2000, (2, 64), generator=torch.Generator().manual_seed(1))
TYPES = ("float64", "float32", "bfloat16", "float16")
WORDS = {"vocab_size": 2048}
PYTHIA = WORDS | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "rotary_pct": 0.25,
}
GPT2 = WORDS | {"n_embd": 768, "n_head": 12, "n_layer": 3, "bos_token_id": 0, "eos_token_id": 0}
GPTJ = WORDS | {"n_embd": 1024, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
FAIRSEQ = WORDS | {"num_hidden_layers": 2, "hidden_size": 1024, "num_attention_heads": 16}
FALCON = WORDS | {"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "multi_query": False}
JAPANESE = {key: value for key, value in PYTHIA.items() if key != "intermediate_size"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Pythia-70m": ("gpt_neox", PYTHIA),
    "GPT-NeoX, MLP after attention": ("gpt_neox", PYTHIA | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "GPT-NeoX Japanese": ("gpt_neox_japanese", JAPANESE | {"bos_token_id": 0, "eos_token_id": 0}),
    "GPT-J": ("gptj", GPTJ | {"n_head": 4, "rotary_dim": 64}),
    "CodeGen-350M": ("codegen", GPTJ | {"n_head": 16, "rotary_dim": 32}),
    "GPT-2": ("gpt2", GPT2),
    "OPT-125m": ("opt", WORDS | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 3, "num_attention_heads": 12}),
    "BioGPT": ("biogpt", FAIRSEQ | {"intermediate_size": 4096}),
    "XGLM-564M": ("xglm", WORDS | {"num_layers": 2, "d_model": 1024, "attention_heads": 16, "ffn_dim": 4096}),
    "Falcon, rotary": ("falcon", FALCON),
    "Falcon, ALiBi": ("falcon", FALCON | {"alibi": True, "bias": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], metavar="MODEL", help="default: all")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    rows = []
    for name in args.models or MODELS:
        with tempfile.TemporaryDirectory() as place:
            rows.append({"model": name, **tried(name, Path(place))})
        print(json.dumps(rows[-1]), flush=True)
    if args.results:
        args.results.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n", encoding="utf-8")


def tried(name: str, place: Path) -> dict[str, Any]:
    """The two types and, for each type of numbers, the error, that of the source itself, and whether tokens are the same."""
    model_type, settings = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings), dtype=torch.float64)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                scale = parameter_name.endswith("weight")
                parameter.uniform_(0.1, 1.5) if scale else parameter.normal_(0, 0.2)
    told: dict[str, Any] = {"from": model_type}
    for dtype in TYPES:
        source, out = place / f"{dtype}-source", place / f"{dtype}-out"
        model.to(getattr(torch, dtype)).save_pretrained(source)
        model.to(torch.float64)  # the weights as the type has them
        told["to"] = moved(source, out)
        told[dtype] = compared(source, out, dtype)
    return told


def moved(source: Path, out: Path) -> str:
    """Write the model of the other family, with all its heads; its type."""
    out.mkdir()
    with open_checkpoint(source) as checkpoint:
        seen = retarget(checkpoint.config, checkpoint.tensors)
        assert seen is not None
        tensors = {new: checkpoint.read(old) for new, old in seen.renames.items()}
        for rule in seen.rules:
            tensors |= rule.apply({name: checkpoint.read(name) for name in rule.reads})
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(seen.config), encoding="utf-8")
    return str(seen.config["model_type"])


def compared(source: Path, out: Path, dtype: str) -> dict[str, Any]:
    (before, tokens), (after, same) = answers(source, dtype), answers(out, dtype)
    largest = before.abs().max()
    own = 0.0 if dtype == "float64" else float((before - logits_of(loaded(source, "float64"))).abs().max() / largest)
    return {"error": float((before - after).abs().max() / largest), "own": own, "same_tokens": torch.equal(tokens, same)}


@torch.no_grad()
def answers(folder: Path, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, 64, vocabulary] in float64 and the tokens with eight more."""
    model = loaded(folder, dtype)
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return logits_of(model), tokens


def loaded(folder: Path, dtype: str) -> Any:
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)  # XGLM's class runs in float64 only so
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.double()


if __name__ == "__main__":
    main()

"""Small trained models of other shapes than the embedded one's, on the same kind of text: what merges are measured on.

    python -m benchmarks.small_models FOLDER qwen3 --tokens 6M

The embedded model's tokenizer, width, heads, text and recipe (`scripts/train_embedded_model.py`). T5's shape learns to write
spans that are left out, BART's to write a text some spans of which are masked. FOLDER/SHAPE is a finished model folder;
FOLDER/tokens.npy serves all shapes. A run that was stopped begins again.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from scripts.train_embedded_model import BATCH, CONFIG, CONTEXT, batch_at, collect, parse_tokens, rate
from upfit.examples.from_text import masked
from upfit.text.spans import SENTINEL, Vocabulary, corrupt, sentinels, sizes_of

TOKENIZER = Path(__file__).parents[1] / "upfit" / "demo" / "model"
SPANS = sizes_of(CONTEXT).spans
MASK = "<mask>"
TABLES = ("embed", "shared", "wte", "wpe", "relative_attention_bias", "lm_head")  # of one row a token or a position


@dataclass(frozen=True)
class Shape:
    model: str  # its class in transformers
    config: dict[str, Any]
    task: str = "text"  # or "spans", "masks"
    muon: float = 0.02  # the rate of hidden matrices, the embedded model's


COMMON = {name: CONFIG[name] for name in CONFIG if name != "vocab_size"}
HALF = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
SHAPES = {
    "qwen3": Shape("Qwen3ForCausalLM", COMMON),
    "gemma3": Shape("Gemma3ForCausalLM", COMMON | {"query_pre_attn_scalar": 32, "layer_types": ["full_attention"] * 4}),
    "olmo2": Shape("Olmo2ForCausalLM", {name: COMMON[name] for name in COMMON if name != "head_dim"} | {"hidden_size": 256}),
    "gpt2": Shape("GPT2LMHeadModel", {"n_embd": 192, "n_layer": 4, "n_head": 8, "n_positions": 1024}),
    "bloom": Shape("BloomForCausalLM", {"hidden_size": 192, "n_layer": 4, "n_head": 8}),
    "t5": Shape(
        "T5ForConditionalGeneration", {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 8}, "spans", 0.005
    ),  # its scores are not divided by the root of their width, so that large steps of queries and keys end its learning
    "bart": Shape(
        "BartForConditionalGeneration",
        {"d_model": 192, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_position_embeddings": 1024, **HALF},
        "masks",
    ),
}


def tokenizer_of(task: str) -> Any:
    """The embedded model's, with sentinels or a mask where the task needs them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    if task == "spans":
        tokenizer.add_tokens([SENTINEL.format(number) for number in range(SPANS)], special_tokens=True)
    if task == "masks":
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def make_model(shape: Shape, tokenizer: Any) -> Any:
    end = tokenizer.eos_token_id
    model_class = getattr(transformers, shape.model)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end}
    return model_class(model_class.config_class(**shape.config, **ids, vocab_size=len(tokenizer), use_cache=False))


def tokens_of(folder: Path) -> np.ndarray:
    """uint16 [tokens] of the corpus, documents separated by the end token; made once."""
    path = folder / "tokens.npy"
    if not path.exists():
        texts, sources = collect()
        (folder / "sources.json").write_text(json.dumps(sources, indent=1), encoding="utf-8")
        tokenizer = tokenizer_of("text")
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        np.save(path, np.concatenate([np.array(row + [tokenizer.eos_token_id], dtype=np.uint16) for row in ids]))
    return np.load(path, mmap_mode="r")


def maker(task: str, tokenizer: Any) -> Callable[[Tensor, int], dict[str, Tensor]]:
    """What turns rows of ids [BATCH, CONTEXT + 1] and the number of the step into what the model is called with."""
    if task == "text":
        return lambda ids, step: {"input_ids": ids[:, :-1], "labels": ids[:, :-1]}
    vocabulary = Vocabulary(sentinels(tokenizer), tokenizer.eos_token_id)

    def pair(row: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if task == "spans":
            return corrupt(row, sizes_of(len(row)), vocabulary, random)
        return masked(row, tokenizer.mask_token_id, random), np.append(row, tokenizer.eos_token_id)

    def make(ids: Tensor, step: int) -> dict[str, Tensor]:
        rows = [pair(row, np.random.default_rng([step, at])) for at, row in enumerate(ids[:, :-1].numpy())]
        inputs, labels = zip(*rows, strict=True)
        return {"input_ids": torch.from_numpy(np.stack(inputs)), "labels": torch.from_numpy(np.stack(labels))}

    return make


def optimizers(model: Any, muon: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices at the rate `muon`, AdamW for tables and vectors at the embedded model's."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.ndim == 2 and not any(word in name for word in TABLES)]
    rest = [p for name, p in named.items() if p.ndim != 2 or any(word in name for word in TABLES)]
    return [
        torch.optim.Muon(hidden, lr=muon, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: Any, tokens: np.ndarray, make: Callable[[Tensor, int], dict[str, Tensor]], steps: int, muon: float) -> float:
    """The loss in nats a token, as the mean of the last 50 steps."""
    opts, losses, began = optimizers(model, muon), list[float](), time.monotonic()
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    for step in range(steps):
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak[0] * rate(step, steps)
            opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make(batch_at(tokens, step), step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            speed = (step + 1) * BATCH * CONTEXT / (time.monotonic() - began)
            print(f"step {step + 1}/{steps} loss {np.mean(losses[-20:]):.4f} {speed:.0f} tok/s", flush=True)
    return float(np.mean(losses[-50:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tokens", type=parse_tokens, default=6_000_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tokens, shape = tokens_of(args.folder), SHAPES[args.shape]
    tokenizer = tokenizer_of(shape.task)
    torch.manual_seed(0)
    model = make_model(shape, tokenizer)
    loss = train(model, tokens, maker(shape.task, tokenizer), args.tokens // (BATCH * CONTEXT), shape.muon)
    model.config.use_cache = True
    model.save_pretrained(args.folder / args.shape)
    tokenizer.save_pretrained(args.folder / args.shape)
    told = {"tokens": args.tokens, "parameters": model.num_parameters(), "loss": loss}
    (args.folder / args.shape / "training.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train the small Llama that ships inside the package (`upfit/demo/model`).

The text is Python source of the permissively licensed distributions installed beside this script; the standard library is
left out, because `upfit demo` measures on it. Run it again with the same folder to go on where it stopped:

    python scripts/train_embedded_model.py build/embedded --tokens 12M

The schedule is warm-up, stable, decay, so `--tokens` may be raised on a later call as long as the decay has not begun.
"""

import argparse
import hashlib
import importlib.metadata
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PERMISSIVE = ("mit", "bsd", "apache", "isc", "psf", "python software foundation", "hpnd", "unlicense", "cc0", "zlib")
RESTRICTED = ("gpl", "mozilla", "mpl", "proprietary", "nvidia", "eupl", "non-commercial")
END = "<|end|>"
VOCAB = 2048
CONTEXT = 512
BATCH = 16  # rows of CONTEXT tokens a step
CHARACTERS_A_DISTRIBUTION = 9_000_000  # no single project may dominate the mixture
WARMUP_STEPS, DECAY_SHARE = 50, 0.25
CONFIG: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def licence_of(metadata: Any) -> str:
    """The licence as the distribution states it: the expression, else the classifiers, else the first line of the field."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    return "; ".join(classifiers) or (metadata.get("License") or "").strip().split("\n")[0][:60]


def is_permissive(licence: str) -> bool:
    text = licence.lower()
    return any(word in text for word in PERMISSIVE) and not any(word in text for word in RESTRICTED)


def collect() -> tuple[list[str], list[dict]]:
    """Distinct Python files of permissively licensed distributions, in an order fixed by their hashes."""
    texts: dict[str, str] = {}
    sources = []
    for dist in sorted(importlib.metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        licence = licence_of(dist.metadata)
        if not is_permissive(licence):
            continue
        files = [f for f in dist.files or [] if f.suffix == ".py"]
        files.sort(key=lambda f: hashlib.sha256(str(f).encode()).digest())
        taken = 0
        for file in files:
            try:
                text = Path(str(file.locate())).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if not 200 < len(text) < 200_000 or digest in texts:
                continue
            if taken + len(text) > CHARACTERS_A_DISTRIBUTION:
                break
            texts[digest] = text
            taken += len(text)
        if taken:
            sources.append({"name": dist.metadata["Name"], "version": dist.version, "licence": licence, "characters": taken})
    return [texts[digest] for digest in sorted(texts)], sources


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = random.Random(0).sample(texts, min(len(texts), 3000))
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def prepare(folder: Path) -> np.ndarray:
    """Token ids of the corpus, documents separated by END; made once and kept in `folder`."""
    tokens_file = folder / "tokens.npy"
    if not tokens_file.exists():
        texts, sources = collect()
        print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(sources)} distributions", flush=True)
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(folder / "model")
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stream = np.concatenate([np.array(row + [tokenizer.eos_token_id], dtype=np.uint16) for row in ids])
        (folder / "sources.json").write_text(json.dumps(sources, indent=1))
        np.save(tokens_file, stream)
    return np.load(tokens_file, mmap_mode="r")


def batch_at(tokens: np.ndarray, step: int) -> torch.Tensor:
    """[BATCH, CONTEXT + 1] ids of step `step`: rows of one fixed permutation, so a resumed run sees the same order."""
    rows = (len(tokens) - 1) // CONTEXT
    order = np.random.default_rng(0).permutation(rows)
    picks = [order[(step * BATCH + i) % rows] for i in range(BATCH)]
    return torch.from_numpy(np.stack([tokens[p * CONTEXT : p * CONTEXT + CONTEXT + 1] for p in picks]).astype(np.int64))


def rate(step: int, steps: int) -> float:
    decay = max(1, int(steps * DECAY_SHARE))
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (steps - step) / decay))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def write_model(model: LlamaForCausalLM, folder: Path, losses: list[float], step: int) -> None:
    """The folder that ships: bfloat16 weights, tied head left out, and the card."""
    shipped: Any = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "use_cache": True}))
    shipped = shipped.to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.save_pretrained(folder / "model")
    report = {
        "parameters": model.num_parameters(),
        "tokens": step * BATCH * CONTEXT,
        "loss": float(np.mean(losses[-50:])),
        "sources": json.loads((folder / "sources.json").read_text()),
    }
    (folder / "model" / "README.md").write_text(card(report), encoding="utf-8")


def card(report: dict) -> str:
    rows = "\n".join(
        f"| {s['name']} {s['version']} | {s['licence']} | {s['characters'] / 1e6:.2f} M |" for s in report["sources"]
    )
    return f"""---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---
# The embedded model

A {report["parameters"] / 1e6:.2f} M parameter multi-head Llama (8 query and 8 key/value heads of 32 in each of 4 layers, tied
embedding, 2048 byte-level BPE tokens) that knows a little Python. It exists so that `upfit demo` and the tests have a
trained model without a network; it is of no other use.

Trained by `scripts/train_embedded_model.py` on {report["tokens"] / 1e6:.1f} M tokens in rows of {CONTEXT}, last training loss
{report["loss"]:.3f} nats a token (mean of the last 50 steps). The standard library of Python is not in its
training text as such; setuptools and multiprocess carry changed copies of distutils and multiprocessing, which the demo
therefore leaves out. The weights are stored in bfloat16.

| distribution | licence as stated | characters |
|---|---|---|
{rows}
"""


def parse_tokens(text: str) -> int:
    return int(float(text[:-1]) * 1_000_000) if text.endswith("M") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=parse_tokens, default=12_000_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tokens = prepare(args.folder)
    end = AutoTokenizer.from_pretrained(args.folder / "model").eos_token_id
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, bos_token_id=end, eos_token_id=end, pad_token_id=end, use_cache=False))
    opts = optimizers(model)
    peaks = [group["lr"] for opt in opts for group in opt.param_groups]
    step, losses = 0, []
    state_file = args.folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, losses = state["step"], state["losses"]
    steps = args.tokens // (BATCH * CONTEXT)
    print(
        f"{len(tokens) / 1e6:.1f} M tokens, {model.num_parameters() / 1e6:.2f} M parameters, step {step} of {steps}", flush=True
    )
    began, first = time.time(), step
    while step < steps:
        ids = batch_at(tokens, step)
        for opt, peak in zip(opts, peaks, strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * rate(step, steps)
            opt.zero_grad()
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        losses.append(loss.item())
        step += 1
        if step % 20 == 0:
            speed = (step - first) * BATCH * CONTEXT / (time.time() - began)
            print(f"step {step}/{steps} loss {np.mean(losses[-20:]):.4f} {speed:.0f} tok/s", flush=True)
        if step % 50 == 0 or step == steps:
            new = state_file.with_suffix(".new")
            opt_states = [opt.state_dict() for opt in opts]
            torch.save({"model": model.state_dict(), "optimizers": opt_states, "step": step, "losses": losses}, new)
            new.replace(state_file)
    write_model(model, args.folder, losses, step)


if __name__ == "__main__":
    main()

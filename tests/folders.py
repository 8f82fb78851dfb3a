"""Model folders for tests: tiny Llamas with a tokenizer, made in memory and saved to a temporary place."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;()[]{}_=+-*/'\"<>!?#@%&|"


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """4 query heads, 4 KV heads of 8, 2 layers, vocabulary 100; every weight random."""
    settings: dict[str, Any] = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character; 0 is padding, 1 the end of a document, 2 unknown."""
    vocabulary = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {letter: i + 3 for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def save_tiny(folder: Path, model: LlamaForCausalLM | None = None, shards: int = 1, tokenizer: bool = True) -> Path:
    """A standard folder; with `shards` > 1 the weights are split by a small shard size."""
    model = model or tiny_llama()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards + 1)
    if tokenizer:
        letter_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the folder's model, loaded by plain transformers, on fixed ids."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = ids if ids is not None else torch.arange(24).reshape(2, 12) * 3 % 100
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits

"""Tiny models with random weights, and text, for `same_outputs.py`. Knows nothing of upfit: whatever moves there, they stay.

The tokenizer, and the one model that has learned anything, are the folder that ships inside the package.
"""

import json
import random
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
from transformers.utils import logging

VOCABULARY = 2048  # that of the tokenizer
NOISE = 0.1  # added to every parameter: a bias left at zero or a norm left at one would hide what becomes of it
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **ENDS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
OF_GPT2 = {**ENDS, "vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
OF_BART = {
    **ENDS,
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 0,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
}
OF_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
# Folder: the model type and what its config says; each is here for a way of its own through the converter.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "shards": ("llama", {**SIZES, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "half": ("llama", {**SIZES, "num_attention_heads": 8, "dtype": torch.bfloat16}),
    "qwen2": ("qwen2", SIZES),  # biases
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),  # key norms
    "gemma3": ("gemma3_text", {**SIZES, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),  # sinks
    "phi": ("phi", SIZES),  # partial rotary, biases
    "phi3": ("phi3", SIZES),  # fused
    "falcon": ("falcon", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 4, "bias": True, "ffn_hidden_size": 96}),
    "gpt_bigcode": ("gpt_bigcode", {**OF_GPT2, "multi_query": False}),
    "gpt_neox": ("gpt_neox", SIZES),  # becomes phi
    "gpt2": ("gpt2", OF_GPT2),  # becomes gpt_bigcode
    "bloom": ("bloom", {**ENDS, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bart": ("bart", OF_BART),
    "whisper": ("whisper", {**OF_BART, "num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 64}),
    "t5": ("t5", {**OF_T5, **ENDS, "vocab_size": VOCABULARY}),
}
AUTO: dict[str, Any] = {"bart": AutoModelForSeq2SeqLM, "t5": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}
LIBRARY = ("asyncio", "email", "json", "logging")  # packages of Python's library: text that is on every machine
SENTENCE = "the workshop puts a new body on a finished chassis and drives it until it is good again"
QUESTIONS = 6
TASK = """task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metadata: {{version: 1}}
"""


def make_models(embedded: Path, folder: Path) -> None:
    """Write every model of MODELS into `folder`, with the tokenizer of the folder `embedded`, and a copy of that."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.copytree(embedded, folder / "embedded")
    for name, (model_type, settings) in MODELS.items():
        torch.manual_seed(0)
        dtype = settings.get("dtype", torch.float32)
        model = AUTO.get(model_type, AutoModelForCausalLM).from_config(CONFIG_MAPPING[model_type](**settings), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
        model.save_pretrained(folder / name, max_shard_size="400KB" if name == "shards" else "5GB")
        for file in embedded.glob("tokenizer*"):
            shutil.copyfile(file, folder / name / file.name)


def make_text(folder: Path) -> None:
    """Text to calibrate, train and measure on: sources of Python's library as .txt, and random words as .jsonl; and a task."""
    library, draw, words = Path(sysconfig.get_paths()["stdlib"]), random.Random(0), SENTENCE.split()
    for package in LIBRARY:
        (folder / package).mkdir(parents=True)
        for file in sorted((library / package).glob("*.py")):
            shutil.copyfile(file, folder / package / f"{file.stem}.txt")
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=60)) + "."}) for _ in range(100)]
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "task").mkdir()
    rows = [
        json.dumps(
            {"question": " ".join(draw.choices(words, k=8)), "choices": draw.sample(words, 3), "gold": draw.randrange(3)}
        )
        for _ in range(QUESTIONS)
    ]
    (folder / "task" / "pick.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "task" / "pick.yaml").write_text(TASK.format(path=folder / "task" / "pick.jsonl"), encoding="utf-8")

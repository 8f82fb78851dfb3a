"""What our own class does to the caches of encoder-decoders: T5-small and Whisper-tiny shapes with random weights.

    python benchmarks/own_classes.py SCRATCH --results benchmarks/results/NAME.json

For every number of key/value heads: are the logits of the identity conversion equal bit for bit, does generation with the cache
give the tokens that it gives without, and how many bytes do the tensors of both caches hold afterwards, in memory.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, GenerationMixin, T5Config, WhisperConfig

from upfit.architecture.forwards import cache_of
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.output import Output

TOKENS = 32  # generated
PROMPT = 128  # tokens that T5 reads; Whisper reads 1,500 frames

SHAPES: dict[str, tuple[Any, Any]] = {
    "t5-small": (AutoModelForSeq2SeqLM, T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)),
    "whisper-tiny": (AutoModelForSpeechSeq2Seq, WhisperConfig()),
}


def inputs(config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if config.model_type == "whisper":
        return {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    return {"input_ids": torch.randint(3, config.vocab_size, (2, PROMPT), generator=generator)}


def generate(model: Any, given: dict[str, Tensor], use_cache: bool) -> Any:
    told: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "use_cache": use_cache}
    plain: Any = GenerationMixin.generate  # Whisper's own wants to know of languages and timestamps
    return plain(model, **given, **told, decoder_start_token_id=1, return_dict_in_generate=True)


def held(cache: Any) -> int:
    """Bytes of the tensors of a cache."""
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given, decoder_input_ids=torch.arange(1, 9).repeat(2, 1)).logits
    return found


def measure(name: str, scratch: Path) -> list[dict[str, Any]]:
    auto, config = SHAPES[name]
    torch.manual_seed(0)
    source = auto.from_config(config).eval()
    source.save_pretrained(scratch / name)
    given, recipe, rows = inputs(config), get_recipe("gqa"), []
    heads = config.num_heads if config.model_type == "t5" else config.decoder_attention_heads
    for kv_heads in (n for n in range(heads, 0, -1) if heads % n == 0):
        out = scratch / f"{name}-{kv_heads}"
        start = time.perf_counter()
        options = recipe.options(kv_heads=kv_heads, method="mean")
        told = convert(recipe, str(scratch / name), out, options, Settings(overwrite=True, verify=False), Output(quiet=True))
        seconds = time.perf_counter() - start
        model = auto.from_pretrained(out).eval()
        with_cache, without = (generate(model, given, use_cache) for use_cache in (True, False))
        caches = cache_of(with_cache)
        rows.append(
            {
                "shape": name,
                "class": type(model).__name__,
                "kv_heads": [heads, kv_heads],
                "parameters": told.parameters,
                "logits_equal_the_source": torch.equal(logits(model, given), logits(source, given)),
                "generates_the_same_without_cache": torch.equal(with_cache.sequences, without.sequences),
                "self_attention_cache_bytes": held(caches.self_attention_cache),
                "cross_attention_cache_bytes": held(caches.cross_attention_cache),
                "convert_seconds": round(seconds, 2),
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    rows = [row for name in SHAPES for row in measure(name, given.scratch)]
    told = {"date": time.strftime("%Y-%m-%d"), "environment": environment(), "batch": 2, "tokens": TOKENS, "rows": rows}
    given.results.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Models that hear, before and after their heads were merged: loss and word error rate on recordings, side by side.

    python -m benchmarks.speech_merges SOURCE SPEECH OUT [OUT ...] [--results FILE.json]

SOURCE and each OUT are folders of one model, the OUTs converted from SOURCE with any method and number of heads; SPEECH is a
folder of recordings with transcripts (`speech.py` makes one). The encoder, which no merge changes, runs once for all. Loss in
nats a token of the transcript, teacher-forced, and word error rate, both as differences to SOURCE with 95 % intervals over
recordings, paired; bytes of both caches. One row an OUT.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from upfit.architecture.loading import load_strictly
from upfit.environment import environment
from upfit.evaluate.encoder_decoder.caches import measure_caches
from upfit.evaluate.encoder_decoder.losses import example_losses
from upfit.evaluate.encoder_decoder.words import difference, listen
from upfit.evaluate.interval import Interval
from upfit.evaluate.loss import difference as loss_difference
from upfit.examples.model_inputs import padding_of
from upfit.examples.read import read_examples
from upfit.output import Output
from upfit.text.tokenizer import load_tokenizer

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("speech")
    parser.add_argument("outs", type=Path, nargs="*")
    parser.add_argument("--count", type=int, default=240, help="recordings, at most (default 240)")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = measure(args.source, args.speech, args.outs, args.count, {})
    if args.results:
        record = {"environment": environment(), "recordings": args.count, "rows": rows}
        args.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(source: Path, speech: str, outs: list[Path], count: int, memory: dict[float, Tensor]) -> list[dict[str, Any]]:
    """A row a model. What the encoder gives out is kept in `memory`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quiet, pad = Output(quiet=True), padding_of(config)
    examples = read_examples(source, config, [speech], "SPEECH", "text", count, quiet).examples
    tokenizer, rows = load_tokenizer(str(source)), list[dict[str, Any]]()
    first: Any = None
    for folder in (source, *outs):
        model: Any = load_strictly(folder, dtype=torch.float32).eval()
        encoder = model.get_encoder()
        encoder.forward = remembered(encoder.forward, memory)
        with quiet.progress("", len(examples)) as meter:
            losses = example_losses(model, examples, tokenizer, pad, BATCH, str(folder), meter)
            heard = listen(model, examples, tokenizer, pad, BATCH, meter)
        growth, cross = measure_caches(model, examples[0], pad)
        assert growth is not None and cross is not None
        first = first or (losses, heard)
        row = {
            "model": folder.name,
            "loss": asdict(losses.summary().nats_per_token),
            "loss_over_source": _shown(loss_difference(losses, first[0], True).nats_per_token),
            "word_error_rate": asdict(heard.summary().rate),
            "word_errors_over_source": asdict(difference(heard, first[1])),
            "cache_bytes_a_token": growth.bytes_per_token,
            "cross_cache_bytes": cross.bytes,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _shown(interval: Interval | None) -> dict[str, Any]:
    assert interval is not None  # the models share their tokens
    return asdict(interval)


def remembered(forward: Callable[..., Any], memory: dict[float, Tensor]) -> Callable[..., Any]:
    """The encoder's `forward`, which runs once for each batch of sound."""

    def run(input_features: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        key = float(input_features.double().sum())
        if key not in memory:
            memory[key] = forward(input_features, *args, **kwargs)[0]
        return BaseModelOutput(last_hidden_state=memory[key])

    return run


if __name__ == "__main__":
    main()

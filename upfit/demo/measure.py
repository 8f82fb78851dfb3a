"""Losses of the demo's models on its held-out files: what `upfit evaluate` measures, but the source is measured once."""

from pathlib import Path
from typing import Any

import torch

from upfit.checkpoint.source import find_source
from upfit.evaluate.cache import measure_cache
from upfit.evaluate.evaluate import READ_BYTES
from upfit.evaluate.load import free, load_config, load_model, load_tokenizer, most_positions, pick_device
from upfit.evaluate.loss import Losses, difference, window_losses
from upfit.output import Output
from upfit.text import file_documents
from upfit.text.windows import make_windows

BATCH = 4


class Measure:
    """Measures folders on the same `count` windows of `length` tokens, in the type that the weights are stored in."""

    def __init__(self, source: Path, held_out: list[str], length: int, count: int) -> None:
        self.length, self.device = length, pick_device("auto")
        self.windows = make_windows(
            file_documents(held_out, READ_BYTES), load_tokenizer(find_source(str(source))), length, count
        )
        self._source, self.source = self._measured(source)

    def __call__(self, folder: Path) -> dict[str, Any]:
        """What was measured of `folder`, and its difference to the source, paired by window."""
        losses, numbers = self._measured(folder)
        nats = difference(losses, self._source, True).nats_per_token
        assert nats is not None
        return numbers | {"difference": nats.record()}

    def text(self) -> dict[str, int]:
        """What an interval is over."""
        full = sum(len(window.ids) == self.length for window in self.windows)
        documents, scored = len({window.document for window in self.windows}), sum(len(w.ids) - 1 for w in self.windows)
        return {"windows": len(self.windows), "full": full, "documents": documents, "length": self.length, "tokens": scored}

    def _measured(self, folder: Path) -> tuple[Losses, dict[str, Any]]:
        source = find_source(str(folder))
        model = load_model(source, "auto", self.device)
        with Output(quiet=True).progress("", len(self.windows)) as meter:
            losses = window_losses(model, self.windows, BATCH, source.name, meter)
        ids = torch.cat([torch.from_numpy(window.ids) for window in self.windows])
        cache = measure_cache(model, ids.to(model.device), most_positions(load_config(source)))
        assert cache is not None
        dtype = str(model.dtype).removeprefix("torch.")
        del model
        free(self.device)
        loss = losses.summary().nats_per_token.record()
        numbers = {"folder": str(folder), "loss": loss, "difference": None, "kv_bytes_per_token": cache.bytes_per_token}
        return losses, numbers | {"dtype": dtype}

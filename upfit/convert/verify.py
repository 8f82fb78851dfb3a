"""Checks a written folder: it loads completely into its class, it is finite, and its logits are what the recipe promised.

The structure is always checked (on the meta device, in seconds, whatever the size). The numerical part loads the source and
the result one after the other and runs them over a short text; it is left out, and says so, when memory does not allow it.
"""

import gc
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.errors import UpfitError
from upfit.own import family

if TYPE_CHECKING:
    import torch

SAMPLE_TOKENS = 512
MEMORY_FACTOR = 1.3  # weights, plus activations and logits of one short window
FALLBACK_SEED = 0
CLOSE = {"float32": 1e-4, "float64": 1e-8}  # of the largest logit, where a plan promises equality to rounding
CLOSE_MOVED = CLOSE | {"float64": 1e-6}  # between two families, one of which may have float32 inside (GPT-J's rotation)
CLOSE_COARSE = 3e-2
FAILED = "the result failed its check and was not kept"


@dataclass(frozen=True)
class Report:
    """What verify found. Losses are in nats a token on `tokens` tokens; None where the numerical part did not run."""

    structure: str
    numbers: str
    tokens: int = 0
    equal: bool | None = None
    max_difference: float | None = None
    source_loss: float | None = None
    loss: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    folder: Path, source: Path | None, exact: bool, close: bool, named: Path, allowed: frozenset[str] = frozenset()
) -> Report:
    """Check `folder`, made from `source`. `exact` demands equal logits, `close` logits that are equal to rounding. `named` is
    what the folder will be called. Without a `source`, only the structure is checked.

    `allowed` names tensors that the source's class already left unused. Raises UpfitError when a check fails.
    """
    from upfit.convert.checkpoint import open_checkpoint, read_config
    from upfit.convert.skeleton import check_structure

    try:
        with open_checkpoint(folder) as written:
            check_structure(written, allowed)
    except UpfitError as error:
        raise UpfitError(f"{FAILED}: {str(error).replace(str(folder), str(named))}") from error
    structure = "loads into its class; nothing missing, left over or of another shape"
    if source is None:
        return Report(structure, "not compared: the source was streamed")
    short = _memory_short(source, folder)
    if short:
        return Report(structure, f"not compared: {short}")
    ids, is_text = sample_ids(source)
    if ids is None:
        return Report(structure, "not compared: this class takes more than token ids")
    before, after = _logits(source, ids, allowed), _logits(folder, ids, allowed)
    if before is None or after is None:
        return Report(structure, "not compared: this class takes more than token ids")
    if not after.isfinite().all():
        raise UpfitError(f"{FAILED}: its logits are not finite; check the source's weights")
    moved = family(read_config(source)) != family(read_config(folder))
    return _compare(structure, before, after, ids, is_text, exact, (CLOSE_MOVED if moved else CLOSE) if close else None)


def _compare(
    structure: str,
    before: "torch.Tensor",
    after: "torch.Tensor",
    ids: "torch.Tensor",
    is_text: bool,
    exact: bool,
    bounds: dict[str, float] | None,
) -> Report:
    import torch

    equal = torch.equal(before, after)
    difference = (before.float() - after.float()).abs().max().item()
    bound = (bounds or {}).get(str(before.dtype).removeprefix("torch."), CLOSE_COARSE)
    tolerance = bound * before.abs().max().item()
    if (exact and not equal) or (bounds is not None and difference > tolerance):
        raise UpfitError(
            f"{FAILED}: its logits differ from the source's by {difference:.2g} where this "
            "setting promises equality; please report it"
        )
    said = "logits equal the source's bit for bit" if equal else f"logits differ from the source's by up to {difference:.2g}"
    losses = [_loss(logits, ids) for logits in (before, after)] if is_text else [None, None]
    return Report(structure, said, ids.shape[1], equal, difference, *losses)


def _memory_short(source: Path, folder: Path) -> str:
    """Why the numerical part cannot run; empty when it can."""
    import psutil

    size = max(sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (source, folder))
    free = psutil.virtual_memory().available
    if size * MEMORY_FACTOR > free:
        return f"it needs {size * MEMORY_FACTOR / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""


def sample_text() -> str:
    """The short text (prose and code) that ships with the package."""
    return resources.files("upfit.convert").joinpath("sample.txt").read_text(encoding="utf-8")


def sample_ids(folder: Path) -> tuple["torch.Tensor | None", bool]:
    """([1, T] token ids, True) of the sample text, or (random ids, False) for a folder without a tokenizer; no more than the
    model has positions."""
    import torch

    from upfit.convert.checkpoint import most_positions, read_config
    from upfit.convert.skeleton import quiet_transformers, vocabulary

    config = read_config(folder)
    size, longest = vocabulary(config), min(SAMPLE_TOKENS, most_positions(config) or SAMPLE_TOKENS)
    if size is None:
        return None, False
    try:
        from transformers import AutoTokenizer

        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(sample_text(), return_tensors="pt", truncation=False, verbose=False)["input_ids"][:, :longest]
        if ids.shape[1] >= 16 and int(ids.max()) < size:
            return ids, True
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError):
        pass  # many checkpoints come without a tokenizer; random ids still compare two models
    generator = torch.Generator().manual_seed(FALLBACK_SEED)
    return torch.randint(0, size, (1, min(64, longest)), generator=generator), False


def _logits(folder: Path, ids: "torch.Tensor", allowed: frozenset[str]) -> "torch.Tensor | None":
    """[T, vocabulary] logits of the model in `folder`; None when its class cannot run on token ids alone."""
    import torch

    from upfit.convert.skeleton import load_strictly

    model = load_strictly(folder, unexpected=allowed)
    try:
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0].clone()
    except (TypeError, ValueError, AttributeError):
        return None
    finally:
        del model
        gc.collect()


def _loss(logits: "torch.Tensor", ids: "torch.Tensor") -> float:
    import torch

    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:]).item()

"""Checks a written folder: it loads completely into its class, it is finite, and its logits are what the recipe promised.

The structure is always checked (on the meta device, in seconds, whatever the size). The numerical part loads the source and
the result one after the other and runs them over a short text, and what else their class takes, such as sound, which is random;
it is left out, and says so, when memory does not allow it.
Where the result is of another type, it is held against the source rounded to that type. A large model is run in float32 where
this machine is faster in that; what does not hold there is looked at once more in the type that is stored.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.architecture.loading import check_structure, garbage_collected, load_strictly
from upfit.architecture.meta_model import quiet_transformers, read_as_class, vocabulary
from upfit.bounded import reason
from upfit.checkpoint.execute import Planned
from upfit.checkpoint.plan import Plan
from upfit.checkpoint.reader import config_dtypes, most_positions, open_checkpoint, read_config, torch_dtype
from upfit.convert.result import Verification
from upfit.errors import UpfitError
from upfit.examples.random_inputs import possible_inputs
from upfit.modeling.registry import family
from upfit.output import Output
from upfit.text.tokenizer import no_panic

if TYPE_CHECKING:
    import torch

SAMPLE_TOKENS = 512  # a CPU takes seconds for them, and their loss has a use
MEMORY_FACTOR = 1.3  # weights, plus activations and logits of one short window
FALLBACK_SEED = 0
CLOSE = {"float32": 1e-4, "float64": 1e-8}  # of the largest logit, where a plan promises equality to rounding
CLOSE_MOVED = CLOSE | {"float64": 1e-6}  # between two families, one of which may have float32 inside (GPT-J's rotation)
CLOSE_COARSE = 3e-2
LARGE = 10**8  # bytes of weights, below which it does not matter in which type a model is run
WORTH_WHILE = 1.5  # times as fast
STEPS = 2  # of a model: loaded, run
WINDOWS = 8  # pieces of the sample text, over which the interval of its loss is taken
STUDENT = 2.365  # of 95 % with WINDOWS - 1 degrees of freedom
FAILED = "the result failed its check and was not kept"


@dataclass(frozen=True)
class Promise:
    """How far the logits may be from those of the source, in shares of the largest: 0.0 is equal bit for bit, None anywhere.
    The source is first rounded to `dtype` where the result was ("" where it was not)."""

    tolerance: float | None = None
    dtype: str = ""


def promise_of(plan: Plan, planned: list[Planned], dtype: str, source: dict[str, Any]) -> Promise:
    """How far a result of `plan` may be from its source, which has the config `source`: not at all, or as far as rounding goes
    in the types that it computes in. `dtype`: the one that it is written in, where that is another."""
    if plan.exact or not plan.close:
        return Promise(0.0 if plan.exact else None, dtype)
    moved = family(source) != family(plan.config)
    stored = str(torch_dtype(max(planned, key=lambda item: item.nbytes).dtype)).removeprefix("torch.")
    return Promise(max(tolerance(name, moved) for name in {stored, *config_dtypes(plan.config)}), dtype)


def verify(
    folder: Path,
    source: Path | None,
    promise: Promise,
    named: Path,
    allowed: frozenset[str] = frozenset(),
    output: Output | None = None,
) -> Verification:
    """Check `folder`, made from `source`, for what the plan promises. `named` is what the folder will be called. Without a
    `source`, only the structure is checked.

    `allowed` names tensors that the source's class already left unused. Raises UpfitError when a check fails.
    """

    try:
        with open_checkpoint(folder) as written:
            check_structure(written, allowed)
    except UpfitError as error:
        raise UpfitError(f"{FAILED}: {str(error).replace(str(folder), str(named))}") from error
    structure = "loads into its class; nothing missing, left over or of another shape"
    if source is None:
        return Verification(structure, "not compared: the source was streamed")
    short = _memory_short(source, folder)
    if short:
        return Verification(structure, f"not compared: {short}")
    ids, is_text = sample_ids(source)
    if ids is None:
        return Verification(structure, "not compared: the config tells of no vocabulary")
    output = output or Output(quiet=True)
    whole = Verification(structure, "")
    faster = faster_in_float32(folder)
    if faster:
        output.note(f"verifying in float32, which this machine multiplies {faster:.1f} times as fast as bfloat16")
        with suppress(UpfitError):  # what is not equal there is looked at as it is stored
            return _compared(whole, folder, source, promise, allowed, ids, is_text, output, in_float32=True)
    return _compared(whole, folder, source, promise, allowed, ids, is_text, output)


def _compared(
    report: Verification,
    folder: Path,
    source: Path,
    promise: Promise,
    allowed: frozenset[str],
    ids: "torch.Tensor",
    is_text: bool,
    output: Output,
    in_float32: bool = False,
) -> Verification:
    """`report` with the numerical part: both models run, one after the other, as they are stored or in float32."""
    sizes = [_weight_bytes(place) for place in (source, folder)]
    with output.progress("verifying", sum(sizes)) as meter:
        before = _run(source, ids, allowed, promise.dtype, in_float32, partial(meter.advance, sizes[0] / STEPS))
        if isinstance(before, str):
            return replace(report, numbers=f"not compared: the source's own class does not run here ({before})")
        after = _run(folder, before.keywords, allowed, "", in_float32, partial(meter.advance, sizes[1] / STEPS))
    if isinstance(after, str):
        raise UpfitError(f"{FAILED}: its class does not run where the source's does ({after}); please report it")
    return compare(report, before.logits, after.logits, ids if is_text and before.reads(ids) else None, promise)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def faster_in_float32(folder: Path) -> float | None:
    """How many times as fast this machine multiplies float32 as bfloat16, where most of the weights in `folder` are of that;
    None where that is not worth while, or memory does not allow it. (float16 may overflow where float32 would not show it.)"""
    import psutil
    import torch

    with open_checkpoint(folder) as checkpoint:
        stored = torch_dtype(max(checkpoint.tensors.values(), key=lambda info: info.nbytes).dtype)
    size = _weight_bytes(folder)
    if stored != torch.bfloat16 or size < LARGE:
        return None
    if 2 * size * MEMORY_FACTOR > psutil.virtual_memory().available:
        return None
    ratio = _seconds(stored) / _seconds(torch.float32)
    return ratio if ratio > WORTH_WHILE else None


def _seconds(dtype: "torch.dtype") -> float:
    """Time of a small product in this type, the best of a few."""
    import torch

    tokens, weights = torch.ones(SAMPLE_TOKENS, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):  # the first one sets up what the others use
        began = time.perf_counter()
        tokens @ weights
        times.append(time.perf_counter() - began)
    return min(times)


def tolerance(dtype: str, moved: bool) -> float:
    """What is rounding in logits of a model that computes in this type, in shares of the largest; `moved` says that the two
    models are of different families."""
    return (CLOSE_MOVED if moved else CLOSE).get(dtype, CLOSE_COARSE)


def compare(
    checked: Verification,
    before: "torch.Tensor",
    after: "torch.Tensor",
    ids: "torch.Tensor | None",
    promise: Promise,
) -> Verification:
    """`checked` with what the logits [T, vocabulary] of source and result say; `ids` [1, T] are None where they are no text.

    Raises UpfitError when the result's are not finite, or not what was promised.
    """
    import torch

    if not after.isfinite().all():
        what = "the source's weights" if not promise.dtype or not before.isfinite().all() else "what --dtype can hold"
        raise UpfitError(f"{FAILED}: its logits are not finite; check {what}")
    equal = torch.equal(before, after)
    difference = (before.float() - after.float()).abs().max().item()
    whose = f"the source's in {promise.dtype}" if promise.dtype else "the source's"
    if promise.tolerance is not None and not equal and not difference <= promise.tolerance * before.abs().max().item():
        what = f"equality to {promise.tolerance:g} of the largest" if promise.tolerance else "equality"
        raise UpfitError(
            f"{FAILED}: its logits differ from {whose} by {difference:.2g} where this setting promises {what}; please report it"
        )
    sentence = f"logits equal {whose} bit for bit" if equal else f"logits differ from {whose} by up to {difference:.2g}"
    numbers = replace(checked, numbers=sentence, tokens=before.shape[0], equal=equal, max_difference=difference)
    if ids is None:
        return numbers
    losses = [_losses(logits, ids) for logits in (before, after)]
    return replace(
        numbers,
        source_loss=losses[0].mean().item(),
        loss=losses[1].mean().item(),
        loss_interval=_interval(losses[1] - losses[0]),
    )


def _losses(logits: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
    """[T - 1] nats of each token but the first."""
    import torch

    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")


def _interval(differences: "torch.Tensor") -> float | None:
    """Half the width of a 95 % interval of the mean, over pieces of the text; None for too short a text."""
    if len(differences) < 2 * WINDOWS:
        return None
    means = [piece.mean().item() for piece in differences.tensor_split(WINDOWS)]
    return STUDENT * statistics.stdev(means) / math.sqrt(WINDOWS)


def _memory_short(source: Path, folder: Path) -> str:
    """Why the numerical part cannot run; empty when it can."""
    import psutil

    size = max(map(_weight_bytes, (source, folder)))
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

    config = read_config(folder)
    size, longest = vocabulary(config) or _read_vocabulary(config), min(SAMPLE_TOKENS, most_positions(config) or SAMPLE_TOKENS)
    if size is None:
        return None, False
    try:
        from transformers import AutoTokenizer

        with quiet_transformers(), no_panic(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids = tokenizer(sample_text(), return_tensors="pt", truncation=False, verbose=False)["input_ids"][:, :longest]
        if ids.shape[1] >= 16 and int(ids.max()) < size:
            return ids, True
    except Exception:  # many checkpoints come without a tokenizer or with a broken one; random ids still compare two models
        pass
    generator = torch.Generator().manual_seed(FALLBACK_SEED)
    return torch.randint(0, size, (1, min(64, longest)), generator=generator), False


def _read_vocabulary(config: dict[str, Any]) -> int | None:
    """The number of token ids that are read, as the config tells it; None where it does not."""
    parsed = read_as_class(config)
    encoder = parsed.get_text_config(encoder=True) if parsed.is_encoder_decoder else parsed.get_text_config()
    size = getattr(encoder, "vocab_size", None)
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class _Ran:
    """The `keywords` that a forward was given, and its `logits` [T, vocabulary] of the first row."""

    keywords: "dict[str, torch.Tensor]"
    logits: "torch.Tensor"

    def reads(self, ids: "torch.Tensor") -> bool:
        """Whether the model was given nothing but `ids`, so that its loss on them has a meaning."""
        return all(value is ids for value in self.keywords.values())


def _run(
    folder: Path,
    inputs: "torch.Tensor | dict[str, torch.Tensor]",
    allowed: frozenset[str],
    dtype: str,
    in_float32: bool,
    advance: Callable[[], None],
) -> _Ran | str:
    """What the model in `folder`, its weights rounded to `dtype`, makes of token ids and whatever else its class takes, or of
    all that another one was given; why it does not run where it does not. With `in_float32` it computes in that; `advance` is
    called when it is loaded, and when it has run."""
    import torch

    options = {"dtype": getattr(torch, dtype)} if dtype else {}
    with garbage_collected():
        model = load_strictly(folder, unexpected=allowed, **options)
        if dtype:
            _round(model, getattr(torch, dtype))
        advance()
        if in_float32:
            model.float()
        candidates = [inputs] if isinstance(inputs, dict) else list(possible_inputs(model, inputs))
        try:
            ran = _first_that_runs(model, candidates)
            advance()
            return ran
        finally:
            del model


def _first_that_runs(model: Any, candidates: "list[dict[str, torch.Tensor]]") -> _Ran | str:
    """What the first of the `candidates` gives that the model's forward accepts; why it accepts none."""
    import torch

    complaint = ""
    for keywords in candidates:
        cast = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in keywords.items()}
        try:
            with torch.no_grad():
                return _Ran(keywords, model(**cast, use_cache=False).logits[0].clone())
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:  # each class has its own
            complaint = complaint or reason(error)
    return complaint


def _round(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """What a class keeps in a wider type than it was asked for, rounded too: a file has one type for all."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.copy_(tensor.to(dtype))

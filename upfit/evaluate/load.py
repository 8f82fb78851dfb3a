"""Loads a model for measuring, whole or not at all. Code from the folder is never run, and no weight may be made up."""

import gc
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from upfit.architecture.loading import load_strictly
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.text.tokenizer import no_panic

LEAK_SHARE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; other types round at 2 ** -8
LEAK_SHARE_COARSE = 0.05


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one. Raises UpfitError for a device that is not here."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UpfitError(f"--device {name} cannot be used here ({_first_line(error)}); try cpu or auto") from error
    return device


def load_config(source: Source) -> Any:
    """The model's text configuration. Raises UpfitError when there is none or transformers does not know its type."""
    return _whole_config(source).get_text_config(decoder=True)


def is_encoder_decoder(source: Source) -> bool:
    """Raises UpfitError as `load_config` does."""
    return bool(_whole_config(source).is_encoder_decoder)


def _whole_config(source: Source) -> Any:
    if not (source.path / "config.json").exists():
        raise UpfitError(f"{source.name} has no config.json; give a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UpfitError(f"{source.name} has a config.json that does not load: {_first_line(error)}") from error


def most_positions(config: Any) -> int | None:
    """How many tokens the model takes; None where the architecture sets no limit."""
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def load_tokenizer(source: Source) -> Any:
    """Raises UpfitError when the folder holds no tokenizer, or one that cannot tell where its tokens stand in the text."""
    has_files = any(
        next(source.path.glob(name), None) for name in ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
    )
    try:
        with no_panic(source.name):
            tokenizer = (
                AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
                if has_files
                else None
            )
    except UpfitError:
        raise
    except Exception as error:  # its parsers raise whatever they like on a broken file
        raise UpfitError(f"{source.name} has a tokenizer that does not load: {_first_line(error)}") from error
    if tokenizer is None:
        raise UpfitError(f"{source.name} has no tokenizer; copy tokenizer.json and tokenizer_config.json into the folder")
    if not tokenizer.is_fast:
        raise UpfitError(f"{source.name} has a tokenizer without character offsets; save it as tokenizer.json")
    return tokenizer


def load_model(source: Source, dtype: str, device: torch.device) -> Any:
    """The causal language model in `source`, in eval mode on `device`; `dtype` as torch calls it, or `auto`.

    Raises UpfitError when it is not one, needs code from its folder, or lacks weights that its class wants.
    """
    return _loaded(source, AutoModelForCausalLM, dtype, device)


def load_encoder_decoder(source: Source, dtype: str, device: torch.device) -> Any:
    """As `load_model`, of the class that the config names."""
    return _loaded(source, None, dtype, device)


def _loaded(source: Source, auto_class: Any, dtype: str, device: torch.device) -> Any:
    model = load_strictly(source.path, auto_class, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return torch.nn.Module.to(model, device)


@torch.inference_mode()
def check_model(model: Any, ids: torch.Tensor, name: str) -> None:
    """Feed `ids` [tokens] twice with another last token: the logits before it must not know.

    Raises UpfitError when they do (an encoder, or a mask that leaks: its loss would mean nothing), or when an id is outside
    the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise UpfitError(f"{name} embeds {rows} tokens but its tokenizer gives id {int(ids.max())}; check the tokenizer files")
    changed = ids.clone()
    changed[-1] = ids[0] if ids[0] != ids[-1] else (ids[-1] + 1) % rows
    both = torch.stack([ids, changed])
    logits = model(input_ids=both, attention_mask=torch.ones_like(both), use_cache=False).logits[:, :-1].float()
    leak, scale = (logits[0] - logits[1]).abs().max().item(), logits.abs().max().item()
    if leak > LEAK_SHARE.get(model.dtype, LEAK_SHARE_COARSE) * scale:
        raise UpfitError(f"{name} is not a causal language model: a later token changes what it predicts before it")


def free(device: torch.device) -> None:
    """Give back the memory of models that nobody refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

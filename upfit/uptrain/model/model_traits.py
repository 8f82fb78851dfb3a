"""Student and teacher: loading, what can be told of them by trying, and the module that turns a batch into a loss.

Legend: B rows, T tokens a row, H hidden size, V vocabulary.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from upfit.architecture.forwards import LOGITS_TO_KEEP, POSITIONS, takes
from upfit.architecture.loading import load_strictly
from upfit.checkpoint.content import content_hash
from upfit.checkpoint.reader import open_checkpoint, read_config, torch_dtype
from upfit.errors import UpfitError
from upfit.uptrain.model import packed
from upfit.uptrain.model.losses import Head

PROBE_TOKENS = 16  # random ones, two documents of 8
EXACT, ROUNDED = 1e-4, 2e-2  # largest relative difference of two ways to the same numbers, in float32 and in shorter types


@dataclass(frozen=True)
class ModelTraits:
    """What trying a model on a few tokens has shown.

    `head` is None where its logits are not a plain product with the head's weight (scaled and capped as its config tells).
    """

    takes_positions: bool
    separates_documents: bool
    head: Head | None


def load(folder: Path, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The language model in `folder`, in eval mode. Tensors its class does not read are no error: they are passed on.

    Raises UpfitError for any other kind of model, or one with weights that are missing or of another shape.
    """
    config = read_config(folder)
    auto_class = AutoModelForSeq2SeqLM if is_seq2seq(config) else AutoModelForCausalLM
    model = load_strictly(folder, auto_class, dtype=dtype)
    if is_seq2seq(config) and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UpfitError(f"{type(model).__name__} cannot be asked how its decoder reads labels; it cannot be uptrained")
    nn.Module.to(model, device)
    return model


def is_seq2seq(config: dict[str, Any]) -> bool:
    """Whether the model of a config.json is an encoder-decoder; transformers writes it down where it is one."""
    return bool(config.get("is_encoder_decoder"))


def stored_dtype(folder: Path) -> torch.dtype:
    """The type most of the weights in the files have; config.json may say another."""
    with open_checkpoint(folder) as checkpoint:
        counts = Counter[str]()
        for info in checkpoint.tensors.values():
            counts[info.dtype] += info.numel
    return torch_dtype(counts.most_common(1)[0][0])


def fingerprint(folder: Path) -> str:
    """A hash that tells model folders apart: of the config, and of the names and the whole content of the weight files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with open_checkpoint(folder) as checkpoint:
        files = checkpoint.files
    for path in files:
        digest.update(f"{path.name} {content_hash(path)}".encode())
    return digest.hexdigest()


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, traits: ModelTraits) -> Tensor:
    """Last hidden states [B, T, H]. Three things keep packed documents apart: positions, no mask, no cache."""
    extra = {POSITIONS: positions} if traits.takes_positions else {}
    return model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state


def full_logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, traits: ModelTraits, places: Tensor | None = None
) -> Tensor:
    """The model's own logits [B, T, V], or [B, P, V] at the `places` [P] of every row."""
    extra = {POSITIONS: positions} if traits.takes_positions else {}
    if places is not None and takes(model.forward, LOGITS_TO_KEEP):
        extra[LOGITS_TO_KEEP] = places
        return model(input_ids=ids, use_cache=False, **extra).logits
    logits = model(input_ids=ids, use_cache=False, **extra).logits
    return logits if places is None else logits[:, places]


def embedding(model: PreTrainedModel) -> Tensor:
    """The weight of the input embedding, one row a token the model knows."""
    return next(model.get_input_embeddings().parameters())


def head_weight(model: PreTrainedModel) -> Tensor | None:
    """The weight [V, H] of the language model head, if it is a linear layer without bias."""
    head = model.get_output_embeddings()
    return head.weight if isinstance(head, nn.Linear) and head.bias is None else None


def plain_head(model: PreTrainedModel, traits: ModelTraits) -> tuple[Tensor, Head]:
    weight = head_weight(model)
    assert weight is not None and traits.head is not None, "only asked for when examining the model has found a plain head"
    return weight, traits.head


def configured_head(model: PreTrainedModel) -> Head:
    """Scale and cap of the logits, by the names that configs of transformers give them."""
    config = model.config.get_text_config()
    scale = 1.0
    for name, inverse in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1 / value if inverse else value
    return Head(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def examine(model: PreTrainedModel) -> ModelTraits:
    """Run `model` on a row of two documents, whole and apart, and compare its head with ours.

    Of an encoder-decoder nothing is asked: it counts positions itself, and all its logits are made.
    """
    if model.config.is_encoder_decoder:
        return ModelTraits(False, False, None)
    was_training = model.training
    model.eval()
    takes_positions = takes(model.base_model.forward, POSITIONS)
    traits = ModelTraits(takes_positions, takes_positions, None)
    ids, positions, half = probe(model)
    whole = hidden_states(model, ids, positions, traits)
    alone = hidden_states(model, ids[:, half:], positions[:, half:], traits)
    head, weight = configured_head(model), head_weight(model)
    plain = False
    if weight is not None and weight.shape[1] == whole.shape[2]:
        logits = full_logits(model, ids, positions, traits)
        ours = head.logits((whole @ weight.t()).float())
        plain = ours.shape == logits.shape and alike(ours, logits.float(), model.dtype)
    model.train(was_training)
    return ModelTraits(takes_positions, takes_positions and alike(whole[:, half:], alone, model.dtype), head if plain else None)


def probe(model: PreTrainedModel) -> tuple[Tensor, Tensor, int]:
    """Ids and positions [1, T] of two documents in a row, and where the second one begins."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(model), (1, PROBE_TOKENS), generator=generator).to(model.device)
    half = PROBE_TOKENS // 2
    return ids, torch.arange(half, device=model.device).repeat(2)[None], half


@torch.no_grad()
def pack(model: PreTrainedModel, traits: ModelTraits, dtype: torch.dtype | None = None) -> ModelTraits | None:
    """Let `model` attend to packed documents one by one (packed.py), as it will be run (autocast to `dtype`).

    None where its class cannot, or says anything else than of the documents apart; it is then left as it was. A model that is
    going to be trained is tried in training too: dropout, and what is learned, may ask attention for more.
    """
    if model.config.is_encoder_decoder or not traits.takes_positions:
        return None
    was_training, before = model.training, model.config._attn_implementation
    model.eval()
    ids, positions, half = probe(model)
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not None):
        documents = (slice(half), slice(half, None))
        separate = [hidden_states(model, ids[:, span], positions[:, span], traits) for span in documents]
        try:
            model.set_attn_implementation(packed.NAME)
            fits = alike(hidden_states(model, ids, positions, traits), torch.cat(separate, 1), dtype or model.dtype)
            with torch.set_grad_enabled(was_training):
                hidden_states(model.train(was_training), ids, positions, traits)
        except Exception:  # of a class that asks for more than causal attention, or a kernel that does not take its sizes
            fits = False
    if not fits:
        model.set_attn_implementation(before)
    model.train(was_training)
    return replace(traits, separates_documents=True) if fits else None


def alike(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    tolerance = EXACT if dtype in (torch.float32, torch.float64) else ROUNDED
    return bool((first - second).abs().max() <= tolerance * second.abs().max())


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of logits V; may be padded beyond what the tokenizer knows."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if isinstance(head, nn.Linear) else model.config.get_text_config().vocab_size

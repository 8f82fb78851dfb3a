"""Checks before the first step whether this model can learn from contexts of this length, so that a run does not fail after
hours.

Memory is not guessed from sizes: what autograd keeps is counted on short rows, and follows a + b·T + c·T² in their length T.
"""

from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from upfit.errors import UpfitError
from upfit.output import Output, human_bytes
from upfit.uptrain.config import Config
from upfit.uptrain.data.answers import AnswerRows
from upfit.uptrain.data.dataloader import StepSampler
from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.model_traits import vocabulary_size
from upfit.uptrain.model.parallel import recompute

TRIED = 256  # tokens of the longest row that is tried
SUPERVISED = 8  # labels of such a row


def preflight(distiller: Distiller, sampler: StepSampler, config: Config, accelerator: Accelerator, output: Output) -> None:
    """Look at windows, rotary base and memory for the longest example of answers; text is cut to what the model takes anyway.

    Turns gradient checkpointing on where it is asked for. Raises UpfitError where the memory does not suffice.
    """
    student, device = distiller.student, accelerator.device
    if not isinstance(sampler.main, AnswerRows):
        checkpoint_gradients(student, config, accelerator.is_fsdp2)
        return
    longest = sampler.main.longest
    for warning in (window_warning(student.config.get_text_config(), longest), base_warning(student, longest)):
        if warning is not None:
            output.note(warning)
    needed = kept_bytes(distiller, longest)
    if checkpoint_gradients(student, config, accelerator.is_fsdp2):
        layers = student.config.get_text_config().num_hidden_layers
        needed /= layers  # one layer at a time; the borders between them are small beside it
    free = free_bytes(device)
    if needed > free:
        advice = "make shorter examples with upfit synth --max-tokens"
        advice = advice if config.gradient_checkpointing else f"give --gradient-checkpointing, or {advice}"
        raise UpfitError(
            f"learning from an example of {longest} tokens keeps about {human_bytes(needed)} for the backward pass, "
            f"{human_bytes(free)} are free on {device}; {advice}"
        )


def checkpoint_gradients(student: PreTrainedModel, config: Config, sharded: bool) -> bool:
    """Whether layers are computed again in the backward pass. Raises UpfitError when the class cannot."""
    if not config.gradient_checkpointing:
        return False
    if sharded:  # shards gathered for a layer serve both its passes where the wrapper is inside the sharding, not around it
        recompute(student)
        return True
    if not student.supports_gradient_checkpointing:
        raise UpfitError(f"--gradient-checkpointing: {type(student).__name__} cannot do that; leave it out")
    student.gradient_checkpointing_enable({"use_reentrant": False})
    return True


def window_warning(config: Any, longest: int) -> str | None:
    """What to say when layers see only the newest tokens: nothing is asked of a full one further away."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or window >= longest or (kinds is not None and "sliding_attention" not in kinds):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    share = "all layers" if kinds is None else f"{kinds.count('sliding_attention')} of {len(kinds)} layers"
    return f"{share} see only the newest {window} tokens of up to {longest}: answers further away reach them at second hand"


def base_warning(model: PreTrainedModel, longest: int) -> str | None:
    """What to say when the rotary base is too small for the length (Men et al. 2024, arXiv 2405.14591).

    Their bound: the mean of cos(m·θ_i) over the rotary frequencies θ_i, by which a query tells a like key from others, must not
    fall below 0 at any distance m up to the length.
    """
    frequencies = next((buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")), None)
    if frequencies is None:
        return None
    reach = rotary_reach(frequencies.double().cpu(), longest)
    if reach >= longest:
        return None
    return (
        f"the rotary frequencies tell like keys from others up to some {reach} tokens (arXiv 2405.14591), examples have up to "
        f"{longest}: a larger rope_theta may serve better"
    )


def rotary_reach(frequencies: Tensor, longest: int) -> int:
    """The first distance, up to `longest`, at which the mean of cos(m·θ) over `frequencies` [F] is below 0."""
    for start in range(0, longest, 4096):
        distances = torch.arange(start, min(start + 4096, longest), dtype=torch.float64)
        below = (torch.outer(distances, frequencies).cos().mean(-1) < 0).nonzero()
        if len(below):
            return start + int(below[0])
    return longest


def kept_bytes(distiller: Distiller, longest: int) -> float:
    """Bytes that autograd keeps for one row of `longest` tokens: a parabola through what it keeps for short ones."""
    lengths = [min(TRIED, longest) // part for part in (4, 2, 1)]
    return float(np.polyval(np.polyfit(lengths, [_kept(distiller, length) for length in lengths], 2), longest))


def _kept(distiller: Distiller, length: int) -> int:
    """Bytes kept for one row of `length` tokens; parameters are there anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in distiller.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(distiller.parameters()).device
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary_size(distiller.student), (1, length), generator=generator).to(device)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distiller(ids, torch.arange(length, device=device)[None], labels)  # the graph goes with the result
    return sum(storages.values())


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available

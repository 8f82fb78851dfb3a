"""Counts what a model computes and keeps for a row of tokens, by running its own code on tensors without values.

Nothing is derived from a known architecture, so whatever transformers can build can be planned for. Only the attention is
replaced: training keeps queries, keys, values, the output and one number for each query (as the fused kernels of FlashAttention
and SDPA do), and a causal map costs half of a full one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel

from upfit.architecture.meta_model import build_on_meta
from upfit.errors import UpfitError
from upfit.uptrain.model.packed import UNKNOWN

Trained = Literal["all", "attention", "layerwise"]
NAME = "upfit_traced"  # of our function in transformers' attention interface


@dataclass(frozen=True)
class Trace:
    """Of one model and one row of `length` tokens. FLOPs are of a forward pass, a token: those of `matrices` without the head,
    of the `attention` (causal), and of the `head`. `saved` are bytes that autograd keeps below the head, copies of weights in
    the type of the computation not counted; those are `cast`. `hidden` and `vocabulary` are sizes, `attention_parameters` those
    inside attention modules. `packed`: attention is told positions, so that packed documents need no mask."""

    length: int
    parameters: int
    embedding: int
    layers: int
    hidden: int
    vocabulary: int
    matrices: float
    attention: float
    head: float
    saved: int
    cast: int
    attention_parameters: int
    packed: bool

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass, a token."""
        return self.matrices + self.attention + self.head


class _Attention(torch.autograd.Function):
    """Shapes alone: what a fused kernel returns and keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("a trace has no backward pass")


class _Counter:
    """FLOPs of the attention calls of one trace, and the modules that they come from."""

    def __init__(self) -> None:
        self.flops, self.modules, self.packed = 0.0, dict[int, nn.Module](), True

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, sliding_window: int | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        self.modules[id(module)] = module
        self.packed &= others.get("position_ids") is not None
        self.packed &= all(others.get(name) is None for name in ("softcap", *UNKNOWN))  # without flash-attn
        rows, keys = q.shape[2], k.shape[2]
        window = min(keys, sliding_window or keys)
        pairs = rows * window - window * (window - 1) / 2  # what a causal map, cut to a window, looks at
        self.flops += 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[3] + v.shape[3])
        return _Attention.apply(q, k, v), None


def trace(config: dict[str, Any], length: int, dtype: str, trained: Trained = "all") -> Trace:
    """Trace the class of this `config.json` on a row of `length` tokens, computing in `dtype` (weights are float32).

    What is kept depends on what is `trained`: all of it, attention alone, or attention layer by layer (`layerwise`).
    Raises UpfitError when the model's code cannot be run without numbers.
    """
    counter = _Counter()
    AttentionInterface.register(NAME, counter)
    with FakeTensorMode():
        model = build_on_meta(_plain(config) | {"dtype": "float32"}, meta=False, stored=True).train()
        model.set_attn_implementation(NAME)
        weights = {parameter.untyped_storage()._cdata: parameter for parameter in model.parameters()}
        with FlopCounterMode(display=False) as flops, _autocast(dtype):
            states = _run(model, length)
        attention, counted = list(counter.modules.values()), counter.flops
        _freeze(model, attention, trained)
        with _kept(weights) as stored, _weights_kept(model, dtype) as copies, _autocast(dtype):
            _run(model, length)
        sizes = sum(parameter.numel() for parameter in weights.values())
        embedding = next(model.get_input_embeddings().parameters()).numel()
        vocabulary = _vocabulary(model)
        casts = _casts(model, dtype)
    saved = max(0, sum(stored.values()) - sum(copies.values()))
    text = model.config.get_text_config()
    return Trace(
        length=length,
        parameters=sizes,
        embedding=embedding,
        layers=text.num_hidden_layers,
        hidden=states.shape[-1],
        vocabulary=vocabulary,
        matrices=flops.get_total_flops() / length,
        attention=counted / length,
        head=2.0 * states.shape[-1] * vocabulary,
        saved=saved,
        cast=casts,
        attention_parameters=sum({id(p): p.numel() for module in attention for p in module.parameters()}.values()),
        packed=counter.packed and bool(attention),
    )


def _freeze(model: PreTrainedModel, attention: list[nn.Module], trained: Trained) -> None:
    """Let only what is trained learn. Layer by layer nothing is kept outside of attention: no gradient leaves a layer."""
    if trained == "all":
        return
    model.requires_grad_(False)
    for module in attention:
        module.requires_grad_(True)
    if trained == "layerwise":
        switch = torch.set_grad_enabled
        model.base_model.register_forward_pre_hook(lambda *_: _nothing(switch(False)))
        model.base_model.register_forward_hook(lambda *_: _nothing(switch(True)))
        for module in attention:
            module.register_forward_pre_hook(lambda *_: _nothing(switch(True)))
            module.register_forward_hook(lambda *_: _nothing(switch(False)))


def _nothing(_: Any) -> None:
    """What a hook returns that changes nothing."""


@contextmanager
def _weights_kept(model: PreTrainedModel, dtype: str) -> Iterator[dict[int, int]]:
    """Bytes of the copies of weights, in the type of the computation, that linear layers keep inside the block: those through
    which a gradient passes."""
    copies: dict[int, int] = {}

    def seen(module: Any, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and arguments[0].requires_grad:
            copies[id(module.weight)] = 2 * module.weight.numel()

    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    hooks = [module.register_forward_pre_hook(seen) for module in linear if dtype != "float32"]
    yield copies
    for hook in hooks:
        hook.remove()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}


def _autocast(dtype: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def _run(model: PreTrainedModel, length: int) -> Tensor:
    ids, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
    try:
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    except Exception as error:  # code that looks at numbers, such as routers of experts, fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpfitError(f"{type(model).__name__} cannot be planned for: its code looks at numbers ({reason})") from error


@contextmanager
def _kept(weights: dict[int, Any]) -> Iterator[dict[int, int]]:
    """Sizes of the storages that autograd keeps inside the block, weights themselves aside."""
    stored: dict[int, int] = {}
    alive = []  # else one that is let go of would give its address, which it is known by, to the next

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            stored[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield stored


def _casts(model: PreTrainedModel, dtype: str) -> int:
    """Bytes of the trained weights of linear layers in the type of the computation, there until the backward pass is done."""
    if dtype == "float32":
        return 0
    head = model.get_output_embeddings()
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    return sum(2 * weight.numel() for weight in linear if weight.requires_grad)


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return head.weight.shape[0] if isinstance(head, nn.Linear) else model.config.get_text_config().vocab_size

"""Runs a model layer by layer over what it takes, with the weights of one layer in memory. Of an encoder-decoder the layers are
those of the decoder, of a model that sees those of its language model: the encoder, and what sees, have run before them.

The model's own code runs, whatever its family: its forward is called once with the layers replaced by stubs, which tells what
each layer is given besides the hidden states (positions, masks); then the layers are called one after the other on hidden
states that are kept between them. Attention goes through a function of ours in transformers' attention interface, so that
queries, keys and values can be seen as the attention sees them.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upfit.architecture.layers import Architecture
from upfit.architecture.meta_model import build_on_meta, quiet_transformers
from upfit.architecture.names import name_map
from upfit.calibration.capture import calls_torch
from upfit.calibration.observe import NAME, Call, Opaque, Stop, register
from upfit.checkpoint.reader import Checkpoint
from upfit.examples.model_inputs import ModelInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device and their buffers (rotary frequencies) for real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _as_if_on(device: str) -> Iterator[None]:
    """Models say that they are on this device: some send what they make to where their first parameter is, which is nowhere."""
    from transformers import PreTrainedModel

    PreTrainedModel.device = property(lambda model: torch.device(device))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del PreTrainedModel.device  # what it inherits shows again


def observed_model(config: dict[str, Any], device: str = "cpu") -> "PreTrainedModel":
    """The class of this config without weights, with attention that can be listened to."""
    register()
    with _parameters_on_meta(), torch.device(device):
        model = build_on_meta(config, meta=False)
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    calling = {id(module.config) for module in owners if _calls_interface(module)}
    for module in owners:
        if hasattr(module.config, "_attn_implementation_internal"):  # other classes write their attention out
            other = "sdpa" if calls_torch(module) else "eager"
            module.config._attn_implementation_internal = NAME if id(module.config) in calling else other
    return model.float().eval()


def _calls_interface(module: nn.Module) -> bool:
    """Whether the file of this module's class knows transformers' attention interface (as the one of its base class does). Ours
    knows it, but what it stands in front of need not."""
    files = {kind.__module__ for kind in type(module).__mro__} - {"transformers.modeling_utils"}
    files = {file for file in files if not file.rpartition(".")[2].startswith("modeling_upfit")}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


@dataclass(frozen=True)
class Block:
    """One entry of the model's list of layers; `attentions` are the paths of its convertible attentions inside it, in the order
    in which they run."""

    path: str
    module: nn.Module
    attentions: tuple[str, ...]


def find_blocks(model: nn.Module, architecture: Architecture) -> list[Block]:
    """The list of layers that holds the attention layers. Raises Opaque when they are not all in one list."""
    paths = [layer.path for layer in architecture.layers]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    holding = [name for name in lists if all(path.startswith(name + ".") for path in paths)]
    if not holding:
        raise Opaque("its attention layers are not in one list of layers")
    holder = max(holding, key=len)
    inside: dict[str, list[str]] = {}
    if any(layer.caches > 1 for layer in architecture.layers):
        raise Opaque("several of its layers share the weights of one attention")
    for path in paths:
        index, _, rest = path.removeprefix(holder + ".").partition(".")
        inside.setdefault(index, []).append(rest)
    blocks = model.get_submodule(holder)
    assert isinstance(blocks, nn.ModuleList)
    return [Block(f"{holder}.{index}", module, tuple(inside.get(str(index), ()))) for index, module in enumerate(blocks)]


class Weights:
    """Puts the checkpoint's tensors into modules of a weightless model, and takes them out again."""

    def __init__(self, model: "PreTrainedModel", checkpoint: Checkpoint, device: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.checkpoint, self.device = model, checkpoint, device
        with quiet_transformers():
            self.mapping: Any = get_model_conversion_mapping(model)
        names = name_map(checkpoint.config)
        sources: dict[str, list[str]] = {}
        for disk_name in checkpoint.tensors:
            sources.setdefault(names.module_name(disk_name), []).append(disk_name)
        self.tied = names.tied
        self.sources = {alias: stored for name, stored in sources.items() for alias in names.tied.get(name, (name,))}

    def load(self, path: str, deep: bool = True) -> None:
        """Fill the module at `path` (with `deep` all below it), in float32, not to be trained."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        module = self.model.get_submodule(path)
        empty = [name for name, tensor in module.named_parameters(recurse=deep) if tensor.device.type == "meta"]
        empty += [name for name, _ in module.named_buffers(recurse=deep)]
        wanted = {disk for name in empty for disk in self.sources.get(f"{path}.{name}".lstrip("."), ())}
        if not wanted:
            return
        settings = LoadStateDictConfig(dtype=torch.float32, device_map={"": self.device}, weight_mapping=self.mapping)
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self.model, {name: self.checkpoint.read(name) for name in wanted}, settings)
        tied = {name: self.tied.get(f"{path}.{name}".lstrip("."), []) for name in empty}
        for name, others in tied.items():  # a weight that is shared lies in the file under one of its names
            loaded = [p for p in map(self.model.get_parameter, others) if p.device.type != "meta"]
            owner, _, own = name.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            empty_one = parameters.get(own)
            if loaded and empty_one is not None and empty_one.device.type == "meta":
                parameters[own] = loaded[0]
        module.requires_grad_(False)

    def load_all(self, inside: Callable[[str], bool]) -> None:
        """Fill every module that `inside` does not claim; as the class begins, where the checkpoint has nothing (sinusoids)."""
        for path, module in self.model.named_modules():
            if path and not inside(path) and next(module.parameters(recurse=False), None) is not None:
                self.load(path, deep=False)
                if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
                    module.to_empty(device=self.device, recurse=False)
                    with torch.no_grad():
                        self.model._init_weights(module)

    def on_demand(self, inside: Callable[[str], bool]) -> None:
        """Fill every module that `inside` does not claim when it is first called."""
        for path, module in self.model.named_modules():
            if path and not inside(path) and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda module, arguments, path=path: self.load(path, deep=False))


def _between(before: Tensor, hidden: Tensor) -> Tensor | None:
    """What the model adds to the hidden states between two layers; None for nothing."""
    if hidden is before or hidden.shape != before.shape or torch.equal(hidden, before):
        return None
    return hidden - before


@dataclass
class Batch:
    """What the model is given and, between the layers, hidden states [B, T, E]; what each layer is given besides."""

    inputs: ModelInputs
    hidden: Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """T; hidden states may have other dimensions before it (Gemma 3n's four streams)."""
        ids = self.inputs.keywords.get("decoder_input_ids", self.inputs.keywords.get("input_ids"))
        assert ids is not None or self.hidden is not None
        return ids.shape[1] if ids is not None else self.hidden.shape[1]  # type: ignore[union-attr]

    def moved_to(self, device: str) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.inputs.keywords.items()}


class LayerwiseModel:
    """A model that is run layer by layer over some batches.

    Raises Opaque when the family's forward cannot be run this way.
    """

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, inputs: list[ModelInputs], device: str = "cpu"
    ) -> None:
        self.model = observed_model(checkpoint.config, device)
        self.blocks = find_blocks(self.model, architecture)
        self.weights = Weights(self.model, checkpoint, device)
        self.device, self.batches = device, [Batch(each) for each in inputs]
        if self.model.config.is_encoder_decoder:
            self._begin_behind_encoder()
        elif any(each.keywords.keys() > {"input_ids"} for each in inputs):
            self._begin_behind_eye()
        else:
            self._begin_at_embedding()

    def _in_blocks(self, path: str) -> bool:
        return any(path == block.path or path.startswith(block.path + ".") for block in self.blocks)

    def _begin_at_embedding(self) -> None:
        self.weights.on_demand(self._in_blocks)
        embedding = self.model.get_input_embeddings()  # asked for its device before it is called
        self.weights.load(next(path for path, module in self.model.named_modules() if module is embedding))
        self._begin_all()
        for module in self.model.modules():
            module._forward_pre_hooks.clear()

    def _begin_behind_eye(self) -> None:
        """All that comes before the layers runs whole; its modules may use each other's weights without calling them."""
        head = self.model.get_output_embeddings()
        ends = [path for path, module in self.model.named_modules() if module is head]  # which comes behind the layers
        self.weights.load_all(lambda path: self._in_blocks(path) or path in ends)
        self._begin_all()
        self.empty(self.model)

    def _begin_all(self) -> None:
        for batch in self.batches:
            try:
                self._begin(batch, lambda hidden: hidden)
            except Opaque:
                batch.calls.clear()
                self._begin(batch, lambda hidden: (hidden, None))

    def _begin_behind_encoder(self) -> None:
        """The encoder runs whole. What the decoder's first layer gives out beside its hidden states (T5: the bias by position)
        is what the later layers are given."""
        self.weights.load_all(self._in_blocks)
        self.load(0)
        block = self.blocks[0].module
        for batch in self.batches:

            def result(hidden: Tensor, batch: Batch = batch) -> Any:
                own = type(block).forward(block, hidden, *batch.calls[0].arguments, **batch.calls[0].keywords)
                return (hidden, *own[1:]) if isinstance(own, tuple) else hidden

            self._begin(batch, functools.cache(result))
        self.empty(self.model.get_encoder())

    def _begin(self, batch: Batch, result: Callable[[Tensor], Any]) -> None:
        """Run the model with stubs for layers: gives the first layer's hidden states and every layer's other arguments.

        `result` makes of hidden states what a layer of the family gives out: most the hidden states themselves, some a tuple.
        """
        first: list[Tensor] = []
        last: list[Tensor] = []

        def stub(index: int, *arguments: Any, **keywords: Any) -> Any:
            hidden = keywords.pop("hidden_states") if "hidden_states" in keywords else arguments[0]
            if not first:
                first.append(hidden)
            if index < len(batch.calls):
                raise Opaque("its forward does not go through its layers one after the other")
            batch.calls += [Call((), {}, passed_by=True)] * (index - len(batch.calls))
            batch.calls.append(Call(arguments[1:], keywords, _between(last.pop(), hidden) if last else None))
            last.append(hidden)
            if len(batch.calls) == len(self.blocks):
                raise Stop
            return result(hidden)

        for index, block in enumerate(self.blocks):
            block.module.forward = functools.partial(stub, index)
        try:
            with torch.no_grad(), quiet_transformers(), _as_if_on(self.device):
                self.model(**batch.moved_to(self.device), use_cache=False)
        except Stop:
            pass
        except Opaque:
            raise
        except Exception as error:  # any family's forward may want what a text does not give
            raise Opaque(f"its forward cannot be run on what it was given: {' '.join(str(error).split())[:120]}") from error
        finally:
            for block in self.blocks:
                block.module.__dict__.pop("forward", None)
        if len(batch.calls) != len(self.blocks):
            raise Opaque("its forward does not go through its layers to the end")
        if first[0].device.type == "meta" or not first[0].isfinite().all():
            raise Opaque("its layers get no hidden states from what it was given")
        batch.hidden = first[0]

    def load(self, index: int) -> None:
        self.weights.load(self.blocks[index].path)

    def empty(self, module: nn.Module) -> None:
        """Let go of the weights of a layer."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

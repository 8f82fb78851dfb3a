"""Merges the heads of tiny models as `upfit convert gqa` does, on whatever their forward takes, and compares their layers."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import ORDINARY_TOKENS, tiny_inputs
from tests.watching import one_batch
from upfit.architecture.attention import Attention
from upfit.architecture.layers import Architecture, open_model
from upfit.calibration.between import OF_DIMENSIONS
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import run_block, tapped
from upfit.calibration.teacher_student import LayerPair, PairedBatch, open_pair, pass_by
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.plan import Plan, Rule
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.convert_layers import convert_layers
from upfit.convert.gqa.layer_state import Settings as MergeSettings
from upfit.convert.gqa.reparametrise import permute_heads, rebase_values, scale_pairs
from upfit.convert.recipe import Recipe, get_recipe
from upfit.examples.model_inputs import ModelInputs
from upfit.output import Output

ROWS, TOKENS = 8, 24  # of a batch of text


@dataclass(frozen=True)
class Nothing:
    """No options."""


def inputs_of(model: PreTrainedModel, seed: int) -> ModelInputs:
    """A batch of random inputs of the model."""
    generator = torch.Generator().manual_seed(seed)
    if not model.config.is_encoder_decoder:
        return ModelInputs({"input_ids": torch.randint(*ORDINARY_TOKENS, (ROWS, TOKENS), generator=generator)})
    drawn = {}
    for name, tensor in tiny_inputs(model).items():
        shape = (ROWS, *tensor.shape[1:])
        ids = tensor.dtype == torch.long
        drawn[name] = (
            torch.randint(*ORDINARY_TOKENS, shape, generator=generator) if ids else torch.randn(shape, generator=generator)
        )
    return one_batch(drawn)


@dataclass
class Sample:
    """In the place of calibration text."""

    inputs: list[ModelInputs]

    def batches(self) -> tuple[list[ModelInputs], list[bool]]:
        """The last batch is held back."""
        return self.inputs, [False] * (len(self.inputs) - 1) + [True]


@dataclass
class Fits:
    """In the place of `LayerFits`, without its folder: what each layer got, by its path."""

    architecture: Architecture
    model: LayerwiseModel
    batches: list[PairedBatch]
    kv_heads: int
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def context(self) -> Any:
        return SimpleNamespace(architecture=self.architecture)

    def __iter__(self) -> Iterator[LayerPair]:
        for index, block in enumerate(self.model.blocks):
            self.model.load(index)
            paths = [f"{block.path}.{attention}" for attention in block.attentions]
            layers = [x for x in self.architecture.layers if x.path in paths and x.geometry.kv_heads > self.kv_heads]
            for layer in layers:
                last = layer is layers[-1]
                yield LayerPair(self.model, index, layer, self.architecture.entry, self.batches, block.module, last)
            if not layers:
                pass_by(block.module, index, self.batches, alone=False)

    def store(self, pair: LayerPair, record: dict[str, Any], tensors: dict[str, Tensor], note: str = "") -> None:
        self.records[pair.layer.path] = record
        self.tensors[pair.layer.path] = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def merge(source: Path, out: Path, inputs: list[ModelInputs], kv_heads: int, refit: bool = False) -> dict[str, dict[str, Any]]:
    """Align the model in `source` on `inputs`, of which the last batch is held back; the records of its layers."""
    with open_checkpoint(source) as stored:
        checkpoint, architecture = open_model(stored)
        fits = Fits(architecture, *open_pair(checkpoint, architecture, Sample(inputs)), kv_heads)  # type: ignore[arg-type]
        convert_layers(fits, architecture.with_kv_heads(kv_heads), lambda path: None, MergeSettings(kv_heads, refit))  # type: ignore[arg-type]

    def plan(architecture: Architecture, options: Nothing) -> Plan:
        layers = [layer for layer in architecture.layers if layer.path in fits.tensors]
        rules = tuple(_rule(tuple(layer.names.values()), fits.tensors[layer.path]) for layer in layers)
        return Plan(architecture.with_kv_heads(kv_heads), rules)

    written(plan, source, out)
    return fits.records


def _rule(names: tuple[str, ...], tensors: dict[str, Tensor]) -> Rule:
    def apply(stored: Any) -> dict[str, Tensor]:
        return {name: tensor.to(stored[names[0]].device) for name, tensor in tensors.items()}

    return Rule(names, tuple(tensors), apply, "merged")


def mean(source: Path, out: Path, kv_heads: int) -> None:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=kv_heads, method="mean")
    convert(recipe, str(source), out, options, Settings(verify=False), Output(quiet=True))


def written(plan: Any, source: Path, out: Path) -> None:
    recipe = Recipe("changed", "changed heads", "none", Nothing, plan, lambda _: None, lambda _: [])
    convert(recipe, str(source), out, Nothing(), Settings(verify=False), Output(quiet=True))


def layer_errors(source: Path, other: Path, inputs: ModelInputs) -> dict[str, float]:
    """|other − source|² / |source|² of what each attention gives out, each layer being given what the source's is given."""
    errors = {}
    with open_checkpoint(source) as first, open_checkpoint(other) as second:
        models = [(arch, LayerwiseModel(opened, arch, [inputs])) for opened, arch in map(open_model, (first, second))]
        (architecture, teacher), (changed, student) = models
        hidden = teacher.batches[0].hidden
        assert hidden is not None
        for index, (block, own) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
            teacher.load(index)
            student.load(index)
            attended = []
            for at, (model, arch) in ((block, (teacher, architecture)), (own, (student, changed))):
                taps = {path: at.module.get_submodule(f"{path}.{arch.entry.o}") for path in at.attentions}
                with tapped(taps) as seen:
                    output = run_block(at.module, hidden, model.batches[0].calls[index])
                attended.append(({path: seen[path][1] for path in at.attentions if path in seen}, output))
            for (path, wanted), result in zip(attended[0][0].items(), attended[1][0].values(), strict=True):
                errors[f"{block.path}.{path}"] = float((result - wanted).square().sum() / wanted.square().sum())
            hidden = attended[0][1]
    return errors


def disguised(attention: Attention, traits: AttentionTraits, generator: torch.Generator, factors: bool) -> Attention:
    """The same function: each head in another basis, as far as what lies between lets one pass, and in another place. Of values
    before a norm of all heads only signs are free, no `factors`."""
    assert attention.k is not None and attention.v is not None
    if attention.k.device.type == "meta":  # the shapes stay
        return attention
    heads, width = attention.v.shape[:2]
    if traits.values and traits.gated == OF_DIMENSIONS:
        scale = torch.randn(heads, width, generator=generator).sign()
        scale = scale * (0.5 + torch.rand(heads, width, generator=generator)) if factors else scale
        attention = rebase_values(attention, torch.diag_embed(scale))
    elif traits.values:
        maps = _maps(heads, width, generator)
        attention = rebase_values(attention, torch.linalg.qr(maps).Q if traits.value_unit else maps)
    if traits.keys and (attention.k_norm is None or attention.k_norm.ndim == 1):
        attention = _keys_disguised(attention, traits, generator)
    return permute_heads(attention, torch.randperm(heads, generator=generator).tolist()) if traits.movable else attention


def _keys_disguised(attention: Attention, traits: AttentionTraits, generator: torch.Generator) -> Attention:
    assert attention.k is not None
    heads = attention.k.shape[0]
    lengths = 0.8 + 0.4 * torch.rand(heads, generator=generator)  # a norm's ε sees a little of them
    if traits.pairs and traits.factors:
        first, second = traits.order[: traits.pairs], traits.order[traits.pairs : 2 * traits.pairs]
        turns = torch.polar(torch.ones(heads, traits.pairs), 6.3 * torch.rand(heads, traits.pairs, generator=generator))
        if not traits.normed:
            turns = turns * (0.5 + torch.rand(heads, traits.pairs, generator=generator))
        attention = scale_pairs(attention, turns, first, second)
    free = list(traits.order[2 * traits.pairs :])
    if free and not traits.normed:
        maps = torch.eye(len(traits.order)).repeat(heads, 1, 1)
        maps[:, torch.tensor(free)[:, None], free] = _maps(heads, len(free), generator)
        attention = _through(attention, maps, torch.linalg.inv(maps).mT)
    if traits.normed and attention.k_bias is None:  # a norm takes the length away
        assert attention.k is not None
        attention = replace(attention, k=attention.k * lengths[:, None, None])
    return attention


def _through(attention: Attention, of_keys: Tensor, of_queries: Tensor) -> Attention:
    assert attention.q is not None
    of_queries = of_queries.repeat_interleave(attention.q.shape[0] // len(of_keys), 0)
    changed: dict[str, Any] = {}
    for names, maps in ((("k", "k_bias"), of_keys), (("q", "q_bias"), of_queries)):
        for name in names:
            tensor = getattr(attention, name)
            changed[name] = None if tensor is None else torch.einsum("hde,he...->hd...", maps, tensor)
    return replace(attention, **changed)


def _maps(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.eye(width) + 0.3 * torch.randn(count, width, width, generator=generator)

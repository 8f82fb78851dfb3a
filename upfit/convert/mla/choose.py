"""Which pairs stay rotated, and by how many shared keys: chosen for the model, on what some layers lose of text held back.

A rotated key costs two numbers of a cache that the latent could have; a pair without one loses its rotation. Which matters more
differs from model to model, so every way of spending the cache is tried in closed form.
"""

from dataclasses import dataclass

from upfit.architecture.attention import LAYOUTS
from upfit.calibration.observe import Opaque
from upfit.calibration.sample_for import sample_for
from upfit.calibration.teacher_student import LayerPair, open_pair, pass_by
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.watch_layer import BALANCES, check_projections, closest, watch_layer
from upfit.convert.recipe import FitContext
from upfit.output import Output

TOKENS = "8k"  # closed forms of a few layers need no more to be told apart
LAYERS = 4  # that are looked at, from all over the model
QUIET = Output(quiet=True)


@dataclass(frozen=True)
class Tried:
    """One way, and the mean over layers of the share of the attention's output that it loses."""

    sizes: Sizes
    error: float


def choose(
    context: FitContext, texts: list[str] | None, length: int | None, field: str, possible: list[Sizes]
) -> tuple[Sizes, list[Tried]]:
    """The best of the `possible` sizes, and what was tried, best first. Raises Opaque for a model that cannot be watched."""
    if len(possible) == 1:
        return possible[0], []
    sample = sample_for(context.folder, context.checkpoint, texts, TOKENS, length, QUIET, field)
    model, batches = open_pair(context.checkpoint, context.architecture, sample)
    places = {layer.path: layer for layer in context.architecture.layers}
    holding = [index for index, block in enumerate(model.blocks) if block.attentions]
    looked = {holding[number] for number in looked_at(len(holding))}
    errors: dict[Sizes, list[float]] = {sizes: [] for sizes in possible}
    with context.output.progress("choosing rotated keys", max(looked) + 1) as meter:
        for index in range(max(looked) + 1):
            block = model.blocks[index]
            model.load(index)
            if index in looked:
                layer = places[f"{block.path}.{block.attentions[0]}"]
                pair = LayerPair(model, index, layer, context.architecture.entry, batches, block.module, True)
                for sizes, error in _errors(pair, possible).items():
                    errors[sizes].append(error)
            pass_by(block.module, index, batches, alone=True)
            model.empty(block.module)
            meter.advance(1)
    tried = sorted((Tried(sizes, sum(each) / len(each)) for sizes, each in errors.items() if each), key=lambda one: one.error)
    if not tried:
        raise Opaque("none of its layers rotates as many pairs as its class says")
    return tried[0].sizes, tried


def looked_at(layers: int) -> list[int]:
    """Numbers of the layers that are looked at, of so many, ascending."""
    return sorted({(2 * number + 1) * layers // (2 * LAYERS) for number in range(LAYERS)})


def _errors(pair: LayerPair, possible: list[Sizes]) -> dict[Sizes, float]:
    """What each of the sizes loses in one layer; nothing for a layer of another rotation. Raises Opaque for one that cannot be
    given a latent."""
    traits, turns = pair.probe()
    check_projections(pair, traits)
    if any(len(sizes.counts) != traits.pairs for sizes in possible):
        return {}
    stored = {part: pair.model.weights.checkpoint.read(name).float() for part, name in pair.layer.names.items()}
    device = pair.batches[0].teacher.device
    attention = LAYOUTS[pair.layer.layout].unpack({p: t.to(device) for p, t in stored.items()}, pair.layer.geometry)
    seen = watch_layer(pair, traits, turns, attention)
    return {sizes: closest(seen, sizes, BALANCES[:1]).error for sizes in possible}

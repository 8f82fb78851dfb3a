"""What latents cost beside others' ways to the same cache, all fitted on the same text, before any training.

    python -m benchmarks.latent_baselines MODEL SCRATCH --numbers 256 128 --calibration TEXT --results RESULTS.json

A row for each number of cached numbers a token and layer, way and refit. Ways of `baselines.py`: `care` (keys and values cut
by themselves, to equal ranks), `care by layer` (ranks dealt to layers), `joint` (one SVD for both, balanced), `transmla`; of
ours: `latent` (our class). The first three cache keys before their rotation: each step of decoding makes all keys of the
context again, K·D times the rank multiplications a cached token and layer, and rotates them, which no stock class does. Their
refit maps inputs by the drift and fits O and the MLP's last matrix; that of the others is `upfit convert mla`'s. Ridges,
balances, folds and sizes are chosen on calibration text that is held back. Losses over the source in nats a token, paired, with
intervals over the documents of Upfit's own evaluation text. For families that store queries, keys and values apart, without
biases or norms of them. Where a run was stopped, its results file has the rows that were done.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.baselines import dealt_ranks, joint_svd, transmla, weighted_svd
from benchmarks.latents import numbers as cached_numbers
from benchmarks.latents import sizes as cached_sizes
from benchmarks.low_rank import moments
from benchmarks.parts import read_documents, shared_runs, windows_record
from benchmarks.small_merges import QUIET, over
from upfit.architecture.layers import open_model
from upfit.architecture.loading import load_strictly
from upfit.calibration.sample import Sample
from upfit.calibration.sample_for import sample_for
from upfit.calibration.stream_refit import drifts_of, mapped, refit_stream
from upfit.calibration.teacher_student import LayerPair, enter, open_pair, put
from upfit.calibration.teacher_view import watch_teacher
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import find_source
from upfit.convert.conversion import Settings, convert
from upfit.convert.mla import choose, convert_layers
from upfit.convert.mla import sizes as mla_sizes
from upfit.convert.mla.sizes import MOST_ROTATED, Sizes
from upfit.convert.mla.watch_layer import Closest, Shown, errors
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.evaluate.loss import Losses, window_losses
from upfit.text import python_documents
from upfit.text.tokenizer import load_tokenizer
from upfit.text.windows import Window, make_windows

WAYS = ("care", "care by layer", "joint", "transmla", "latent")
LOW_RANK = WAYS[:3]
RIDGES = (0.0, 0.01, 0.1)  # of a moment's mean; CARE's release adds a tenth, SVD-LLM V2 nothing
BALANCES = (0.25, 1.0, 4.0)  # of K against V by norms; TransMLA's is 1
LENGTH, BATCH = 512, 4
Cut = list[tuple[Tensor, Tensor]]  # weights of keys and values of each layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--numbers", type=int, nargs="+", required=True, help="a token and layer")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", default="32k")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = find_source(args.model).path
    windows = make_windows(python_documents(), load_tokenizer(args.model), LENGTH, args.windows)
    source = measure(load(folder), windows)
    record = {
        "source": asdict(source.per_token()),
        "source_numbers": cached_numbers(folder),
        "calibration_tokens": args.calibration_tokens,
        "text": windows_record(windows, LENGTH),
        "shared_with_calibration": shared_runs(python_documents(), read_documents([args.calibration])),
        "environment": environment(),
    }
    low, rows = LowRank(folder, args.calibration, args.calibration_tokens), list[dict[str, Any]]()
    for numbers, way, refit in product(args.numbers, args.ways, (False, True)):
        row, model = low.make(numbers, way, refit) if way in LOW_RANK else converted(folder, numbers, way, refit, args)
        losses = measure(model, windows)
        rows.append({"asked": numbers, "way": way, "refit": refit, **row})
        rows[-1]["over_source"] = over(losses, source, [str(window.document) for window in windows])
        print(json.dumps(rows[-1]), flush=True)
        if args.results:
            args.results.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Any:
    return load_strictly(folder, dtype=torch.float32).eval()


def measure(model: Any, windows: list[Window]) -> Losses:
    with QUIET.progress("", len(windows)) as meter:
        return window_losses(model, windows, BATCH, "baselines", meter)


@dataclass
class LowRank:
    """Keys and values of the model in `folder` as products of two matrices: what is known of it on calibration text."""

    folder: Path
    text: str
    tokens: str
    chosen: dict[tuple[int, str], tuple[dict[str, Any], Cut]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint, self.architecture = open_model(open_checkpoint(self.folder))
        sample = sample_for(self.folder, self.checkpoint, [self.text], self.tokens, None, QUIET)
        assert isinstance(sample, Sample)
        self.sample = sample
        self.weights = [
            (self.checkpoint.read(layer.names["k.weight"]), self.checkpoint.read(layer.names["v.weight"]))
            for layer in self.architecture.layers
        ]
        model = load(self.folder)
        keys = [model.get_submodule(f"{layer.path}.{self.architecture.entry.k}") for layer in self.architecture.layers]
        fitted = [row for length, rows in sample.windows.items() for row in rows[sample.held[length] :]]
        self.moments = moments(model, keys, fitted)

    def make(self, numbers: int, way: str, refit: bool) -> tuple[dict[str, Any], Any]:
        """What a results row says of the model, and the model."""
        if (numbers, way) not in self.chosen:
            self.chosen[numbers, way] = self.choose(numbers, way)
        row, cut = self.chosen[numbers, way]
        return row, self.with_tensors(self.refitted(cut) if refit else self.named(cut))

    def choose(self, numbers: int, way: str) -> tuple[dict[str, Any], Cut]:
        """The best on what is held back."""
        tried = list[tuple[dict[str, Any], Cut]]()
        for ridge, balance in product(RIDGES, BALANCES if way == "joint" else (1.0,)):
            cached, cut = self.cut(numbers, way, ridge, balance)
            loss = self.held_loss(self.with_tensors(self.named(cut)))
            tried.append(({"numbers": cached, "ridge": ridge, "balance": balance, "held_back": loss}, cut))
        return min(tried, key=lambda one: one[0]["held_back"])

    def cut(self, numbers: int, way: str, ridge: float, balance: float) -> tuple[float, Cut]:
        """Numbers cached a token and layer, and the weights."""
        wide = [(k.double(), v.double(), moment) for (k, v), moment in zip(self.weights, self.moments, strict=True)]
        most = min(len(wide[0][0]), len(wide[0][2]))
        if way == "joint":
            rank = min(numbers, len(wide[0][2]))
            return rank, [joint_svd(k, v, moment, rank, balance, ridge) for k, v, moment in wide]
        rank, cuts, cached = min(numbers // 2, most), list[list[Tensor]](), 0
        for part in (0, 1):
            whole = [weighted_svd(layer[part], layer[2], most, ridge) for layer in wide]
            ranks = dealt_ranks([one.sizes for one in whole], rank, most) if "by layer" in way else [rank] * len(wide)
            cuts.append([one.up[:, :own] @ one.down[:own] for one, own in zip(whole, ranks, strict=True)])
            cached += sum(ranks)
        return cached / len(wide), list(zip(cuts[0], cuts[1], strict=True))

    def named(self, cut: Cut) -> dict[str, Tensor]:
        names = [(layer.names["k.weight"], layer.names["v.weight"]) for layer in self.architecture.layers]
        pairs = zip(names, cut, strict=True)
        return {name: weight for own, new in pairs for name, weight in zip(own, new, strict=True)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Any:
        model = load(self.folder)
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            assert parameters[name].shape == tensor.shape
            parameters[name].data = tensor.float()
        return model

    @torch.no_grad()
    def held_loss(self, model: Any) -> float:
        """Nats a token on the windows that are held back."""
        nats = tokens = 0.0
        for length, rows in self.sample.windows.items():
            for row in rows[: self.sample.held[length]]:
                nats += float(model(input_ids=row[None], labels=row[None]).loss) * (length - 1)
                tokens += length - 1
        return nats / tokens

    @torch.no_grad()
    def refitted(self, cut: Cut) -> dict[str, Tensor]:
        """The new tensors of the model by name: layer by layer, on what the converted model really sees."""
        model, batches = open_pair(self.checkpoint, self.architecture, self.sample)
        tensors = dict[str, Tensor]()
        for index, (layer, block, new) in enumerate(zip(self.architecture.layers, model.blocks, cut, strict=True)):
            model.load(index)
            enter(index, batches)
            student = copy.deepcopy(block.module)
            tensors |= _refit(LayerPair(model, index, layer, self.architecture.entry, batches, student), new)
            model.empty(block.module)
        return tensors


def _refit(pair: LayerPair, new: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """One layer with low-rank keys and values; both streams move on."""
    traits, _ = pair.probe()
    views = [view for view, _, _ in watch_teacher(pair, traits, None, 1, 1.0)]
    inputs = [pair.run_until(pair.path("q"), view.batch) for view in views]
    drift, _ = drifts_of([(x, x) for x in inputs], views)
    queries = pair.linear(pair.path("q")).weight
    tensors = dict[str, Tensor]()
    for part, weight in zip("qkv", (queries, *new), strict=True):
        tensors[pair.layer.names[f"{part}.weight"]] = mapped(weight.float(), drift)
        put(pair.student, pair.path(part), mapped(weight.float(), drift))
    for view in views:
        view.targets.clear()
    tensors |= refit_stream(pair, traits, views, 2.0)
    for view in views:
        view.batch.teacher = view.output
    return tensors


def converted(folder: Path, numbers: int, way: str, refit: bool, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """What a results row says of a latent by `upfit convert mla`, and the model: ours, or TransMLA's closed form in its place.
    Where a closed form of the same size stands in SCRATCH, its sizes are taken."""
    out, recipe = args.scratch / f"{numbers}-{way}-{'refit' if refit else 'closed'}", get_recipe("mla")
    text = {"calibration": [args.calibration], "calibration_tokens": args.calibration_tokens}
    options = recipe.options(cache=str(numbers), target="upfit_mla", refit=refit, **text)
    known = sizes_of(args.scratch / f"{numbers}-{way}-closed") if refit else None
    theirs: AbstractContextManager[list[tuple[int, float]]] = transmla_instead() if way == "transmla" else nullcontext([])
    with only_sizes(numbers, known, way), theirs as chosen:
        convert(recipe, str(folder), out, options, Settings(verify=False), QUIET)
    row: dict[str, Any] = {"numbers": cached_numbers(out), **cached_sizes(out)}
    if way == "transmla":
        layers = len(measurements(out)["layers"])
        row["folds"], row["balances"] = zip(*chosen[-layers:], strict=True)
    return row, load(out)


def measurements(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["steps"][-1]["measurements"]
    return record


def sizes_of(folder: Path) -> Sizes | None:
    if not folder.exists():
        return None
    sizes = measurements(folder)["sizes"]
    return Sizes(tuple(sizes["counts"]), sizes["latent"], sizes["unrotated"])


@contextmanager
def only_sizes(numbers: int, known: Sizes | None, way: str) -> Iterator[None]:
    """`upfit convert mla` with `known` sizes, else TransMLA's for `way` transmla, else its own."""
    own = mla_sizes.possible_sizes

    def possible(shape: Any, inputs: int, pairs: int, several: bool, asked: Any) -> list[Sizes]:
        if known is not None:
            return [known]
        return transmla_sizes(shape, inputs, pairs, numbers) if way == "transmla" else own(shape, inputs, pairs, several, asked)

    with patch.object(mla_sizes, "possible_sizes", possible):
        yield


@contextmanager
def transmla_instead() -> Iterator[list[tuple[int, float]]]:
    """`upfit convert mla` with TransMLA's closed form; what it chose, fold and balance, layer by layer."""
    chosen = list[tuple[int, float]]()

    def closest(shown: Shown, sizes: Sizes, balances: tuple[float, ...]) -> Closest:
        best, fold = closest_transmla(shown, sizes, BALANCES if len(balances) > 1 else (1.0,))
        chosen.append((fold, best.balance))
        return best

    with (
        patch.object(choose, "closest", closest),
        patch.object(convert_layers, "closest", closest),
    ):
        yield chosen


def transmla_sizes(shape: Any, inputs: int, pairs: int, numbers: int) -> list[Sizes]:
    """Ways to spend the cache: every pair keeps one rotated key, or every second, fourth ... (its `collapse`)."""
    ways = list[Sizes]()
    for collapse in (step for step in range(1, pairs + 1) if pairs % step == 0 and step & (step - 1) == 0):
        counts = tuple(int(pair % collapse == 0) for pair in range(pairs))
        rotated = 2 * sum(counts)
        most = min(inputs, shape.kv_heads * (shape.head_dim + shape.v_head_dim) - rotated)
        if rotated <= MOST_ROTATED * numbers:
            ways.append(Sizes(counts, min(numbers - rotated, most), shape.head_dim))
    return ways


def closest_transmla(shown: Shown, sizes: Sizes, balances: tuple[float, ...]) -> tuple[Closest, int]:
    """The fold and balance that lose least of the attention's output on what is held back; TransMLA takes one fold for the
    whole model and one balance that the user gives."""
    views, tried = [view for view in shown.views if view.batch.held], list[tuple[Closest, int]]()
    slots, pairs = [pair for pair, count in enumerate(sizes.counts) if count], len(sizes.counts)
    folds = [fold for fold in range(1, pairs + 1) if pairs % fold == 0 and fold * len(slots) % pairs == 0]
    for fold, balance in product(folds, balances):
        latent = transmla(shown.source, shown.sums, slots, sizes.latent, fold, balance).to(views[0].inputs.device)
        error, _ = errors(latent, shown.source.scaling, shown.turns, views)
        tried.append((Closest(latent, balance, None, error), fold))
    return min(tried, key=lambda one: one[0].error)


if __name__ == "__main__":
    main()

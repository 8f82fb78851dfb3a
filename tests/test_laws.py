"""The laws of the house, over every recipe and every architecture that can be built tiny.

Each architecture is converted for real, from a folder to a folder. The everyday run covers a sample of families that differ
in something that matters here; the full run covers them all.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from tests.tiny import BUILDABLE, UNGROUPABLE, auto_class, runs, tiny_inputs, tiny_model
from tests.tiny_data import DOES_NOT_RUN, MODEL_TYPES
from upfit.architecture.adapter import adapt
from upfit.architecture.layers import Architecture, bind, open_model
from upfit.architecture.table import table
from upfit.calibration.estimate import Windows, block_of
from upfit.checkpoint.execute import outline
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.cost import aligned
from upfit.convert.recipe import Recipe, find_recipes, outline_of
from upfit.errors import UpfitError
from upfit.options import check
from upfit.output import Output

# Plain, biases, per-head norm, full-width norm, sinks, interleaved rotary, partial rotary, fused, hybrid, nested config, our
# own class.
EVERYDAY = (
    "llama", "qwen2", "qwen3", "olmo2", "gpt_oss", "cohere", "phi", "phi3", "qwen3_next", "voxtral", "t5", "whisper",
)  # fmt: skip
QUIET = Output(quiet=True)


# Configurations of a type that store something else than its default one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", {"attention_bias": True}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "gemma4-keys-are-values": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
}


def sample(model_type: str) -> Any:
    """A parameter of its own group, so that one worker builds the model once."""
    slow = [] if model_type in EVERYDAY else [pytest.mark.slow]
    return pytest.param(model_type, marks=[pytest.mark.xdist_group(model_type), *slow])


@dataclass(frozen=True)
class Case:
    """One architecture, saved as a folder."""

    model_type: str
    folder: Path
    inputs: dict[str, torch.Tensor]
    architecture: Architecture
    scratch: Path
    known: dict[Path, torch.Tensor] = field(default_factory=dict)

    def logits(self, folder: Path) -> torch.Tensor:
        """Plain transformers, strict: nothing missing, left over or mismatched. Folders do not change, so each is run once."""
        if folder not in self.known:
            self.known[folder] = self._logits(folder)
        return self.known[folder]

    def trials(self, recipe: Recipe) -> list[tuple[int, Any]]:
        """(number, options): all for an everyday type; of the others one, another from type to type."""
        found = list(enumerate(recipe.trials(self.architecture)))
        if self.model_type in EVERYDAY or not found:
            return found
        return [found[sum(map(ord, self.model_type)) % len(found)]]

    def _logits(self, folder: Path) -> torch.Tensor:
        model = self.load(folder)
        with torch.no_grad():
            return model(**self.inputs).logits if runs(self.model_type) else torch.zeros(0)

    def load(self, folder: Path) -> Any:
        model, info = auto_class(self.model_type).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        problems = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
        assert not problems
        return model.eval()

    def converted(self, recipe: Recipe, options: Any, name: str) -> Path:
        """The result of a conversion, made once. `verify` has tests of its own; the laws below look for themselves."""
        out = self.scratch / name
        if not out.exists():
            convert(recipe, str(self.folder), out, options, Settings(verify=False), QUIET)
        return out


def is_wrapper(name: str) -> bool:
    """Whether what is converted is a language model inside another model, by the rules of its own type."""
    return name in table().entries and bool(table().entries[name].nested) and name not in EVERYDAY


# What becomes another family is the subject of test_retarget.py.
POSSIBLE = [name for name in (*BUILDABLE, *VARIANTS) if name not in UNGROUPABLE and name not in table().retargets]
CASES = [name for name in POSSIBLE if not is_wrapper(name)]
WRAPPERS = [name for name in POSSIBLE if is_wrapper(name)]


@pytest.fixture(scope="module", params=[sample(name) for name in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, changes = VARIANTS.get(request.param, (request.param, {}))
    if model_type not in BUILDABLE:
        pytest.skip(f"the installed transformers has no {model_type}")
    return case_of(model_type, changes, tmp_path_factory.mktemp(request.param))


def case_of(model_type: str, changes: dict[str, Any], scratch: Path) -> Case:
    model = tiny_model(model_type, **changes)
    model.save_pretrained(scratch / "source")
    with open_checkpoint(scratch / "source") as checkpoint:
        architecture = bind(checkpoint.config, checkpoint.tensors)
    return Case(model_type, scratch / "source", tiny_inputs(model), architecture, scratch)


def test_what_a_fit_takes_can_be_estimated_of_every_layer(case: Case) -> None:
    with open_checkpoint(case.folder) as checkpoint:
        checkpoint, architecture = open_model(checkpoint)
        blocks = [block_of(layer, checkpoint.tensors, architecture.layers) for layer in architecture.layers]
        attention = [sum(checkpoint.tensors[name].numel for name in layer.names.values()) for layer in architecture.layers]
    assert all(block.weights >= own > 0 for block, own in zip(blocks, attention, strict=True))
    assert all(aligned(block, 1, [Windows(2, 32)]).products > 0 for block in blocks)


def tensors(folder: Path) -> dict[str, str]:
    """A hash of the bytes of every tensor."""
    with open_checkpoint(folder) as checkpoint:
        found = {n: checkpoint.read_bytes(info.file.name, info.nbytes, info.start) for n, info in checkpoint.tensors.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_supported_type_is_tried_or_explained() -> None:
    """Every type the table supports is in the list of types to build, and each is built or has a reason why not."""
    assert set(table().entries) == set(MODEL_TYPES) - set(table().refused)
    assert set(UNGROUPABLE) <= set(table().refused)


@pytest.mark.parametrize("model_type", [name for name in DOES_NOT_RUN if not runs(name)])
def test_what_is_said_not_to_run_does_not(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(AttributeError, match=DOES_NOT_RUN[model_type][1]):
        model(**tiny_inputs(model))


def test_a_type_is_supported_or_refused_never_both() -> None:
    known = table()
    assert not known.refused.keys() & (known.entries.keys() | known.retargets.keys())


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    """StableLM's key norms are a list with a module a head: their number changes with the heads, and no layout packs that."""
    tiny_model("stablelm", qk_layernorm=True).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(UpfitError, match="in a way that is not supported"):
        bind(checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("recipe", find_recipes().values(), ids=lambda recipe: recipe.name)
def test_identity(case: Case, recipe: Recipe) -> None:
    options = recipe.identity(case.architecture)
    if options is None:
        return
    before = hashes(case.folder)
    out = case.converted(recipe, options, f"identity-{recipe.name}")
    exact, before_logits, after_logits = (
        outline_of(recipe.plan(case.architecture, options)).exact,
        case.logits(case.folder),
        case.logits(out),
    )
    assert torch.equal(after_logits, before_logits) if exact else torch.allclose(after_logits, before_logits, atol=1e-5)
    assert hashes(case.folder) == before, "the source was touched"


def offered(recipe: Recipe, architecture: Architecture) -> list[Any]:
    """The options of each command line that `upfit show` offers: `--a 1|2, or --b --c N (words)`; a word in capitals stands for
    what the recipe's first trial has there."""
    lines = re.sub(r"\(.*?\)", "", recipe.offers(architecture)).split(", or ") if recipe.offers(architecture) else []
    hints, options = get_type_hints(recipe.options), []

    def value(name: str, text: str) -> Any:
        if text.isupper():
            return getattr(recipe.trials(architecture)[0], name)
        return int(text) if hints[name] is int else text or True

    for pairs in (re.findall(r"--(\S+)(?: ([^-\s]\S*))?", line) for line in lines):
        names = [name.replace("-", "_") for name, _ in pairs]
        for texts in itertools.product(*(text.split("|") for _, text in pairs)):
            options.append(recipe.options(**{name: value(name, text) for name, text in zip(names, texts, strict=True)}))
    return options


@pytest.mark.parametrize("recipe", find_recipes().values(), ids=lambda recipe: recipe.name)
def test_what_is_offered_is_not_refused(case: Case, recipe: Recipe) -> None:
    for options in offered(recipe, case.architecture):
        check(options)
        assert recipe.plan(case.architecture, options)


@pytest.mark.parametrize("recipe", find_recipes().values(), ids=lambda recipe: recipe.name)
def test_dry_is_real_and_stock_loads_it(case: Case, recipe: Recipe) -> None:
    for number, options in case.trials(recipe):
        with open_checkpoint(case.folder) as stored:
            checkpoint = adapt(stored)
            planned = outline(checkpoint.written(outline_of(recipe.plan(case.architecture, options))), checkpoint, None)
        out = case.converted(recipe, options, f"{recipe.name}-{number}")
        with open_checkpoint(out) as written:
            real = {(name, info.dtype, info.shape) for name, info in written.tensors.items()}
        assert {(item.name, item.dtype, item.shape) for item in planned} == real
        assert case.logits(out).isfinite().all()


@pytest.mark.parametrize("recipe", find_recipes().values(), ids=lambda recipe: recipe.name)
def test_the_cache_is_as_told(case: Case, recipe: Recipe) -> None:
    """The head counts that `show` reads from the result are those that the recipe tells of its options."""
    for number, options in case.trials(recipe):
        with open_checkpoint(case.converted(recipe, options, f"{recipe.name}-{number}")) as checkpoint:
            after = bind(checkpoint.config, checkpoint.tensors)
        shapes = recipe.shapes(case.architecture, options)
        assert [layer.geometry for layer in after.layers] == shapes


@pytest.mark.parametrize("model_type", [sample(name) for name in WRAPPERS])
def test_a_language_model_inside_another(model_type: str, tmp_path: Path) -> None:
    """What sees or hears is left alone; the rest is as for the inner type, over which all laws run."""
    case, recipe = case_of(model_type, {}, tmp_path), find_recipes()["gqa"]
    same = case.converted(recipe, recipe.identity(case.architecture), "identity")
    assert tensors(same) == tensors(case.folder)
    test_dry_is_real_and_stock_loads_it(case, recipe)
    test_the_cache_is_as_told(case, recipe)


def test_round_trip(case: Case) -> None:
    """Loaded and saved by transformers, a result keeps its bytes from then on."""
    recipe = find_recipes()["gqa"]
    out = case.converted(recipe, recipe.trials(case.architecture)[0], "gqa-0")
    model = auto_class(case.model_type).from_pretrained(out, dtype="auto")
    model.save_pretrained(case.scratch / "saved")
    auto_class(case.model_type).from_pretrained(case.scratch / "saved", dtype="auto").save_pretrained(case.scratch / "again")
    weights = "model.safetensors"
    assert (case.scratch / "saved" / weights).read_bytes() == (case.scratch / "again" / weights).read_bytes()
    assert torch.equal(case.logits(case.scratch / "saved"), case.logits(out))

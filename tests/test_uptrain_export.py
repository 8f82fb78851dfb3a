"""What a run writes: every stored tensor that the class reads is the trained one, under whatever name it was stored."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.folders import letter_tokenizer
from tests.test_uptrain_seq2seq import SENTINELS, tiny_t5
from tests.tiny import tiny_model
from tests.uptraining import QUIET, config, one_thread, text
from upfit.architecture.loading import load_strictly
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.model.export import export, layout_of, namesakes
from upfit.uptrain.model.model_traits import is_seq2seq, load, read_config
from upfit.uptrain.model.parallel import gathered
from upfit.uptrain.train import uptrain

WEIGHTS = "model.safetensors"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Text as shards, by a tokenizer with sentinels for those models that want them."""
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(folder / "tokenizer")
    (folder / "a.txt").write_text("\n".join(text(seed) for seed in range(30)))
    prepare([str(folder / "a.txt")], folder / "data", str(folder / "tokenizer"), "text", QUIET)
    with one_thread():
        yield folder


def save_tokenizer(folder: Path) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([f"<extra_id_{index}>" for index in range(SENTINELS)])
    tokenizer.save_pretrained(folder)


def saved(folder: Path, model: str | PreTrainedModel, **changes: Any) -> Path:
    model = tiny_model(model, vocab_size=128, **changes) if isinstance(model, str) else model
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def converted(folder: Path, model_type: str, recipe: str, **options: Any) -> Path:
    source, found = saved(folder.with_name("source"), model_type), find_recipes()[recipe]
    convert(found, str(source), folder, found.options(**options), Settings(verify=False), QUIET)
    return folder


def run(source: Path, data: Path, out: Path) -> State:
    stage = None if is_seq2seq(read_config(source)) else "lm"
    settings = config(tokens="256", stages=stage, teacher="none", learning_rate=0.05, weight_decay=0.0)
    uptrain(str(source), str(data), out, settings, False, False, QUIET)
    load_strictly(out)
    return load_file(out / WEIGHTS)


def written(source: Path, out: Path) -> State:
    """What a run would write that has moved every parameter of the model by something of its own."""
    student = load(source, torch.float32, torch.device("cpu"))
    layout = layout_of(student, source)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(name.encode()))))
    out.mkdir()
    export(student, gathered(student, True), layout, source, out)
    load_strictly(out)
    return load_file(out / WEIGHTS)


def without(prefix: str) -> Callable[[State], State]:
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def twice(name: str, *others: str) -> Callable[[State], State]:
    return lambda state: state | {other: state[name].clone() for other in others}


def beside(state: State) -> State:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "steps": torch.arange(3)}
    return state | extra


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[State], State]]] = {
    "tied, stored twice": (
        lambda path: saved(path, "llama", tie_word_embeddings=True),
        twice("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "llama without prefix": (lambda path: saved(path, "llama"), without("model.")),
    "tied llama without prefix, stored twice": (
        lambda path: saved(path, "llama", tie_word_embeddings=True),
        lambda state: without("model.")(twice("model.embed_tokens.weight", "lm_head.weight")(state)),
    ),
    "gpt2 without prefix": (lambda path: saved(path, "gpt2"), without("transformer.")),
    "bloom without prefix": (lambda path: saved(path, "bloom"), without("transformer.")),
    "t5 with every name of its embedding": (
        lambda path: saved(path, tiny_t5()),
        twice("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    "tensors that the class does not read": (lambda path: saved(path, "llama"), beside),
    "experts without prefix": (lambda path: saved(path, "mixtral"), without("model.")),
    "fused projections without prefix": (lambda path: saved(path, "phi3"), without("model.")),
    "our grouped class without prefix": (
        lambda path: converted(path, "gpt2", "gqa", kv_heads=2, method="mean"),
        without("transformer."),
    ),
    "our differential class without prefix": (lambda path: converted(path, "llama", "diff"), without("model.")),
    "our contextual class without prefix": (
        lambda path: converted(path, "llama", "cope", gates="constant", positions=6),
        without("model."),
    ),
}


@pytest.mark.parametrize("make,change", CASES.values(), ids=CASES)
def test_other_names_change_nothing_but_names(
    tmp_path: Path, make: Callable[[Path], Path], change: Callable[[State], State]
) -> None:
    """A folder with other names for its tensors becomes, trained, what the usual one becomes, with those names."""
    source = make(tmp_path / "model")
    before, usual = load_file(source / WEIGHTS), written(source, tmp_path / "usual")
    assert before.keys() == usual.keys() and not any(torch.equal(before[name], usual[name]) for name in usual)
    same(others(source, change, lambda: written(source, tmp_path / "others")), change(usual))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied, stored twice", "gpt2 without prefix", "t5 with every name of its embedding"])
def test_a_whole_run_keeps_the_names(place: Path, tmp_path: Path, name: str) -> None:
    make, change = CASES[name]
    source = make(tmp_path / "model")
    usual = run(source, place / "data", tmp_path / "usual")
    same(others(source, change, lambda: run(source, place / "data", tmp_path / "others")), change(usual))


def others(source: Path, change: Callable[[State], State], make: Callable[[], State]) -> State:
    """What is made of `source` once its tensors have other names."""
    before = load_file(source / WEIGHTS)
    save_file(change(before), source / WEIGHTS, metadata={"format": "pt"})
    assert change(before).keys() != before.keys()
    return make()


def same(state: State, wanted: State) -> None:
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name


def test_what_could_not_be_written_is_told_before_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "model", "llama")
    kept = "model.norm.weight"
    monkeypatch.setattr("upfit.uptrain.model.export.as_saved", lambda student, weights: {kept: weights[kept]})
    with pytest.raises(UpfitError, match="as nothing .*: it could not be written") as caught:
        run(source, place / "data", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.uptrain").exists()


def test_whole_numbers_cannot_hold_what_is_trained(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "llama")
    state = load_file(source / WEIGHTS)
    save_file(state | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UpfitError, match=r"model.norm.weight, in I32.*floating type"):
        layout_of(load(source, torch.float32, torch.device("cpu")), source)


def test_of_several_tensors_that_make_up_one_the_namesake_is_meant() -> None:
    experts = [f"model.layers.0.experts.{number}.w1.weight" for number in (1, 11)]
    assert namesakes("layers.0.experts.1.w1.weight", experts) == experts[:1]
    assert namesakes("base.model.layers.0.experts.11.w1.weight", experts) == experts[1:]
    assert namesakes(experts[1], experts) == experts[1:] and namesakes("lm_head.weight", ["embedding"]) == ["embedding"]
    assert namesakes("layers.0.experts.2.w1.weight", experts) == []


def test_a_layout_looks_at_no_value(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "mixtral")
    student = load(source, torch.float32, torch.device("cpu"))
    layout = layout_of(student, source)
    assert layout == {name: name for name in load_file(source / WEIGHTS)}
    assert layout_of(nn.Module.to(student, "meta"), source) == layout

"""What is asked of the installed transformers by name is there, and a cache that a model does not use is noticed."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from tests.tiny import tiny_config, tiny_inputs, tiny_model
from upfit.architecture.forwards import CACHE_NAMES, LOGITS_TO_KEEP, POSITIONS, cache_name, cache_of, takes
from upfit.calibration.layerwise import observed_model
from upfit.calibration.observe import NAME
from upfit.errors import UpfitError
from upfit.evaluate.cache import CachedModel, tokens_held
from upfit.evaluate.probes.reader import check_goes_on
from upfit.uptrain.model.parallel import layer_classes

CLOSE = 1e-5  # of the largest logit: float32, through different shapes
# Plain; soft caps and windows; sinks; windows of another kind; linear attention between; our own class's family.
FAMILIES = ("llama", "gemma2", "gpt_oss", "cohere2", "qwen3_next", "gpt2")


def mamba() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def in_pieces(model: Any, ids: Tensor, size: int) -> Tensor:
    """The logits of all tokens, `size` of them at a time after the cache of those before."""
    run, cache, parts = CachedModel(model), None, []
    for piece in ids.split(size, 1):
        logits, cache = run.logits(piece, cache, piece.shape[1])
        parts.append(logits)
    return torch.cat(parts, 1)


def test_what_is_asked_for_by_name_is_there() -> None:
    """Each of these is looked up without an error where it is missing."""
    model: Any = tiny_model("llama")
    assert cache_name(model.forward) == cache_name(model.model.layers[0].self_attn.forward)
    assert takes(model.forward, LOGITS_TO_KEEP) and takes(model.base_model.forward, POSITIONS)
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    assert observed_model(tiny_config("llama").to_dict()).config._attn_implementation == NAME
    ids = tiny_inputs(model)["input_ids"]
    told = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert tokens_held(cache_of(told)) == ids.shape[1] + 1 and cache_of(model(ids, use_cache=False)) is None


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("size", [1, 5])
def test_cached_logits_are_whole_logits(model_type: str, size: int) -> None:
    model: Any = tiny_model(model_type)
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        alone = torch.cat([model(piece, use_cache=False).logits for piece in ids.split(size, 1)], 1)
    scale = whole.abs().max()
    assert (in_pieces(model, ids, size) - whole).abs().max() < CLOSE * scale < (alone - whole).abs().max() / 10
    check_goes_on(CachedModel(model), ids)


def test_a_state_that_does_not_grow_is_a_cache_too() -> None:
    model = mamba()
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(in_pieces(model, ids, 1), model(ids, use_cache=False).logits, atol=1e-4)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_given_by_the_name_that_the_forward_has(name: str) -> None:
    run = CachedModel(Counting(name))
    _, cache = run(torch.zeros(1, 4, dtype=torch.long))
    assert run.cache_name == name and tokens_held(run(torch.zeros(1, 3, dtype=torch.long), cache)[1]) == 7


class Counting:
    """A model that has nothing but a cache of as many tokens as it was fed, by this name."""

    def __init__(self, name: str) -> None:
        def forward(input_ids: Tensor, use_cache: bool = True, **others: Any) -> Any:
            cache, states = others.get(name) or DynamicCache(), torch.zeros(1, 1, input_ids.shape[1], 1)
            cache.update(states, states, 0)
            return Output(logits=torch.zeros(1, input_ids.shape[1], 2), **{name: cache})

        names = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in ("input_ids", name)]
        vars(forward)["__signature__"] = inspect.Signature(names)
        self.forward = forward

    def __call__(self, **given: Any) -> Any:
        return self.forward(**given)


class Output(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Forgetful(LlamaForCausalLM):
    """Takes a cache by its name and begins a new one."""

    def forward(self, input_ids: Any = None, cache: Any = None, **options: Any) -> Any:
        return super().forward(input_ids, **options)


class Renamed(LlamaForCausalLM):
    """Its cache is called what nobody knows yet, and what it is given by another name is one option of many."""

    def forward(self, input_ids: Any = None, memory: Any = None, use_cache: bool = True, **options: Any) -> Any:
        return super().forward(input_ids, use_cache=use_cache)


class ForgetfulMamba(MambaForCausalLM):
    def forward(self, input_ids: Any = None, cache: Any = None, use_cache: bool = True) -> Any:
        return super().forward(input_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgetful, "it held 4 tokens, 3 were fed, and now it holds 3"),
        (Renamed, "by none of the names cache, past_key_values"),
        (ForgetfulMamba, "did not go on from the cache"),
    ],
)
def test_a_cache_that_is_not_used_never_passes(kind: Any, message: str) -> None:
    config = mamba().config if kind is ForgetfulMamba else tiny_config("llama")
    run, ids = CachedModel(kind(config).eval()), torch.zeros(1, 3, dtype=torch.long)
    _, cache = run(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UpfitError, match=message):
        run(ids, cache)
    with pytest.raises(UpfitError, match="by none of the names|did not go on from the cache that it was given"):
        check_goes_on(run, torch.zeros(1, 12, dtype=torch.long))

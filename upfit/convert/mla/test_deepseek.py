"""A latent attention written as the stock DeepSeek-V3 class computes what its source does."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from tests.full_rank import own_checkpoint, source
from upfit.architecture.retarget.draft import Draft
from upfit.convert.mla.deepseek import stock_config, to_deepseek, why_not
from upfit.convert.mla.deepseek_families import FAMILIES, read_family
from upfit.errors import UpfitError

SINGLE, DOUBLE = 1e-4, 1e-9  # of logits about 1
NORMS = 5e-6  # what norms and sines in float32 cost a model in float64
ROUNDED = 0.1  # of logits about 1, in bfloat16
TINY_ERROR = 1e-13  # of the norm's constant, for DOUBLE

DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = DEFAULT | {"rope_type": "llama3", "rope_theta": 10.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 1000}
YARN = DEFAULT | {"rope_type": "yarn", "rope_theta": 3.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 3.0, "beta_slow": 2.0}
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2, "sliding_window": 16}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 1.7, "attention_multiplier": 0.3}

# Name of the case: model type, its settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cwm": ("cwm", FULL | {"rope_parameters": DEFAULT}),
    "ernie4_5": ("ernie4_5", {"tie_word_embeddings": True}),
    "exaone": ("exaone", {}),
    "glm": ("glm", {}),
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "helium": ("helium", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "hyperclovax": ("hyperclovax", GRANITE | {"use_post_norm": False}),
    "internlm3": ("internlm3", {"qkv_bias": False}),
    "iquestcoder": ("iquestcoder", {}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-heads": ("llama", {"num_key_value_heads": 2}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "ministral": ("ministral", FULL),
    "mistral": ("mistral", {"rope_parameters": DEFAULT | {"rope_theta": 1e6}}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "qwen2": ("qwen2", {"rms_norm_eps": 4e-6}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "seed_oss": ("seed_oss", {"attention_bias": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1]}),
    "yi": ("llama", {"num_key_value_heads": 4, "rope_parameters": DEFAULT | {"rope_theta": 5e6}}),
}


class OwnDraft(Draft):
    """The draft of a checkpoint whose file names are those of the parameters."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.raw, self.config = config, read_family(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        tied = {"lm_head.weight": ["model.embed_tokens.weight"]} if self.config.tie_word_embeddings else {}
        self.names: Any = SimpleNamespace(shapes=shapes, tied=tied)
        self.disk = {name: name for name in tensors}
        self.renames, self.rules = {}, []


def rewritten(config: dict[str, Any], tensors: dict[str, Tensor], error: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the stock class, each tensor written once, with the shape and type that a dry run shows."""
    draft = OwnDraft(config, tensors)
    settings = to_deepseek(draft, error)
    state = {new: tensors[old] for new, old in draft.renames.items()}
    for rule in draft.rules:
        result = rule.apply({name: tensors[name] for name in rule.reads})
        planned = rule.apply({name: tensors[name].to("meta") for name in rule.reads})
        assert set(result) == set(planned) == set(rule.writes)
        assert not set(result) & set(state), "a tensor is written twice"
        assert all((tensor.shape, tensor.dtype) == (planned[n].shape, planned[n].dtype) for n, tensor in result.items())
        state |= result
    return settings, state


def loaded(settings: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v3"].from_dict(settings), dtype=dtype)
    assert [type(model).__name__] == settings["architectures"]
    model.load_state_dict(state)
    return model.eval()


def both(case: str, dtype: torch.dtype, error: float = 1e-7) -> tuple[Any, Any]:
    model_type, settings = CASES[case]
    model = source(model_type, dtype, **settings)
    return model, loaded(*rewritten(*own_checkpoint(model), error), dtype)


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result.float() if result.dtype == torch.bfloat16 else result


def apart(model: Any, other: Any) -> float:
    expected = logits(model)
    assert expected.std() > 0.1, "logits that are all alike show nothing"
    return float((logits(other) - expected).abs().max())


class Wide:
    """torch, with float64 where the classes ask for float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_the_source(case: str) -> None:
    assert apart(*both(case, torch.float32)) < SINGLE
    assert apart(*both(case, torch.float64)) < NORMS


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"ernie4_5"}))  # Ernie turns queries and keys in float32 by a method
def test_full_rank_is_exact_but_for_rounding(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With norms, rotations and softmax in float64 too, nothing is left but the norm's constant."""
    model = source(CASES[case][0], torch.float32, **CASES[case][1])
    modules: list[ModuleType] = [sys.modules[type(model).__module__], modeling_deepseek_v3, modeling_rope_utils]
    for module in modules:
        monkeypatch.setattr(module, "torch", Wide())
    assert apart(*both(case, torch.float64, TINY_ERROR)) < DOUBLE


def test_every_family_is_tried() -> None:
    assert {model_type for model_type, _ in CASES.values()} == FAMILIES.keys()


def test_the_error_is_as_large_as_the_equation_says() -> None:
    """s² mean(c²) / (2 ε): a hundred times the bound, more error, and never more than the bound in the latent."""
    model = source("llama", torch.float64)
    config, tensors = own_checkpoint(model)
    coarse, fine = (apart(model, loaded(*rewritten(config, tensors, error), torch.float64)) for error in (1e-2, 1e-7))
    assert 100 * fine < coarse < 1e-1


@pytest.mark.parametrize("case", ["llama-tied", "phi3", "granite"])
def test_generation_with_a_cache_is_that_without(case: str) -> None:
    model, stock = both(case, torch.float32)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache, without = (stock.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache, model.generate(ids, **options))


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_the_fastest_pairs_alone(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose slower pairs are zero, with only its fastest ones kept: θ' turns them by their own angles."""
    for name in ("transformers.models.llama.modeling_llama", modeling_deepseek_v3.__name__, modeling_rope_utils.__name__):
        monkeypatch.setattr(sys.modules[name], "torch", Wide())
    model = source("llama", torch.float64)
    rows = [*range(pairs), *range(4, 4 + pairs)]
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight.data
        keys[[row for row in range(8) if row not in rows]] = 0
    config, tensors = own_checkpoint(model)
    for index in range(2):
        prefix = f"model.layers.{index}.self_attn."
        tensors[prefix + "q_proj.weight"] = tensors[prefix + "q_proj.weight"].unflatten(0, (4, 8))[:, rows].flatten(0, 1)
        latent = prefix + "kv_a_proj_with_mqa.weight"
        tensors[latent] = torch.cat([tensors[latent][:8], tensors[latent][8:][rows]])
    config["mla"]["layers"] = [{"latent": 8, "unrotated": 0, "columns": list(range(pairs))}] * 2
    settings, state = rewritten(config, tensors, TINY_ERROR)
    assert settings["rope_parameters"]["rope_theta"] == pytest.approx(1e4 ** (pairs / 4))
    assert apart(model, loaded(settings, state, torch.float64)) < DOUBLE


def test_a_folder_loads_as_it_is(tmp_path: Path) -> None:
    """Every tensor in its place; token ids, type, positions and generation settings as in the source."""
    model = source("qwen3", torch.bfloat16, tie_word_embeddings=True)
    settings, state = rewritten(*own_checkpoint(model), 1e-7)
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    GenerationConfig(eos_token_id=[2, 7], pad_token_id=0, bos_token_id=1, top_k=7, do_sample=True).save_pretrained(tmp_path)
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    stock, report = loading
    assert not any(report.values()), report
    assert (stock.dtype, stock.config.max_position_embeddings, stock.config.vocab_size) == (torch.bfloat16, 64, 64)
    assert [getattr(stock.config, f"{name}_token_id") for name in ("pad", "bos", "eos")] == [0, 1, [2, 5]]
    assert (stock.generation_config.eos_token_id, stock.generation_config.top_k) == ([2, 7], 7)
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    assert torch.equal(stock.lm_head.weight, model.lm_head.weight)
    assert apart(model, stock) < ROUNDED


def test_what_engines_read_stands_in_the_config() -> None:
    """Other engines divide by routed_scaling_factor in float16, tie nothing, and take the norm's constant from the config."""
    settings = stock_config(own_checkpoint(source("granite", torch.float32, **GRANITE))[0])
    wanted: dict[str, Any] = {
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "q_lora_rank": None,
    }
    wanted |= {"first_k_dense_replace": 2, "num_hidden_layers": 2, "num_key_value_heads": 4, "num_attention_heads": 4}
    wanted |= {"kv_lora_rank": 8, "qk_nope_head_dim": 0, "qk_rope_head_dim": 8, "v_head_dim": 8, "attention_bias": False}
    wanted |= {"num_nextn_predict_layers": 0, "rope_theta": 1e4, "rope_interleave": True, "dtype": "float32"}
    assert {key: settings[key] for key in wanted} == wanted
    rope = settings["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 1.0, 1e4)
    assert {"rope_theta": 1e4, **settings["rope_scaling"]} == rope
    assert not {"mla", "auto_map", "base_model_type", "embedding_multiplier"} & settings.keys()
    # llama.cpp asserts as much of any model that names experts, before it sees that no layer has them.
    assert 1 <= settings["num_experts_per_tok"] <= settings["n_routed_experts"]
    assert 1 <= settings["topk_group"] <= settings["n_group"] < settings["n_routed_experts"]


LINEAR = DEFAULT | {"rope_type": "linear", "factor": 2.0}
WINDOW = {"sliding_window": 16}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "bias": ("llama", {}, {"bias": True}, "no biases"),
    "output bias": ("llama", {"attention_bias": True}, {}, r"no self_attn.o_proj.bias"),
    "MLP bias": ("llama", {"mlp_bias": True}, {}, "no mlp.gate_proj.bias"),
    "norms": ("hyperclovax", {"use_post_norm": True}, {}, "no post_norm1.weight"),
    "window": ("mistral", WINDOW, {}, "to the last 16"),
    "windows here and there": (
        "ministral",
        WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
        {},
        "to the last 16",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, {}, "this model has gelu"),
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}, {}, "gelu_pytorch_tanh"),
    "family": ("olmo2", {}, {}, "the layers of olmo2 are not"),
    "linear": ("llama", {"rope_parameters": LINEAR}, {}, r"other angles \(linear"),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 20}}, {}, r"other angles \(llama3"),
    "dynamic": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, {}, "rope type dynamic"),
    "several": ("llama", {}, {"columns": [0, 0, 1, 2]}, "this model several"),
    "the other half": ("llama", {}, {"columns": [0, 4, 1, 2]}, "this model several"),
    "chosen": ("llama", {}, {"columns": [0, 2]}, "chose others for its 2 keys"),
    "unsorted": ("llama", {}, {"columns": [1, 0]}, "chose others for its 2 keys"),
    "none": ("llama", {}, {"columns": []}, "this model none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused(case: str) -> None:
    model_type, settings, changes, message = REFUSED[case]
    config, _ = own_checkpoint(source(model_type, torch.float32, **settings))
    config["mla"] |= {key: value for key, value in changes.items() if key != "columns"}
    if "columns" in changes:
        config["mla"]["layers"] = [layer | {"columns": changes["columns"]} for layer in config["mla"]["layers"]]
    assert_refused(config, message)


def assert_refused(config: dict[str, Any], message: str) -> None:
    reason = why_not(config)
    assert reason is not None
    with pytest.raises(UpfitError, match=message):
        stock_config(config)


def test_layers_that_differ_are_refused() -> None:
    config, _ = own_checkpoint(source("llama", torch.float32))
    layer = config["mla"]["layers"][0]
    config["mla"]["layers"] = [layer, layer | {"latent": 4}]
    assert_refused(config, "these layers differ")
    config["mla"]["layers"] = [layer]
    assert_refused(config, "in 1 of 2")


def test_other_models_are_refused() -> None:
    """Experts, soft caps, a type in which the scaled latent is zero."""
    for name, settings, message in (
        ("mixtral", {"num_local_experts": 4}, "experts"),
        ("gemma2", {"final_logit_softcapping": 30.0}, "soft caps"),
    ):
        config = CONFIG_MAPPING[name](**settings).to_dict()
        assert_refused(config | {"model_type": "upfit_mla", "base_model_type": name, "mla": {}}, message)
    config, tensors = own_checkpoint(source("llama", torch.float32))
    assert_refused(config | {"dtype": "float16"}, "too small for float16")
    draft = OwnDraft(config, tensors)
    to_deepseek(draft)
    rule = next(rule for rule in draft.rules if "latent" in rule.label)
    with pytest.raises(UpfitError, match="too small for float16"):
        rule.apply({name: tensors[name].half() for name in rule.reads})

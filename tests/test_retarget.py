"""A checkpoint seen as one of another family computes the same.

Tiny models are made, moved and compared in memory, in float64 where their class can.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from upfit.architecture.retarget.draft import rotary_share
from upfit.architecture.retarget.falcon import is_multi_head
from upfit.architecture.retarget.nemotron import SMALLEST, powers
from upfit.architecture.retarget.retarget import MAKERS, retarget
from upfit.architecture.table import table
from upfit.checkpoint.reader import most_positions, open_checkpoint
from upfit.checkpoint.source import find_source
from upfit.convert.conversion import Settings, convert
from upfit.convert.describe import describe
from upfit.convert.recipe import find_recipes
from upfit.convert.result import Conversion
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.uptrain.model.layerwise import attention_paths

CLOSE = 1e-10
COARSE = 2e-6  # GPT-J and CodeGen multiply queries by keys in float32, and have sines and cosines in it

WIDE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
NEOX = WIDE | {"intermediate_size": 40, "rotary_pct": 0.5}
OPT = WIDE | {"ffn_dim": 40}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
XGLM = {"vocab_size": 64, "d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 32}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": False}
LINEAR = {"rope_type": "linear", "factor": 2.0}

# Name of the case: model type, its configuration, what it becomes.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox": ("gpt_neox", NEOX, "phi"),
    "gpt_neox-tied": ("gpt_neox", NEOX | {"tie_word_embeddings": True, "attention_bias": False}, "phi"),
    "gpt_neox-linear": ("gpt_neox", NEOX | {"rope_scaling": LINEAR, "rotary_emb_base": 500}, "phi"),
    "gpt_neox-after": ("gpt_neox", NEOX | {"use_parallel_residual": False}, "nemotron"),
    "gpt_neox_japanese": ("gpt_neox_japanese", WIDE | {"rotary_pct": 0.5}, "nemotron"),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}, "phi"),
    "gptj-tied": ("gptj", GPT | {"rotary_dim": 8, "n_inner": 40, "tie_word_embeddings": True}, "phi"),
    "codegen": ("codegen", GPT | {"rotary_dim": 2, "n_head": 8}, "phi"),
    "gpt2": ("gpt2", GPT, "gpt_bigcode"),
    "gpt2-untied": ("gpt2", GPT | {"tie_word_embeddings": False, "n_inner": 40}, "gpt_bigcode"),
    "gpt2-scaled": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, "gpt_bigcode"),
    "gpt-sw3": ("gpt-sw3", GPT, "gpt_bigcode"),
    "opt": ("opt", OPT, "gpt_bigcode"),
    "opt-bare": ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}, "gpt_bigcode"),
    "biogpt": ("biogpt", WIDE | {"intermediate_size": 40}, "gpt_bigcode"),
    "biogpt-untied": ("biogpt", WIDE | {"intermediate_size": 40, "tie_word_embeddings": False}, "gpt_bigcode"),
    "xglm": ("xglm", XGLM, "gpt_bigcode"),
    "falcon": ("falcon", FALCON, "falcon"),
    "falcon-alibi": ("falcon", FALCON | {"alibi": True, "bias": True}, "falcon"),
}


@dataclass(frozen=True)
class Described:
    shape: tuple[int, ...]
    dtype: str = "F64"


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """XGLM's class runs in float64 only where that is torch's default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(model_type: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a file of this model holds: a tied head is not stored."""
    left_out = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def config_json(model: PreTrainedModel) -> dict[str, Any]:
    return model.config.to_dict() | {"architectures": [type(model).__name__]}


def moved(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model of the other family, every parameter of it given, and nothing else."""
    seen = retarget(config, {name: Described(tuple(tensor.shape)) for name, tensor in tensors.items()})
    assert seen is not None
    state = {new: tensors[old] for new, old in seen.renames.items()}
    for rule in seen.rules:
        made = rule.apply({name: tensors[name] for name in rule.reads})
        planned = rule.apply({name: tensors[name].to("meta") for name in rule.reads})
        assert set(made) == set(planned) == set(rule.writes)
        assert not set(made) & set(state), "a tensor is given twice"
        for name, tensor in made.items():
            assert (tensor.shape, tensor.dtype) == (planned[name].shape, planned[name].dtype)
        state |= made
    parsed = CONFIG_MAPPING[seen.config["model_type"]].from_dict(seen.config)
    model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float64)
    assert [type(model).__name__] == seen.config["architectures"]
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return model.eval()


def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two rows of tokens, and eight tokens after them."""
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        return logits, tokens


@pytest.mark.parametrize("case", CASES)
def test_another_family_computes_the_same(case: str) -> None:
    model_type, settings, target = CASES[case]
    source = tiny(model_type, settings)
    result = moved(config_json(source), stored(source))
    assert result.config.model_type == target
    (before, tokens), (after, same_tokens) = answers(source), answers(result)
    assert (before - after).abs().max() < (COARSE if model_type in ("gptj", "codegen") else CLOSE)
    assert torch.equal(tokens, same_tokens)


def test_every_family_is_tried() -> None:
    """The types of the table, their targets, and the functions that make them agree; Falcon stays a Falcon."""
    tried = {(model_type, target) for model_type, _, target in CASES.values()} - {("falcon", "falcon")}
    assert tried == {(model_type, target) for model_type, targets in table().retargets.items() for target in targets}
    assert {*MAKERS, "gpt_neox"} == table().retargets.keys()
    assert {target for _, target in tried} <= table().entries.keys()


def test_old_files_are_read() -> None:
    """Names without the base model's prefix, and buffers that are no parameters any more."""
    source = tiny("gpt2", GPT)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored(source).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    before, after = answers(source)[0], answers(moved(config_json(source), tensors))[0]
    assert (before - after).abs().max() < CLOSE
    source = tiny("gpt_neox", NEOX)
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in stored(source).items()}
    tensors |= {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    assert (answers(source)[0] - answers(moved(config_json(source), tensors))[0]).abs().max() < CLOSE


def test_what_follows_a_family_about() -> None:
    """Token ids, the type, tying, and the tokenizer's class, which the new model type would not lead to."""
    config = config_json(tiny("xglm", XGLM)) | {"torch_dtype": "float16", "eos_token_id": 7}
    config.pop("dtype", None)
    seen = retarget(config, {name: Described(tuple(t.shape)) for name, t in stored(tiny("xglm", XGLM)).items()})
    assert seen is not None
    wanted = {"torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 7, "pad_token_id": 1, "tie_word_embeddings": True}
    assert {key: seen.config[key] for key in wanted} == wanted
    assert seen.config["tokenizer_class"] == "XGLMTokenizer"
    assert "dtype" not in seen.config
    assert "gpt_bigcode" in seen.adapted_because


def test_rotated_widths_survive_their_share() -> None:
    """Phi keeps the width of what is rotated as a share of the head, and rounds down."""
    pairs = [(width, head_dim) for head_dim in range(2, 257) for width in range(2, head_dim + 1, 2)]
    assert all(int(head_dim * rotary_share(width, head_dim)) == width for width, head_dim in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_less_one_lose_nothing(dtype: torch.dtype) -> None:
    """Nemotron adds one to what it stores, which alone would cost small scales their last bits."""
    scale = torch.cat([torch.randn(4096, dtype=torch.float32), torch.tensor([0.0, 0.5, 1.0, 0.25, -2.0])]).to(dtype)
    scale = scale[(scale == 0) | (scale.abs() > 2.0**SMALLEST)]
    power = powers(scale)
    again = ((scale / power - 1) + 1) * power
    assert torch.equal(again, scale)
    assert not torch.equal((scale - 1) + 1, scale)
    assert torch.equal(power.log2().frac() if (power > 0).all() else power.abs().log2().frac(), torch.zeros_like(power))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("opt", OPT | {"do_layer_norm_before": False}, "normalises after"),
        ("opt", OPT | {"word_embed_proj_dim": 16}, "its embeddings have another width"),
        ("gpt2", GPT | {"add_cross_attention": True}, "cross-attention"),
        ("gptj", GPT | {"rotary_dim": 3}, "rotary_dim 3"),
        ("falcon", FALCON | {"parallel_attn": False}, "MLP after the attention"),
    ],
)
def test_what_the_other_family_cannot_say_is_refused(model_type: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message):
        retarget({"model_type": model_type, **settings}, {})


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-linear", "gpt_neox-after"])
def test_a_rotation_is_told_to_older_tools_too(name: str) -> None:
    """What changes its angles as well, and where nothing does, nothing."""
    source = tiny(*CASES[name][:2])
    seen = retarget(config_json(source), {name: Described(tuple(tensor.shape)) for name, tensor in stored(source).items()})
    assert seen is not None and seen.config["rope_theta"] == seen.config["rope_parameters"]["rope_theta"]
    assert seen.config["partial_rotary_factor"] == 0.5
    assert seen.config.get("rope_scaling") == ({"rope_type": "linear", "factor": 2.0} if "linear" in name else None)


def test_a_falcon_is_multi_head_where_it_says_so_and_has_the_older_form() -> None:
    """What a config does not say is as the class has it."""
    configs: list[dict[str, Any]] = [
        {},
        {"multi_query": False},
        {"multi_query": True},
        {"multi_query": False, "new_decoder_architecture": True},
    ]
    assert [is_multi_head(config) for config in configs] == [False, True, False, False]


def test_families_that_need_no_other_are_left_alone() -> None:
    old = {"new_decoder_architecture": False}  # multi-query, where it does not say otherwise
    kinds = [{"multi_query": True}, {}, old, {"new_decoder_architecture": True}, {**old, "multi_query": True}]
    configs: list[dict[str, Any]] = [{"model_type": "llama"}, *({"model_type": "falcon", **kind} for kind in kinds)]
    for config in configs:
        assert retarget(config, {}) is None
    with pytest.raises(UpfitError, match="GPT2Model cannot be moved"):
        retarget({"model_type": "gpt2", "architectures": ["GPT2Model"], **GPT}, {})


QUIET = Output(quiet=True)


def converted(recipe: str, source: Path, out: Path, **options: Any) -> Conversion:
    verify = options.pop("verify", False)
    settings = Settings(verify=verify, dry_run=options.pop("dry_run", False))
    found = find_recipes()[recipe]
    return convert(found, str(source), out, found.options(**options), settings, QUIET)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(params=["gpt_neox", "gptj", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A source in several files."""
    model_type, settings, _ = CASES[request.param]
    tiny(model_type, settings).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return tmp_path / "source"


@pytest.mark.slow
def test_a_conversion_of_what_is_seen_is_that_of_what_is_written(folder: Path) -> None:
    """With all heads the result computes what the source does, and fewer heads are made of either alike, as a dry run tells."""
    same, few, again = (folder.parent / name for name in ("same", "few", "again"))
    answer = converted("gqa", folder, same, kv_heads=4, verify=True)
    assert answer.record()["verify"]["max_difference"] < COARSE
    told = converted("gqa", folder, few, kv_heads=1, method="mean", dry_run=True).tensors
    assert converted("gqa", folder, few, kv_heads=1, method="mean").tensors == told
    converted("gqa", same, again, kv_heads=1, method="mean")
    one, other = tensors_of(few), tensors_of(again)
    assert all(list(one[row.tensor].shape) == row.after for row in told)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_change_of_family_is_told(tmp_path: Path) -> None:
    """By show, in recipe.json, and to who would set the attention of both beside each other."""
    tiny("gpt_neox", NEOX).save_pretrained(tmp_path / "source")
    assert describe(str(tmp_path / "source")).converted_as == "phi"
    converted("gqa", tmp_path / "source", tmp_path / "out", kv_heads=2, method="mean")
    (step,) = json.loads((tmp_path / "out" / "recipe.json").read_text())["steps"]
    assert (step["retarget"]["from"], step["retarget"]["to"]) == ("gpt_neox", "phi")
    assert describe(str(tmp_path / "out")).converted_as is None
    with pytest.raises(UpfitError, match="converted as phi"):
        attention_paths(find_source(str(tmp_path / "source")))


def test_positions_are_counted_under_either_name() -> None:
    assert (most_positions({"n_positions": 1024}), most_positions({"text_config": {"max_position_embeddings": 8}})) == (1024, 8)
    assert most_positions({}) is None


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "becomes"), [(1, "gpt_bigcode"), (2, "upfit_gqa"), (4, "gpt_bigcode")])
def test_stock_classes_before_ours(kv_heads: int, becomes: str, tmp_path: Path) -> None:
    """OPT can be a GPTBigCode with one key/value head or all, and our own class with any other number of them."""
    given: dict[str, Any] = OPT
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["opt"](**given)).eval()
    model.save_pretrained(tmp_path / "source")
    told = describe(str(tmp_path / "source")).can_become
    assert "gqa --kv-heads 1" in told and "gqa --kv-heads 1|2" in told
    recipe = find_recipes()["gqa"]
    options = recipe.options(kv_heads=kv_heads, method="mean")
    convert(recipe, str(tmp_path / "source"), tmp_path / "out", options, Settings(), Output(quiet=True))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == becomes
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(3, 60, (1, 8))
    cached, plain = (grown.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)

"""Differential attention: the laws of its own, on tiny models and against plain float64 code of the papers' equations."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert, merge
from upfit.convert.diff.recipe import Options
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.output import Output

QUIET = Output(quiet=True)
RECIPE = find_recipes()["diff"]
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")


def made(tmp_path: Path, model_type: str = "llama", **options: Any) -> tuple[Path, Path]:
    """(source folder, converted folder)."""
    source, out = tmp_path / "source", tmp_path / "-".join(["out", *map(str, options.values())])
    if not source.exists():
        tiny_model(model_type).save_pretrained(source)
    convert(RECIPE, str(source), out, Options(**options), Settings(verify=False), QUIET)
    return source, out


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    result: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **settings)
    model, info = result
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def shaken(model: nn.Module, size: float = 0.1) -> Any:
    """The same model away from its start, where a pair's halves are equal and much cancels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def ids_of(rows: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v2_and_dex_begin_bit_equal(tmp_path: Path, dtype: torch.dtype, attention: str) -> None:
    ids = ids_of()
    for variant in ("v2", "dex"):
        source, out = made(tmp_path, variant=variant)
        with torch.no_grad():
            before, after = (loaded(f, dtype, attn_implementation=attention)(ids).logits for f in (source, out))
        assert torch.equal(before, after)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def paper_v2(x: Tensor, weights: dict[str, Tensor], heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """out_h = (softmax(q_2h k / sqrt d) − sigmoid(w_h x) softmax(q_2h+1 k / sqrt d)) v, one head after the other."""
    width = weights["q"].shape[0] // (2 * heads)
    tokens = x.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    outputs = []
    for h in range(heads):
        j = h // (heads // kv_heads)
        rows = slice(j * width, (j + 1) * width)
        key, value = rotate(x @ weights["k"][rows].T, cos, sin), x @ weights["v"][rows].T
        maps = []
        for branch in (2 * h, 2 * h + 1):
            query = rotate(x @ weights["q"][branch * width : (branch + 1) * width].T, cos, sin)
            scores = (query @ key.transpose(1, 2) / math.sqrt(width)).masked_fill(~causal, float("-inf"))
            maps.append(scores.softmax(-1))
        share = torch.sigmoid(x @ weights["lambda"][h])[..., None]
        outputs.append((maps[0] - share * maps[1]) @ value)
    return torch.cat(outputs, -1) @ weights["o"].T


def test_v2_equals_the_equations_in_values_and_gradients(tmp_path: Path) -> None:
    _, out = made(tmp_path)
    model = shaken(loaded(out).double())
    attention, config = model.model.layers[0].self_attn, model.config
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "lambda": "lambda_proj"}
    weights = {name: attention.get_submodule(path).weight for name, path in names.items()}
    ours = attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    theirs = paper_v2(x, weights, config.num_attention_heads // 2, config.num_key_value_heads, cos, sin)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # λ is computed in float32
    probe = torch.randn_like(ours)
    wanted = [x, *weights.values()]
    for mine, other in zip(torch.autograd.grad(ours, wanted, probe), torch.autograd.grad(theirs, wanted, probe), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_the_cosine_is_that_of_the_two_queries_of_a_pair(tmp_path: Path) -> None:
    _, out = made(tmp_path)
    attention: Any = loaded(out).model.layers[0].self_attn
    assert attention.upfit_measures() == {"cosine": pytest.approx(1)}
    weight = shaken(attention).q_proj.weight.detach()
    rows = [weight[head * attention.head_dim : (head + 1) * attention.head_dim].flatten() for head in range(8)]
    wanted = [float(a @ b / a.norm() / b.norm()) for a, b in zip(rows[0::2], rows[1::2], strict=True)]
    assert len(weight) == 8 * attention.head_dim and min(wanted) < 0.99
    assert attention.upfit_measures()["cosine"] == pytest.approx(sum(wanted) / 4)


def test_dex_equals_its_equation(tmp_path: Path) -> None:
    """O' = O − λ O W on the chosen heads, λ(t) = (1 − a) a λ_init + a λ_learned (arXiv 2505.16333)."""
    _, out = made(tmp_path, variant="dex")
    attention = shaken(loaded(out).double()).model.layers[1].self_attn
    attention.dex_heads = torch.tensor([1.0, 0.0] * (len(attention.dex_heads) // 2), dtype=torch.float64)
    outputs = torch.randn(2, 5, len(attention.dex_heads), attention.head_dim, dtype=torch.float64)
    for progress, strength in ((0.0, 0.0), (0.5, 0.25 * (0.8 - 0.6 * math.exp(-0.3)) + 0.5 * attention.dex_lambda)):
        attention.progress = progress
        changed = attention.combine(outputs)
        torch.testing.assert_close(changed[:, :, 0], outputs[:, :, 0] - strength * outputs[:, :, 0] @ attention.dex_weight)
        assert torch.equal(changed[:, :, 1], outputs[:, :, 1])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [{"lambdas": "head"}, {"variant": "dex"}], ids=["v2", "dex"])
def test_a_trained_model_merges_into_the_stock_class(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    _, out = made(tmp_path, model_type, **options)
    shaken(loaded(out)).save_pretrained(tmp_path / "trained")
    merge(str(tmp_path / "trained"), tmp_path / "merged", Settings(), QUIET)  # verify compares the logits
    stock = loaded(tmp_path / "merged")
    assert type(stock).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(stock(ids_of()).logits, loaded(tmp_path / "trained")(ids_of()).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_told(tmp_path: Path) -> None:
    source, out = made(tmp_path)
    with pytest.raises(UpfitError, match="--lambdas head"):
        merge(str(out), tmp_path / "merged", Settings(), QUIET)
    with pytest.raises(UpfitError, match="nothing to merge"):
        merge(str(source), tmp_path / "merged", Settings(), QUIET)
    with pytest.raises(UpfitError, match="already"):
        convert(RECIPE, str(out), tmp_path / "again", Options(), Settings(), QUIET)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "again").exists()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_and_padding(tmp_path: Path, model_type: str) -> None:
    _, out = made(tmp_path, model_type)
    model, ids = shaken(loaded(out), 0.02), ids_of(2, 10)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids[:1, 3:]], 1)
    batch = torch.cat([padded, ids[1:]])
    mask[0, :3] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    alone = model.generate(ids[:1, 3:], attention_mask=torch.ones(1, 7, dtype=ids.dtype), **settings)
    assert torch.equal(together[:1, 10:], alone[:, 7:])


def test_packed_documents_checkpointing_and_compile(tmp_path: Path) -> None:
    _, out = made(tmp_path)
    model, ids = shaken(loaded(out), 0.02), ids_of(1, 16)
    positions = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]).logits, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    gradients = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        if checkpointing:
            copied.gradient_checkpointing_enable()
        copied(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in copied.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


def still_after_ten_steps(model: Any, ids: Tensor, names: list[str]) -> list[str]:
    """Those of the parameters that training has not moved."""
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return [name for name in names if torch.equal(before[name], model.get_parameter(name))]


@pytest.mark.parametrize("options", [{}, {"lambdas": "head"}, {"variant": "dex"}], ids=["token", "head", "dex"])
def test_no_dead_points(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every parameter of every attention, old and new, has moved after ten steps."""
    _, out = made(tmp_path, **options)
    model, ids = loaded(out).train(), ids_of(4)
    names = [name for name, _ in model.named_parameters() if "self_attn" in name]
    assert any("lambda" in name for name in names)
    assert still_after_ten_steps(model, ids, names) == []
    if "variant" not in options:
        query = model.model.layers[0].self_attn.q_proj.weight.unflatten(0, (-1, 2, model.config.head_dim))
        assert not torch.equal(query[:, 0], query[:, 1])


def test_noise_breaks_the_symmetry(tmp_path: Path) -> None:
    _, out = made(tmp_path, noise=0.1, seed=3)
    with open_checkpoint(out) as checkpoint:
        q = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
        width = checkpoint.config["head_dim"]
    first, second = q.unflatten(0, (-1, 2, width)).unbind(1)
    ratio = (second - first).flatten(1).std(1) / first.flatten(1).std(1)
    assert ((ratio > 0.08) & (ratio < 0.12)).all()


@pytest.mark.slow
def test_round_trip_in_a_process_without_upfit(tmp_path: Path) -> None:
    """Loaded with trust_remote_code where upfit cannot be imported, saved, loaded again: the same logits, the same bytes."""
    _, out = made(tmp_path)
    ids = ids_of()
    with torch.no_grad():
        torch.save(loaded(out)(ids).logits, tmp_path / "logits.pt")
    torch.save(ids, tmp_path / "ids.pt")
    code = f"""
import sys
sys.modules["upfit"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
out, saved, ids = {str(out)!r}, {str(tmp_path / "saved")!r}, torch.load({str(tmp_path / "ids.pt")!r})
for folder in (out, saved):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
    model.save_pretrained(saved)
assert type(AutoModel.from_pretrained(saved, trust_remote_code=True)).__name__ == "UpfitDiffModel"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "saved" / "modeling_upfit_diff.py").read_bytes() == (out / "modeling_upfit_diff.py").read_bytes()


def test_bad_flags_are_told(tmp_path: Path) -> None:
    for options, message in (
        ({"variant": "dex", "noise": 0.1}, "--noise"),
        ({"variant": "dex", "lambdas": "head"}, "--lambdas"),
        ({"noise": 2.0}, "from 0 to 1"),
    ):
        with pytest.raises(UpfitError, match=message):
            made(tmp_path, **options)
    with pytest.raises(UpfitError, match="attn_sub_norm"):
        made(tmp_path / "bitnet", "bitnet")


def test_a_single_layer_keeps_the_width_that_its_config_does_not_name(tmp_path: Path) -> None:
    """Twice the heads of a config without `head_dim` would be heads of half the width."""
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config = {key: value for key, value in checkpoint.config.items() if key != "head_dim"}
        architecture = bind(config, checkpoint.tensors)
    changed = architecture.with_queries_times(2)
    assert changed["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
    assert changed["num_attention_heads"] == 2 * config["num_attention_heads"]
    assert changed["num_key_value_heads"] == config["num_key_value_heads"]

"""Contextual positions in whole models: exact at first, trained, decoded with a cache, saved and loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.folders import letter_tokenizer
from tests.tiny import tiny_model
from upfit.architecture.forwards import CACHE_NAMES, cache_name, cache_of
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.cope.options import Options
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.modeling.modeling_upfit_cope import interface, is_heads_first
from upfit.output import Output
from upfit.uptrain.model.converted_modules import set_progress

QUIET = Output(quiet=True)
RECIPE = find_recipes()["cope"]
GATES = ("content", "keys", "constant")
# Plain; a norm of each head; soft caps and windows; sinks; rotary by neighbours; rotary of a part of the head.
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "cohere", "phi")
TEXT = "\n\n".join(f"the {n} of {n * n} is here and there; return {n};" for n in range(400))


def made(tmp_path: Path, model_type: str = "llama", **options: Any) -> tuple[Path, Path]:
    """(source folder, converted folder)."""
    source, out = tmp_path / f"source-{model_type}", tmp_path / "-".join(["out", model_type, *map(str, options.values())])
    if not source.exists():
        tiny_model(model_type).save_pretrained(source)
        letter_tokenizer().save_pretrained(source)
        (tmp_path / "text.txt").write_text(TEXT)
    if options.get("gates") != "constant":
        text = [str(tmp_path / "text.txt")]
        options = {"calibration": text, "calibration_tokens": "512", "calibration_length": 64, **options}
    convert(RECIPE, str(source), out, Options(**{"positions": 6, "span": 20, **options}), Settings(verify=False), QUIET)
    return source, out


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    result: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **settings)
    model, info = result
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def learned(model: Any, size: float = 0.5) -> Any:
    """The same model with embeddings that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cope_embeddings"):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return model


def ids_of(rows: int = 2, tokens: int = 40) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gates", GATES)
def test_begins_bit_equal(tmp_path: Path, gates: str) -> None:
    source, out = made(tmp_path, gates=gates)
    for attention in ("eager", "sdpa"):
        for dtype in (torch.float32, torch.bfloat16):
            settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
            with torch.no_grad():
                assert torch.equal(loaded(out, **settings)(ids_of()).logits, loaded(source, **settings)(ids_of()).logits)


def test_zero_embeddings_are_equal_in_training_too(tmp_path: Path) -> None:
    """Where gradients flow, the attention is ours from the start: equal to the source's to rounding."""
    source, out = made(tmp_path)
    ours, theirs = loaded(out, torch.float64), loaded(source, torch.float64)
    assert torch.allclose(ours(ids_of()).logits, theirs(ids_of()).logits, atol=1e-12)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_decoding_is_the_full_forward(tmp_path: Path, model_type: str) -> None:
    """One token at a time with the cache, left-padded rows among them."""
    dtype = torch.float32 if model_type == "gpt_oss" else torch.float64  # its experts have no float64
    tolerance = {"gpt_oss": 1e-4, "cohere": 1e-6}.get(model_type, 1e-9)  # Cohere rotates in float32
    for gates in ("content", "keys"):
        _, out = made(tmp_path, model_type, gates=gates)
        model, ids = learned(loaded(out, dtype)), ids_of()
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        places = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            full = model(ids, attention_mask=mask, position_ids=places).logits
            plain = loaded(out, dtype)(ids[:1]).logits  # stock Gemma 2 gives NaN for padded rows in float64
            cache, parts = None, []
            for start, stop in ((0, 20), (20, 30), *((n, n + 1) for n in range(30, 40))):
                made_now = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=places[:, start:stop],
                    use_cache=True,
                    **{cache_name(model.forward): cache},
                )
                cache = cache_of(made_now)
                parts.append(made_now.logits)
        size = full[mask.bool()].abs().max()
        error, changed = (torch.cat(parts, 1) - full)[mask.bool()].abs().max() / size, (plain - full[:1]).abs().max() / size
        assert changed > 1e-3 and error < tolerance, (gates, float(error), float(changed))


@pytest.mark.parametrize("gates", GATES)
def test_generation(tmp_path: Path, gates: str) -> None:
    """With a growing and with a static cache, greedy and beams: as without any cache."""
    _, out = made(tmp_path, gates=gates)
    model = learned(loaded(out, torch.float64))
    ids, mask = ids_of(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), plain)
    beams = model.generate(ids, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **settings))


def test_padding_and_packing_change_nothing(tmp_path: Path) -> None:
    """Gates of padding and of other documents count nothing."""
    _, out = made(tmp_path)
    model, ids = learned(loaded(out, torch.float64)), ids_of(1, 30)
    with torch.no_grad():
        alone = model(ids).logits
        padded = torch.cat([torch.full((1, 7), 5), ids], 1)
        mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 30, dtype=torch.long)], 1)
        places = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.arange(30)[None]], 1)
        assert torch.allclose(model(padded, attention_mask=mask, position_ids=places).logits[:, 7:], alone, atol=1e-10)
        both, places = torch.cat([ids_of(1, 11), ids], 1), torch.cat([torch.arange(11), torch.arange(30)])[None]
        packed = model(both, position_ids=places, use_cache=False).logits[:, 11:]
        assert torch.allclose(packed, alone, atol=1e-10)


@pytest.mark.parametrize("scale", ["paper", "code"])
@pytest.mark.parametrize("gates", ["content", "keys"])
def test_the_module_is_the_equations_from_its_weights(tmp_path: Path, gates: str, scale: str) -> None:
    """Equations 3 to 9 of arXiv 2405.18719 word for word, query by query and key by key, from the tensors of a file."""
    _, out = made(tmp_path, gates=gates, scale=scale)
    model = learned(loaded(out, torch.float64))
    attention, tokens = model.model.layers[0].self_attn, 24
    with torch.no_grad():
        attention.cope_gate_scale.mul_(torch.linspace(5, 15, len(attention.cope_gate_scale)))  # gates that choose
        x = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        cos, sin = model.model.rotary_emb(x, torch.arange(tokens)[None])
        given = attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]
        q, k, v = (getattr(attention, f"{part}_proj")(x)[0].unflatten(-1, (-1, attention.head_dim)) for part in "qkv")
        turned = [
            states * cos[0, :, None]
            + torch.cat([-states[..., states.shape[-1] // 2 :], states[..., : states.shape[-1] // 2]], -1) * sin[0, :, None]
            for states in (q, k)
        ]
        gate_k = attention.cope_gate_keys(x)[0].unflatten(-1, (-1, attention.head_dim)) if gates == "keys" else k
        root, e = attention.head_dim**-0.5, attention.cope_embeddings
        last, outputs = e.shape[-2] - 1, torch.zeros(tokens, q.shape[1], attention.head_dim, dtype=torch.float64)
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // k.shape[1])
            z = q[:, head] @ e.T * (root if scale == "code" else 1.0)
            for i in range(tokens):
                logits, position = torch.zeros(i + 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
                for j in reversed(range(i + 1)):
                    gate = (
                        attention.cope_gate_scale[head] * (q[i, head] @ gate_k[j, own]) * root + attention.cope_gate_bias[head]
                    )
                    position = (position + torch.sigmoid(gate)).clamp(max=last)
                    low = int(position)
                    high = min(low + 1, last)
                    between = z[i, low] + (position - low) * (z[i, high] - z[i, low])
                    logits[j] = turned[0][i, head] @ turned[1][j, own] * root + between
                outputs[i, head] = logits.softmax(0) @ v[: i + 1, own]
        torch.testing.assert_close(given[0], attention.o_proj(outputs.flatten(1)), rtol=1e-9, atol=1e-11)


def test_what_was_learned_counts_at_once(tmp_path: Path) -> None:
    """A model that was run before it was trained is not taken for one that has learned nothing."""
    _, out = made(tmp_path, gates="constant")
    model, ids = loaded(out, torch.float64), ids_of()
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(before, model(ids).logits)
        after = learned(model)(ids).logits
        assert not torch.allclose(before, after, atol=1e-3)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(tmp_path / "saved", torch.float64)(ids).logits, after)


@pytest.mark.parametrize("gates", GATES)
def test_everything_new_moves_within_ten_steps(tmp_path: Path, gates: str) -> None:
    """Embeddings get a gradient in every layer at once, gates as soon as those are not zero."""
    _, out = made(tmp_path, gates=gates, embeddings="heads", every=1, scale="code")
    model = loaded(out).train()
    model.gradient_checkpointing_enable()
    new = {name: p for name, p in model.named_parameters() if "cope" in name}
    before = {name: p.detach().clone() for name, p in new.items()}
    optimizer = torch.optim.Adam(new.values(), lr=1e-2)
    for step in range(10):
        model(ids_of(), labels=ids_of(), use_cache=False).loss.backward()
        if step == 0:
            assert all(p.grad.any() for name, p in new.items() if name.endswith("embeddings"))
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in new.items())
    measures = model.model.layers[0].self_attn.upfit_measures()
    assert measures["position_content"] > 0 and 0 < measures["span"] <= 40 and 0 <= measures["saturated"] <= 1


def test_constant_gates_reach_the_last_position_after_the_span(tmp_path: Path) -> None:
    """Of 6 positions, the last is 5: 20 gates of a quarter each."""
    _, out = made(tmp_path, gates="constant", span=20)
    biases = [tensor for name, tensor in load_file(out / "model.safetensors").items() if name.endswith("cope_gate_bias")]
    assert len(biases) == 2
    for bias in biases:
        torch.testing.assert_close(20 * bias.sigmoid(), torch.full_like(bias, 5.0))


def test_gates_begin_at_the_span(tmp_path: Path) -> None:
    """Nearly constant, so that on the text they were set on the last position is reached `span` tokens away."""
    _, out = made(tmp_path, span=20)
    layers = json.loads((out / "recipe.json").read_text())["steps"][-1]["measurements"]["layers"]
    assert len(layers) == 2 and all(19 < layer["span"] < 21 for layer in layers)
    assert load_file(out / "model.safetensors")["model.layers.0.self_attn.cope_gate_scale"].min() > 0


def test_gates_and_the_plain_weights_are_what_was_asked_for(tmp_path: Path) -> None:
    source, out = made(tmp_path, gates="keys", every=2)
    with open_checkpoint(out) as checkpoint:
        names = {name for name in checkpoint.tensors if "cope" in name}
    assert names == {
        f"model.layers.0.self_attn.{name}"
        for name in ("cope_embeddings", "cope_gate_bias", "cope_gate_scale", "cope_gate_keys.weight")
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(
        after["model.layers.0.self_attn.cope_gate_keys.weight"], before["model.layers.0.self_attn.k_proj.weight"]
    )


def test_only_whole_texts_in_training_are_watched(tmp_path: Path) -> None:
    """What a text was like is not forgotten when one more token is written after it, nor is what nobody trains looked at."""
    _, out = made(tmp_path, gates="constant")
    model, ids = learned(loaded(out)), ids_of()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        model(ids)
        assert not attention.upfit_measures()
        model.train()
        cache = cache_of(model(ids, use_cache=True))
        seen = attention.upfit_measures()
        model(ids[:, :1], **{cache_name(model.forward): cache})
    assert seen and attention.upfit_measures() == seen


def test_rope_fades_out_with_training(tmp_path: Path) -> None:
    """At progress 1 absolute places mean nothing; the file remembers."""
    source, out = made(tmp_path, gates="keys", drop_rope=True)
    model, ids = learned(loaded(out, torch.float64)), ids_of()
    shifted = torch.arange(40)[None] * 3 + 5
    with torch.no_grad():
        plain = loaded(source, torch.float64)
        assert torch.equal(loaded(out, torch.float64)(ids).logits, plain(ids).logits)
        set_progress(model, 1, 8)
        assert 0 < model.model.layers[0].self_attn.upfit_measures()["rope"] < 1
        set_progress(model, 8, 8)
        assert torch.allclose(model(ids).logits, model(ids, position_ids=shifted).logits, atol=1e-12)
        model.save_pretrained(tmp_path / "saved")
        again = loaded(tmp_path / "saved", torch.float64)
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_implementations_agree(tmp_path: Path, model_type: str) -> None:
    """Ours whole and in chunks, and a stock one with the positions as its mask, which is how probes watch attention: with soft
    caps, windows and sinks too."""
    from upfit.calibration.observe import NAME, register

    _, out = made(tmp_path, model_type)
    register()
    dtype, tolerance = (torch.float32, 1e-5) if model_type == "gpt_oss" else (torch.float64, 1e-12)
    with torch.no_grad():
        names = ("eager", NAME, *(["sdpa"] if model_type == "llama" else []))
        logits = [learned(loaded(out, dtype, attn_implementation=name))(ids_of()).logits for name in names]
    assert all(torch.allclose(states, logits[0], atol=tolerance) for states in logits)
    model = learned(loaded(out))
    attention = model.model.layers[0].self_attn
    attention.config.real._attn_implementation_internal = "flash_attention_2"
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="sdpa or eager"):
        interface(attention, states, states, states, None)


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    source, out = made(tmp_path, gates="keys")
    model, cache = loaded(out), cache_of(loaded(source)(ids_of(), use_cache=True))
    with pytest.raises(ValueError, match="begin with an empty one"):
        model(ids_of()[:, :1], **{cache_name(model.forward): cache})


def test_a_cache_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Its gate keys would be kept nowhere, and found nowhere in the next step."""
    _, out = made(tmp_path, gates="keys")
    attention = loaded(out).model.layers[0].self_attn
    with pytest.raises(ValueError, match="of transformers' class Cache, not a dict"):
        attention(torch.zeros(1, 1, 32), **{CACHE_NAMES[0]: {}})


@pytest.mark.slow
def test_round_trip_in_a_process_without_upfit(tmp_path: Path) -> None:
    """Loaded with trust_remote_code where neither upfit nor Triton can be imported, saved, loaded again: the same logits."""
    _, out = made(tmp_path)
    ids, model = ids_of(), learned(loaded(out))
    model.save_pretrained(tmp_path / "learned")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["upfit"] = sys.modules["triton"] = None
import torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
for folder in ({str(tmp_path / "learned")!r}, {str(tmp_path / "again")!r}):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    model.save_pretrained({str(tmp_path / "again")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 1}, "--positions got 1; it takes 2 or more"),
        ({"span": 3}, "no gate is above 1"),
        ({"every": 9}, "from 1 to 2"),
        ({"gates": "constant", "calibration_tokens": "1k"}, "leave it out"),
        ({"drop_rope": True, "every": 2}, "leave out --every"),
    ],
)
def test_bad_flags_are_told(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(UpfitError, match=message):
        convert(RECIPE, str(tmp_path / "source"), tmp_path / "out", Options(**options), Settings(verify=False), QUIET)
    assert not (tmp_path / "out").exists()


def test_heads_are_told_from_tokens_by_strides() -> None:
    tokens_first = torch.zeros(2, 4, 4, 8)
    assert not is_heads_first(tokens_first, 4) and is_heads_first(tokens_first.transpose(1, 2), 4)
    assert is_heads_first(torch.zeros(2, 4, 7, 8), 4) and not is_heads_first(torch.zeros(2, 7, 4, 8), 4)

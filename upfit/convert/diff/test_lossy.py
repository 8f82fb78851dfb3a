"""Differential variants that lose something: the papers' equations, what calibration gains, what merges, what is refused."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.folders import letter_tokenizer
from tests.tiny import tiny_model
from upfit.architecture.attention import Attention
from upfit.calibration.observe import Seen
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert, merge
from upfit.convert.diff.entropy import entropy
from upfit.convert.diff.pairs import halve
from upfit.convert.diff.paper import candidates, lambda_vectors, pairs
from upfit.convert.diff.recipe import Options
from upfit.convert.diff.split import FIRST_SCALES, LAMBDAS, SECOND_SCALES, _best, _variances, choose, groups_of_two, naive
from upfit.convert.diff.test_diff import QUIET, RECIPE, ids_of, loaded, made, shaken, still_after_ten_steps
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.modeling.modeling_upfit_diff import lambda_init


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_of(heads: int, kv_heads: int, tokens: int, width: int) -> Seen:
    q, k, v = (drawn(2, n, tokens, width, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    return Seen(nn.Identity(), q, k, v, None, width**-0.5, None, None, q)


def causal_map(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~torch.ones(q.shape[-2], k.shape[-2]).tril().bool(), -math.inf)
    return scores.softmax(-1)


def test_pairs_equal_the_equations() -> None:
    """Equations 1 to 3, one pair after the other: (A_p − λ A_p+H/2) [v_j; v_j+K/2], normed, times 1 − λ_init."""
    heads, kv_heads, width, lam, start, eps = 8, 4, 6, 0.37, 0.2, 1e-5
    seen = seen_of(heads, kv_heads, 7, width)
    ours, wanted, group = pairs(seen, lam, start, eps), [], heads // kv_heads
    for p in range(heads // 2):
        j = p // group
        plus = causal_map(seen.q[:, p], seen.k[:, j], seen.scaling)
        minus = causal_map(seen.q[:, p + heads // 2], seen.k[:, j + kv_heads // 2], seen.scaling)
        x = (plus - lam * minus) @ torch.cat([seen.v[:, j], seen.v[:, j + kv_heads // 2]], -1)
        x = (1 - start) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        wanted += [x[..., :width], x[..., width:]]
    torch.testing.assert_close(ours, torch.stack(wanted, 2), rtol=1e-9, atol=1e-9)


def test_a_stock_diffllama_is_the_same() -> None:
    """A randomly initialised DiffLlama of transformers gives what `pairs` gives from its weights, values and gradients."""
    model: Any = shaken(tiny_model("diffllama").double())
    attention, config = model.model.layers[1].self_attn, model.config
    x = drawn(2, 9, config.hidden_size).requires_grad_()
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    stock = attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]

    def heads(name: str, turned: bool) -> Tensor:
        y = attention.get_submodule(name)(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        half = attention.head_dim // 2
        return y * cos[:, None] + torch.cat([-y[..., half:], y[..., :half]], -1) * sin[:, None] if turned else y

    q, k, v = heads("q_proj", True), heads("k_proj", True), heads("v_proj", False)
    seen = Seen(attention, q, k, v, None, attention.scaling, None, None, q)
    vectors = [attention.get_parameter(f"lambda_{name}") for name in ("q1", "k1", "q2", "k2")]
    lam = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + attention.lambda_init
    ours = attention.o_proj(pairs(seen, lam, attention.lambda_init, config.rms_norm_eps).flatten(2))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-7)
    wanted = [x, *vectors, attention.q_proj.weight]
    probe = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, wanted, probe), torch.autograd.grad(stock, wanted, probe), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("lam", [-1.0, -0.5, -0.2, 0.0, 0.2, 0.5])
def test_a_layer_that_is_diffllamas_is_found_in_the_grid(lam: float) -> None:
    """With the factor that the output projection is to take up."""
    seen, eps = seen_of(4, 2, 7, 6), 1e-5
    aim = 3 * pairs(seen, lam, lambda_init(1), eps)  # [B, T, H, D], pair after pair
    heads = aim.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
    forms: Any = candidates(1, [(replace(seen, output=heads), torch.arange(7), 7)], eps)
    gaps = [(form.outputs(seen) * form.gain.repeat_interleave(2)[:, None] - aim).abs().max() for form in forms]
    best = min(range(len(forms)), key=lambda index: float(gaps[index]))
    assert float(gaps[best]) < 1e-6 and forms[best].record() == {"lambda": lam}
    assert forms[best].gain.tolist() == pytest.approx([3, 3])


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.2, 0.7])
def test_lambda_vectors_give_their_lambda(lam: float) -> None:
    v = lambda_vectors(lam, 0.35, 16)
    got = (v["lambda_q1"] @ v["lambda_k1"]).exp() - (v["lambda_q2"] @ v["lambda_k2"]).exp() + 0.35
    assert float(got) == pytest.approx(lam, abs=1e-5) and all(bool((vector != 0).all()) for vector in v.values())


def test_split_is_the_difference_of_two_narrower_heads(tmp_path: Path) -> None:
    """What the modelling file computes equals heads that only have the dimensions of their half."""
    _, out = made(tmp_path, variant="split", naive=True)
    attention = loaded(out).double().model.layers[0].self_attn
    heads, _, width = attention.split_scale.shape
    seen = seen_of(heads, attention.k_proj.out_features // width, 6, width)
    cut = naive(heads, width, 0)
    half, scaling, group = width // 2, (width // 2) ** -0.5, heads // seen.k.shape[1]
    first = [causal_map(seen.q[:, h, :, :half], seen.k[:, h // group, :, :half], scaling) for h in range(heads)]
    second = [causal_map(seen.q[:, h, :, half:], seen.k[:, h // group, :, half:], scaling) for h in range(heads)]
    lam = float(cut.lambdas[0])
    wanted = torch.stack([(first[h] - lam * second[h]) @ seen.v[:, h // group] for h in range(heads)], 2)
    torch.testing.assert_close(cut.outputs(seen), wanted, rtol=1e-6, atol=1e-7)
    both = replace(seen, q=attention.queries(seen.q)).attended()
    attention.lambdas = torch.sigmoid(attention.lambda_logit)
    torch.testing.assert_close(attention.combine(both), wanted, rtol=1e-5, atol=1e-6)


def test_a_halved_query_is_its_head_with_every_dimension_scaled() -> None:
    """Weights and biases alike: both halves of head h say scale_h · (W_h x + b_h)."""
    heads, width, hidden = 3, 4, 5
    x, scale = drawn(hidden, seed=1), drawn(heads, 2, width, seed=2)
    q, bias = drawn(heads, width, hidden), drawn(heads, width, seed=3)
    after = halve(Attention(q=q, q_bias=bias), scale)
    assert after.q is not None and after.q_bias is not None
    own = after.q @ x + after.q_bias
    torch.testing.assert_close(own.reshape(heads, 2, width), (q @ x + bias)[:, None] * scale)
    assert halve(Attention(q=q), scale).q_bias is None


def test_sinks_go_with_both_halves(tmp_path: Path) -> None:
    """With a second half that is λ = 0 and a first half that keeps everything, a model with sinks is what it was."""
    source, out = made(tmp_path, "gpt_oss", variant="split", naive=True)
    model, before = loaded(out, attn_implementation="eager"), loaded(source, attn_implementation="eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.split_scale.fill_(1.0)
            layer.self_attn.lambda_logit.fill_(-100.0)
        torch.testing.assert_close(model(ids_of()).logits, before(ids_of()).logits, rtol=1e-5, atol=1e-5)


def test_dimensions_that_turn_together_stay_together() -> None:
    """Of 8 dimensions 4 turn, the first with the third of the order; the others are neighbours."""
    assert groups_of_two((5, 1, 4, 0, 2, 3, 6, 7), 2).tolist() == [[5, 4], [1, 0], [2, 3], [6, 7]]
    assert groups_of_two((0, 1, 2, 3), 2).tolist() == [[0, 2], [1, 3]]
    assert groups_of_two((0, 1, 2, 3), 0).tolist() == [[0, 1], [2, 3]]


def test_the_half_that_matters_is_kept() -> None:
    """Where the scores come from half of the dimensions only, the split finds them and loses next to nothing."""
    seen = seen_of(4, 2, 40, 8)
    order = torch.arange(8).reshape(4, 2)
    q = seen.q.clone()
    q[:, :, :, [0, 1, 6, 7]] *= 1e-3
    seen = replace(seen, q=q)
    split = choose([(seen, torch.arange(40), 40)], order)
    assert bool((split.scale[:, 0, 2:6] > 0).all()) and bool((split.scale[:, 0, [0, 1, 6, 7]] == 0).all())
    assert bool((split.scale[:, 1, 2:6] == 0).all()) and bool((split.scale[:, 1, [0, 1, 6, 7]] > 0).all())
    whole, halves = seen.attended(), split.outputs(seen) * split.gain[:, None].double()
    assert float((whole - halves).square().sum() / whole.square().sum()) < 0.01


def test_halves_are_divided_by_what_the_softmax_sees() -> None:
    """The variance of a group's part of the scores under the attention weights, row by row and key by key."""
    heads, tokens, groups = 2, 12, torch.arange(4).reshape(2, 2)
    seen, wanted = seen_of(heads, 1, tokens, 4), torch.zeros(heads, 2, dtype=torch.float64)
    for row, head, i in itertools.product(range(2), range(heads), range(tokens)):
        q, k = seen.q[row, head, i], seen.k[row, 0, : i + 1]
        weights = (k @ q * seen.scaling).softmax(0)
        for number, group in enumerate(groups):
            part = k[:, group] @ q[group] * seen.scaling
            wanted[head, number] += weights @ (part - weights @ part).square()
    torch.testing.assert_close(_variances(seen, torch.arange(tokens), tokens, groups), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "first, second, share",
    [(1.0, 0.5, 0.02), (1.15, 1.5, 0.05), (1.3, 1.0, 0.2), (1.3, 0.5, 0.1), (1.5, 1.0, 0.35), (1.8, 1.5, 0.5)],
)
def test_a_head_that_is_a_difference_is_found_in_the_grid(first: float, second: float, share: float) -> None:
    """With the factor that the output projection is to take up."""
    halves = drawn(len(FIRST_SCALES) + len(SECOND_SCALES), 50)
    plus, minus = halves[FIRST_SCALES.index(first)], halves[len(FIRST_SCALES) + SECOND_SCALES.index(second)]
    outputs = torch.cat([(2 * (plus - share * minus))[None], halves])
    split = _best((outputs @ outputs.T)[None], torch.ones(1, 2, 4))
    assert split.scale[0].amax(1).tolist() == pytest.approx([first, second])
    assert [float(split.lambdas[0]), float(split.gain[0])] == pytest.approx([share, 2])


def test_scales_and_lambda_are_the_best_of_the_grid() -> None:
    """Of every combination, tried one after the other on the head's own output, none comes nearer."""
    seen = seen_of(2, 1, 30, 8)
    split = choose([(seen, torch.arange(30), 30)], torch.arange(8).reshape(4, 2))
    whole, mask = seen.attended(), split.scale > 0
    for head in range(2):
        errors = {}
        for first in FIRST_SCALES:
            for second in SECOND_SCALES:
                for share in LAMBDAS:
                    scale = mask * torch.tensor([first, second])[:, None]
                    tried = replace(split, scale=scale, lambdas=torch.full((2,), share)).outputs(seen)[:, :, head]
                    gain = (tried * whole[:, :, head]).sum() / tried.square().sum()
                    errors[first, second, share] = float((whole[:, :, head] - gain * tried).square().sum()), float(gain)
        best = min(errors, key=lambda key: errors[key][0])
        assert split.scale[head].amax(1).tolist() == pytest.approx(best[:2]) and float(split.lambdas[head]) == pytest.approx(
            best[2]
        )
        assert float(split.gain[head]) == pytest.approx(errors[best][1], rel=1e-4)


def spread(tmp_path: Path) -> Path:
    """DEX of the half that spreads, of a model whose odd heads attend to all tokens alike and whose even heads to few."""
    model: Any = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.self_attn.q_proj.weight.unflatten(0, (-1, model.config.head_dim))
            rows[1::2], rows[0::2] = 0.0, 50 * rows[0::2]
    model.save_pretrained(tmp_path / "source")
    letter_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {n} of {n * n} is here; return {n};" for n in range(400)))
    options: dict[str, Any] = {"calibration": [str(tmp_path / "text.txt")], "calibration_length": 64}
    options |= {"calibration_tokens": "512"}
    return made(tmp_path, variant="dex", heads="entropy", **options)[1]


def test_heads_that_spread_are_changed_and_no_others(tmp_path: Path) -> None:
    """In the file, and after training in the stock class."""
    out = spread(tmp_path)
    with open_checkpoint(out) as checkpoint:
        for layer in range(2):
            heads = checkpoint.read(f"model.layers.{layer}.self_attn.dex_heads")
            assert heads.tolist() == [0.0, 1.0] * (len(heads) // 2)
    shaken(loaded(out)).save_pretrained(tmp_path / "trained")
    merge(str(tmp_path / "trained"), tmp_path / "merged", Settings(), QUIET)
    with torch.no_grad():
        wanted, given = loaded(tmp_path / "trained")(ids_of()).logits, loaded(tmp_path / "merged")(ids_of()).logits
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def evaluated(folder: Path) -> float:
    from upfit.convert.verify import sample_ids

    ids, _ = sample_ids(embedded_model())
    assert ids is not None
    with torch.no_grad():
        return float(loaded(folder)(ids, labels=ids).loss)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["split", "diffllama"])
def test_calibration_gains(tmp_path: Path, variant: str) -> None:
    """On the embedded model both lossy variants stay near the source's loss, where the naive cut does not."""
    options = Options(variant=variant, calibration_tokens="2k", calibration_length=512)  # type: ignore[arg-type]
    convert(RECIPE, str(embedded_model()), tmp_path / "fitted", options, Settings(verify=False), QUIET)
    convert(
        RECIPE, str(embedded_model()), tmp_path / "naive", Options(variant="split", naive=True), Settings(verify=False), QUIET
    )
    source, fitted, cut = (evaluated(folder) for folder in (embedded_model(), tmp_path / "fitted", tmp_path / "naive"))
    assert fitted - source < 0.5 * (cut - source)
    if variant == "split":
        merge(str(tmp_path / "fitted"), tmp_path / "merged", Settings(), QUIET)
        assert evaluated(tmp_path / "merged") == pytest.approx(fitted, abs=0.01)


def test_a_bias_of_the_output_is_fitted_with_its_weight(tmp_path: Path) -> None:
    """And what is fitted is nearer to the source than the naive cut, on text of that kind."""
    source = tmp_path / "source"
    tiny_model("starcoder2").save_pretrained(source)
    letter_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {n} of {n * n} is here; return {n};" for n in range(400)))
    text: dict[str, Any] = {"calibration": [str(tmp_path / "text.txt")], "calibration_tokens": "1k", "calibration_length": 64}
    for name, more in (("fitted", text), ("naive", {"naive": True})):
        convert(RECIPE, str(source), tmp_path / name, Options(variant="split", **more), Settings(verify=False), QUIET)
    models = {name: loaded(tmp_path / name) for name in ("source", "fitted", "naive")}
    biases = {name: model.model.layers[0].self_attn.o_proj.bias for name, model in models.items()}
    assert torch.equal(biases["naive"], biases["source"]) and not torch.equal(biases["fitted"], biases["source"])
    with torch.no_grad():
        ids = letter_tokenizer()(["the 999 of 998001 is here; return 999;"], return_tensors="pt")["input_ids"]
        logits = {name: model(ids).logits for name, model in models.items()}
    errors = {name: float((logits[name] - logits["source"]).square().mean()) for name in ("fitted", "naive")}
    assert errors["fitted"] < 0.5 * errors["naive"], errors


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_exact_diffllama(tmp_path: Path, model_type: str) -> None:
    changes: dict[str, Any] = {"sliding_window": None} if model_type == "mistral" else {}
    tiny_model(model_type, **changes).save_pretrained(tmp_path / "source")
    options = Options(variant="diffllama", exact=True)
    convert(RECIPE, str(tmp_path / "source"), tmp_path / "out", options, Settings(verify=False), QUIET)
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == "DiffLlamaForCausalLM"
    with torch.no_grad():
        source = loaded(tmp_path / "source")(ids_of()).logits
        assert float((model(ids_of()).logits - source).abs().max()) < 1e-4 * float(source.abs().max())


@pytest.mark.parametrize("options", [{"variant": "split", "naive": True}, {"variant": "diffllama", "exact": True}])
def test_no_dead_points_here_either(tmp_path: Path, options: dict[str, Any]) -> None:
    _, out = made(tmp_path, **options)
    model, ids = loaded(out).train(), ids_of(4)
    names = [name for name, _ in model.named_parameters() if "self_attn" in name and "k_proj.bias" not in name]
    assert still_after_ten_steps(model, ids, names) == []


@pytest.mark.slow
def test_spread_heads_have_more_entropy(tmp_path: Path) -> None:
    seen = seen_of(4, 2, 30, 8)
    scale = torch.tensor([5.0, 0.0, 5.0, 0.1], dtype=torch.float64)
    spread = entropy(replace(seen, q=seen.q * scale[:, None, None]), torch.arange(30), 30)
    assert sorted(spread.argsort(descending=True)[:2].tolist()) == [1, 3]
    options = Options(variant="dex", heads="entropy", calibration_tokens="2k", calibration_length=512)
    convert(RECIPE, str(embedded_model()), tmp_path / "out", options, Settings(), QUIET)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.read("model.layers.1.self_attn.dex_heads").sum() == 4


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    for model_type, changes, options, message in (
        ("llama", {"num_key_value_heads": 1}, {"variant": "diffllama"}, "odd number; choose"),
        ("qwen3", {}, {"variant": "diffllama"}, "does not have"),
        (
            "llama",
            {},
            {"variant": "diffllama", "naive": True},
            "--naive goes with --variant split, not diffllama; leave it out",
        ),
        ("llama", {}, {"variant": "split", "naive": True, "calibration_tokens": "4k"}, "leave it out"),
        (
            "llama",
            {},
            {"variant": "diffllama", "exact": True, "calibration_length": 64},
            "--calibration-length is for .* that are",
        ),
        ("llama", {}, {"variant": "dex", "heads": "all", "calibration_tokens": "4k"}, "--calibration-tokens is for"),
        ("llama", {}, {"refit": False}, "--no-refit goes with --variant split or diffllama, not v2; leave it out"),
    ):
        folder = tmp_path / f"{model_type}{len(changes)}"
        if not folder.exists():
            tiny_model(model_type, **changes).save_pretrained(folder)
        with pytest.raises(UpfitError, match=message):
            convert(RECIPE, str(folder), tmp_path / "out", Options(**options), Settings(), QUIET)
    assert not (tmp_path / "out").exists()

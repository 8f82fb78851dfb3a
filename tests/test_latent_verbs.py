"""Models of transformers' own that cache a latent: they are measured, and not trained where it is normed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from typer.testing import CliRunner

from tests.folders import letter_tokenizer
from tests.uptraining import Workshop, make_workshop
from upfit import api, provenance
from upfit.cli import app
from upfit.convert.result import cache_words
from upfit.errors import UpfitError
from upfit.publish.options import Options
from upfit.publish.push import pack

LATENT, ROTATED, LAYERS, BFLOAT16 = 12, 4, 2, 2


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def stock(workshop: Workshop) -> Path:
    """A tiny dense DeepSeek-V3 in bfloat16, with the tokenizer of the workshop's models."""
    settings: dict[str, Any] = {
        **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "q_lora_rank": None},
        **{"num_attention_heads": 4, "kv_lora_rank": LATENT, "qk_rope_head_dim": ROTATED, "qk_nope_head_dim": 4},
        **{"v_head_dim": 8, "first_k_dense_replace": LAYERS, "max_position_embeddings": 128, "dtype": "bfloat16"},
        **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"), 1),
    }
    folder = workshop.teacher.parent / "stock"
    DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).bfloat16().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    source = {"name": "teacher", "revision": None, "path": str(workshop.teacher)}
    provenance.write(folder, [provenance.step("merge", source, {})])
    return folder


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def card(folder: Path) -> str:
    text = pack(folder, "user/repo", Options()).files["README.md"]
    assert isinstance(text, bytes)
    return text.decode()


def test_it_is_measured_as_what_it_caches(workshop: Workshop, stock: Path) -> None:
    """By the command line, whose early checks see the config alone."""
    data = workshop.teacher.parent / "text.jsonl"
    flags = ("--data", data, "--windows", 2, "--length", 32, "--record", "-q")
    run("evaluate", stock, "--against", workshop.teacher, *flags)
    run("evaluate", workshop.teacher, "--against", stock, *flags[:-2], "-q")
    cache = api.describe(stock).history[-1]["measurements"]["model"]["cache"]
    assert cache["bytes_per_token"] == LAYERS * (LATENT + ROTATED) * BFLOAT16 == api.describe(stock).kv_bytes_per_token
    run("report", stock, workshop.teacher.parent / "page.html")
    assert f'"{stock.name}"' in run("compare", workshop.teacher, stock, "--json")
    run("plan", stock, "--tokens", "1M")


def test_it_has_no_heads_of_keys_and_values(workshop: Workshop, stock: Path) -> None:
    """Neither a width of such a head: what heads share is told in their place."""
    shared = f"one latent of {LATENT + ROTATED} numbers"
    lines = run("show", stock).splitlines()
    assert f"key/value heads   {shared}" in lines and not any(line.startswith("head width") for line in lines)
    assert shared in run("compare", stock, "--json") and shared in card(stock)
    assert api.describe(stock).latent == [LATENT + ROTATED] and api.describe(workshop.student).latent is None
    assert shared not in run("compare", workshop.student, "--json") and shared not in card(workshop.student)
    assert cache_words([8, 1], [64, 32], None, [16]) == "8 key/value heads → one latent of 16 numbers, " + cache_words(
        [1, 1], [64, 32]
    )
    assert cache_words([1, 1], [64, 32], None, [8, 16]).startswith("1 key/value head → one latent of 8, 16 numbers, ")
    assert "one latent" not in str(api.describe(workshop.student))


def test_it_is_not_trained(workshop: Workshop, stock: Path, tmp_path: Path) -> None:
    """Its latent is normed; what upfit makes of other models is trained (test_latent_trained.py)."""
    with pytest.raises(UpfitError, match="this deepseek_v3 is not trained: kv_a_layernorm is no constant"):
        replace(workshop, student=stock).run(tmp_path / "out")
    assert not list(tmp_path.iterdir())

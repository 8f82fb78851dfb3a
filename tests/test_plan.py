"""What a plan tells is what training does: FLOPs and bytes are those of the model's own code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.folders import save_tiny, tiny_llama
from tests.records import plan
from upfit import provenance
from upfit.errors import UpfitError
from upfit.plan.options import Options
from upfit.plan.trace import _kept as kept_in_trace
from upfit.plan.trace import trace
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.layerwise import Layerwise, freeze_all_but
from upfit.uptrain.model.losses import Objective
from upfit.uptrain.model.model_traits import examine
from upfit.uptrain.run.preflight import _kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text()) | changes


def test_flops_are_those_of_the_matrices_and_of_half_a_map(folder: Path) -> None:
    told = trace(config(folder), 64, "float32")
    hidden, mlp, layers, heads, width, vocabulary = 32, 48, 2, 4, 8, 100
    assert told.matrices == layers * 2 * (4 * hidden * heads * width + 3 * hidden * mlp)
    assert told.attention == layers * 2 * heads * (64 * 65 / 2) / 64 * 2 * width
    assert told.head == 2 * hidden * vocabulary
    model = tiny_llama(attn_implementation="eager")
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(1, 64, dtype=torch.long))
    whole_map = layers * 2 * heads * 64 * 2 * width
    assert counted.get_total_flops() / 64 == told.matrices + told.head + whole_map


def test_a_window_looks_at_no_more_than_it_holds(folder: Path) -> None:
    kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    full, windowed = (trace(config(folder, **kind, sliding_window=size), 64, "float32").attention for size in (None, 8))
    pairs = sum(min(8, row + 1) for row in range(64))
    assert windowed / full == pairs / (64 * 65 / 2)


@pytest.mark.parametrize("length", [64, 128])
def test_kept_bytes_are_those_that_training_keeps(folder: Path, length: int) -> None:
    model = tiny_llama().train()
    distiller = Distiller(model, examine(model), None, {"": Objective(1.0, 0.0)})
    head = 4 * 8 * 32 + 4 * 100 * 32 + 4 * length * 32  # its gradients, for the eight labels that are looked at
    assert trace(config(folder), length, "float32").saved == pytest.approx(_kept(distiller, length) - head, rel=0.05)


def test_a_share_of_the_compute_pays_for_the_teacher(folder: Path) -> None:
    with_teacher = plan(str(folder), Options(share="5%", original_tokens="1M"))
    alone = plan(str(folder), Options(share="5%", original_tokens="1M", teacher="none"))
    assert alone["tokens"] == 50_000 and with_teacher["tokens"] == 37_500
    assert with_teacher["share_of_original"] == pytest.approx(0.05) and alone["teacher_parameters"] is None
    assert with_teacher["flops"] == pytest.approx(alone["flops"])


def test_the_teacher_is_the_source_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", tiny_llama(num_key_value_heads=1))
    provenance.write(student, [provenance.step("convert mqa", {"name": "tiny", "revision": None, "path": str(folder)}, {})])
    told = plan(str(student), Options(tokens="1M"))
    assert told["teacher_parameters"] == tiny_llama().num_parameters() > told["parameters"]
    assert told["flops_a_token"]["teacher"] > told["flops_a_token"]["forward"]


def test_recomputed_layers_save_memory_and_cost_time(folder: Path) -> None:
    plain, again = (plan(str(folder), Options(tokens="1M", gradient_checkpointing=on)) for on in (False, True))
    assert again["memory"]["activations"] < plain["memory"]["activations"] and again["flops"] == plain["flops"]
    assert again["gpu_hours"] == pytest.approx(plain["gpu_hours"] * 5 / 4)


def test_shards_divide_what_is_trained_and_a_teacher_if_it_is_asked(folder: Path) -> None:
    whole, shards, both, nodes = (
        plan(str(folder), Options(tokens="1M", gpus=16, **how))["memory"]
        for how in (
            {},
            {"parallel": "fsdp"},
            {"parallel": "fsdp", "shard_teacher": True},
            {"parallel": "hsdp", "gpus_a_node": 4, "shard_teacher": True},
        )
    )
    for part in ("weights", "moments", "gradients"):
        assert whole[part] == 16 * shards[part] == 16 * both[part] == 4 * nodes[part]
    assert whole["teacher"] == shards["teacher"] == 16 * both["teacher"] == 4 * nodes["teacher"]
    assert whole["gathered"] == 0 < shards["gathered"] < both["gathered"] == nodes["gathered"]
    assert all(whole[part] == shards[part] for part in ("activations", "head", "logits", "mask"))


def test_attention_alone_takes_less_of_all_but_time_for_what_it_reads(folder: Path) -> None:
    everything, attention = (plan(str(folder), Options(tokens="1M", trainable=what)) for what in ("all", "attention"))
    inside = 2 * 4 * 32 * 32  # parameters of four projections in two layers
    assert (
        attention["memory"]["moments"]
        == 2 * attention["memory"]["gradients"]
        == 2 * attention["memory"]["weights"]
        == 8 * inside
    )
    assert attention["memory"]["activations"] < everything["memory"]["activations"]
    spared = everything["flops_a_token"]["backward"] - attention["flops_a_token"]["backward"]
    assert spared == 2 * (2 * 3 * 32 * 48 + 32 * 100), "the gradients of the MLPs and the head"


def test_stages_are_told_one_by_one(folder: Path) -> None:
    told = plan(str(folder), Options(tokens="1M", stages="layerwise=25%,distill"))
    first, second = told["stages"]
    assert (first["stage"], first["tokens"], second["tokens"]) == ("layerwise", 250_000, 750_000)
    assert first["flops"] + second["flops"] == pytest.approx(told["flops"])
    assert first["gpu_hours"] + second["gpu_hours"] == pytest.approx(told["gpu_hours"])
    traced = trace(config(folder), 128, "float32")
    attention = 2 * 2 * 4 * 32 * 32 + traced.attention
    assert first["flops_a_token"]["total"] == 3 * attention + traced.forward - traced.head
    assert told["memory"] == second["memory"] and first["memory"]["peak"] < second["memory"]["peak"]
    assert plan(str(folder), Options(tokens="1M"))["stages"][0]["flops_a_token"] == second["flops_a_token"]


@pytest.mark.parametrize("trained", ["attention", "layerwise"])
def test_what_is_kept_where_attention_alone_learns(folder: Path, trained: Any) -> None:
    student, teacher = tiny_llama(num_key_value_heads=1).train(), tiny_llama()
    paths = [f"model.layers.{number}.self_attn" for number in range(2)]
    told = trace(config(folder, num_key_value_heads=1), 64, "float32", trained).saved
    if trained == "layerwise":
        learner: Any = Layerwise(student, teacher, examine(teacher), paths)
        outputs = 2 * 4 * 64 * 32  # the errors, of two layers
        assert told == pytest.approx(_kept(learner, 64) - outputs, rel=0.1)
        return
    freeze_all_but(student, None, paths)
    learner = Distiller(student, examine(student), None, {"": Objective(1.0, 0.0)})
    assert told == pytest.approx(_kept(learner, 64) - 4 * 8 * 32 - 4 * 64 * 32, rel=0.05)


EIGHT_B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.slow
def test_eight_billion_parameters_and_their_teacher_fit_one_gpu_where_attention_alone_learns(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_B))
    with pytest.raises(UpfitError, match="--trainable attention"):
        plan(str(tmp_path), Options(tokens="1M", gpu="h200", gradient_checkpointing=True))
    how: dict[str, Any] = {"tokens": "1M", "gpu": "h200", "trainable": "attention", "gradient_checkpointing": True}
    assert plan(str(tmp_path), Options(**how, stages="layerwise=20%,distill"))["memory"]["peak"] < 134e9


def test_what_cannot_fit_is_refused_with_what_would_help(folder: Path) -> None:
    with pytest.raises(UpfitError, match="are needed on each GPU, NVIDIA A100 .* give --gradient-checkpointing"):
        plan(str(folder), Options(tokens="1M", gpu="a100", micro_batch=10_000_000))


WRONG: dict[str, tuple[Options, str]] = {
    "no budget": (Options(), "the budget is missing"),
    "two budgets": (Options(tokens="1M", share="5%"), "--tokens got company"),
    "unknown GPU": (Options(tokens="1M", gpu="rtx"), "--gpu rtx is not known; give one of a100"),
    "half a node": (Options(tokens="1M", gpus=12, parallel="hsdp"), "no whole number of nodes of 8"),
    "a teacher to shard": (Options(tokens="1M", shard_teacher=True), "--shard-teacher goes with"),
    "answers": (Options(tokens="1M", stages="distill,answers"), "--stages got answers"),
    "layers without a teacher": (Options(tokens="1M", stages="layerwise,lm", teacher="none"), "--teacher none leaves none"),
    "layers in shards": (
        Options(tokens="1M", stages="layerwise,lm", parallel="fsdp"),
        "layerwise .* leave --parallel out",
    ),
    "all of the peak and more": (Options(tokens="1M", mfu=1.2), "--mfu got 1.2"),
    "longer than the model": (Options(tokens="1M", length=4096), "longer than the model's 128 positions"),
}


@pytest.mark.parametrize("options, words", WRONG.values(), ids=WRONG)
def test_bad_settings_are_one_clear_line(folder: Path, options: Options, words: str) -> None:
    with pytest.raises(UpfitError, match=words):
        plan(str(folder), options)


def test_code_that_looks_at_numbers_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50, "intermediate_size": 32}
    with pytest.raises(UpfitError, match="cannot be planned for: its code looks at numbers"):
        trace(
            {"model_type": "gpt_oss", "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8, **sizes}, 32, "float32"
        )


def test_what_a_trace_lets_go_of_is_counted_too() -> None:
    """Attention layer by layer keeps no outputs: the next one may lie where the last one was."""
    weight = torch.ones(1000, requires_grad=True)
    with kept_in_trace({}) as found:
        for _ in range(8):
            weight * weight.detach().exp()  # keeps the second factor
    assert list(found.values()) == 8 * [4000]

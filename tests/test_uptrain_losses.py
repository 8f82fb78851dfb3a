"""The chunked loss equals a plain float64 reference in value and gradients; packed documents equal separate ones."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.folders import tiny_llama
from tests.tiny import tiny_model
from tests.uptraining import pooled, seeded
from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.losses import Head, Objective, chunked_loss, dense_loss
from upfit.uptrain.model.model_traits import configured_head, examine, hidden_states

N, H, V = 37, 16, 53
FLOAT32: dict[str, Any] = dict(rtol=2e-5, atol=2e-5)  # sums of 37 · 53 float32 terms
FLOAT64: dict[str, Any] = dict(rtol=1e-10, atol=1e-12)
BFLOAT16: dict[str, Any] = dict(rtol=5e-2, atol=5e-2)  # 8 bits of mantissa through three products
HEADS = [Head(), Head(0.5), Head(1.0, 3.0), Head(2.0, 5.0)]
OBJECTIVES = [
    Objective(1.0, 0.0, 1.0, 10),
    Objective(0.0, 1.0, 1.0, 10),
    Objective(0.3, 0.7, 1.0, 8),
    Objective(0.3, 0.7, 2.0, 100),
    Objective(0.0, 1.0, 4.0, 1),
]


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, head: Head, teacher: tuple[Tensor, Tensor, Head], objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, over whole logits and with torch's own losses."""

    def logits(states: Tensor, matrix: Tensor, shape: Head) -> Tensor:
        raw = states @ matrix.t() * shape.scale
        return raw if shape.cap is None else torch.tanh(raw / shape.cap) * shape.cap

    student, target = logits(hidden, weight, head), logits(*teacher).detach()
    heat = objective.temperature
    ce = F.cross_entropy(student, labels, reduction="sum", ignore_index=IGNORE)
    soft = (student / heat).log_softmax(-1), (target / heat).log_softmax(-1)
    each = F.kl_div(*soft, reduction="none", log_target=True).sum(-1)
    kl = each[labels != IGNORE].sum() * heat**2
    return objective.ce_weight * ce + objective.kl_weight * kl, ce, kl


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = seeded(N, H, seed=1).to(dtype), seeded(V, H, seed=2).to(dtype)
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    labels[::5] = IGNORE
    return hidden, weight, labels, seeded(N, H, seed=4).to(dtype), seeded(V, H, seed=5).to(dtype)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype,close", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["float64", "float32"])
def test_values_and_gradients_equal_the_reference(
    head: Head, objective: Objective, dtype: torch.dtype, close: dict[str, Any]
) -> None:
    hidden, weight, labels, teacher_hidden, teacher_weight = problem(dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    found = chunked_loss(leaves[0], leaves[1], labels, head, (teacher_hidden, teacher_weight, Head(1.5)), objective)
    told = (teacher_hidden.double(), teacher_weight.double(), Head(1.5))
    wanted = reference(exact[0], exact[1], labels, head, told, objective)
    (found[0] * 0.25).backward()
    (wanted[0] * 0.25).backward()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), **close)
    for leaf, true in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), true.grad, **close)  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_dense_equals_chunked(objective: Objective) -> None:
    hidden, weight, labels, teacher_hidden, teacher_weight = problem(torch.float32)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    chunked = chunked_loss(leaves[0], weight, labels, Head(), (teacher_hidden, teacher_weight, Head()), objective)
    dense = dense_loss(leaves[1] @ weight.t(), teacher_hidden @ teacher_weight.t(), labels, objective)
    chunked[0].backward()
    dense[0].backward()
    torch.testing.assert_close(chunked, dense, **FLOAT32)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **FLOAT32)


def test_no_gradient_for_a_frozen_head() -> None:
    hidden, weight, labels, *_ = problem(torch.float32)
    hidden.requires_grad_()
    loss, *_ = chunked_loss(hidden, weight, labels, Head(), None, Objective(1.0, 0.0))
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().t(), labels, reduction="sum", ignore_index=IGNORE).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, **FLOAT32)  # type: ignore[union-attr]


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, labels, *_ = problem(torch.float32)
    with torch.no_grad():
        loss, *_ = chunked_loss(hidden.requires_grad_(), weight.requires_grad_(), labels, Head(), None, Objective(1.0, 0.0))
    assert not loss.requires_grad


def test_bfloat16_products_under_autocast_stay_near() -> None:
    hidden, weight, labels, teacher_hidden, teacher_weight = problem(torch.float32)
    objective, told = Objective(0.5, 0.5, 1.0, 8), (teacher_hidden, teacher_weight, Head())
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_loss(leaves[0], leaves[1], labels, Head(), told, objective)
    found[0].backward()
    exact = [t.clone().requires_grad_() for t in (hidden, weight)]
    wanted = reference(exact[0], exact[1], labels, Head(), told, objective)
    wanted[0].backward()
    assert found[0].dtype == torch.float32 and leaves[0].grad is not None and leaves[0].grad.dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0].detach(), **BFLOAT16)
    torch.testing.assert_close(leaves[1].grad, exact[1].grad, rtol=5e-2, atol=0.2)


def test_all_labels_masked_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels, *_ = problem(torch.float32)
    hidden.requires_grad_()
    loss, *_ = chunked_loss(hidden, weight, torch.full_like(labels, IGNORE), Head(), None, Objective(1.0, 0.0))
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_an_identical_teacher_has_no_divergence() -> None:
    model = tiny_llama()
    traits = examine(model)
    teacher = Distiller(tiny_llama(), traits, None, {})
    distiller = Distiller(model, traits, teacher, {"": Objective()})
    ids = torch.arange(3, 67).reshape(2, 32)
    _, ce, kl = distiller(ids, torch.arange(32).expand(2, -1), ids)
    assert abs(kl) / ids.numel() < 1e-6 < ce
    _, _, other = Distiller(pooled(model), traits, teacher, {"": Objective()})(ids, torch.arange(32).expand(2, -1), ids)
    assert other / ids.numel() > 1e-3


def test_what_nobody_asked_for_is_the_divergence_alone_and_as_it_is() -> None:
    hidden, weight, labels, *teacher = problem(torch.float64)
    whole = reference(hidden, weight, labels, Head(1.0, None), (teacher[0], teacher[1], Head()), Objective(0.0, 1.0, 1.0))
    torch.testing.assert_close(
        chunked_loss(hidden, weight, labels, Head(), (teacher[0], teacher[1], Head()), Objective()), whole
    )


def test_packed_documents_equal_separate_ones() -> None:
    model = tiny_llama()
    traits = examine(model)
    assert traits.separates_documents and traits.head == Head()
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None].expand(2, -1)
    packed = hidden_states(model, ids, positions, traits)
    parts = [hidden_states(model, part, torch.arange(part.shape[1])[None], traits) for part in ids.split([9, 15], dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)
    leaking = hidden_states(model, ids, torch.arange(24)[None], traits)
    assert (leaking - packed).abs().max() > 1e-2, "the test must be able to see a leak"


def test_a_head_with_a_bias_is_not_taken_for_a_plain_one() -> None:
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 100, bias=True)
    traits = examine(model)
    assert traits.head is None
    ids = torch.arange(3, 35)[None]
    distiller = Distiller(model, traits, None, {"": Objective(1.0, 0.0)})
    wanted = F.cross_entropy(model(ids).logits[0], ids[0], reduction="sum")
    torch.testing.assert_close(distiller(ids, torch.arange(32)[None], ids)[1], wanted.detach())


PLAIN_HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("model_type", PLAIN_HEADS)
def test_scales_and_caps_of_real_families_are_found(model_type: str) -> None:
    model = tiny_model(model_type, **PLAIN_HEADS[model_type])
    traits = examine(model)
    assert traits.head is not None and traits.separates_documents
    assert traits.head == configured_head(model)
    assert (traits.head != Head()) == bool(PLAIN_HEADS[model_type])
    if PLAIN_HEADS[model_type]:
        name, value = next(iter(PLAIN_HEADS[model_type].items()))
        setattr(model.config, name, value * 3)
        model.forward = functools.partial(frozen_forward, model, value * 3, name, value)
        assert examine(model).head is None, "the comparison must be able to fail"


def frozen_forward(model: Any, told: float, name: str, used: float, **inputs: Any) -> Any:
    """The model's own forward with the setting it was made with, whatever its config tells now."""
    setattr(model.config, name, used)
    try:
        return type(model).forward(model, **inputs)
    finally:
        setattr(model.config, name, told)


def test_a_family_without_positions_is_known_to_mix_documents() -> None:
    assert not examine(tiny_model("bloom")).separates_documents


def test_a_transformed_head_is_not_taken_for_a_plain_one() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 1.1)
    assert examine(model).head is None

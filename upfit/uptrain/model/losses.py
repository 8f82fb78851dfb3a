"""Cross-entropy and full-vocabulary KL divergence from hidden states, a few rows of logits at a time.

Legend: N token positions, C of them in a chunk, H hidden size, V vocabulary.

    loss = ce_weight · Σ CE(student, label) + kl_weight · T² · Σ KL(teacher ‖ student at temperature T)

Sums, not means: the trainer divides by the number of labels over all processes and micro-batches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.uptrain.data.rows import IGNORE


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how many positions are worked on at once."""

    ce_weight: float = 0.0
    kl_weight: float = 1.0
    temperature: float = 1.0
    chunk: int = 512


@dataclass(frozen=True)
class Head:
    """How logits follow from the raw product hidden · weightᵀ: times `scale`, then `cap · tanh(· / cap)` where `cap` is set."""

    scale: float = 1.0
    cap: float | None = None

    def logits(self, raw: Tensor) -> Tensor:
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the raw product from that of the logits."""
        if self.cap is not None:
            grad = grad * (1 - (logits / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


def chunk_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CE and KL sums of one chunk of logits [C, V], and the gradient of the weighted loss by the student's logits.

    d CE / d logits = softmax − onehot;  d (T² KL) / d logits = T · (softmax(student / T) − softmax(teacher / T)).
    The gradient is that of all rows; those whose label is IGNORE are left out of the products made of it, which are smaller.
    """
    counted = labels != IGNORE
    targets = labels.clamp_min(0)[:, None]
    log_p = student.log_softmax(-1)  # [C, V]
    ce = -(log_p.gather(1, targets)[:, 0] * counted).sum()
    kl = torch.zeros_like(ce)
    grad = None
    if want_grad and objective.ce_weight:
        grad = log_p.exp_() if teacher is None else log_p.exp()
        grad.scatter_add_(1, targets, -torch.ones_like(targets, dtype=grad.dtype))
        if objective.ce_weight != 1.0:
            grad *= objective.ce_weight
    if teacher is not None:
        heat = objective.temperature
        log_p = log_p if heat == 1.0 else (student / heat).log_softmax(-1)
        log_q = (teacher if heat == 1.0 else teacher / heat).log_softmax(-1)
        q = log_q.exp()
        kl = torch.linalg.vecdot(q, log_q.sub_(log_p)).mul(counted).sum() * heat**2
        if want_grad and objective.kl_weight:
            part = log_p.exp_().sub_(q)
            if objective.kl_weight * heat != 1.0:
                part *= objective.kl_weight * heat
            grad = part if grad is None else grad.add_(part)
    if want_grad and grad is None:
        grad = torch.zeros_like(student)
    return ce, kl, grad


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, so no [N, V] tensor ever exists."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        head: Head,
        teacher: tuple[Tensor, Tensor, Head] | None,
        objective: Objective,
        compute: torch.dtype,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.float64 if compute == torch.float64 else torch.float32
        weight_c = weight.to(compute)
        teacher_weight = None if teacher is None else teacher[1].to(compute)
        d_hidden = torch.zeros_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if needs[1] else None
        ce = torch.zeros((), dtype=precise, device=hidden.device)
        kl = torch.zeros_like(ce)
        for at in range(0, hidden.shape[0], objective.chunk):
            rows = slice(at, at + objective.chunk)
            hidden_c = hidden[rows].to(compute)
            student = head.logits((hidden_c @ weight_c.t()).to(precise))  # [C, V]
            target = None
            if teacher is not None and teacher_weight is not None:
                target = teacher[2].logits((teacher[0][rows].to(compute) @ teacher_weight.t()).to(precise))
            chunk_ce, chunk_kl, grad = chunk_terms(student, target, labels[rows], objective, any(needs))
            ce += chunk_ce
            kl += chunk_kl
            if grad is None:
                continue
            grad_c, counted = head.backward(grad, student).to(compute), (labels[rows] != IGNORE)[:, None]
            if d_hidden is not None:
                d_hidden[rows] = (grad_c @ weight_c).to(hidden.dtype) * counted
            if d_weight is not None:
                d_weight += grad_c.t() @ (hidden_c * counted)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(ce, kl)
        return objective.ce_weight * ce + objective.kl_weight * kl, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, for the weight's may be the largest tensor of a step: a second backward pass is an error.
        scaled = [None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, None, None, None, None


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    teacher: tuple[Tensor, Tensor, Head] | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE, KL) summed over the labels that are not IGNORE, in nats; only the loss carries gradients.

    `hidden` [N, H] and `weight` [V, H] are the student's, `teacher` its own hidden states, weight and head (no gradient).
    `labels` [N] are vocabulary indices. Products are taken in autocast's type where autocast is on, everything after them in
    float32 (float64 for float64 input). The gradient of `weight` is skipped when it needs none.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    else:
        compute = torch.promote_types(hidden.dtype, weight.dtype)
    grads = torch.is_grad_enabled()
    needs = (grads and hidden.requires_grad, grads and weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return _ChunkedLoss.apply(hidden, weight, labels, head, teacher, objective, compute, needs)


def dense_loss(student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The same three sums from whole logits [N, V] through plain autograd, for models whose head is more than a product."""
    ce, kl, _ = chunk_terms(student.float(), None if teacher is None else teacher.float(), labels, objective, want_grad=False)
    return objective.ce_weight * ce + objective.kl_weight * kl, ce.detach(), kl.detach()

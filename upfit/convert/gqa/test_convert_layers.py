"""The pieces of a refit against plain references: what is fitted on what, in which metric."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.folders import letter_tokenizer
from tests.tiny import tiny_model
from upfit.calibration.observe import Seen
from upfit.calibration.stream_refit import _drift
from upfit.calibration.teacher_student import MlpEnd, PairedBatch, _is_plain, refit_mlp
from upfit.calibration.teacher_view import View, _spread
from upfit.convert.conversion import Settings, convert
from upfit.convert.gqa.test_closed_form import drawn, plain_error, problem
from upfit.convert.recipe import get_recipe
from upfit.output import Output


def batch(held: bool, hidden: Tensor) -> PairedBatch:
    return PairedBatch(held, [], [], hidden, hidden, hidden.shape[1])


def view(held: bool, inputs: Tensor) -> View:
    stream: dict[str, Any] = dict.fromkeys(("inputs", "key_inputs", "before", "attended", "total", "output", "values"), inputs)
    return View(batch(held, inputs), **stream, scaling=1.0, targets=[])


def test_drift_brings_the_students_inputs_back() -> None:
    """What the student sees is a map of what the teacher saw: the drift is its inverse, found on fitted windows alone."""
    teacher = [drawn(2, 40, 6, seed=seed).float() for seed in (1, 2, 3)]
    away = torch.eye(6) + 0.3 * drawn(6, 6).float()
    student = [x @ away.T for x in teacher[:2]] + [drawn(2, 40, 6, seed=9).float()]
    views = [view(held, x) for held, x in zip((False, False, True), teacher, strict=True)]
    drift = _drift(student, views)
    torch.testing.assert_close(student[0] @ drift.T, teacher[0], rtol=0, atol=0.02)
    assert torch.equal(_drift(teacher, views), torch.eye(6))


def test_the_metric_of_scores_is_what_the_softmax_sees() -> None:
    """A row's error is nothing where all scores move alike, and twice the divergence of the softmax to second order."""
    target = problem(norm=False)[2][0].targets[1]
    gap, p = drawn(*target.weights.shape, seed=4), target.weights
    assert float(plain_error(target, torch.ones_like(gap)).abs()) < 1e-12
    small = 1e-4 * gap
    moved = (p.log() + small).softmax(-1).nan_to_num()
    divergence = torch.where(p > 0, p * (p.log() - moved.log()), 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(2 * (divergence * target.importance).sum(), plain_error(target, small), rtol=1e-3, atol=1e-13)


def test_scores_matter_where_values_differ() -> None:
    """The importance of a row: Σ p |O(v − v̄)|², in loops. Nothing where all values are one."""
    heads, kv_heads, tokens, width, hidden = 4, 2, 5, 3, 7
    v, outputs = drawn(1, kv_heads, tokens, width), drawn(hidden, heads, width, seed=1)
    weights = drawn(1, heads, 2, tokens, seed=2).softmax(-1)
    seen = Seen(nn.Identity(), drawn(1, heads, tokens, width), v, v, None, 1.0, None, None, v)
    spread = _spread(seen, weights, tokens, outputs)
    for h in range(heads):
        outs = v[0, h // 2] @ outputs[:, h].T  # [tokens, hidden]
        for row in range(2):
            p = weights[0, h, row]
            wanted = (p * (outs - p @ outs).square().sum(1)).sum()
            torch.testing.assert_close(spread[0, h, row, 0], wanted)
    same = Seen(nn.Identity(), seen.q, v, v[:, :, :1].expand_as(v), None, 1.0, None, None, v)
    assert float(_spread(same, weights, tokens, outputs).max()) < 1e-12


class Block(nn.Module):
    """A layer that is the last matrix of an MLP and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 3)


def test_the_mlp_is_fitted_on_fitted_windows_and_chosen_on_held_back_ones() -> None:
    """Held-back rows, too few to tell the matrix from, hold noise: what comes out is what the fitted rows say. Where held-back
    rows contradict them altogether, nothing is changed."""
    module, truth = Block().requires_grad_(False), drawn(3, 8, seed=1).float()
    before = module.down.weight.clone()
    inputs = [drawn(1, count, 8, seed=count).float() for count in (300, 5)]
    without = [drawn(1, len(x[0]), 3).float() for x in inputs]
    batches = [batch(held, x) for held, x in zip((False, True), without, strict=True)]

    def rest(number: int, _: PairedBatch) -> tuple[Tensor, Tensor]:
        return inputs[number], without[number]

    for sign in (1.0, -1.0):
        wanted = [inputs[0] @ truth.T + 2, sign * (inputs[1] @ truth.T + 2)]
        outputs = [0.5 * y + rest for y, rest in zip(wanted, without, strict=True)]
        module.down.weight.copy_(before)
        new = refit_mlp(module, MlpEnd("down", ("w", "b")), 0.5, batches, outputs, rest, 0.0)
        assert torch.equal(new["w"], module.down.weight) and torch.equal(new["b"], module.down.bias)
        if sign > 0:
            torch.testing.assert_close(new["w"], truth, rtol=0, atol=5e-3)
            torch.testing.assert_close(new["b"], torch.full((3,), 2.0), rtol=0, atol=5e-3)
        else:
            torch.testing.assert_close(new["w"], before, rtol=0, atol=1e-6)


TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 60


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("granite", {"residual_multiplier": 0.4})])
def test_refit_brings_the_logits_nearer(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    """On the text that it was fitted on, a refitted model is nearer to the source than one that was only merged, in a family
    that adds shares of what its parts give out, too. Of the squared error 0.73 and 0.50 are left; with the share left out where
    it belongs, more than 0.9."""
    tiny_model(model_type, **changes).save_pretrained(tmp_path / "source")
    letter_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = get_recipe("gqa")
    for refit in (True, False):
        text = {"calibration": [str(tmp_path / "text.txt")], "calibration_tokens": "2k", "calibration_length": 32}
        options = recipe.options(kv_heads=1, method="aligned", refit=refit, **text)
        quiet = Output(quiet=True)
        report = convert(recipe, str(tmp_path / "source"), tmp_path / str(refit), options, Settings(verify=False), quiet)
        labels = {change.rule for change in report.tensors}
        assert labels == {"→ 1 key/value heads, aligned" + (", refitted" if refit else "")}
    source, refitted, merged = (logits(tmp_path / name) for name in ("source", "True", "False"))
    assert (refitted - source).square().mean() < 0.8 * (merged - source).square().mean()


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(letter_tokenizer()(TEXT)["input_ids"][: 16 * 32]).reshape(16, 32)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@pytest.mark.parametrize(
    ("names", "shapes", "plain"),
    [
        ([["w"], ["b"]], {"w": (2, 3), "b": (2,)}, True),
        ([["w"], None], {"w": (2, 3)}, False),
        ([["w"], ["b", "c"]], {"w": (2, 3), "b": (2,), "c": (2,)}, False),
        ([["w"], ["b"]], {"w": (3, 2), "b": (2,)}, False),
    ],
)
def test_a_linear_is_plain_where_it_is_what_is_stored(names: Any, shapes: dict[str, Any], plain: bool) -> None:
    checkpoint: Any = SimpleNamespace(tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    assert _is_plain(names, nn.Linear(3, 2), checkpoint) == plain

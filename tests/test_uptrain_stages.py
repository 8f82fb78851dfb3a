"""Stages: shares of a budget, what each learns, and a run that goes on across their borders."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.folders import save_tiny, tiny_llama
from tests.test_uptrain_faults import Telling
from tests.test_uptrain_resume import Interrupting, away, flipped, untimed
from tests.uptraining import QUIET, Workshop, config, make_workshop, metrics, pooled, weights
from upfit import provenance
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.output import Meter
from upfit.uptrain.config import Config
from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.layerwise import Layerwise, attention_paths, converted_paths
from upfit.uptrain.model.model_traits import examine, load
from upfit.uptrain.run.finished import together
from upfit.uptrain.run.result import Uptraining
from upfit.uptrain.run.stage_folders import make_way
from upfit.uptrain.run.state import STOPPED
from upfit.uptrain.stages import parse, split
from upfit.uptrain.train import uptrain

BOTH: dict[str, Any] = {"stages": "layerwise=50%,distill", "tokens": "1024", "save_every": "100"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.parametrize(
    "text,shares",
    [
        ("distill", {"distill": 1.0}),
        ("layerwise=10%, distill", {"layerwise": 0.1, "distill": 0.9}),
        ("layerwise,distill,lm=0.5", {"layerwise": 0.25, "distill": 0.25, "lm": 0.5}),
        ("distill,answers", {"distill": 1.0, "answers": None}),
        ("distill=75%,answers=25%", {"distill": 0.75, "answers": 0.25}),
        ("answers", {"answers": None}),
    ],
)
def test_shares_of_the_budget(text: str, shares: dict[str, float | None]) -> None:
    assert parse(text) == pytest.approx(shares)
    assert list(parse(text)) == [part.partition("=")[0].strip() for part in text.split(",")]


@pytest.mark.parametrize(
    "settings,tables,message",
    [
        ({"stages": "warp"}, {}, "the stages are layerwise"),
        ({"stages": "lm,lm"}, {}, "twice"),
        ({"stages": "layerwise=100%,distill"}, {}, "leave 0%"),
        ({"stages": "layerwise=10%,distill=10%"}, {}, "80%"),
        ({"stages": "layerwise=many,distill"}, {}, "--stages layerwise"),
        ({"stages": "distill,answers"}, {}, "set questions to a folder"),
        ({"stages": "distill", "questions": "q"}, {}, "questions is for the stage answers"),
        ({}, {"distill": {"seed": 1}}, r"\[distill\]"),
        ({"stages": "lm"}, {"distill": {"seed": 1}}, r"\[distill\]"),
        ({"stages": "layerwise,distill"}, {"distill": {"tokens": "5k"}}, "tokens"),
        ({"stages": "layerwise,distill"}, {"distill": {"seed": -1}}, "--seed"),
        ({"stages": "layerwise", "kl_weight": 0.5}, {}, "kl_weight does nothing"),
        ({"stages": "layerwise,distill"}, {"layerwise": {"chunk": 8}}, "chunk does nothing"),
    ],
)
def test_stages_that_cannot_be_are_one_line(settings: dict[str, Any], tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message) as caught:
        split(Config(**{"tokens": "1k", **settings}), tables, "data")
    assert "\n" not in str(caught.value)


def test_each_stage_has_its_budget_its_data_and_its_settings() -> None:
    given = Config(share="5%", original_tokens="200k", stages="layerwise=10%,distill,lm=20%,answers", questions="q", mix="text")
    stages = split(given, {"layerwise": {"learning_rate": 0.5}}, "data")
    assert [stage.data for stage in stages] == ["data", "data", "data", "q"]
    assert [stage.config.tokens for stage in stages] == ["1000", "7000", "2000", None]
    assert [stage.config.learning_rate for stage in stages] == [0.5, None, None, None]
    assert [stage.config.mix for stage in stages] == [None, None, None, "text"]
    assert [(stage.config.kl_weight, stage.config.ce_weight) for stage in stages[1:3]] == [(1.0, 0.0), (0.0, 1.0)]


def layerwise(shop: Workshop, student: LlamaForCausalLM) -> Layerwise:
    teacher = load(shop.teacher, torch.float32, torch.device("cpu"))
    paths = converted_paths(student, teacher, attention_paths(Source(shop.teacher, "teacher")))
    return Layerwise(student, teacher, examine(teacher), paths)


def test_the_error_of_a_layer_is_that_of_its_output_on_the_teachers_input(shop: Workshop) -> None:
    """Against modules run by hand on the hidden states that the teacher tells."""
    student = pooled(tiny_llama())
    learner, teacher = layerwise(shop, student), load(shop.teacher, torch.float32, torch.device("cpu"))
    ids, positions = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(1)), torch.arange(12).expand(2, -1)
    labels = torch.where(torch.arange(12) % 3 == 0, IGNORE, ids)
    loss, *errors = learner(ids, positions, labels)
    hidden = teacher.model(ids, output_hidden_states=True).hidden_states
    for index, error in enumerate(errors):
        normed = teacher.model.layers[index].input_layernorm(hidden[index])
        turned = teacher.model.rotary_emb(normed, positions)
        outputs = [
            m.model.layers[index].self_attn(normed, position_embeddings=turned, attention_mask=None)[0]
            for m in (teacher, student)
        ]
        wanted = (outputs[1] - outputs[0]).square().sum(-1)[labels != IGNORE].sum()
        torch.testing.assert_close(error, wanted)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_errors_are_told_in_units_of_the_teachers_mean_square(shop: Workshop) -> None:
    """So that layers count alike: a student that puts out nothing is off by one such unit in each."""
    student = pooled(tiny_llama())
    learner = layerwise(shop, student)
    ids, positions = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(1)), torch.arange(12).expand(2, -1)
    learner.take_units(ids, positions)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    _, *errors = learner(ids, positions, ids)
    torch.testing.assert_close(torch.stack(errors) / ids.numel(), torch.ones(2))


def test_who_has_been_listened_to_is_so_no_more(shop: Workshop) -> None:
    """Else every later pass of the teacher would run the student's attention once more for each step that was."""
    learner = layerwise(shop, pooled(tiny_llama()))
    ids, positions = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(1)), torch.arange(12).expand(2, -1)
    calls = list[int]()
    for path in learner.paths:
        learner.student.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        calls.clear()
        learner(ids, positions, ids)
        assert len(calls) == len(learner.paths)
    calls.clear()
    learner._run_teacher(ids, positions)
    assert not calls


def test_only_attention_learns_and_each_layer_by_itself(shop: Workshop) -> None:
    student = pooled(tiny_llama())
    learner = layerwise(shop, student)
    ids = torch.randint(30, (1, 12), generator=torch.Generator().manual_seed(1))
    assert {name.split(".")[3] for name, p in student.named_parameters() if p.requires_grad} == {"self_attn"}
    theirs = dict(learner._teacher[0].named_parameters())
    assert student.model.embed_tokens.weight.data_ptr() == theirs["model.embed_tokens.weight"].data_ptr(), "kept once"
    _, first, *_ = _with_graph(learner, ids)
    first.backward()
    assert student.model.layers[0].self_attn.k_proj.weight.grad is not None
    assert student.model.layers[1].self_attn.k_proj.weight.grad is None


def _with_graph(learner: Layerwise, ids: torch.Tensor) -> list[torch.Tensor]:
    distances = learner._distances(ids, torch.arange(ids.shape[1])[None])
    return [torch.zeros(()), *(distance.sum() for distance in distances)]


def test_equal_attention_has_nothing_to_learn(shop: Workshop) -> None:
    with pytest.raises(UpfitError, match="leave the stage layerwise out"):
        layerwise(shop, tiny_llama())


@pytest.mark.slow
def test_both_stages_are_told_and_each_wins(shop: Workshop, tmp_path: Path) -> None:
    report = shop.run(tmp_path / "out", **{**BOTH, "tokens": "6144"})
    assert [stage.stage for stage in report.stages or []] == ["layerwise", "distill"]
    first, second = (stage.holdout for stage in report.stages or [])
    assert first["after"]["attention_error"] < 0.9 * first["before"]["attention_error"]
    assert second["after"]["kl"] < second["before"]["kl"]
    told = [step for step in provenance.read(tmp_path / "out") if step["verb"] == "uptrain"]
    assert [(step["stage"], step["source"]["path"]) for step in told] == [
        ("layerwise", str(shop.student)),
        ("distill", str(shop.student)),
    ]
    assert [step["teacher"]["path"] for step in told] == [str(shop.teacher)] * 2
    lines = metrics(tmp_path / "out")
    assert [line["stage"] for line in lines] == ["layerwise"] * 24 + ["distill"] * 24
    assert len(lines[0]["attention_errors"]) == 2
    assert not (tmp_path / "out.upfit-work").exists()


class InterruptingStage(Interrupting):
    """Sends this process a SIGTERM in step `at` of stage `stage`, counted from 1."""

    def __init__(self, stage: int, at: int) -> None:
        super().__init__(at)
        self.stage, self.wanted, self.at = stage, at, -1

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        self.stage -= label == "uptrain"
        self.at = self.wanted if self.stage == 0 else -1
        with super().progress(label, total) as meter:
            yield meter


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_stopped_on_either_side_of_the_border_it_ends_with_the_same_bytes(shop: Workshop, tmp_path: Path, stage: int) -> None:
    shop.run(tmp_path / "whole", **BOTH)
    report = shop.run(tmp_path / "broken", output=InterruptingStage(stage, 3), **BOTH)
    assert report.stopped and len(report.stages or []) == stage and not (tmp_path / "broken").exists()
    between = tmp_path / "broken.upfit-work" / "stage-1-layerwise"
    assert between.exists() == (stage == 2)
    with pytest.raises(UpfitError, match="--resume"):
        shop.run(tmp_path / "broken", **BOTH)
    if stage == 2:
        with pytest.raises(UpfitError, match="other settings"):
            shop.run(tmp_path / "broken", resume=True, **{**BOTH, "seed": 1})
    report = shop.run(tmp_path / "broken", resume=True, **BOTH)
    assert [one.steps for one in report.stages or []] == [4, 4]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")
    assert not (tmp_path / "broken.upfit-work").exists()


@pytest.mark.slow
def test_a_finished_stage_is_one_of_the_same_content(shop: Workshop, tmp_path: Path) -> None:
    """Under the same names and with the same settings, a model, teacher or data of other content is no finished stage."""
    teacher, student, data = (Path(shutil.copytree(p, tmp_path / p.name)) for p in (shop.teacher, shop.student, shop.data))
    mine, out, given = Workshop(teacher, student, data), tmp_path / "out", {**BOTH, "teacher": str(teacher)}
    mine.run(out, output=InterruptingStage(2, 3), **given)
    other = make_workshop(tmp_path / "other", documents=50).data

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UpfitError, match=message) as caught:
            mine.run(out, resume=True, **given)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    between = tmp_path / "out.upfit-work" / "stage-1-layerwise"
    for folder in (student, teacher):
        with flipped(folder / "model.safetensors"):
            refused(between, "changed since")
    with away(data):
        shutil.copytree(other, data)
        refused(data, "not made of what")
        shutil.rmtree(data)
    telling = Telling({})
    assert not mine.run(out, resume=True, output=telling, **given).stopped
    assert "stage 1 of 2, layerwise is finished" in telling.notes, "for all that"


@pytest.mark.slow
def test_overwrite_throws_finished_stages_away(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "out", output=InterruptingStage(2, 3), **BOTH)
    report = shop.run(tmp_path / "out", overwrite=True, **{**BOTH, "seed": 1})
    assert not report.stopped and not (tmp_path / "out.upfit-work").exists()


@pytest.mark.parametrize("how", ["resume", "overwrite", "neither"])
def test_stages_of_an_earlier_run_go_where_they_are_to_be_overwritten(tmp_path: Path, how: str) -> None:
    """Alone they do; what else lies there stays, and the mark of a clean stop goes."""
    for name in ("stage-1-layerwise", "stage-2-distill.steps", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / STOPPED).touch()
    with pytest.raises(UpfitError, match="--resume") if how == "neither" else nullcontext():
        make_way(tmp_path, how == "resume", how == "overwrite")
    stages = [] if how == "overwrite" else ["stage-1-layerwise", "stage-2-distill.steps"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other", *stages])


def test_several_stages_are_told_as_the_last_with_all_of_them() -> None:
    reports = [Uptraining(False, stage, 4, 4, 512, 0, [], 1.0, 512.0, {}, 4) for stage in ("layerwise", "distill", "lm")]
    whole = together(reports, 3)
    assert whole.stage == "lm" and whole.stages == reports
    stopped = together(reports[:1], 3)
    assert stopped.stage == "layerwise" and stopped.stages == reports[:1]
    assert together(reports[:1], 1) is reports[0]


@pytest.mark.slow
def test_nothing_is_rounded_between_stages(shop: Workshop, tmp_path: Path) -> None:
    """A model in bfloat16 comes back in bfloat16; what the second stage starts from has what bfloat16 would lose."""
    student = save_tiny(tmp_path / "student", pooled(tiny_llama()).bfloat16())
    provenance.write(student, provenance.read(shop.student))
    half = Workshop(shop.teacher, student, shop.data)
    half.run(tmp_path / "out", output=InterruptingStage(2, 3), **BOTH)
    between = load_file(tmp_path / "out.upfit-work" / "stage-1-layerwise" / "model.safetensors")
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in between.values())
    half.run(tmp_path / "out", resume=True, **BOTH)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"stages": "layerwise", "teacher": "none"}, "--teacher none"),
        ({"stages": "distill", "kl_weight": 0.0}, "kl_weight 0"),
        ({"stages": "answers"}, "questions of upfit synth"),
    ],
)
def test_a_stage_without_what_it_needs_is_one_line(
    shop: Workshop, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpfitError, match=message):
        shop.run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stages,changes,tables,message",
    [
        ("lm,distill", {"teacher": "none"}, {}, "--teacher none"),
        ("lm,answers", {"questions": "text"}, {}, "questions of upfit synth"),
        ("lm,distill", {}, {"distill": {"length": 4096}}, "--length 4096"),
        ("lm,distill", {}, {"distill": {"teacher": "nowhere/at/all"}}, "nowhere"),
    ],
)
def test_what_a_later_stage_cannot_have_is_told_before_the_first(
    shop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: str,
    changes: dict[str, Any],
    tables: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("upfit.uptrain.train.one_stage", lambda *_: pytest.fail("the first stage began"))
    changes = changes | ({"questions": str(shop.data)} if "questions" in changes else {})
    settings = config(**{"tokens": "1024", "stages": stages, "length": None, "batch_tokens": None, **changes})
    with pytest.raises(UpfitError, match=message) as caught:
        uptrain(str(shop.student), str(shop.data), tmp_path / "out", settings, False, False, QUIET, tables)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_step_that_says_nothing_leaves_nothing_known() -> None:
    """recipe.json may have been written by hand."""
    for entry in ({"verb": "convert gqa"}, {"verb": "convert gqa", "measurements": {"lossless": True, "leaves": []}}):
        assert provenance.state_left(entry) is None and provenance.head_order(entry, [2]) == [[0, 1]]
    assert provenance.state_left({"verb": "convert x", "measurements": {"lossless": True}}) == "lossless"

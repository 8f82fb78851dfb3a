"""Questions on long contexts: everything is read, the answer alone is learned, each label of a step counts alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tests.folders import save_tiny, tiny_llama
from tests.test_uptrain_faults import Telling
from tests.test_uptrain_resume import Interrupting
from tests.uptraining import BASE, QUIET, metrics, text, weights
from upfit import provenance
from upfit.errors import UpfitError
from upfit.longcontext.contexts import Contexts
from upfit.longcontext.options import Options
from upfit.longcontext.synth import synth
from upfit.longcontext.wording import Wording
from upfit.output import Output
from upfit.text.tokenizer import load_tokenizer
from upfit.uptrain.config import Config
from upfit.uptrain.data.answers import AnswerRows, fingerprint
from upfit.uptrain.data.dataloader import RowGroup, StepSampler, micro_batches, tensors
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import IGNORE
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.losses import Objective
from upfit.uptrain.model.model_traits import examine
from upfit.uptrain.run import preflight
from upfit.uptrain.run.result import Uptraining
from upfit.uptrain.train import uptrain

SETTINGS: dict[str, Any] = {
    "batch_tokens": "4000",
    "holdout": 3,
    "learning_rate": 3e-3,
    "save_every": "1",
    "dtype": "float32",
}
FAMILIES = ["record", "count"]


def make_home(folder: Path) -> Path:
    """A model that takes 2048 tokens, questions on up to 2000 letters, and token shards."""
    save_tiny(folder / "model", tiny_llama(max_position_embeddings=2048))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text(seed)}) for seed in range(60)))
    prepare([str(folder / "text.jsonl")], folder / "shards", str(folder / "model"), "text", QUIET)
    options = Options(
        tokenizer=str(folder / "model"), items=30, families=FAMILIES, min_tokens=1400, max_tokens=2000, segment_tokens=32
    )
    assert synth([str(folder / "text.jsonl")], folder / "data", options, QUIET).finished
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


def run(home: Path, out: Path, resume: bool = False, output: Output = QUIET, **changes: Any) -> Uptraining:
    settings = Config(**{**SETTINGS, **changes})
    return uptrain(str(home / "model"), str(home / "data"), out, settings, resume, False, output)


def rows_of(home: Path) -> AnswerRows:
    return AnswerRows(Contexts(home / "data", Wording(load_tokenizer(str(home / "model")), "plain")), 3, 0)


def with_bias(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A head that is more than a product: its logits are computed by the model itself."""
    model.lm_head = torch.nn.Linear(32, 100)
    return model


@pytest.mark.parametrize("head", [lambda model: model, with_bias], ids=["plain head", "whole logits"])
def test_the_loss_is_that_of_the_answers_and_so_are_the_gradients(
    home: Path, head: Callable[[LlamaForCausalLM], LlamaForCausalLM]
) -> None:
    model = head(tiny_llama(max_position_embeddings=2048))
    rows = [rows_of(home).at(index) for index in (0, 7)]
    assert len(rows[0].labels) != len(rows[1].labels), "rows of several lengths, so that one is filled up"
    distiller = Distiller(model, examine(model), None, {"": Objective(1.0, 0.0)})
    asked: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, given: asked.append(given[0].shape[1]))
    loss, ce, _ = distiller(*tensors(rows, torch.device("cpu")))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(count <= sum(row.supervised for row in rows) for count in asked), "logits only where a label counts"
    model.zero_grad()
    total: Tensor = torch.zeros(())
    for row in rows:  # one by one, every logit, nothing filled up
        logits = model(torch.from_numpy(row.input_ids)[None]).logits[0]
        total = total + F.cross_entropy(logits, torch.from_numpy(row.labels), ignore_index=IGNORE, reduction="sum")
    total.backward()
    torch.testing.assert_close(ce, total.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_labels_are_the_answer_and_its_end_token(home: Path) -> None:
    rows, tokenizer = rows_of(home), load_tokenizer(str(home / "model"))
    for index in range(len(rows.contexts)):
        row = rows.at(index)
        learned = row.labels[row.labels != IGNORE]
        wanted = tokenizer(rows.contexts.item(index).answer)["input_ids"]
        assert learned.tolist() == [*wanted, tokenizer.eos_token_id]
        assert (row.labels[-len(learned) :] == learned).all() and len(row.input_ids) == len(row.labels) <= rows.longest


@pytest.mark.slow
def test_an_uptraining_on_answers_is_one_pass_and_tells_what_was_asked(home: Path, tmp_path: Path) -> None:
    report = run(home, tmp_path / "out")
    rows = rows_of(home)
    lines = metrics(tmp_path / "out")
    a_step = provenance.read(tmp_path / "out")[-1]["options"]["resolved"]["rows_a_step"]
    assert a_step > 1 and report.steps * a_step >= len(rows.training) == 27 > (report.steps - 1) * a_step
    taken = [row for step in range(report.steps) for row in StepSampler(rows, a_step).of_step(step, 0, 1)[0].rows]
    assert report.tokens == lines[-1]["tokens"] == sum(len(row.labels) for row in taken)
    model = tiny_llama(max_position_embeddings=2048)
    distiller = Distiller(model, examine(model), None, {"": Objective(1.0, 0.0)})
    first = taken[:a_step]
    nats = sum(float(distiller(*tensors([row], torch.device("cpu")))[1]) for row in first)
    assert lines[0]["ce"] == pytest.approx(nats / sum(row.supervised for row in first), rel=1e-4)
    assert report.holdout["after"]["ce"] < report.holdout["before"]["ce"] and report.holdout_rows == 3
    told = provenance.read(tmp_path / "out")[-1]
    assert told["stage"] == "answers" and told["teacher"] is None and told["data"]["items"] == 30
    assert told["data"]["patterns"] == ["counting", "key and value, both ways"]


@pytest.mark.slow
def test_micro_batches_and_recomputed_layers_change_nothing(home: Path, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{"micro_batch": 1}, {"micro_batch": 2}, {"micro_batch": 1, "gradient_checkpointing": True}]
    lines = []
    for number, changes in enumerate(kinds):
        run(home, tmp_path / str(number), tokens="8000", **changes)
        lines.append([(line["ce"], line["grad_norm"]) for line in metrics(tmp_path / str(number))])
    for other in lines[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(lines[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["answers", "with text"])
def test_stopped_and_resumed_is_as_unbroken(home: Path, tmp_path: Path, mixed: bool) -> None:
    mix: dict[str, Any] = {"mix": str(home / "shards"), "length": 64, "teacher": str(home / "model")} if mixed else {}
    run(home, tmp_path / "whole", tokens="12000", **mix)
    assert run(home, tmp_path / "broken", output=Interrupting(2), tokens="12000", **mix).stopped
    run(home, tmp_path / "broken", resume=True, tokens="12000", **mix)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    same = [[{**line, "seconds": 0, "tokens_per_second": 0} for line in metrics(tmp_path / at)] for at in ("broken", "whole")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_text_beside_answers_has_a_mean_and_a_teacher_of_its_own(home: Path, tmp_path: Path) -> None:
    mix: dict[str, Any] = {
        "mix": str(home / "shards"),
        "length": 64,
        "teacher": str(home / "model"),
        "mix_weight": 0.5,
        "mix_share": 0.4,
    }
    report = run(home, tmp_path / "out", tokens="12000", **mix)
    lines = metrics(tmp_path / "out")
    assert abs(lines[0]["mix_kl"]) < 1e-5 < lines[-1]["mix_kl"], "the teacher is the model itself, which then moves"
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + 0.5 * line["mix_kl"], rel=1e-4)
    before = report.holdout["before"]
    assert before["teacher_mix_ce"] == pytest.approx(before["mix_ce"], rel=1e-4) and "teacher_ce" not in before
    resolved = provenance.read(tmp_path / "out")[-1]
    assert resolved["data"]["mix"] == str(home / "shards") and resolved["teacher"]["path"] == str(home / "model")


def test_another_corpus_is_other_data(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    wording = rows_of(home).contexts.wording
    assert fingerprint(Contexts(tmp_path / "data", wording)) == fingerprint(rows_of(home).contexts)
    about = tmp_path / "data" / "segments" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": "of another text"}))
    assert fingerprint(Contexts(tmp_path / "data", wording)) != fingerprint(rows_of(home).contexts)


def test_every_process_takes_its_share_of_a_step(home: Path) -> None:
    rows = rows_of(home)
    whole = [tuple(row.input_ids) for row in StepSampler(rows, 7).of_step(1, 0, 1)[0].rows]
    assert [len(row) for row in whole] == sorted(map(len, whole), reverse=True) or len(set(map(len, whole))) > 1
    for world in (2, 3, 5):
        shares = [StepSampler(rows, 7).of_step(1, rank, world)[0].rows for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(tuple(row.input_ids) for share in shares for row in share if row.supervised) == sorted(whole)


def test_rows_of_like_length_share_a_micro_batch(home: Path) -> None:
    rows = rows_of(home).of_step(0, 12, 0, 1)
    batches = list(micro_batches(rows, None, 5000))
    assert [row for batch in batches for row in batch] == rows and max(map(len, batches)) > 1
    assert all(len(batch) == 1 or len(batch) * max(len(row.labels) for row in batch) <= 5000 for batch in batches)
    filled = sum(len(batch) * max(len(row.labels) for row in batch) for batch in batches)
    assert filled < 1.2 * RowGroup("", rows).tokens


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "share without text": ({"mix_share": 0.5}, "mix_share is for text, which --mix adds to answers; leave it out"),
    "length without text": ({"length": 64}, "--length is for text"),
    "no shards there": ({"mix": "nowhere"}, "no manifest.json"),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_what_would_mean_nothing_is_refused(home: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UpfitError, match=words):
        run(home, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_text_as_data_takes_no_mix(home: Path, tmp_path: Path) -> None:
    settings = Config(**{**BASE, "mix": str(home / "shards")})
    with pytest.raises(UpfitError, match="--mix goes with answers"):
        uptrain(str(home / "model"), str(home / "shards"), tmp_path / "out", settings, False, False, QUIET)


def test_examples_the_model_cannot_take_are_refused(home: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "short", tiny_llama(max_position_embeddings=512))
    with pytest.raises(
        UpfitError, match="examples of up to 2000 tokens, the model takes 512; make shorter ones with upfit synth"
    ):
        uptrain(str(tmp_path / "short"), str(home / "data"), tmp_path / "out", Config(**SETTINGS), False, False, QUIET)


def test_questions_of_another_tokenizer_are_refused(home: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", tiny_llama(max_position_embeddings=2048))
    other = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {"a": other["model"]["vocab"]["b"], "b": other["model"]["vocab"]["a"]}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UpfitError, match="which is not that of .*; make it again with --tokenizer"):
        uptrain(str(tmp_path / "other"), str(home / "data"), tmp_path / "out", Config(**SETTINGS), False, False, QUIET)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_memory_of_a_long_row_is_known_from_short_ones(attention: str) -> None:
    model = tiny_llama(max_position_embeddings=2048).train()
    model.set_attn_implementation(attention)
    distiller = Distiller(model, examine(model), None, {"": Objective(1.0, 0.0)})
    assert preflight.kept_bytes(distiller, 1500) == pytest.approx(preflight._kept(distiller, 1500), rel=0.02)


def test_too_little_memory_is_told_before_the_first_step(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 10_000)
    with pytest.raises(UpfitError, match="keeps about .* for the backward pass, .* are free on cpu; give --gradient-checkpoin"):
        run(home, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_short_is_told_and_nothing_else(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "window_warning", lambda config, longest: f"the window ends before {longest}")
    monkeypatch.setattr(preflight, "base_warning", lambda model, longest: None)
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 10_000)
    output = Telling({})
    with pytest.raises(UpfitError, match="free on cpu"):
        run(home, tmp_path / "out", output=output)
    warnings = [note for note in output.notes if note is None or "window" in note]
    assert warnings == [f"the window ends before {rows_of(home).longest}"]


def test_windows_and_rotary_bases_that_are_too_short_are_told() -> None:
    config = tiny_llama().config
    assert preflight.window_warning(config, 100) is None
    windowed = type("Config", (), {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]})
    assert "1 of 2 layers see only the newest 64 tokens" in str(preflight.window_warning(windowed, 100))
    assert preflight.window_warning(windowed, 64) is None
    frequencies = 10000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    reach = preflight.rotary_reach(frequencies, 322048)
    assert min(torch.cos(m * frequencies).mean() for m in range(reach)) >= 0 > torch.cos(reach * frequencies).mean()
    assert preflight.rotary_reach(5e5 ** -(torch.arange(0, 128, 2).double() / 128), 4096) == 4096
    assert "arXiv 2405.14591" in str(preflight.base_warning(tiny_llama(), 4096))

"""Laws of `--tasks`: log-likelihoods are the harness's own, batches change nothing, nothing is cut, documents are paired."""

import json
import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.folders import letter_tokenizer, save_tiny, tiny_llama
from tests.records import evaluate
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.harness import harness
from upfit.evaluate.harness.scores import MEANS, Metric, Scores, differences, metric
from upfit.evaluate.interval import Interval
from upfit.evaluate.options import Options, check_options
from upfit.evaluate.result import Evaluation
from upfit.output import Meter, Output
from upfit.report.measured import measured

QUIET = Output(quiet=True)
POSITIONS = 128
# Float32 sums in another order; the harness's own tests allow as much.
LOG_LIKELIHOOD = 1e-4
ROWS: list[dict[str, Any]] = [
    {"question": "the sum of 1 and 2 is", "choices": ["3", "4", "twelve"], "gold": 0},
    {"question": "b", "choices": ["c", "an unlikely one", "d"], "gold": 2},
    {"question": "a much longer question, which has to be padded for no other one", "choices": ["yes", "no", "so"], "gold": 1},
    {"question": "x = 1; y = x; print(y) gives", "choices": ["1", "x", "y"], "gold": 0},
]
CHOICE = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metadata: {{version: 3}}
"""
WRITE = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 12, do_sample: false, until: []}}
metric_list: [{{metric: exact_match}}]
"""
ROLL = """
task: roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@contextmanager
def meter(requests: int) -> Any:
    yield Meter("", requests, True, None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks, whose data lies beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in {"pick": CHOICE, "say": WRITE, "roll": ROLL}.items():
        (folder / f"{name}.yaml").write_text(text.format(path=data))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama, and what our own classes make of it, away from where they are equal to it."""
    root = tmp_path_factory.mktemp("models")
    folders = {"llama": save_tiny(root / "llama")}
    made: dict[str, dict[str, Any]] = {"diff": {"variant": "v2"}, "cope": {"gates": "constant", "positions": 6, "span": 20}}
    for name, settings in made.items():
        recipe, out = find_recipes()[name], root / name
        convert(recipe, str(folders["llama"]), out, recipe.options(**settings), Settings(verify=False), QUIET)
        model: Any = AutoModelForCausalLM.from_pretrained(out)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(out)
        folders[name] = out
    return folders


def asked(folder: Path, tasks: str, names: list[str], batch: int = 4) -> tuple[Any, list[harness.Asked], Options]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = Options(tasks=names, task_path=tasks, batch=batch)
    return model, harness.load(options, letter_tokenizer(), POSITIONS, QUIET), options


def instances(one: harness.Asked) -> list[Any]:
    one.task.build_all_requests(limit=None)
    return list(one.task.instances)


@pytest.mark.parametrize("batch", [1, 5])
def test_log_likelihoods_are_those_of_the_harness(models: dict[str, Path], tasks: str, batch: int) -> None:
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from upfit.evaluate.harness.model import Model

    model, (pick, roll), _ = asked(models["llama"], tasks, ["pick", "roll"])
    stock = hf.HFLM(pretrained=model, tokenizer=letter_tokenizer(), max_length=POSITIONS, backend="causal")
    ours = Model(model, letter_tokenizer(), batch, POSITIONS, meter)
    requests = instances(pick)
    for request in requests[:2]:
        request.arguments = ("", request.args[1])  # nothing before the answer: the prefix token stands there
    wanted, found = stock.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert np.allclose([value for value, _ in found], [value for value, _ in wanted], atol=LOG_LIKELIHOOD, rtol=0)
    texts = instances(roll)
    for request in texts[:1]:
        request.arguments = (" and so on" * 40,)  # longer than the model takes: read in stretches
    rolled, expected = ours.loglikelihood_rolling(texts), stock.loglikelihood_rolling(texts, disable_tqdm=True)
    assert np.allclose(rolled, expected, atol=LOG_LIKELIHOOD, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "diff", "cope"])
def test_batches_change_nothing(models: dict[str, Path], tasks: str, name: str) -> None:
    pytest.importorskip("lm_eval")
    from upfit.evaluate.harness.model import Model

    model, (pick, say), _ = asked(models[name], tasks, ["pick", "say"])
    assert type(model).__name__.startswith("Upfit") == (name != "llama")
    alone, together = (Model(model, letter_tokenizer(), batch, POSITIONS, meter) for batch in (1, 4))
    one, many = alone.loglikelihood(instances(pick)), together.loglikelihood(instances(pick))
    assert np.allclose([value for value, _ in one], [value for value, _ in many], atol=LOG_LIKELIHOOD, rtol=0)
    said = alone.generate_until(instances(say))
    assert said == together.generate_until(instances(say)) and len(set(said)) == len(ROWS)


def test_only_what_is_scored_becomes_logits(models: dict[str, Path], tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from upfit.evaluate.harness.model import Model

    model, (pick,), _ = asked(models["llama"], tasks, ["pick"])
    ours = Model(model, letter_tokenizer(), 4, POSITIONS, meter)
    shapes, logits = [], Model._logits

    def watched(self: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        found = logits(self, ids, places)
        shapes.append((ids.shape[1], found.shape[1], len(places)))
        return found

    monkeypatch.setattr(Model, "_logits", watched)
    ours.loglikelihood(instances(pick))
    assert all(kept == wanted for _, kept, wanted in shapes)
    assert sum(kept for _, kept, _ in shapes) < sum(tokens for tokens, _, _ in shapes), "more than the answers' positions"


@pytest.mark.parametrize("name", ["pick", "say"])
def test_what_does_not_fit_is_refused_before_anything_is_run(models: dict[str, Path], tasks: str, name: str) -> None:
    pytest.importorskip("lm_eval")
    model, found, options = asked(models["llama"], tasks, ["roll", name])
    model.model.forward = None  # to call it would be an error
    message = rf"--tasks {name}: a prompt of 6[34] tokens and .* the 64 positions.*nothing is cut"
    with pytest.raises(UpfitError, match=message):
        harness.ask(model, letter_tokenizer(), 64, found, options, "tiny", QUIET)


def test_it_fits_to_the_last_position(models: dict[str, Path], tasks: str) -> None:
    pytest.importorskip("lm_eval")
    from upfit.evaluate.harness.model import Model

    model, (say,), _ = asked(models["llama"], tasks, ["say"])
    longest = max(len(row["question"]) for row in ROWS) + 12
    assert len(Model(model, letter_tokenizer(), 4, longest, meter).generate_until(instances(say))) == len(ROWS)
    with pytest.raises(UpfitError, match="12 to generate"):
        Model(model, letter_tokenizer(), 4, longest - 1, meter).generate_until(instances(say))


def test_two_models_are_asked_the_same(
    models: dict[str, Path], tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    text = tmp_path / "text.txt"
    text.write_text("a line of text with words in it\n" * 60)
    options = Options(
        data=[str(text)], length=32, windows=4, device="cpu", tasks=["pick", "roll"], task_path=tasks, task_limit=3,
        against=str(models["llama"]),
    )  # fmt: skip
    result = evaluate(str(models["diff"]), options, Output(as_json=True, quiet=True))
    assert result == json.loads(json.dumps(result))
    own = result["model"]["tasks"]["pick"]
    assert (own["documents"], own["version"], own["few_shot"], own["length"]) == (3, 3, 0, None)
    assert set(own["metrics"]) == {"acc", "acc_norm"} and own["metrics"]["acc"]["low"] is not None
    right = [result[key]["tasks"]["pick"]["metrics"]["acc"]["mean"] for key in ("model", "against")]
    assert math.isclose(result["task_differences"]["pick"]["acc"]["mean"], right[0] - right[1], abs_tol=1e-12)
    rolled = [result[key]["tasks"]["roll"]["metrics"]["word_perplexity"]["mean"] for key in ("model", "against")]
    assert math.isclose(result["task_differences"]["roll"]["word_perplexity_ratio"]["mean"], rolled[0] / rolled[1])
    Evaluation.read(result).show(Output())
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("acc_norm", "word_perplexity", "difference", "ratio"))
    (section,) = measured([("after diff", result)])
    assert any("lm-evaluation-harness" in table.title and len(table.rows) == 8 for table in section.tables)


def test_a_model_alone_has_no_differences(models: dict[str, Path], tasks: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text("a line of text with words in it\n" * 60)
    data: dict[str, Any] = {"data": [str(tmp_path / "text.txt")], "length": 32, "windows": 2, "device": "cpu"}
    options = Options(**data, tasks=["pick"], task_path=tasks, task_limit=2)
    result = evaluate(str(models["llama"]), options, Output(as_json=True, quiet=True))
    assert result["model"]["tasks"] and result["task_differences"] is result["against"] is None


def test_a_model_differs_from_itself_by_nothing(models: dict[str, Path], tasks: str) -> None:
    pytest.importorskip("lm_eval")
    model, found, options = asked(models["llama"], tasks, ["pick", "say"])
    scores = harness.ask(model, letter_tokenizer(), POSITIONS, found, options, "tiny", QUIET)
    told = differences(scores, harness.ask(model, letter_tokenizer(), POSITIONS, found, options, "tiny", QUIET))
    assert all(value == Interval(0.0, 0.0, 0.0) for task in told.values() for value in task.values())


LIKE_RULER = """
task: {name}
dataset_path: ""
dataset_name: ""
output_type: generate_until
test_split: test
custom_dataset: !function made.texts
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
process_results: !function made.scored
metric_list: [{{metric: "4096", aggregation: !function made.known}}]
generation_kwargs: {{max_gen_toks: 4, do_sample: false, until: []}}
"""
MADE = """
import datasets
from transformers import AutoTokenizer

def texts(**told):
    assert len(AutoTokenizer.from_pretrained(told["tokenizer"])("abc").input_ids) == 3
    lengths = [length for length in told["max_seq_lengths"] for _ in "abc"]
    rows = [{"input": "a" * (length // 10), "outputs": ["x"], "max_length": length} for length in lengths]
    return {"test": datasets.Dataset.from_list(rows)}

def scored(doc, results):
    print("harnesses talk")
    return {"4096": -1.0} | {str(doc["max_length"]): 0.5}

def known(values):
    return sum(value for value in values if value != -1)
"""


def test_ruler_is_run_length_by_length(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "made.py").write_text(MADE)
    for name in ("ruler_vt", "ruler_qa_squad"):
        (tmp_path / f"{name}.yaml").write_text(LIKE_RULER.format(name=name))
    monkeypatch.setattr(harness, "ruler", lambda: tmp_path)
    options = Options(tasks=["ruler_vt", "ruler_qa_squad"], task_lengths=[600, 1000], task_limit=2)
    found = harness.load(options, letter_tokenizer(), 1024, Output())
    told = harness.ask(tiny_llama(), letter_tokenizer(), POSITIONS, found, options, "tiny", QUIET)
    said = capsys.readouterr()
    assert "making the texts of ruler_vt, 600 tokens long" in said.err and said.out == "", "--json stands there"
    for name, score in (("ruler_vt", 0.5), ("ruler_qa_squad", 1.0)):
        for length in (600, 1000):
            record = told[f"{name}, {length} tokens"].summary().record()
            assert (record["length"], record["documents"]) == (length, 2), "a limit is one of each length"
            assert {key: value["mean"] for key, value in record["metrics"].items()} == {"string_match": score}


def test_intervals_belong_to_what_the_harness_tells() -> None:
    agg = pytest.importorskip("lm_eval.api.metrics")
    draw = np.random.default_rng(0)
    plain = draw.normal(-2, 1, 50).tolist()
    weighted = [(float(a), float(b)) for a, b in zip(draw.normal(-40, 9, 50), draw.integers(5, 30, 50), strict=True)]
    for name in MEANS:
        values = plain if name in ("mean", "perplexity") else weighted
        found = metric(values, name, getattr(agg, name)(values)).estimate()
        assert math.isclose(found.mean, getattr(agg, name)(values)), name
        assert found.low is not None and found.high is not None and found.low < found.mean < found.high


def test_other_aggregations_have_a_value_and_no_interval() -> None:
    one, two = (Metric(value) for value in (0.75, 0.5))
    assert metric([(0, 1), (1, 1)], "f1", 0.75) == one and metric(["a"], "mean", 0.5) == two
    scores = [{"t": Scores("0", "t", None, 1, 0, ["x"], {"f1": found})} for found in (one, two)]
    assert differences(*scores) == {"t": {"f1": Interval(0.25, None, None)}}


def test_without_the_harness_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UpfitError, match=r"pip install 'upfit\[eval\]'"):
        harness.load(Options(tasks=["pick"]), letter_tokenizer(), None, QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_limit": 3}, "--task-limit goes with --tasks; add --tasks, or leave it out"),
        ({"tasks": ["a"], "task_path": "/nowhere"}, "is not a folder"),
        ({"tasks": ["a"], "task_limit": 0}, "--task-limit got 0; it takes 1 or more"),
        ({"tasks": ["a"], "task_lengths": [100]}, r"--task-lengths got \[100\]; it takes 512 or more"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message):
        check_options(replace(Options(), **changes))


def test_the_home_folder_of_tasks_is_known(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HOME", str(Path(tasks).parent))
    options = Options(tasks=["pick"], task_path=f"~/{Path(tasks).name}")
    check_options(options)
    assert [one.label for one in harness.load(options, letter_tokenizer(), POSITIONS, QUIET)] == ["pick"]


def test_bad_tasks_are_one_line(tasks: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "gone.yaml").write_text(CHOICE.replace("pick", "gone").format(path=tmp_path / "gone.jsonl"))
    cases = [
        (Options(tasks=["gone"], task_path=str(tmp_path)), "--tasks gone does not load"),
        (Options(tasks=["pick"], task_path=tasks, task_lengths=[1024]), "--task-lengths goes with tasks of RULER"),
        (Options(tasks=["ruler-offline"]), "--task-lengths 4096 .* is more than the 128 positions"),
    ]
    for options, message in cases:
        with pytest.raises(UpfitError, match=message):
            harness.load(options, letter_tokenizer(), POSITIONS, QUIET)


def test_a_tokenizer_without_an_end_is_refused(models: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval")
    from upfit.evaluate.harness.model import Model

    tokenizer = letter_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UpfitError, match="end-of-text"):
        Model(tiny_llama(), tokenizer, 1, POSITIONS, meter)

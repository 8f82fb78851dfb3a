"""The CoPE paper's tasks: answers follow from the text, distributions are the source's, the probe tells who can do them."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.records import evaluate
from upfit.cli import app
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.evaluate import PROBES
from upfit.evaluate.options import PROBES as NAMES
from upfit.evaluate.options import Options
from upfit.evaluate.probes.synthetic import TASKS, Question, compared, make_questions, probe
from upfit.evaluate.probes.synthetic import summary as answered
from upfit.evaluate.synthetic import counting, flipflop, selective_copy
from upfit.evaluate.synthetic.items import Item
from upfit.output import Output

# Shares are of fixed samples; a tolerance is about five standard errors of one, so that another way to draw would not matter.
PROGRAMS = 1000


def some(make: Callable[..., Item], count: int, **sizes: Any) -> list[Item]:
    draw = random.Random(0)
    return [make(draw, **sizes) for _ in range(count)]


def asked(item: Item) -> list[str]:
    return [item.tokens[at] for at in item.answers]


# Generators


@pytest.fixture(scope="module", params=counting.VARIABLES)
def programs(request: pytest.FixtureRequest) -> tuple[int, list[Item]]:
    return request.param, some(counting.make, PROGRAMS, variables=request.param)


class Small(dict[str, int]):
    """Variables that are never above 10."""

    def __setitem__(self, name: str, value: int) -> None:
        assert 0 <= value <= counting.MOST
        super().__setitem__(name, value)


def test_programs_print_what_python_says(programs: tuple[int, list[Item]]) -> None:
    variables, items = programs
    for item in items[:200]:
        *program, word, name, answer = item.tokens
        assert word == "print" and item.answers == (len(item.tokens) - 1,)
        values = Small()
        exec(" ".join(program).replace("++;", "+= 1 ;").replace("pass;", "pass ;"), {}, values)
        assert str(values[name]) == answer
    symbols = {token for item in items for token in item.tokens}
    assert symbols == set(counting.vocabulary(variables)) and len(symbols) == 16 + variables


def steps(item: Item) -> list[tuple[str, str]]:
    """Operation and variable of each step of a program that is whole."""
    told, at, tokens = [], 0, item.tokens
    while at < len(tokens) - 3:
        operation, name = ("pass", "") if tokens[at] == "pass;" else (tokens[at + 1].strip(";"), tokens[at])
        told.append((operation, name))
        at += {"pass": 1, "++": 2, "=": 4}[operation]
    return told


def test_programs_are_as_long_and_as_eventful_as_the_authors(programs: tuple[int, list[Item]]) -> None:
    variables, items = programs
    lengths = [len(item.tokens) for item in items]
    assert sum(lengths) / PROGRAMS == pytest.approx(316, abs=20)
    assert 590 < max(lengths) < 680
    assert sum(length > 512 for length in lengths) / PROGRAMS == pytest.approx(0.135, abs=0.045)
    free = Counter[str]()  # steps at which each operation was possible, whatever variable it took
    for item in items:
        values: dict[str, int] = {}
        program = steps(item)
        assert counting.LEAST_STEPS <= len(program) <= counting.MAX_STEPS
        for operation, name in program:
            if values and max(values.values()) < counting.MOST:
                free[operation] += 1
            if operation != "pass":
                values[name] = values[name] + 1 if operation == "++" else 0
    assert free["="] / free["pass"] == pytest.approx(1 / 50, rel=0.1)
    assert free["++"] / free["pass"] == pytest.approx(7 / 50, rel=0.05)
    answers = Counter(token for item in items for token in asked(item))
    assert answers.most_common(1)[0][0] == "10" and answers["10"] / PROGRAMS == pytest.approx(0.2, abs=0.05)
    names = Counter(item.tokens[-2] for item in items if len(set(item.tokens) & set(counting.NAMES)) == variables)
    assert min(names.values()) / names.total() == pytest.approx(1 / variables, abs=0.06)


def test_a_cut_program_keeps_its_end(programs: tuple[int, list[Item]]) -> None:
    variables, items = programs
    unknown = 0
    for whole in items:
        item = whole.trimmed(512)
        assert item.tokens == whole.tokens[-512:] and item.answers == (len(item.tokens) - 1,) and asked(item) == asked(whole)
        unknown += (item.tokens[-2], "=") not in zip(item.tokens, item.tokens[1:], strict=False)
    assert unknown / PROGRAMS < 0.01
    assert some(counting.make, 20, variables=variables, block=99) == [whole.trimmed(99) for whole in items[:20]]
    assert Item(("r", "1", "r", "0"), (1, 3)).trimmed(2) == Item(("r", "0"), (1,))


def test_longer_programs_are_longer() -> None:
    numbers = [len(steps(item)) for item in some(counting.make, 300, max_steps=64)]
    assert min(numbers) >= 3 and 60 <= max(numbers) <= 64
    # An increment that is not possible takes no step.
    assert {len(steps(item)) for item in some(counting.make, 200, max_steps=3)} == {3}


@pytest.mark.parametrize("split", flipflop.IGNORE)
def test_the_register_holds_what_was_written_last(split: str) -> None:
    items = some(flipflop.make, 300, ignore=flipflop.IGNORE[split])
    middle, free = Counter[str](), Counter[str]()
    for item in items:
        assert len(item.tokens) == flipflop.LENGTH
        orders, bits = item.tokens[::2], item.tokens[1::2]
        assert orders[0] == "w" and orders[-1] == "r" and set(bits) <= {"0", "1"}
        bit = ""
        for at, (order, told) in enumerate(zip(orders, bits, strict=True)):
            bit = told if order == "w" else bit
            assert (2 * at + 1 in item.answers) == (order == "r")
            assert order != "r" or told == bit
            free[told] += order != "r"
        middle.update(orders[1:-1])
    total = middle.total()
    assert middle["i"] / total == pytest.approx(flipflop.IGNORE[split], abs=0.01)
    assert middle["w"] / (middle["w"] + middle["r"]) == pytest.approx(0.5, abs=0.06)  # as in any other split
    assert free["1"] / free.total() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("split", selective_copy.BLANKS)
def test_a_copy_is_the_text_without_blanks(split: str) -> None:
    blanks, copied = round(selective_copy.BLANKS[split] * 128), 128
    assert (split, blanks) in (("in distribution", 128), ("dense", 64), ("sparse", 256))
    items = some(selective_copy.make, 300, blanks=blanks)
    for item in items:
        assert len(item.tokens) == blanks + 2 * copied
        read, copy = item.tokens[: blanks + copied], item.tokens[blanks + copied :]
        assert tuple(token for token in read if token != "_") == copy == tuple(asked(item))
    counts = Counter(token for item in items for token in asked(item))
    assert set(counts) | {"_"} == set(selective_copy.VOCABULARY) and len(selective_copy.VOCABULARY) == 16
    assert min(counts.values()) / max(counts.values()) > 0.9
    for at in (0, blanks + copied - 1):  # blanks are everywhere alike
        share = sum(item.tokens[at] == "_" for item in items) / len(items)
        assert share == pytest.approx(blanks / (blanks + copied), abs=0.15)


@pytest.mark.parametrize("make", [counting.make, flipflop.make, selective_copy.make], ids=["counting", "flipflop", "copy"])
def test_a_seed_is_a_text(make: Callable[[random.Random], Item]) -> None:
    assert make(random.Random(1)) == make(random.Random(1)) != make(random.Random(2))


# The probe


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model())


def spelled(symbols: str, merges: list[tuple[str, str]], parted: bool = True) -> Any:
    """A tokenizer of single characters and `merges` of them."""
    letters = [*dict.fromkeys(symbols), *("".join(pair) for pair in merges)]
    own = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, merges))
    if parted:
        own.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=own)


class Says(nn.Module):
    """A model whose choice after each token is `choose(ids)` [T]; `sure`: the logit of it, 0 for all alike."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor], sure: float = 40.0, size: int = 2049) -> None:
        super().__init__()
        self.choose, self.sure, self.size, self.device = choose, sure, size, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(1, input_ids.shape[1], self.size)
        logits.scatter_(2, self.choose(input_ids[0])[None, :, None], self.sure)
        return type("Told", (), {"logits": logits})()


def told(model: nn.Module, questions: list[Question]) -> dict[str, Any]:
    with Output(quiet=True).progress("", 1) as meter:
        return answered(probe(model, questions, meter), questions).record()["splits"]


@pytest.mark.parametrize("name", TASKS)
def test_who_knows_the_answers_has_them_all_right(name: str, tokenizer: Any) -> None:
    (questions,) = make_questions(name, [tokenizer], 6, 200)
    assert Counter(question.split for question in questions) == dict.fromkeys(TASKS[name].splits, 6)
    for question in questions:
        assert len(question.ids) <= 200
        words = tokenizer.decode(question.ids).split()
        assert [tokenizer.decode(question.ids[a:b]).strip() for a, b in question.answers] == list(question.symbols)
        assert words[-1] == question.symbols[-1]
    for split in told(Says(lambda ids: ids.roll(-1)), questions).values():
        assert split["accuracy"]["mean"] == 1.0 and split["nats_per_answer"]["mean"] < 1e-6
    for split in told(Says(lambda ids: ids.roll(-1) + 1), questions).values():
        assert split["accuracy"]["mean"] == 0.0 and split["nats_per_answer"]["mean"] >= 40.0
    for split in told(Says(lambda ids: ids, sure=0.0), questions).values():
        assert split["nats_per_answer"]["mean"] >= math.log(2049) - 1e-4


def test_the_items_are_the_same_each_time(tokenizer: Any) -> None:
    """Those of the seed 0, so that models are compared on them whenever they are measured; another seed has others."""
    asked, again, others = (
        [question.ids.tolist() for question in make_questions("flipflop", [tokenizer], 3, 256, **seed)[0]]
        for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert asked == again != others


def test_who_always_says_the_same_is_right_as_often_as_that(tokenizer: Any) -> None:
    (questions,) = make_questions("flipflop", [tokenizer], 20, 256)
    one = tokenizer(" 1", add_special_tokens=False)["input_ids"][-1]
    for name, split in told(Says(lambda ids: torch.full_like(ids, one)), questions).items():
        said = Counter(symbol for question in questions if question.split == name for symbol in question.symbols)
        assert split["answers"] == said.total() and split["items"] == 20
        assert split["accuracy"]["mean"] == pytest.approx(said["1"] / said.total())
        assert split["commonest_answer"] == pytest.approx(max(said.values()) / said.total())
        assert 0.2 < split["accuracy"]["mean"] < 0.8


def test_an_answer_of_two_tokens_needs_both() -> None:
    merges = [("p", "a"), ("s", "s"), ("pa", "ss"), ("pass", ";")]
    digits = spelled("".join(counting.vocabulary(5)) + " ", merges)
    (questions,) = make_questions("counting", [digits], 12, 1200)
    ten = digits("10")["input_ids"]
    assert len(ten) == 2
    share = sum(question.symbols == ("10",) for question in questions) / len(questions)
    assert share > 0.1

    def never_a_zero_after_a_one(ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids == ten[0], ids, ids.roll(-1))

    splits = told(Says(never_a_zero_after_a_one, size=64), questions)
    right = sum(split["accuracy"]["mean"] * split["answers"] for split in splits.values()) / len(questions)
    assert right == pytest.approx(1 - share)


def test_models_with_other_tokens_get_the_same_items(tokenizer: Any) -> None:
    letters = spelled("".join(counting.vocabulary(5)) + " ", [])
    ours, theirs = make_questions("counting", [tokenizer, letters], 5, 300)
    assert [question.symbols for question in ours] == [question.symbols for question in theirs]
    assert {question.size for question in ours} == {question.size for question in theirs}
    assert max(len(question.ids) for question in [*ours, *theirs]) <= 300
    assert any(len(a.ids) != len(b.ids) for a, b in zip(ours, theirs, strict=True))
    again, _ = make_questions("counting", [tokenizer, letters], 5, 300)
    assert all(a.ids.tolist() == b.ids.tolist() for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_items_are_as_large_as_may_be(name: str, tokenizer: Any) -> None:
    sizes = [make_questions(name, [tokenizer], 2, length)[0][0].size for length in (64, 200, 100_000)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == TASKS[name].size
    with pytest.raises(UpfitError, match=f"--probe {name} has texts of"):
        make_questions(name, [tokenizer], 2, 3)


def test_symbols_must_stay_apart() -> None:
    merged = spelled("wri01 ", [("r", " "), ("r ", "1")], parted=False)
    assert merged.tokenize("r 1") == ["r 1"]
    with pytest.raises(UpfitError, match="keeps symbols"):
        make_questions("flipflop", [merged], 5, 64)


def test_pairs_tell_models_apart(tokenizer: Any) -> None:
    (questions,) = make_questions("selective-copy", [tokenizer], 5, 200)
    with Output(quiet=True).progress("", 1) as meter:
        good = probe(Says(lambda ids: ids.roll(-1)), questions, meter)
        bad = probe(Says(lambda ids: ids.roll(-1) + (torch.arange(len(ids)) % 2)), questions, meter)
    for split in compared(good, bad).values():
        assert split["accuracy"]["mean"] == pytest.approx(0.5, abs=0.05) and split["accuracy"]["low"] > 0
        assert split["nats_per_answer"]["mean"] == pytest.approx(-20, abs=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A sentence of no great interest, which is there to be read. " * 60)
    return str(path)


def test_the_verb_tells_it(text: str) -> None:
    assert set(NAMES) == set(PROBES)
    words = ["evaluate", str(embedded_model()), "--data", text, "--length", "96", "--probe-samples", "3", "--json", "-q"]
    done = CliRunner().invoke(app, [*words, "--probe", "flipflop", "--probe", "needle", "--probe", "counting"])
    assert done.exit_code == 0, done.output
    probes = json.loads(done.stdout)["model"]["probes"]
    assert list(probes) == ["flipflop", "needle", "counting"]
    assert probes["counting"]["unit"] == "steps" and list(probes["counting"]["splits"]) == list(TASKS["counting"].splits)


@pytest.mark.slow
def test_two_models_get_a_table(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from upfit.evaluate.result import Evaluation

    same = str(embedded_model())
    options = Options(against=same, data=[text], length=64, probe=["selective-copy"], probe_samples=2)
    result = evaluate(same, options, Output(quiet=True))
    for split in result["probe_differences"]["selective-copy"].values():
        assert split["accuracy"]["mean"] == split["nats_per_answer"]["mean"] == 0.0
    Evaluation.read(result).show(Output())
    shown = capsys.readouterr().out
    assert "Selective-copy" in shown and "dense" in shown and "sparse" in shown


# The benchmark's decoder

"""Probes of long contexts: one answer to each question, at its depth, in what fits; scores and gaps that mean what they say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.folders import letter_tokenizer
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.probes import depths
from upfit.evaluate.probes.retrieval import floor
from upfit.longcontext.probes import scores
from upfit.longcontext.probes.contexts import SPARE, Laid, Settings, make_contexts
from upfit.longcontext.probes.families import FAMILIES
from upfit.longcontext.probes.hidden import HOPS
from upfit.text import Document, python_documents

DEPTHS = 4
SHORT, LONG = 1000, 1600  # tokens of the embedded tokenizer, which makes many of a word
HIDDEN = [name for name, family in FAMILIES.items() if family.hide is not None]
FILM = [name for name, family in FAMILIES.items() if family.film is not None]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Enough of both kinds for LONG tokens, and quick to tokenise."""
    every = python_documents()
    return [document for document in every if document.kind == "prose"][:60] + [every[-1], every[-3]]


@pytest.fixture(scope="module", params=FAMILIES)
def laid(request: pytest.FixtureRequest, tokenizer: Any, documents: list[Document]) -> list[Laid]:
    (made,) = make_contexts(request.param, [tokenizer], documents, [SHORT, LONG], 3, Settings(DEPTHS, 2))
    return made


def test_every_question_has_one_answer_at_its_depth(laid: list[Laid]) -> None:
    for one in laid:
        text = one.tokenizer.decode(one.ids).split("\n### Question")[0]
        assert one.example not in one.questions and all(part in text for part in one.example.parts)
        stands = Counter(question.key for question in one.questions)
        assert len(one.questions) == DEPTHS and max(stands.values()) == 1
        places = []
        for question in one.questions:
            if one.name not in HIDDEN:  # the key of several needles is their names, that of a chain a number
                assert text.count(question.key) == 1
            for part in question.parts:
                mentions = 1 + (one.name == "variable-tracking" and part != question.parts[-1])
                assert one.name == "val-code" or text.count(part) == mentions
            mark = f"def {question.parts[0]}(" if one.name == "val-code" else question.parts[0]
            places.append(text.index(mark) / len(text))
        assert places == sorted(places)
        assert [question.depth for question in one.questions] == sorted(question.depth for question in one.questions)
        assert one.questions[0].depth < 0.4 and one.questions[-1].depth > 0.5
        for ask, answer, question in zip(one.asks, one.answers, one.questions, strict=True):
            assert one.tokenizer.decode(answer) == f" {question.answer}"
            assert question.key in one.tokenizer.decode(ask)


def test_the_length_is_used_and_kept(laid: list[Laid]) -> None:
    for one in laid:
        longest = len(one.ids) + SPARE + max(len(a) + len(b) for a, b in zip(one.asks, one.answers, strict=True))
        assert 0.6 * one.length < longest <= one.length
    assert Counter(one.length for one in laid) == {SHORT: 3, LONG: 3}
    assert len({one.ids.tobytes() for one in laid}) == 6


def test_the_same_call_gives_the_same_contexts(tokenizer: Any, documents: list[Document]) -> None:
    first, again = (make_contexts("val-code", [tokenizer], documents, [LONG], 1, Settings(DEPTHS))[0][0] for _ in range(2))
    assert first.questions == again.questions and np.array_equal(first.ids, again.ids)


def test_text_is_taken_where_there_is_enough(tokenizer: Any, documents: list[Document]) -> None:
    for name, texts, source in (("val-document", documents, "text"), ("val-document", documents[-1:], "invented"),
                                ("val-code", documents, "text"), ("val-code", documents[:60], "invented")):  # fmt: skip
        (made,) = make_contexts(name, [tokenizer], texts, [LONG], 1, Settings(DEPTHS))
        assert made[0].source == source
        everything = "\n".join(document.text for document in texts)
        line = made[0].questions[0].key.split("  ")[0]
        assert (" ".join(line.split()) in " ".join(everything.split())) == (source == "text")


@pytest.mark.parametrize("name", ["val-database", "key-value"])
def test_two_tokenizers_get_the_same_text(name: str, tokenizer: Any) -> None:
    letters = letter_tokenizer()
    both = make_contexts(name, [tokenizer, letters], [], [2000], 2, Settings(DEPTHS))
    for first, second in zip(*both, strict=True):
        assert first.questions == second.questions
        assert tokenizer.decode(first.ids) == "".join(letters.convert_ids_to_tokens(second.ids))
        assert max(len(one.ids) for one in (first, second)) < 2000


def test_what_does_not_fit_is_refused(tokenizer: Any, documents: list[Document]) -> None:
    with pytest.raises(UpfitError, match="larger --probe-length or fewer --probe-depths"):
        make_contexts("val-database", [tokenizer], documents, [100], 1, Settings(DEPTHS))
    with pytest.raises(UpfitError, match="too few for 9000000"):
        make_contexts("multi-needle", [tokenizer], documents, [9_000_000], 1, Settings(DEPTHS))


def test_what_has_several_answers_is_never_asked(tokenizer: Any, tmp_path: Path) -> None:
    """Of the good and the ambiguous pieces of a text only the good ones are asked about; where there are none it is refused."""
    ambiguous = [{"sentence": f"{i} {'so ' * 40}it goes.", "piece": f"so{' so' * i}"} for i in range(1, 16)]
    good = [{"sentence": f"Number {i} says that all of them say the very same thing.", "piece": f"{i} says"} for i in range(60)]
    path, settings = tmp_path / "document_sentences.jsonl", Settings(DEPTHS, folder=tmp_path)
    path.write_text("\n".join(json.dumps(row) for row in ambiguous + good))
    for one in make_contexts("val-document", [tokenizer], [], [600], 3, settings)[0]:
        assert all("says" in question.key for question in one.questions)
    path.write_text("\n".join(json.dumps(row) for row in ambiguous))
    with pytest.raises(UpfitError, match="one answer each"):
        make_contexts("val-document", [tokenizer], [], [600], 1, settings)


# FILM's files and figures

PIECES = {
    "val-document": ("document_sentences", lambda i: {"sentence": f"We find that {i} apples weigh as much as a pear {i}.",
                                                      "piece": f"find that {i} apples"}),
    "val-code": ("code_functions", lambda i: {"function_name": f"fun_{i}", "piece": f"  a = {i} * 3 - first",
                                              "function_define": f"def fun_{i}(first):\n  a = {i} * 3 - first\n  return a"}),
    "val-database": ("database_entities", lambda i: {"id": f"Q{i}", "label": f"Thing {i}.", "dcpt": f"one of many, {i}"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILM)
def test_pieces_of_film_are_read(name: str, tokenizer: Any, tmp_path: Path) -> None:
    file, row = PIECES[name]
    path = tmp_path / f"{file}.jsonl"
    path.write_text("\n".join(json.dumps(row(i)) for i in range(100, 400)))
    (made,) = make_contexts(name, [tokenizer], [], [LONG], 1, Settings(DEPTHS, folder=tmp_path))
    assert made[0].source == "pieces"
    number = made[0].questions[0].parts[0].rstrip(".")[-3:]
    assert number in made[0].questions[0].key and number.isdecimal()
    path.write_text('{"sentence": "No piece."}\n')
    with pytest.raises(UpfitError, match="does not read as FILM's pieces"):
        make_contexts(name, [tokenizer], [], [LONG], 1, Settings(DEPTHS, folder=tmp_path))


def test_films_metrics_are_films() -> None:
    sentence = ["a Cat sat on the mat on the floor"]
    assert scores.film_words(sentence, "the floor on the CAT") == pytest.approx(4 / 7)
    assert scores.film_substring(["run."], "def rerun(x)") == 1.0 and scores.film_substring(["run"], "Run") == 0.0
    assert scores.film_either(["Rome.", "a city"], "it is ROME") == 1.0 == scores.film_either(["Rome", "a city"], "A City of")
    assert scores.film_either(["Rome", "a city"], "Paris, a town") == 0.0


def test_films_bins_leave_out_their_last_position() -> None:
    positions = np.array([[0, 48, 49, 50, 99], [1, 49, 49, 98, 99]])
    told = scores.film_bins(positions, np.array([[1.0, 0.5, 9.0, 0.25, 9.0], [0.0, 9.0, 9.0, 0.75, 9.0]]))
    assert [values.tolist() for values in told] == [[0.75, 0.0], [0.25, 0.75]]


# Scores


def test_an_echo_of_the_question_is_worth_nothing_but_to_film(laid: list[Laid]) -> None:
    if laid[0].name == "val-document":
        own = [(question.key, question.parts) for one in laid for question in one.questions]
        for key, (sentence, *_) in own:  # an echo scores words that the sentence has once more, and no others
            rest = Counter(sentence.split()) - Counter(key.split())
            again = (rest & Counter(key.split())).total()
            assert scores.beyond_key(key, (sentence,), key) <= again / max(1, rest.total())
        assert any(scores.beyond_key(key, parts, key) == 0 for key, parts in own)
        assert np.mean([scores.film_words(parts, key) for key, parts in own]) > 0.3
    assert 0 <= floor(laid) < (0.6 if laid[0].name in ("multi-needle", "val-document") else 0.05)
    for one in laid:
        for question in one.questions:
            assert FAMILIES[one.name].relaxed(question.key, question.parts, question.answer) == 1.0


def test_strict_and_relaxed_differ_where_they_should() -> None:
    assert scores.strict('"a1"', " a1,") == 1.0 and scores.strict("a1", "a1 or b2") == 0.0
    assert scores.share_said("", ("12", "345"), "12 and 3456") == 0.5
    assert scores.beyond_key("b c", ("a b c d e",), "e d a") == pytest.approx(1 / 3), "order counts"
    assert scores.common_in_order(["a", "b", "c", "d", "e"], ["a", "x", "c", "e", "d"]) == 3


def test_chains_name_every_variable(tokenizer: Any, documents: list[Document]) -> None:
    (made,) = make_contexts("variable-tracking", [tokenizer], documents, [LONG], 1, Settings(2))
    text = tokenizer.decode(made[0].ids).split("\n### Question")[0]
    for question in made[0].questions:
        assert len(question.parts) == HOPS + 1
        held = {question.key}
        for line in text.split("\n"):
            words = line.rstrip(".").split()
            if words[:1] == ["Let"] and (words[3] == question.key or words[4:5] and words[4] in held):
                held.add(words[1])
        assert held == {question.key, *question.parts}


# Gaps


def test_no_effect_of_depth_gives_even_p_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts differ in difficulty, depths do not: p is as likely to be low as high."""
    monkeypatch.setattr(depths, "ROUNDS", 100)
    draw = np.random.default_rng(0)
    found = [depths.gap(draw.normal(size=(6, 5)) + 3 * draw.normal(size=(6, 1))).p_value for _ in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert depths.gap(draw.normal(size=(6, 5)) + 3 * np.eye(5)[0]).p_value < 0.02


def test_a_gap_that_every_deal_shows_is_no_finding() -> None:
    """Scores that are the same at every depth, and the same of every context, tie with what chance gives."""
    assert depths.gap(np.ones((6, 5))).p_value == 1
    assert depths.gap(np.array([[1.0, 0.0]])).p_value == 1


def test_the_null_gap_is_that_of_coins() -> None:
    """Sixteen bins of 25 even coins: a mean gap of 0.35, and above 0.48 one time in twenty."""
    null = depths.gap((np.random.default_rng(1).random((25, 16)) < 0.5).astype(float)).null
    assert null.mean == pytest.approx(0.35, abs=0.03) and null.p95 == pytest.approx(0.48, abs=0.05)


def test_pairs_cancel_and_one_context_proves_nothing() -> None:
    values = np.random.default_rng(2).random((8, 5))
    same = depths.compared(values, values)
    assert same["gap"] == same["average"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    steeper = values + 2 * np.arange(5)
    moved = depths.compared(steeper, values)["gap"]
    assert moved["low"] > 5 and moved["mean"] == pytest.approx(np.ptp(steeper.mean(0)) - np.ptp(values.mean(0)))
    assert depths.gap(values[:1]).value.low is None and depths.compared(values[:1], values[:1])["gap"]["low"] is None
    interval = depths.gap(values).value
    assert interval.low is not None and interval.high is not None and interval.low < interval.mean < interval.high

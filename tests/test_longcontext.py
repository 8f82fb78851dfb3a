"""Every question has its answer in its context and nowhere else, whatever way the work was split or broken off."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.folders import save_tiny
from tests.uptraining import QUIET
from upfit.checkpoint.work_folder import locked, work_folder
from upfit.errors import UpfitError
from upfit.longcontext import synth as machine
from upfit.longcontext.ask import code, prose, template
from upfit.longcontext.ask.dataset import read
from upfit.longcontext.ask.model import refused
from upfit.longcontext.contexts import Contexts
from upfit.longcontext.items import Item, generator
from upfit.longcontext.options import Options
from upfit.longcontext.segments import Segments, cut, lines_of, ten_grams
from upfit.longcontext.synth import synth
from upfit.longcontext.wording import AFTER, QUESTION, Wording
from upfit.text.tokenizer import load_tokenizer

MODEL = str(Path(machine.__file__).parent.parent / "demo" / "model")
LIBRARY = Path(json.__file__).parent
TEXT = [str(LIBRARY), str(LIBRARY.parent / "email"), str(LIBRARY.parent / "logging")]
OPTIONS = Options(tokenizer=MODEL, items=90, min_tokens=1024, max_tokens=3072, short_share=0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "out"
    assert synth(TEXT, out, replace(OPTIONS, export="film"), QUIET).finished
    return out


@pytest.fixture(scope="module")
def contexts(made: Path) -> Contexts:
    return Contexts(made, Wording(load_tokenizer(MODEL), "plain"))


def test_every_answer_is_there_and_no_key_stands_anywhere_else(contexts: Contexts) -> None:
    families = set()
    for index in range(len(contexts)):
        item, plan = contexts.item(index), contexts.plan(index)
        parts = contexts.composer.context(item, plan)
        segments = contexts.composer.segments
        assert [parts.parts[place] for place in parts.places] == list(item.pieces)
        fillers = [p for n, p in enumerate(parts.parts) if n not in parts.places and p not in item.decoys]
        texts = [segments.text(filler) for filler in fillers if isinstance(filler, int)]
        assert not any(key in text for text in texts for key in item.keys)
        if isinstance(item.pieces[0], int):
            piece = " ".join(segments.text(item.pieces[0]).split())
            assert all(" ".join(key.split()) in piece for key in item.keys) and item.answer in piece
        if item.ordered:
            assert parts.places == sorted(parts.places)
        families.add(item.family)
    assert families == set(template.FAMILIES)


def test_examples_are_what_the_text_says_and_as_long_as_told(contexts: Contexts) -> None:
    tokenizer = load_tokenizer(MODEL)
    for index in range(0, len(contexts), 7):
        item, plan = contexts.item(index), contexts.plan(index)
        ids, begins = contexts[index]
        assert ids.dtype == np.uint32 and tokenizer.decode(ids[begins:]) == item.answer + tokenizer.eos_token
        prompt = tokenizer.decode(ids[:begins])
        assert prompt == contexts.wording.prompt(contexts.text(index), item.question)
        assert prompt.endswith(AFTER.replace(QUESTION, item.question))
        if plan.tokens:
            longest = int(contexts.composer.segments.lengths.max())
            assert plan.tokens - longest <= len(ids) <= plan.tokens


def test_lengths_and_depths_are_spread_evenly(contexts: Contexts) -> None:
    recipes = [contexts.plan(index) for index in range(len(contexts))]
    long = [plan for plan in recipes if plan.tokens]
    for values in ([(r.tokens - 1024) / 2049 for r in long], [r.depth for r in long]):
        counts, _ = np.histogram(values, bins=5, range=(0, 1))
        assert counts.min() > 0.6 * len(long) / 5, "five equal parts of the range hold about as many each"
    assert 1 <= len(recipes) - len(long) <= 20, "about a tenth is short"
    assert max(len(plan.line()) for plan in recipes) < 150


def test_parts_and_interruptions_change_no_byte(made: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.upfit-work"
    options = replace(OPTIONS, export="film")
    asked = template.ask

    def killed(segments: Segments, families: list[str], seed: int, index: int) -> Item | None:
        if index > 40:
            raise KeyboardInterrupt
        return asked(segments, families, seed, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "ask", killed)
        with pytest.raises(KeyboardInterrupt):
            synth(TEXT, out, replace(options, shard="1/3"), QUIET)
    part = work / "part-1-of-3.jsonl"
    part.write_bytes(part.read_bytes()[:-5])  # a torn last line
    assert not synth(TEXT, out, replace(options, shard="1/3"), QUIET).finished
    assert not synth(TEXT, out, replace(options, shard="0/3"), QUIET).finished and not out.exists()
    assert synth(TEXT, out, replace(options, shard="2/3"), QUIET).finished and not work.exists()
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    for name in names:
        if name != "recipe.json":  # tells the date
            assert (out / name).read_bytes() == (made / name).read_bytes(), name


def test_work_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    options = replace(OPTIONS, items=6, shard="0/2")
    synth(TEXT[:1], tmp_path / "out", options, QUIET)
    with pytest.raises(UpfitError, match="begun with other settings"):
        synth(TEXT[:1], tmp_path / "out", replace(options, seed=1), QUIET)


def test_work_is_not_gone_on_with_on_other_text(tmp_path: Path) -> None:
    """Text that was replaced after a stop, by some of the same size and time."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text("utf-8") for path in sorted(Path(TEXT[0]).glob("*.py"))), encoding="utf-8")
    before = text.stat()
    synth([str(text)], tmp_path / "out", replace(OPTIONS, items=6, shard="0/2"), QUIET)
    text.write_text(text.read_text(encoding="utf-8").swapcase(), encoding="utf-8")
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert text.stat().st_size == before.st_size
    with pytest.raises(UpfitError, match="begun with other settings"):
        synth([str(text)], tmp_path / "out", replace(OPTIONS, items=6, shard="1/2"), QUIET)


def test_two_cannot_do_the_same_part(tmp_path: Path) -> None:
    """Else both would write its lines, and every question would stand there twice. Another part may be done meanwhile."""
    options = replace(OPTIONS, items=6)
    with work_folder(tmp_path / "out", "synth", shared=True) as work, locked(work.path / "part-0-of-2.lock", "the part"):
        with pytest.raises(UpfitError, match="another process is at work on part 0-of-2"):
            synth(TEXT[:1], tmp_path / "out", replace(options, shard="0/2"), QUIET)
        assert not synth(TEXT[:1], tmp_path / "out", replace(options, shard="1/2"), QUIET).finished
    assert synth(TEXT[:1], tmp_path / "out", replace(options, shard="0/2"), QUIET).items == 6


def test_after_a_mistake_other_text_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UpfitError, match="no text is left"):
        synth([str(tmp_path / "empty.txt")], tmp_path / "out", replace(OPTIONS, items=4), QUIET)
    assert synth(TEXT[:1], tmp_path / "out", replace(OPTIONS, items=4), QUIET).items == 4


def test_what_an_evaluation_holds_is_left_out(tmp_path: Path) -> None:
    options = replace(OPTIONS, items=6, decontaminate=[str(LIBRARY / "decoder.py")])
    synth(TEXT[:1], tmp_path / "out", options, QUIET)
    about = json.loads((tmp_path / "out" / "segments" / "about.json").read_text())
    segments = Segments(tmp_path / "out" / "segments")
    banned = ten_grams((LIBRARY / "decoder.py").read_text())
    assert about["left_out"] > 5 and not any(ten_grams(segments.text(index)) & banned for index in range(len(segments)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 0}, "--items got 0"),
        ({"max_tokens": 100}, "--max-tokens got 100"),
        ({"families": ["cloze", "riddle"]}, "--families got 'riddle'"),
        ({"shard": "3/3"}, "--shard got '3/3'"),
        ({"ask": "dataset"}, "needs --questions"),
        ({"questions": ["a.json"]}, "goes with --ask dataset"),
        ({"base_url": "http://localhost"}, "--base-url goes with --ask openai"),
        ({"ask": "hf"}, "needs --model"),
        ({"format": "chat"}, "chat template"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpfitError, match=message):
        synth(TEXT, tmp_path / "out", replace(OPTIONS, **changes), QUIET)
    assert not list(tmp_path.iterdir())


def test_question_sets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squad = {"data": [{"paragraphs": [{"context": "The sky  is blue.", "qas": [
        {"question": "What is blue?", "answers": [{"text": "The sky"}]}, {"question": "Why?", "answers": []}]}]}]}  # fmt: skip
    hotpot = [{"question": "Where was A's B born?", "answer": "Rome", "context": [["A", ["A has B."]], ["B", ["B is of Rome."]],
               ["C", ["C is not."]]], "supporting_facts": [["A", 0], ["B", 0]]}]  # fmt: skip
    for name, told in (("squad.json", squad), ("hotpot.json", hotpot), ("other.json", [1])):
        (tmp_path / name).write_text(json.dumps(told))
    items = read([str(tmp_path / "squad.json"), str(tmp_path / "hotpot.json")])
    assert [(item.answer, len(item.pieces), len(item.decoys)) for item in items] == [("The sky", 1, 0), ("Rome", 2, 1)]
    with pytest.raises(UpfitError, match="not shaped like"):
        read([str(tmp_path / "other.json")])
    monkeypatch.setenv("HOME", str(tmp_path))
    options = replace(OPTIONS, ask="dataset", questions=["~/squad.json", str(tmp_path / "hotpot.json")])
    assert synth(TEXT[:1], tmp_path / "out", options, QUIET).items == 2


def test_a_chat_template_is_filled_in(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tiny(tmp_path / "model")))
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    prompt = Wording(tokenizer, "chat").prompt("CONTEXT", "Why?")
    assert prompt.startswith("<|user|>Read") and prompt.endswith("Why?<|assistant|>") and "CONTEXT" in prompt


def test_the_same_examples_with_other_words_around_them(contexts: Contexts) -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    chat = Wording(tokenizer, "chat")
    worded, opened = contexts.worded(chat), Contexts(contexts.folder, chat)
    assert len(worded) == len(opened) == len(contexts) and worded.text(3) == contexts.text(3)
    assert all(np.array_equal(*pair) for pair in zip(worded[3], opened[3], strict=True))
    assert not np.array_equal(worded[3][0], contexts[3][0]), "and those that were there keep theirs"


def test_segments_are_whole_lines_of_enough_tokens() -> None:
    lines = ["a", "b", "c", "d", "e"]
    assert cut(lines, [3, 3, 3, 3, 1], 5) == ["a\nb", "c\nd\ne"]
    assert cut(lines, [1, 1, 1, 1, 1], 9) == ["a\nb\nc\nd\ne"] and cut([], [], 5) == []
    assert "".join(lines_of("x" * 5000)) == "x" * 5000 and max(map(len, lines_of("x" * 5000 + " y. z" * 900))) <= 2000


class _One(Segments):
    """A corpus of one segment."""

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "only", text)

    def text(self, index: int) -> str:
        return self.__dict__["only"]


def test_questions_about_code_and_prose_have_the_right_answers() -> None:
    source = 'def first(a):\n    """Begins with a long line."""\n    total = compute(a, 3)\n    return total\n\n\n' + (
        "def second(b):\n    other = combine(b, 4)\n    return other\n"
    )
    answers = {code.line_to_function(_One(source), 0, generator(0, "t", index)) for index in range(40)}
    found = {question.split("`")[1]: answer for question, answer, _ in filter(None, answers)}
    assert found["total = compute(a, 3)"] == "first" and found["other = combine(b, 4)"] == "second"
    asked = {code.documented(_One(source), 0, generator(0, "t", index)) for index in range(20)}
    assert {answer for _, answer, _ in filter(None, asked)} == {"first", "Begins with a long line."}
    story = (
        "In the spring the old ship left for the harbour of Bergen with coal. Nobody on board had ever seen the northern sea."
    )
    gap = prose.cloze(_One(story), 0, generator(0, "t", 0))
    assert gap is not None and gap[1] == "Bergen" and "harbour of ____ with" in gap[0]
    pairs = {prose.neighbour(_One(story), 0, generator(0, "t", index)) for index in range(20)}
    answers_of = {answer.split()[0] for _, answer, _ in filter(None, pairs)}
    assert answers_of == {"In", "Nobody"}


def test_data_that_is_not_ours_is_told(tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="upfit synth"):
        Contexts(tmp_path, Wording(load_tokenizer(MODEL), "plain"))


def test_a_question_on_several_pieces_needs_more_than_one() -> None:
    pieces = ["In 1912 Marianne Keller built an observatory in Davos.", "Its dome was later moved to Chur."]
    asked = "Where is the dome of the observatory of Marianne Keller now?"
    assert refused(asked, "The dome of what Keller built was moved to Chur.", pieces) is None
    assert refused(asked, "She built it in Davos.", pieces) == "needs one piece only"


def test_a_question_without_room_is_left_out_not_cut(tmp_path: Path) -> None:
    save_tiny(tmp_path / "letters")  # one token a letter: a table of records alone has more than 1000
    tokenizer, families = str(tmp_path / "letters"), ["record", "chain"]
    options = Options(tokenizer, items=6, families=families, min_tokens=64, max_tokens=700, segment_tokens=64)
    told = synth(TEXT[:1], tmp_path / "out", options, QUIET).record()
    assert set(told["rejected"]) == {machine.TOO_LONG}
    assert told["items"] + told["rejected"][machine.TOO_LONG] == 6
    contexts = Contexts(tmp_path / "out", Wording(load_tokenizer(str(tmp_path / "letters")), "plain"))
    assert all(len(ids) <= 700 for ids, _ in contexts)


def test_no_question_at_all_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    save_tiny(tmp_path / "letters")
    options = Options(str(tmp_path / "letters"), items=3, families=["record"], min_tokens=64, max_tokens=300)
    with pytest.raises(UpfitError, match="no question was kept: longer than --max-tokens by itself"):
        synth(TEXT[:1], tmp_path / "out", options, QUIET)
    assert not (tmp_path / "out").exists()

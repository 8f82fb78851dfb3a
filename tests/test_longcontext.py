"""Every question has its answer in its context and nowhere else, whatever way the work was split or broken off."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.folders import save_tiny
from tests.uptraining import QUIET
from upfit.checkpoint.work_folder import locked, work_folder
from upfit.errors import UpfitError
from upfit.longcontext import synth as machine
from upfit.longcontext.ask import backends, code, prose, template
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


class _Server(ThreadingHTTPServer):
    """Speaks just enough of OpenAI's protocol, and fails a third of the time."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.count = 0
        self.silent = 10**6  # answers, after which it says nothing more
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = told["messages"][0]["content"]
        self.server.count += 1
        if len(self.server.asked) >= self.server.silent:
            time.sleep(2)
            return
        if self.server.count % 3 == 0:
            self.send_response([429, 500][self.server.count % 2])
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.asked.append(prompt)
        word = max(prompt.split("Write one")[0].split(), key=len)
        message = {"role": "assistant", "content": f"Question: What is said of `{word}` here?\nAnswer: There is {word}."}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": {"total_tokens": 10}}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        content = json.dumps(body | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_a_failing_server_is_asked_everything_once(server: _Server, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    options = replace(OPTIONS, ask="openai", model="m", base_url=url, items=24, families=None)
    first = synth(TEXT, tmp_path / "out", replace(options, budget_tokens=60, concurrency=1), QUIET).record()
    assert not first["finished"] and "budget" in first["missing"][0] and len(server.asked) == 6
    told = synth(TEXT, tmp_path / "out", options, QUIET).record()
    assert told["finished"] and len(server.asked) == len(set(server.asked)) == 24, "nothing twice, nothing lost"
    assert told["items"] + sum(told["rejected"].values()) == 24 and told["items"] > 5
    item = Contexts(tmp_path / "out", Wording(load_tokenizer(MODEL), "plain")).item(0)
    assert item.generator == "openai/m" and item.family in ("single", "several")


def test_a_server_that_falls_silent_is_one_line_and_asked_again_later(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr(backends, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(backends, "RETRIES", 0)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    options = replace(OPTIONS, ask="openai", model="m", base_url=url, items=4, families=None, concurrency=1)
    server.silent = 2
    with pytest.raises(UpfitError, match="does not answer .*timed out.*; the same command goes on"):
        synth(TEXT, tmp_path / "out", options, QUIET)
    kept = (tmp_path / "out.upfit-work" / "answers-0-of-1.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == 2
    server.silent, server.count = 10**6, 0
    monkeypatch.setattr(backends, "RETRIES", 3)
    told = synth(TEXT, tmp_path / "out", options, QUIET).record()
    assert told["finished"] and len(server.asked) == len(set(server.asked)) == 4


def test_requests_go_out_and_responses_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, ask="file", model="m", items=6, several_share=0.0)
    waiting = synth(TEXT, tmp_path / "out", options, QUIET).record()
    assert not waiting["finished"]
    rows = [json.loads(line) for line in (tmp_path / "out.upfit-work" / "requests-0-of-1.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["url"] == "/v1/chat/completions" and rows[0]["body"]["model"] == "m"

    def response(row: dict[str, Any]) -> str:
        prompt = row["body"]["messages"][0]["content"]
        word = max(prompt.split("Write one")[0].split(), key=len)
        text = f"**Question:** What is said of `{word}` here?\n**Answer:** There is {word}."
        body = {"choices": [{"message": {"content": text}}]}
        return json.dumps({"custom_id": row["custom_id"], "response": {"body": body}, "error": None})

    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(response(row) for row in rows[:4]) + "\n")
    waiting = synth(TEXT, tmp_path / "out", replace(options, responses=[str(answers)]), QUIET).record()
    assert not waiting["finished"] and "2 requests" in waiting["missing"][0]
    answers.write_text("\n".join(response(row) for row in rows[4:]) + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    told = synth(TEXT, tmp_path / "out", replace(options, responses=["~/answers.jsonl"]), QUIET).record()
    assert told["finished"] and told["items"] + sum(told["rejected"].values()) == 6


@pytest.mark.slow
def test_a_model_in_this_process_can_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(MODEL)
    options = replace(OPTIONS, ask="hf", model="~/model", items=2, temperature=0.0)
    with pytest.raises(UpfitError, match=r"no question was kept: .*\(2\)"):  # the embedded model asks nothing sensible
        synth(TEXT, tmp_path / "out", options, QUIET)
    answered = (tmp_path / "out.upfit-work" / "answers-0-of-1.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answered) == 2, "what it said is kept"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Where did Marianne Keller build the observatory?", "She built the observatory in Davos.", None),
        ("Where did Marianne Keller build the observatory", "In Davos.", "no question"),
        ("Where?", "In Davos.", "too short or too long"),
        ("What does the text say about Marianne Keller?", "She built an observatory.", "speaks of the text"),
        ("Where did Marianne Keller build the observatory?", "It is not mentioned.", "no answer"),
        ("Where did she do it then?", "In Davos.", "names nothing"),
        ("When did Marianne Keller build the observatory?", "She built it in 1921.", "not from the pieces"),
        (
            "Where did Marianne Keller build the observatory?",
            "Somewhere near an Italian village.",
            "not from the pieces",
        ),
    ],
)
def test_questions_of_a_model_are_checked(question: str, answer: str, reason: str | None) -> None:
    pieces = ["In 1912 Marianne Keller built an observatory in Davos.", "Its dome was later moved to Chur."]
    assert refused(question, answer, pieces[:1]) == reason


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

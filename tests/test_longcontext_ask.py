"""Questions of a model: over HTTP, in batches of requests, in this process."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.test_longcontext import MODEL, OPTIONS, TEXT
from tests.uptraining import QUIET
from upfit.errors import UpfitError
from upfit.longcontext.ask import backends
from upfit.longcontext.ask.model import refused
from upfit.longcontext.contexts import Contexts
from upfit.longcontext.synth import synth
from upfit.longcontext.wording import Wording
from upfit.text.tokenizer import load_tokenizer


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

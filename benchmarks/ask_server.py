"""`upfit synth --ask openai` before a real server that fails: is anything lost, or asked twice?

    python benchmarks/ask_server.py docs/ --model MODEL --scratch DIR --results benchmarks/results/N.json
    python benchmarks/ask_server.py docs/ --model NAME --tokenizer MODEL --url http://localhost:8000/v1 ...

Without `--url` it starts `transformers serve MODEL` (`pip install 'transformers[serving]'`; `--python` names the interpreter
that has it) with one thread. Between that and `upfit synth` stands a proxy that answers a share of the requests with 429, 500
or 503, drops connections before the model has heard or after it has answered, or is slow; and `upfit synth` is killed once in
the middle (SIGKILL), then the same command is given again. The proxy knows items by their seed.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from upfit.environment import environment

STATUSES = {"429": 429, "500": 500, "503": 503}
BEFORE, AFTER, SLOW, NONE = "dropped before the model heard", "dropped after the answer", "slow", "none"
FAULTS = (*STATUSES, BEFORE, AFTER, SLOW)
SLOW_SECONDS = 10
# Requests that come together are answered together: on a CPU that is several times the rate of one after the other.
SERVE = ("--device", "cpu", "--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512")
START_SECONDS = 300
ANSWER_SECONDS = 6 * 3600


@dataclass
class Attempt:
    """One request for an item: what the proxy did to it, and how far it came."""

    item: int
    run: int
    fault: str
    answered: bool = False  # by the model
    text: str | None = None  # that the client was sent


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, url: str, share: float) -> None:
        self.url, self.share, self.run = url, share, 1
        self.attempts: list[Attempt] = []
        self.lock, self.draw, self.turn = threading.Lock(), random.Random(0), 0
        super().__init__(("127.0.0.1", 0), _Handler)

    def begin(self, item: int) -> Attempt:
        """Faults come at random, their kinds in turn."""
        with self.lock:
            fault = NONE
            if self.draw.random() < self.share:
                fault, self.turn = FAULTS[self.turn % len(FAULTS)], self.turn + 1
            self.attempts.append(Attempt(item, self.run, fault))
            return self.attempts[-1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client was killed: that is what is tried here
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        attempt = self.server.begin(json.loads(body)["seed"])
        if attempt.fault in STATUSES:
            return self._send(STATUSES[attempt.fault], b"{}", {"Retry-After": "1"} if attempt.fault == "429" else {})
        if attempt.fault == BEFORE:
            return self._drop()
        status, content = self._forward(body)
        attempt.answered = status == 200
        if attempt.fault == AFTER:
            return self._drop()
        if attempt.fault == SLOW:
            time.sleep(SLOW_SECONDS)
        self._send(status, content, {})
        if attempt.answered:
            attempt.text = json.loads(content)["choices"][0]["message"]["content"]

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self.server.url}/chat/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="default: MODEL")
    parser.add_argument("--url", help="of a server that runs already, with /v1")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    out = args.scratch / "out"
    with _server(args) as url, Proxy(url, args.share) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        command = _command(args, out, proxy.server_address[1])
        began = time.monotonic()
        kept = _killed(command, out, args.items)
        open_then = [attempt for attempt in proxy.attempts if attempt.item not in kept and attempt.text is None]
        proxy.run = 2
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        proxy.shutdown()
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    items = [json.loads(line) for line in (out / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    told = {
        "server": args.url or " ".join(["transformers serve", *SERVE]),
        "model": Path(args.model).name,
        "concurrency": args.concurrency,
    }
    told |= count(proxy.attempts, kept, open_then, args.items, items, settings["rejected"])
    told |= {"families": settings["families"], "seconds": seconds, "environment": environment()}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server that is ready."""
    if args.url:
        yield args.url.rstrip("/")
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [args.python, "-m", "transformers.cli.transformers", "serve", args.model, "--port", str(port), *SERVE]
    with open(args.scratch / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, args.scratch / "server.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()  # asked nicely it would finish what nobody waits for
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server did not start; see {log}")


def _command(args: argparse.Namespace, out: Path, port: int) -> list[str]:
    settings = {"--tokenizer": args.tokenizer or args.model, "--items": args.items, "--min-tokens": 512, "--max-tokens": 1024}
    settings |= {"--ask": "openai", "--model": args.model, "--base-url": f"http://127.0.0.1:{port}/v1"}
    settings |= {"--concurrency": args.concurrency}
    return [sys.executable, "-m", "upfit", "synth", *args.texts, str(out), "-q", *(str(w) for s in settings.items() for w in s)]


def _killed(command: list[str], out: Path, items: int) -> set[int]:
    """Run until two fifths of the answers are kept, then kill; the numbers of the items kept."""
    path = out.with_name(out.name + ".upfit-work") / "answers-0-of-1.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(_kept(path)) < 2 * items // 5:
        time.sleep(0.1)
    if process.poll() is not None:
        raise SystemExit("upfit synth ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return _kept(path)


def _kept(path: Path) -> set[int]:
    content = path.read_bytes() if path.exists() else b""
    return {json.loads(line)["index"] for line in content[: content.rfind(b"\n") + 1].splitlines()}


def count(
    attempts: list[Attempt], kept: set[int], open_then: list[Attempt], wanted: int, items: list[Any], rejected: dict[str, int]
) -> dict[str, Any]:
    """What became of `wanted` items. `kept`: numbers of those whose answers stood on disk at the kill; `open_then`: attempts
    whose answer had not been sent by then."""
    answered = Counter(attempt.item for attempt in attempts if attempt.answered)
    again: Counter[str] = Counter()
    for item in range(wanted):
        served = [attempt for attempt in attempts if attempt.item == item and attempt.answered]
        for attempt in served[:-1]:
            if attempt.fault == AFTER:
                again["its connection dropped after the answer"] += 1
            elif any(attempt is other for other in open_then):
                again["killed before the answer came"] += 1
            elif attempt.run == 1 and item not in kept:
                again["killed before the answer was kept"] += 1
            else:
                again["for no reason"] += 1
    sent = {attempt.item: attempt.text for attempt in attempts if attempt.text is not None}
    strange = [item["index"] for item in items if item["question"] not in " ".join(sent.get(item["index"], "").split())]
    return {
        "items": wanted,
        "requests": len(attempts),
        "faults": dict(Counter(attempt.fault for attempt in attempts)),
        "answered_once": sum(answered[item] == 1 for item in range(wanted)),
        "answered_twice_or_more": sum(answered[item] > 1 for item in range(wanted)),
        "answered_again_because": dict(again),
        "kept_at_the_kill": len(kept),
        "kept_and_asked_again": len({attempt.item for attempt in attempts if attempt.run == 2} & kept),
        "never_answered": wanted - len(answered),
        "lost": wanted - len(items) - sum(rejected.values()),
        "not_what_was_sent": len(strange),
        "accepted": len(items),
        "rejected": rejected,
    }


if __name__ == "__main__":
    main()

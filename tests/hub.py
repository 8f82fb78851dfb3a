"""A Hugging Face Hub on this machine that fails when it is told to, for tests and examples of publishing: the endpoints that
huggingface_hub 2.4 calls for models with HF_HUB_DISABLE_XET=1, nothing else of the hub. `python -m tests.hub` runs it alone."""

import argparse
import contextlib
import itertools
import random
import socket
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_routes import ROUTES, Account, Answer, Ask, refusal
from tests.hub_store import Refused, Repo

DROP = 0  # in Request.status: the connection was closed without an answer


@dataclass
class Faults:
    """What goes wrong from now on. The counts go down as they are used up; any field may be set at any time."""

    rate: float = 0.0  # the share of all requests that ends in one of `kinds`, by turns
    kinds: tuple[int, ...] = (429, 500, 503, DROP)
    drop_uploads: int = 0  # PUTs that are cut off in the middle of the body
    corrupt_uploads: int = 0  # PUTs that are refused as if the checksum did not match
    silent_corruption: int = 0  # PUTs that are accepted, and stored with one byte changed
    lost_commits: int = 0  # commits that are made while the answer is lost
    down: bool = False  # nobody answers

    def take(self, name: str) -> bool:
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return left > 0


class Request(NamedTuple):
    method: str
    path: str  # as sent, without the query
    status: int
    received: int  # bytes of body


class Hub:
    """Serves between `with` and its end; `tokens` maps a token to its user and role (only "write" may write)."""

    def __init__(
        self,
        tokens: dict[str, tuple[str, str]] | None = None,
        seed: int = 0,
        lfs_threshold: int = 10_000_000,
        port: int = 0,
    ) -> None:
        self.tokens = {token: Account(*who) for token, who in (tokens or {"hf_good": ("alice", "write")}).items()}
        self.lfs_threshold = lfs_threshold
        self.faults, self.log = Faults(), list[Request]()
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.tickets: dict[str, tuple[str, str, int]] = {}
        self.lock = threading.RLock()
        self._random, self._turn = random.Random(seed), itertools.count()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def repo(self, repo: str) -> Repo:
        return self.repos[repo]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo].head(revision).tree.items()}

    def fault(self) -> int | None:
        """The status that this request gets instead of its answer, if any."""
        with self.lock:
            if self.faults.down:
                return DROP
            if self._random.random() >= self.faults.rate:
                return None
            return self.faults.kinds[next(self._turn) % len(self.faults.kinds)]

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        with self.lock:
            try:
                for verb, pattern, route in ROUTES:
                    if (verb == method or (verb, method) == ("GET", "HEAD")) and (match := pattern.fullmatch(url.path)):
                        args = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        answer = route(self, Ask(method, args, query, headers, body, self._account(headers)))
                        return answer if isinstance(answer, Answer) else Answer.of(answer)
                raise Refused(404, f"no such page: {url.path}")
            except Refused as refused:
                return refusal(refused)
            except (KeyError, ValueError, TypeError) as error:
                return refusal(Refused(400, f"malformed request: {error!r}"))

    def _account(self, headers: dict[str, str]) -> Account | None:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)


class _Dropped(Exception):
    pass


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.open_sockets: set[socket.socket] = set()

    def hang_up(self) -> None:
        """A client keeps connections for later; one of them must not reach the next hub that gets this port."""
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet; apart, they would wait for each other's acknowledgement

    def setup(self) -> None:
        super().setup()
        self.server.open_sockets.add(self.connection)

    def finish(self) -> None:
        self.server.open_sockets.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.received, status = 0, DROP
        try:
            answer = self._answer()
            status = answer.status
        except _Dropped:
            answer = None
        with self.server.hub.lock:  # before the answer goes out: who has it can read about it in the log
            self.server.hub.log.append(Request(self.command, urlsplit(self.path).path, status, self.received))
        if answer:
            self._send(answer)
        else:
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self) -> Answer:
        hub = self.server.hub
        fault = hub.fault()
        if fault == DROP:
            raise _Dropped
        with hub.lock:
            cut = self.command == "PUT" and fault is None and hub.faults.take("drop_uploads")
        if "Transfer-Encoding" in self.headers:  # stores for large files want the length, like this one
            self.close_connection = True
            return Answer.of({"error": "Length Required"}, 411)
        body = self._body(cut)
        if fault is not None:
            return Answer.of({"error": "injected"}, fault, {"Retry-After": "0"} if fault == 429 else None)
        answer = hub.answer(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        with hub.lock:
            if "/commit/" in self.path and answer.status == 200 and hub.faults.take("lost_commits"):
                raise _Dropped
        return answer

    def _body(self, cut: bool) -> bytes:
        body, size = bytearray(), int(self.headers.get("Content-Length", 0)) // (2 if cut else 1)
        while len(body) < size:
            part = self.rfile.read1(min(1 << 20, size - len(body)))
            body += part
            self.received = len(body)
            if not part or self.server.hub.faults.down:
                raise _Dropped
        if cut:
            raise _Dropped
        return bytes(body)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", action="append", metavar="TOKEN=USER[:ROLE]", help="default: hf_good=alice, who may write")
    given = parser.parse_args()
    pairs = (pair.partition("=")[::2] for pair in given.token or ["hf_good=alice"])
    tokens = {token: (who.partition(":")[0], who.partition(":")[2] or "write") for token, who in pairs}
    with Hub(tokens, port=given.port) as hub, contextlib.suppress(KeyboardInterrupt):
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

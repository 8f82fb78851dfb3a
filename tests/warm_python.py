"""A Python that has imported torch and transformers already: what is started with it begins at once instead of after seconds.

    with warm_python(environment) as python:
        subprocess.run([python, "-m", "upfit", ...])  # as with sys.executable: its output, exit code, signals and death

A server imports what is heavy, and forks for each command. The program `python` hands it the arguments, the folder, the
environment and the three standard files, passes signals on, and ends as the fork ends; killed, it takes the fork along.
In the fork `sys.executable` is the same program, so that processes started from there (torchrun's) are warm as well.
What a library reads from the environment when it is imported (HF_ENDPOINT) has to be in `environment` from the beginning.
`shared_python()` is one program for all tests of a process; what runs in ENVIRONMENT is run with it.
"""

import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "tests" / "warm_server.py"


PATIENCE = 120.0  # seconds; it may be importing still
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def warm_python(environment: dict[str, str], checkout: Path = ROOT) -> Iterator[str]:
    """The path of a program that is used like `sys.executable`, as long as the block lasts; its upfit is that of `checkout`."""
    with tempfile.TemporaryDirectory() as folder:
        server = _serve(Path(folder), environment, checkout)
        try:
            yield str(_program(Path(folder), server))
            server.communicate(timeout=PATIENCE)  # it ends with its standard input, as the shared one has to
        finally:
            server.kill()
            server.wait()


@functools.cache
def shared_python() -> str:
    """The same, for as long as this process lives: the server ends with it."""
    folder = Path(tempfile.mkdtemp())
    _servers.append(_serve(folder, ENVIRONMENT, ROOT))
    return str(_program(folder, _servers[-1]))


_servers: list[subprocess.Popen[bytes]] = []  # each holds the pipe by which its server sees that this process is there


def _serve(folder: Path, environment: dict[str, str], checkout: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SERVER), "server", str(folder / "socket")]
    return subprocess.Popen(command, env=environment | {"PYTHONPATH": str(checkout)}, stdin=subprocess.PIPE)


def _program(folder: Path, server: subprocess.Popen[bytes]) -> Path:
    """The program in `folder` that asks the server there, once it listens."""
    path, program = folder / "socket", folder / "python"
    client = [sys.executable, "-I", "-S", str(SERVER), "client", str(path), sys.executable, str(program)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    program.chmod(0o755)
    while not path.exists():
        assert server.poll() is None, "the server of warm Pythons ended before it began"
        time.sleep(0.01)
    return program

"""A Python that has imported torch and transformers already: what is started with it begins at once instead of after seconds.

    with warm_python(environment) as python:
        subprocess.run([python, "-m", "upfit", ...])  # as with sys.executable: its output, exit code, signals and death

A server imports what is heavy, and forks for each command. The program `python` hands it the arguments, the folder, the
environment and the three standard files, passes signals on, and ends as the fork ends; killed, it takes the fork along.
In the fork `sys.executable` is the same program, so that processes started from there (torchrun's) are warm as well.
What a library reads from the environment when it is imported (HF_ENDPOINT) has to be in `environment` from the beginning.
"""

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


@contextmanager
def warm_python(environment: dict[str, str], checkout: Path = ROOT) -> Iterator[str]:
    """The path of a program that is used like `sys.executable`, as long as the block lasts; its upfit is that of `checkout`."""
    with tempfile.TemporaryDirectory() as folder:
        path, program = Path(folder, "socket"), Path(folder, "python")
        client = [sys.executable, "-I", "-S", str(SERVER), "client", str(path), sys.executable, str(program)]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        program.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, str(SERVER), "server", str(path)], env=environment | {"PYTHONPATH": str(checkout)}
        )
        try:
            while not path.exists():
                assert server.poll() is None, "the server of warm Pythons ended before it began"
                time.sleep(0.01)
            yield str(program)
        finally:
            server.kill()
            server.wait()

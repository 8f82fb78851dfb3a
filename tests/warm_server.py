"""The program behind tests/warm_python.py: a server that forks for each command, and the client that asks it to."""

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def client(path: str, real: str, program: str, words: list[str]) -> None:
    """Have the server at `path` run `words` (`[-u] -m MODULE …` or `[-u] SCRIPT …`); what else Python can do, Python does."""
    given = words[1:] if words[:1] == ["-u"] else words
    if not given or (given[0].startswith("-") and given[0] != "-m"):
        os.execv(real, [real, *words])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        task = json.dumps({"words": given, "program": program, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(task).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(task)
        code = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code in PASSED_ON else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def server(path: str) -> None:
    """Listen at `path`, import, and fork twice a command: a keeper, which waits and passes signals on, and the command. At the
    end of its standard input, whoever started it is gone, and it ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        import accelerate  # noqa: F401
        from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

        import upfit.cli  # noqa: F401

        gc.freeze()  # what is imported is no garbage: forks need not look
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)
                os._exit(0)  # libraries would complain of what is frozen
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                break
            connection.close()
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    task = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    if (child := os.fork()) == 0:
        connection.close()
        return command(files=files, **task)
    keep(connection, child)


def keep(connection: socket.socket, child: int) -> None:
    """Signals from `connection` go to the child, its end to `connection`; when nobody is there any more, it is killed."""
    import threading

    def pass_on() -> None:
        with contextlib.suppress(OSError):  # the child ended meanwhile
            while number := connection.recv(1):
                os.kill(child, number[0])
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=pass_on, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    finally:
        os._exit(0)


def command(words: list[str], program: str, folder: str, environment: dict[str, str], files: list[int]) -> None:
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = program
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server(sys.argv[2])
    else:
        client(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])

"""Where errors leave Upfit: one line for whatever an input can cause, one recognisable line for a defect of ours.

Other rooms raise UpfitError for errors that they foresee. Errors of a file, a disk or a library that nobody foresaw end here.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from upfit.addresses import redacted
from upfit.errors import UpfitError
from upfit.output import printable

# Of what is being read or written, whoever raises them; UnicodeError and JSON's errors are ValueErrors.
OF_INPUT = (OSError, EOFError, ValueError, RecursionError, OverflowError, MemoryError)
# Libraries whose errors are about what they were given to read, some of them outside Python's families of exceptions.
READERS = (
    *("zlib", "_lzma", "lzma", "gzip", "zipfile", "tarfile", "pyarrow", "tokenizers", "pyo3_runtime", "safetensors"),
    *("safetensors_rust", "sentencepiece", "jinja2", "yaml", "datasets", "huggingface_hub", "httpx", "requests", "fsspec"),
)
OF_MACHINE = re.compile(r"home directory|allocate memory|out of memory", re.IGNORECASE)
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST = 600  # characters of a line
STOPPED = "nothing unfinished stands at the output"


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same way out as Ctrl-C, with another exit code."""


class Carried(Exception):
    """An error that is passed on to `main`. The command-line library would take it for a closed input or a Ctrl-C."""


def carried(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with the errors that the command-line library has meanings of its own for inside a Carried."""

    @wraps(command)
    def run(*words: Any, **flags: Any) -> Any:
        try:
            return command(*words, **flags)
        except (EOFError, OSError, KeyboardInterrupt) as error:
            raise Carried from error

    return run


def unpacked(error: BaseException) -> BaseException:
    """The error that was meant."""
    return error.__cause__ if isinstance(error, Carried) and error.__cause__ is not None else error


def end(error: BaseException, words: list[str]) -> int:
    """Say on stderr what has ended the command `words`, and return its exit code."""
    if isinstance(error, BrokenPipeError) and error.filename is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left to be written has no reader
        return 141
    if "--debug" in words and not isinstance(error, KeyboardInterrupt):
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        return 1
    if os.environ.get("RANK", "0") == "0":  # under torchrun all processes fail alike, one tells
        print(f"upfit: {line(error, words)}", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130
    return 1


def line(error: BaseException, words: list[str]) -> str:
    """What is said of an error: one line without secrets."""
    if isinstance(error, KeyboardInterrupt):
        # Whoever knows better what is kept, and how to go on, has added it as a note to the exception on its way here.
        line = "stopped; " + ("; ".join(getattr(error, "__notes__", ())) or STOPPED)
    elif isinstance(error, UpfitError):
        line = str(error)
    elif is_of_input(error):
        line = f"{where(error, words)}{reason(error)}"
    else:
        line = f"a defect of upfit, please report it: {reason(error, kind=True)}{place(error)}; --debug shows the traceback"
    line = printable(redacted(" ".join(line.split())))
    return line if len(line) <= MOST else line[: MOST - 4] + " ..."


def is_of_input(error: BaseException) -> bool:
    """Whether an error that nobody foresaw is about what was read or written; else it is ours."""
    libraries = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    # Readers written in Rust and C raise plain Exceptions.
    return isinstance(error, OF_INPUT) or type(error) is Exception or bool(libraries & set(READERS)) or _of_this_machine(error)


def _of_this_machine(error: BaseException) -> bool:
    """What torch says of memory, and pathlib of a `~name` that nobody is called, with plain RuntimeErrors."""
    return isinstance(error, RuntimeError) and bool(OF_MACHINE.search(str(error)))


def where(error: BaseException, words: list[str]) -> str:
    """`FILE: `, of the error where it knows its file, else of the first input that the command names and that is here."""
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        return ""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename}: "
    named = next((word for word in words if _is_here(word)), None)
    return "" if named is None else f"{named}: "


def _is_here(word: str) -> bool:
    try:
        return not word.startswith("-") and Path(word).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def reason(error: BaseException, kind: bool = False) -> str:
    """What an exception says, on one line; with `kind`, or where that is nothing, what it is called."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in FULL:
        return "the disk is full; free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, RecursionError):
        return "nested too deeply to be read"
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error), re.IGNORECASE):
        return "it takes more memory than there is"
    text = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    return f"{name}: {text}" if text and (kind or type(error) is not Exception) else text or name


def place(error: BaseException) -> str:
    """` (file.py:12)`, the innermost line of ours on the way of the error."""
    package = Path(__file__).parent.parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)]
    return f" ({Path(frames[-1].filename).relative_to(package)}:{frames[-1].lineno})" if frames else ""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated in the block, once; what forks from this process ends as it would otherwise."""
    owner = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # what clears up is not stopped half-way
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where no signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""The folder OUT.upfit-work beside an output, which holds unfinished work. There is one for each output, whatever the command.

It is created exclusively and never through a link. It holds a mark that it is Upfit's, and is locked while a process works in
it. A finished result in it becomes OUT in one rename. A folder of that name without the mark is left as it is, and the command
refuses to work there.
"""

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upfit.checkpoint.output_folder import check_ours, resolved, work_path
from upfit.durable import exchange, remove_tree, rename_new, sync_path, sync_tree, write_whole
from upfit.errors import UpfitError

MARK, LOCK, SETTINGS, RESULT, REPLACED = "upfit-work.json", "lock", "settings.json", "result", "replaced"
# What verbs put into a work folder. Anything else in it is somebody's, and is left where it is.
NAMES = re.compile(
    r"settings\.json|result|result\.safetensors|replaced|fit|stream|layers|state\.json|shards|segments(\.partial)?|stopped"
    r"|metrics\.jsonl|claim\.lock|(part|answers|requests)-\d+-of-\d+\.(jsonl|lock)|step-\d{8}(\.tmp|\.old)?"
    r"|stage-\d+-[a-z]+(\.steps|\.partial)?|\.upfit-[0-9a-f]{16}"  # the last is a small file that was being written
)
FORMAT = 1
MARK_BYTES = 4096  # a mark is smaller
BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Interrupted(UpfitError):
    """The work had to stop; the same command can continue it later."""


class Refused(UpfitError):
    """The folder holds work of other settings. It is left as it is."""


class OutputTaken(Interrupted):
    """Something has appeared at OUT meanwhile. The result is kept in the work folder."""


@dataclass
class WorkFolder:
    """An opened and locked work folder `path` of the output `out`. `keep` says that what is in it is worth going on with even
    after an error; it is kept in any case where the work was interrupted. `check` raises UpfitError for an output that is not
    Upfit's."""

    out: Path
    path: Path
    lock: int
    check: Callable[[Path], None]
    keep: bool = False
    finished: bool = field(default=False, init=False)

    def entries(self) -> list[Path]:
        """What verbs have put into it."""
        return sorted(path for path in self.path.iterdir() if NAMES.fullmatch(path.name))

    def begun(self) -> list[Path]:
        """Those of them that are work done: neither settings nor locks."""
        return [path for path in self.entries() if path.name != SETTINGS and path.suffix != ".lock" and path.name[0] != "."]

    def claim(self, settings: dict[str, Any], restart: bool) -> bool:
        """Make this the work of `settings`; whether there is some of it already, to go on with.

        Raises Refused when there is work of other settings (settings alone are none); with `restart` that is thrown away.
        """
        path, text = self.path / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n"
        begun = self.begun()
        if begun and path.is_file() and path.read_text(encoding="utf-8") == text:
            return True
        if begun and not restart:
            raise Refused(f"{self.path} holds work begun with other settings; give those again, or remove the folder")
        for entry in begun:
            remove_tree(entry)
        write_whole(path, text)
        return False

    def folder(self, name: str, clear: bool = False) -> Path:
        """The folder `name` in here, made where it is not there, emptied with `clear`. Raises UpfitError where it is a link."""
        path = self.path / name
        if clear:
            remove_tree(path)
        if path.is_symlink():
            raise UpfitError(f"{path} is a link, which Upfit did not make; remove it")
        path.mkdir(exist_ok=True)
        return path

    def alone(self) -> bool:
        """Of several processes in here, wait for the others to leave; False for those that find the work done by then."""
        take(self.lock, fcntl.LOCK_EX, wait=True)
        return (self.path / LOCK).exists() and os.path.samestat(os.fstat(self.lock), os.stat(self.path / LOCK))

    def publish(self, result: Path, overwrite: bool) -> None:
        """Let the finished file or folder `result`, in here, be the output: synced, in one rename.

        What stands there is replaced only with `overwrite`, and only where `check` takes it for Upfit's; it is asked before
        and, where the system can swap two names, of what was really taken away. Raises OutputTaken where something has appeared
        there meanwhile: that stays, and so does `result`.
        """
        sync_tree(result) if result.is_dir() else sync_path(result)
        try:
            if overwrite and self.out.exists() and not _is_empty(self.out):
                self._replace(result)
            else:
                rename_new(result, self.out, over_empty=True)
        except FileExistsError as error:
            raise OutputTaken(
                f"{self.out} has appeared while this was made, and stays; the result is whole in {result}: move it away, "
                "or remove the other one and give the command again"
            ) from error
        except UpfitError as error:
            raise OutputTaken(f"{error}; the result is whole in {result}") from error
        self.finished = True
        with suppress(OSError, UpfitError):
            remove_tree(self.path / REPLACED)

    def _replace(self, result: Path) -> None:
        self.check(self.out)
        old = self.path / REPLACED
        os.rename(result, old)
        if exchange(old, self.out):
            try:
                self.check(old)
            except UpfitError:
                exchange(old, self.out)
                os.rename(old, result)
                raise
            sync_path(self.out.parent)
        else:
            os.rename(old, result)
            os.rename(self.out, old)
            rename_new(result, self.out)

    def remove(self) -> None:
        """Remove what verbs have put here, and the folder unless somebody keeps files of their own in it.

        It is given another name first, so that a folder half removed never has this one.
        """
        for entry in self.entries():
            remove_tree(entry)
        if {path.name for path in self.path.iterdir()} - {MARK, LOCK}:
            return
        leaving = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        os.rename(self.path, leaving)
        for name in (LOCK, MARK):
            (leaving / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put a file there just now: then it stays, with the folder
            leaving.rmdir()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def work_folder(
    out: Path, verb: str, overwrite: bool = False, shared: bool = False, check: Callable[[Path], None] = check_ours
) -> Iterator[WorkFolder]:
    """The work folder of `out`, for `verb`, locked; several processes may be in it at once with `shared`.

    Removed when the block has published its result, and after an error that a user can put right, unless something in it is
    worth keeping (`keep`). It stays after everything else (Interrupted, Ctrl-C, a full disk, a defect); a note on Ctrl-C says
    so. `check` raises UpfitError for an output that is not Upfit's.

    Raises UpfitError when another process is at work on this output, the unfinished work of another verb lies there (with
    `overwrite` that is thrown away), or the folder is not Upfit's.
    """
    work = _opened(resolved(out), verb, shared, check)
    try:
        _check_verb(work, verb, overwrite)
        _mend(work)
        try:
            yield work
        except BaseException as error:
            _leave(work, error)
            raise
        if work.finished:
            work.remove()
    finally:
        os.close(work.lock)


def _leave(work: WorkFolder, error: BaseException) -> None:
    """Remove the folder where nothing in it is worth going on with; else say that it is kept."""
    if isinstance(error, Refused):
        return
    worthless = isinstance(error, UpfitError) and not isinstance(error, Interrupted)
    if work.finished or not work.begun() or (worthless and not work.keep):
        with suppress(OSError, UpfitError):
            work.remove()
    elif isinstance(error, KeyboardInterrupt | SystemExit):
        error.add_note(f"{work.path} keeps what is done; the same command goes on from there")


def _opened(out: Path, verb: str, shared: bool, check: Callable[[Path], None]) -> WorkFolder:
    path = work_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        if not os.path.lexists(path):
            _make(path, verb)
        try:
            check_mark(path)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (UpfitError, FileNotFoundError):
            if os.path.lexists(path):
                raise
            continue  # the one who was here has finished and removed the folder
        if not take(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            os.close(lock)
            raise UpfitError(f"another process is at work on {out}; wait for it or choose another output")
        if (path / LOCK).exists() and os.path.samestat(os.fstat(lock), os.stat(path / LOCK)):
            return WorkFolder(out, path, lock, check)
        os.close(lock)  # that of a folder which is gone


def take(lock: int, kind: int, wait: bool = False) -> bool:
    """Lock the open file `lock`; False where another process has it, without `wait`. Raises UpfitError where it cannot."""
    try:
        fcntl.flock(lock, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise UpfitError(f"files here cannot be locked ({error.strerror}); choose an output on another disk") from error
    return True


def _make(path: Path, verb: str) -> None:
    """A work folder with its mark, which appears under its name in one step, and only where nothing is."""
    making = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    making.mkdir()
    (making / MARK).write_text(_mark(verb), encoding="utf-8")
    try:
        rename_new(making, path)
    except FileExistsError:  # another process was faster
        remove_tree(making)


def _mark(verb: str) -> str:
    return json.dumps({"upfit": "work folder", "format": FORMAT, "verb": verb}) + "\n"


def check_mark(path: Path) -> dict[str, Any]:
    """The mark of the work folder `path`. Raises UpfitError when it is not one that Upfit made."""
    mark = path / MARK
    try:
        if path.is_symlink() or mark.is_symlink() or not mark.is_file() or mark.stat().st_size > MARK_BYTES:
            raise ValueError("no mark")
        content = json.loads(mark.read_text(encoding="utf-8"))
        if content["upfit"] != "work folder" or content["format"] != FORMAT:
            raise ValueError("another mark")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UpfitError(f"{path} is there and Upfit did not make it; move it away, or choose another output") from error
    return content


def _check_verb(work: WorkFolder, verb: str, overwrite: bool) -> None:
    other = check_mark(work.path).get("verb")
    if other == verb:
        return
    if work.begun() and not overwrite:
        raise UpfitError(
            f"{work.path} holds unfinished work of upfit {other}; finish that, or throw it away: --overwrite, or remove it"
        )
    for entry in work.entries():
        remove_tree(entry)
    write_whole(work.path / MARK, _mark(verb))


def _mend(work: WorkFolder) -> None:
    """After a kill in the middle of replacing OUT: put back what stood there, or remove it where the new one stands."""
    old = work.path / REPLACED
    if not os.path.lexists(old):
        return
    if not os.path.lexists(work.out):
        rename_new(old, work.out)
    else:
        work.check(old)
        remove_tree(old)


@contextmanager
def locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Keep other processes from `what`, by a lock on the file `path` of a work folder.

    Raises UpfitError when one has it, unless this is to `wait`.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        if not take(lock, fcntl.LOCK_EX, wait):
            raise UpfitError(f"another process is at work on {what}; wait for it")
        yield
    finally:
        os.close(lock)

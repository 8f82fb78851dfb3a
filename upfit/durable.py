"""Writes files and folders that are whole or absent, whenever the process or the machine stops.

No function here replaces or removes what is in the way, unless its name says so. None follows a link or leaves the file system.
Knows nothing of models.
"""

import ctypes
import errno
import os
import secrets
import shutil
from pathlib import Path

from upfit.errors import UpfitError

NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2, linux/fs.h
HERE = -100  # AT_FDCWD: names are relative to the working folder
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
MOUNTS = Path("/proc/self/mountinfo")
MOUNT_POINT = 4  # its field in a line of MOUNTS, proc(5)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that a rename afterwards can never show half-written data."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root, name))
        sync_path(Path(root))


def as_new_file(path: Path) -> None:
    """Give a file the rights that a new one gets here: some libraries make files that only their owner can read."""
    new = path.with_name(f".upfit-{secrets.token_hex(8)}")
    new.touch(exist_ok=False)
    try:
        path.chmod(new.stat().st_mode & 0o7777)
    finally:
        new.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """All of the file or nothing of it. A file that stands at `path` is replaced; nothing else is touched."""
    temporary = path.with_name(f".upfit-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def rename_new(old: Path, new: Path, over_empty: bool = False) -> None:
    """Give `old` the name `new`, where nothing stands; with `over_empty` also in the place of an empty folder.

    Raises FileExistsError, and changes nothing, where something does.
    """
    try:
        if over_empty and old.is_dir():
            os.rename(old, new)  # POSIX: a folder replaces nothing but an empty folder
        elif not _renameat2(old, new, NO_REPLACE):
            _rename_plainly(old, new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error
        raise
    sync_path(new.parent)


def _rename_plainly(old: Path, new: Path) -> None:
    """`rename_new` where the system has no such call: no link is made where a file is, a folder replaces an empty one only."""
    if not old.is_dir():
        os.link(old, new)
        old.unlink()
    elif os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    else:
        os.rename(old, new)


def exchange(first: Path, other: Path) -> bool:
    """Let two files or folders swap their names in one step; False where the system cannot."""
    return _renameat2(first, other, EXCHANGE)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(HERE, os.fsencode(old), HERE, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))


def remove_tree(path: Path) -> None:
    """Remove a file, a link (not what is behind it) or a folder with all that is in it; nothing where there is nothing.

    Raises UpfitError, before anything is removed, for a folder that something is mounted on or in: its files are elsewhere's.
    """
    mounted = mount_below(path)
    if mounted is not None:
        raise UpfitError(f"{mounted} is a mount point, and {path} would be removed; unmount it first")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mount_below(path: Path) -> Path | None:
    """A mount point at or below `path`, None where there is none. Bind mounts count, of files too (on Linux)."""
    place = path.parent.resolve() / path.name
    points = _mount_points() if MOUNTS.exists() else [place] if os.path.ismount(place) else []
    return next((point for point in points if point == place or place in point.parents), None)


def _mount_points() -> list[Path]:
    lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    # Spaces and the like are written as octal numbers: \040.
    raw = (line.split(" ")[MOUNT_POINT].encode("utf-8", "surrogateescape") for line in lines)
    return [Path(os.fsdecode(point.decode("unicode_escape").encode("latin-1"))) for point in raw]

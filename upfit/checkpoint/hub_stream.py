"""A model on the hub whose weight files are downloaded one at a time, when they are needed, and removed when nothing needs
them.

OUT's work folder holds the small files whole and, for each weight file, a ghost: a sparse file with the length and the header
of the real one, which takes no space. Code that reads headers reads ghosts as it reads files.
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit.addresses import id_and_revision
from upfit.checkpoint.reader import INDEX, SINGLE
from upfit.checkpoint.safetensors_header import MAX_HEADER_BYTES
from upfit.checkpoint.source import HUB_ID, SMALL_FILES, Source, hub_errors
from upfit.checkpoint.work_folder import Interrupted
from upfit.errors import UpfitError


@dataclass
class HubStream:
    """The source as a folder of ghosts, and the way to its files. Nothing of it is left when a conversion has ended well."""

    source: Source
    headers: dict[str, int]  # weight file -> bytes up to the first tensor
    forget: Callable[[Path], None]  # what is to be told that a file is another one now

    def fetch(self, path: Path) -> None:
        """Put the real file in the ghost's place. A download that was cut off goes on."""
        from huggingface_hub import hf_hub_download

        with _hub_errors(self.source.name):
            got = hf_hub_download(self.source.name, path.name, revision=self.source.revision, local_dir=_downloads(path.parent))
        if os.path.getsize(got) != path.stat().st_size:
            raise UpfitError(f"{path.name} of {self.source.name} has another size than its listing tells; start again")
        self.forget(path)
        os.replace(got, path)

    def release(self, path: Path) -> None:
        """Make a ghost of the file again: its data give their space back."""
        self.forget(path)
        _ghost(path, path.stat().st_size, _beginning(path, self.headers[path.name]))


def streamed(name: str, revision: str | None, folder: Path) -> HubStream:
    """The ghosts of a hub model `id` or `id@revision` in `folder`; what an earlier run has left there is gone on with.

    Raises UpfitError for what is no hub id, and Interrupted when the hub does not give it.
    """
    hub_id, tagged = id_and_revision(name)
    if Path(name).expanduser().exists() or not HUB_ID.fullmatch(hub_id):
        raise UpfitError(f"--stream is for models on the hub, and {name} is none; leave it out, or give an id like org/model")
    return _begin(folder, hub_id, revision or tagged)


def _begin(folder: Path, hub_id: str, revision: str | None) -> HubStream:
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(hub_id):
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
        commit = str(info.sha)
        sizes = {file.rfilename: file.size for file in info.siblings or [] if "/" not in file.rfilename}
        snapshot_download(
            hub_id, revision=commit, allow_patterns=[*SMALL_FILES], ignore_patterns=["*.safetensors"], local_dir=folder
        )
        headers = {}
        for name in _weight_files(folder, sizes):
            if (size := sizes[name]) is None:
                raise UpfitError(f"the hub does not tell the size of {name} of {hub_id}; leave --stream out")
            beginning = _header(hub_id, name, commit)
            headers[name] = len(beginning)
            _ghost(folder / name, size, beginning)
    return HubStream(Source(folder, hub_id, commit, permanent=False), headers, lambda path: None)


def _weight_files(folder: Path, sizes: dict[str, Any]) -> list[str]:
    """The files that the index names, or the one there is; a name that is not on the hub is left for the reader to miss."""
    if SINGLE in sizes:
        return [SINGLE]
    try:
        named = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(name for name in sizes if name in named and name.endswith(".safetensors"))


def _header(hub_id: str, name: str, commit: str) -> bytes:
    """The first bytes of a weight file, up to its first tensor."""
    length = _range(hub_id, name, commit, 0, 8)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise UpfitError(f"{name} of {hub_id} has a header of {size} bytes; at most {MAX_HEADER_BYTES} are read")
    return length + _range(hub_id, name, commit, 8, 8 + size)


def _range(hub_id: str, name: str, commit: str, start: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(hub_id, name, revision=commit)
    answer = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}, follow_redirects=True)
    hf_raise_for_status(answer)
    if len(answer.content) != end - start:
        raise UpfitError(f"the hub does not give parts of {name} of {hub_id}; leave --stream out")
    return bytes(answer.content)


def _ghost(path: Path, size: int, beginning: bytes) -> None:
    temporary = path.with_name(path.name + ".ghost")
    with open(temporary, "wb") as file:
        file.write(beginning)
        file.truncate(size)
    os.utime(temporary, ns=(0, 0))  # the same ghost is the same source, whenever it was made
    os.replace(temporary, path)


def _beginning(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _downloads(folder: Path) -> Path:
    return folder / "downloads"


def _hub_errors(hub_id: str) -> AbstractContextManager[None]:
    """The hub's errors as one line."""
    return hub_errors(
        lambda reason: Interrupted(f"the hub does not give {hub_id}: {reason}; the same command goes on from here")
    )

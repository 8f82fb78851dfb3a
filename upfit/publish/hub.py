"""Calls of the hub that `push` needs. Each is repeated when the network or the hub fails for a moment; each refusal becomes one
line.

The token comes from the hub library's own store or HF_TOKEN. That library alone uses it; it is never read here.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from upfit.checkpoint.source import one_line_a_try
from upfit.errors import UpfitError
from upfit.output import Meter, Output

Result = TypeVar("Result")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
PASSING = {408, 425, 429, 500, 502, 503, 504}
NO_ANSWER = {"TransportError", "ConnectionError", "TimeoutError", "JSONDecodeError"}
LONGEST_WAIT = 120.0


def check_token() -> None:
    """Raise UpfitError where there is no token. The hub is not asked."""
    if get_token() is None:
        raise UpfitError("no hub token found; run `hf auth login`, or set HF_TOKEN to a token that may write")


def connect() -> HfApi:
    """The hub, with a token that it knows. Raises UpfitError without a token, with a wrong one, or without a network."""
    check_token()
    api = HfApi()
    with refusals("the hub does not accept your token; run `hf auth login` again, or mend HF_TOKEN"):
        call(api.whoami, "asking the hub who you are")
    return api


def check_name(repo: str) -> None:
    """Raise UpfitError for what cannot be a repository's name."""
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no user before a slash")
    except HFValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise UpfitError(f"{repo!r} cannot be a repository ({reason}); give USER/NAME") from error


def call(action: Callable[[], Result], what: str, waits: tuple[float, ...] = WAITS) -> Result:
    """`action`, again after a wait when the hub is busy, failing or gone for a moment.

    Raises HfHubHTTPError where the hub refuses, UpfitError where there is no network or it stays away.
    """
    for wait in (*waits, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise UpfitError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to push") from error
        except Exception as error:
            if not _passes(error):
                raise
            if wait is None:
                raise UpfitError(
                    f"{what} failed {len(waits) + 1} times ({_reason(error)}); run the same command again"
                ) from error
            time.sleep(min(max(wait, _asked_wait(error)), LONGEST_WAIT))
    raise AssertionError("unreachable")


def status(error: Exception) -> int | None:
    """The HTTP status the hub answered with; None when it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether it may be gone the next time: a status that says so, no answer (whichever HTTP library the hub's uses), a
    proxy's page where JSON belongs, or a file that did not arrive as it was sent."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    broken = isinstance(error, RuntimeError) and str(error).startswith("Error while uploading")
    return broken or status(error) in PASSING or bool(kinds & NO_ANSWER)


def _asked_wait(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"HTTP {status(error)}" if status(error) else (text.splitlines()[0] if text else type(error).__name__)


@contextmanager
def bars(output: Output) -> Iterator[Output]:
    """The hub library's own bars, which count bytes, on a terminal that wants them, and nothing beside; elsewhere ours."""
    shown = output.stderr.is_terminal and not output.quiet
    was_shown = not are_progress_bars_disabled()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield Output(quiet=True) if shown else output
    finally:
        (enable_progress_bars if was_shown else disable_progress_bars)()


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """What the hub refuses inside the block, as one line that begins with `what`."""
    try:
        with one_line_a_try():
            yield
    except HfHubHTTPError as error:
        raise UpfitError(f"{what} ({_reason(error)})") from error


def files_of(api: HfApi, repo: str, revision: str | None) -> dict[str, Any] | None:
    """Name → what the hub knows of the file; None when there is no such repository or branch."""
    with refusals(f"the hub does not show {repo}; look whether the name is yours"):
        try:
            entries = call(lambda: list(api.list_repo_tree(repo, revision=revision, recursive=True)), f"listing {repo}")
        except HfHubHTTPError as error:
            if status(error) == 404:
                return None
            raise
    return {entry.path: entry for entry in entries if hasattr(entry, "size")}


def make(api: HfApi, repo: str, private: bool, branch: str | None) -> None:
    """The repository, and the branch, where they are not there. Raises UpfitError when the name may not be used."""
    with refusals(_not_yours(repo)):
        call(lambda: api.create_repo(repo, private=private, exist_ok=True), f"making {repo}")
        if branch is not None:
            call(lambda: api.create_branch(repo, branch=branch, exist_ok=True), f"making the branch {branch}")


def _not_yours(repo: str) -> str:
    return f"the hub does not let you write to {repo}; give a name of your own, or a token that may write there"


def send(api: HfApi, repo: str, additions: list[CommitOperationAdd], where: dict[str, Any], meter: Meter) -> None:
    """Large files, one after the other; what the hub has already is not sent again."""
    with refusals(_not_yours(repo)):
        for addition in additions:
            call(
                lambda: api.preupload_lfs_files(repo, additions=[addition], free_memory=False, **where),  # noqa: B023
                f"sending {addition.path_in_repo}",
            )
            meter.advance(addition.upload_info.size, addition.path_in_repo)


def commit(api: HfApi, repo: str, operations: list[Any], message: str, where: dict[str, Any]) -> Any:
    """All files at once or none. A pull request is not asked for twice: an answer that was lost may have opened it."""
    waits = () if where.get("create_pr") else WAITS
    with refusals(f"the hub refuses the commit to {repo}; nothing of it is visible"):
        return call(
            lambda: api.create_commit(repo, operations=operations, commit_message=message, **where), "committing", waits
        )


def check(api: HfApi, repo: str, additions: list[CommitOperationAdd], revision: str | None) -> None:
    """Raise UpfitError unless the hub now holds exactly these bytes."""
    there = files_of(api, repo, revision) or {}
    for addition in additions:
        name, info = addition.path_in_repo, addition.upload_info
        entry = there.get(name)
        digest = entry.lfs.sha256 if entry is not None and entry.lfs else None
        if entry is None or entry.size != info.size or digest not in (None, info.sha256.hex()):
            raise UpfitError(f"{repo} holds other bytes of {name} than were sent; delete that file there and push again")


def addition(name: str, content: Path | bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


def deletion(name: str) -> CommitOperationDelete:
    return CommitOperationDelete(path_in_repo=name)


def collect(api: HfApi, user: str, title: str, repos: list[str]) -> str:
    """A collection of the user's with these models in it, made where it is not there; its address."""
    with refusals(f"the hub refuses the collection {title!r}; the models are published"):
        collection = call(lambda: api.create_collection(title, namespace=user, exists_ok=True), "making the collection")
        for repo in repos:
            call(
                lambda: api.add_collection_item(collection.slug, item_id=repo, item_type="model", exists_ok=True),  # noqa: B023
                f"adding {repo} to the collection",
            )
    return str(collection.url)

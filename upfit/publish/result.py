"""What `upfit push` answers."""

from dataclasses import dataclass
from typing import Any

from upfit.output import Output, human_bytes
from upfit.results import Result, absent


@dataclass(frozen=True, repr=False)
class Publication(Result):
    """A folder that was published, or with a dry run would be.

    folder: the folder here
    repo: the repository on the hub
    dry_run: whether nothing was sent
    files: sizes in bytes, by name
    bytes: size of all of them, bytes
    left_out: files that stay here
    doubts: of a dry run: what would be asked before it is published
    url: address of what was published
    commit: id of the commit
    deleted: files of an earlier push that were deleted
    """

    folder: str
    repo: str
    dry_run: bool
    files: dict[str, int]
    bytes: int
    left_out: list[str]
    doubts: list[str] | None = absent()
    url: str | None = absent()
    commit: str | None = absent()
    deleted: list[str] | None = absent()

    def show(self, output: Output) -> None:
        if not self.dry_run:
            output.line(f"Published {self.url}: {len(self.files)} files, {human_bytes(self.bytes)}")
            return
        rows = [[name, human_bytes(size)] for name, size in self.files.items()]
        output.table(["file", "size"], rows, f"Would send to {self.repo}")
        output.line(f"{len(rows)} files, {human_bytes(self.bytes)}")
        for name in self.left_out:
            output.line(f"Stays here: {name}")
        for doubt in self.doubts or []:
            output.line(f"Would ask: {doubt}")


@dataclass(frozen=True, repr=False)
class Publications(Result):
    """What `--all` has published.

    models: each folder
    """

    models: list[Publication]

    def record(self) -> list[dict[str, Any]]:
        return [model.record() for model in self.models]

    def show(self, output: Output) -> None:
        for model in self.models:
            model.show(output)

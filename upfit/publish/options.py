"""The settings of `upfit push`, one field a flag. Imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from pathlib import Path

from upfit.errors import UpfitError
from upfit.options import option


@dataclass(frozen=True)
class Options:
    """Where to, as what, and what to say of it."""

    private: bool = option(False, help="make a private repository (an existing one stays as it is)")
    branch: str | None = option(None, help="branch to write to, made where it is not there; default: main")
    pull_request: bool = option(False, help="open a pull request instead of writing to the branch")
    message: str | None = option(None, help="the commit's message; default: made of the folder's history")
    license: str | None = option(None, help="licence id such as apache-2.0, where the folder's README names none")
    base_model: str | None = option(None, help="hub id of the source, where the history knows it as a folder only")
    card: Path | None = option(None, help="write the model card to this file too")
    all: bool = option(False, help="push every model in the folder MODEL, each to REPO with -NAME, or to USER/NAME")
    collection: str | None = option(None, help="with --all: also put them into the hub collection of this title")
    yes: bool = option(False, help="do not ask: publish in spite of a licence, an unverified folder or a name in use")
    dry_run: bool = option(False, help="list the files and their sizes; ask the hub nothing")


def check_options(options: Options) -> None:
    """Raise UpfitError for settings that contradict each other."""
    if options.pull_request and options.branch:
        raise UpfitError("--pull-request is opened against main and goes without --branch; give one of them")
    if options.collection and not options.all:
        raise UpfitError("--collection gathers what --all pushes; give both")
    if options.card and options.all:
        raise UpfitError("--card writes one card, --all makes many; push one folder to see its card")
    if options.card and options.card.exists():
        raise UpfitError(f"--card {options.card} exists; give another name")

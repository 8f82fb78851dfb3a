"""`upfit push`: check, ask, send, check again. What a user can mend is found before the hub is called."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.bounded import CARD_BYTES, read_text, shaped
from upfit.errors import UpfitError
from upfit.output import Output, to_json
from upfit.publish import front, hub, licence, manifest
from upfit.publish.card import Card
from upfit.publish.hub import check_name
from upfit.publish.manifest import CARD
from upfit.publish.options import Options, check_options
from upfit.publish.portable import known_places, portable, sent
from upfit.publish.result import Publication
from upfit.report.story import gather

Ask = Callable[[str], bool]
# Of an earlier push: such files are deleted when they are no longer part of the model.
OURS = (".safetensors", ".safetensors.index.json", ".py")
HARMLESS = {".gitattributes", CARD, "LICENSE"}


@dataclass(frozen=True)
class Parcel:
    """What goes to the hub: `files`, name → path here or bytes made for it."""

    folder: Path
    repo: str
    files: dict[str, Path | bytes]
    left_out: list[str]
    doubts: list[str]
    message: str

    def sizes(self) -> dict[str, int]:
        return {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in self.files.items()}


def push(model: str, repo: str, options: Options, ask: Ask | None, output: Output) -> list[Publication]:
    """Publish the folder `model` as `repo` (with `options.all` each model in it); what was or would be sent, one a model.

    `ask` puts a question to the user; None: nobody is there to answer, and every doubt ends the push unless `options.yes`.
    Raises UpfitError for a folder that is not whole, a doubt that stays, and whatever the hub refuses.
    """
    if options.card:
        options = replace(options, card=options.card.expanduser())
    check_options(options)
    if not options.dry_run:
        hub.check_token()  # before all weights are read
    parcels = [pack(folder, name, options) for folder, name in _places(Path(model).expanduser(), repo, options)]
    if options.card:
        card = parcels[0].files[CARD]
        assert isinstance(card, bytes)
        options.card.write_bytes(card)
    if options.dry_run:
        return [_publication(parcel, dry_run=True, doubts=parcel.doubts) for parcel in parcels]
    for parcel in parcels:
        settle(parcel.doubts, options, ask)

    api = hub.connect()
    answers = [_send(api, parcel, options, ask, output) for parcel in parcels]
    if options.collection:
        hub.collect(api, repo.split("/")[0], options.collection, [parcel.repo for parcel in parcels])
    return answers


def _places(model: Path, repo: str, options: Options) -> list[tuple[Path, str]]:

    if not options.all:
        check_name(repo)
        return [(model, repo)]
    if not model.is_dir():
        raise UpfitError(f"no folder at {model}; give a folder of converted models with --all")
    stages = sorted(path for path in model.iterdir() if (path / provenance.FILE).exists() and (path / "config.json").exists())
    if not stages:
        raise UpfitError(f"{model} holds no folder that Upfit wrote; give the folder above the models with --all")
    named = [(path, f"{repo}-{path.name}" if "/" in repo else f"{repo}/{path.name}") for path in stages]
    for _, name in named:
        check_name(name)
    return named


def pack(folder: Path, repo: str, options: Options) -> Parcel:
    """Everything that will be sent, made and checked here. Raises UpfitError for a folder that may not go."""
    steps = manifest.check_folder(folder)
    gathered = manifest.gather(folder)
    readme = read_text(folder / CARD, CARD_BYTES) if (folder / CARD).exists() else ""
    here = (str(folder), str(folder.resolve()), str(Path.cwd()))
    card = Card(gather(str(folder), []), repo, readme, options.base_model, options.license, here)
    with shaped(provenance.not_ours(folder / provenance.FILE)):
        text = card.text
        settings, _ = front.split(text)
        doubts = [*manifest.unverified(steps), *licence.doubts(settings, manifest.has_licence(folder))]
        record = {"format": provenance.FORMAT, "steps": portable(steps, here)}
        verbs = ", ".join(dict.fromkeys(step["verb"] for step in steps if step["verb"] != "evaluate"))
    places = known_places(steps, here)
    content: dict[str, Path | bytes] = {name: sent(name, path, places) or path for name, path in gathered.files.items()}
    content[provenance.FILE] = (to_json(record) + "\n").encode()
    content[CARD] = text.encode()
    return Parcel(folder, repo, dict(sorted(content.items())), gathered.left_out, doubts, options.message or f"Upfit: {verbs}")


def settle(doubts: list[str], options: Options, ask: Ask | None) -> None:
    """Raise UpfitError unless every doubt is waved through, by --yes or by an answer."""
    for doubt in doubts:
        if options.yes or (ask is not None and ask(f"{doubt}. Publish all the same?")):
            continue
        raise UpfitError(f"not published: {doubt}" + ("" if ask else "; --yes publishes all the same"))


def _send(api: Any, parcel: Parcel, options: Options, ask: Ask | None, output: Output) -> Publication:

    there = hub.files_of(api, parcel.repo, None)
    if there is not None and provenance.FILE not in there and set(there) - HARMLESS:
        settle([f"{parcel.repo} exists and holds files that Upfit did not write"], options, ask)
    hub.make(api, parcel.repo, options.private, options.branch)
    where: dict[str, Any] = {"create_pr": True} if options.pull_request else {"revision": options.branch}
    there = hub.files_of(api, parcel.repo, options.branch) or {}
    stale = [name for name in there if name.endswith(OURS) and name not in parcel.files and provenance.FILE in there]
    sizes = parcel.sizes()
    with hub.bars(output) as own, own.progress(f"sending {parcel.repo}", sum(sizes.values())) as meter:
        additions = [hub.addition(name, part) for name, part in parcel.files.items()]
        hub.send(api, parcel.repo, additions, where, meter)
        done = hub.commit(api, parcel.repo, [*additions, *map(hub.deletion, stale)], parcel.message, where)
    hub.check(api, parcel.repo, additions, done.pr_revision or options.branch)
    url = done.pr_url or str(done.repo_url)
    return _publication(parcel, dry_run=False, url=url, commit=done.oid, deleted=stale)


def _publication(parcel: Parcel, dry_run: bool, **more: Any) -> Publication:
    sizes = parcel.sizes()
    return Publication(
        folder=str(parcel.folder),
        repo=parcel.repo,
        dry_run=dry_run,
        files=sizes,
        bytes=sum(sizes.values()),
        left_out=parcel.left_out,
        **more,
    )

"""`upfit synth`: segment, ask, compose, each a stage that is done once, split over processes, and gone on with after a kill.

Work lies in `OUT.synth` until every part is there; then it is put together and becomes OUT. Every question and every context is
a pure function of the corpus, the settings and its number, so the bytes do not depend on how the work was split or interrupted.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upfit import history
from upfit.convert.folders import check_output, staged
from upfit.corpus import documents, files_of, local_inputs
from upfit.errors import UpfitError
from upfit.longcontext.ask import dataset, template
from upfit.longcontext.compose import Composer
from upfit.longcontext.contexts import CONTEXTS, ITEMS, SEGMENTS, SETTINGS, Contexts
from upfit.longcontext.export import write_export
from upfit.longcontext.items import Item, generator
from upfit.longcontext.options import Options, check_options
from upfit.longcontext.segments import Segments, ten_grams, write_segments
from upfit.longcontext.wording import Wording
from upfit.output import Output
from upfit.tokenizer import identity, load_tokenizer

FLUSH_EVERY = 256
POLL_SECONDS = 1.0
FREE = ("shard", "export")  # settings that change nothing of what is asked


def synth(texts: list[str], out: Path, options: Options, output: Output) -> dict[str, Any]:
    """Write `options.items` examples over the documents of `texts` to the folder `out`; what was written.

    With `--shard` only this process's part, `finished` False, unless the other parts are there already. Raises UpfitError for
    settings or text that will not do, and when `out` is taken.
    """
    shard, shards = check_options(options)
    local = local_inputs(texts)
    check_families(options)
    for source in local or [Path(os.devnull)]:
        check_output(out, source, sum(path.stat().st_size for path in files_of(source)) if source in local else 0, False)
    tokenizer = load_tokenizer(options.tokenizer)
    wording = Wording(tokenizer, options.format)
    work = out.with_name(out.name + ".synth")
    settings = _settings(texts, options, identity(tokenizer)["sha256"])
    _claim(work, settings)
    segments = _segmented(work, texts, local, options, tokenizer, output)
    ask = Asker(segments, options)
    total = ask.total if options.ask != "template" else options.items
    composer = Composer(segments, wording, options.seed, max(1, total), options.min_tokens, options.max_tokens)
    _do_part(work / f"part-{shard}-of-{shards}.jsonl", range(shard, total, shards), ask, composer, options, output)
    parts = [work / f"part-{index}-of-{shards}.jsonl" for index in range(shards)]
    missing = [path.name for path in parts if not _whole(path)]
    if missing:
        return {"finished": False, "missing": missing, "work": str(work)}
    return _put_together(work, parts, out, composer, settings, options)


def check_families(options: Options) -> None:
    unknown = [name for name in options.families or () if name not in template.FAMILIES]
    if unknown:
        raise UpfitError(f"--families got {unknown[0]!r}; choose from {', '.join(template.FAMILIES)}")


def _settings(texts: list[str], options: Options, tokenizer: str) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(options).items() if key not in FREE}
    questions = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in options.questions or ()]
    return {"texts": texts, "options": kept, "tokenizer_sha256": tokenizer, "questions_sha256": questions}


def _claim(work: Path, settings: dict[str, Any]) -> None:
    """The work folder of these settings. Raises UpfitError when it holds work of others."""
    work.mkdir(parents=True, exist_ok=True)
    path, text = work / SETTINGS, json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        partial = work / f"{SETTINGS}.{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    elif path.read_text(encoding="utf-8") != text:
        raise UpfitError(f"{work} holds work begun with other settings; give those again, or remove the folder")


def _segmented(work: Path, texts: list[str], local: list[Path], options: Options, tokenizer: Any, output: Output) -> Segments:
    """The corpus in segments: made by whichever process comes first, the others wait for it."""
    folder = work / SEGMENTS
    while not folder.exists():
        try:
            with staged(folder) as partial:
                banned = {gram for name in options.decontaminate or () for gram in _grams(name, options.field, output)}
                size = sum(path.stat().st_size for source in local for path in files_of(source))
                about = {"texts": texts, "segment_tokens": options.segment_tokens, "tokenizer": identity(tokenizer)["sha256"]}
                with output.progress("segments", size) as meter:
                    read = (text for text, _ in documents(texts, options.field, output))
                    write_segments(partial, read, tokenizer, options.segment_tokens, banned, about, meter)
        except UpfitError as error:
            if "another process is writing" not in str(error):
                raise
            time.sleep(POLL_SECONDS)
    return Segments(folder)


def _grams(name: str, field: str, output: Output) -> Iterator[int]:
    for text, _ in documents([name], field, output):
        yield from ten_grams(text)


class Asker:
    """Item number → item, or None where there is none; `total` of them."""

    def __init__(self, segments: Segments, options: Options) -> None:
        self.known = dataset.read(options.questions or []) if options.ask == "dataset" else []
        self.total = min(len(self.known), options.items) if options.ask == "dataset" else options.items
        families = options.families or list(template.FAMILIES)
        self.ask: Callable[[int], Item | None] = lambda index: template.ask(segments, families, options.seed, index)

    def __call__(self, index: int) -> Item | None:
        return self.known[index] if self.known else self.ask(index)


def _do_part(path: Path, indices: range, ask: Asker, composer: Composer, options: Options, output: Output) -> None:
    """A line for each item of this part, in order: the item and its recipe, or its number alone where nothing could be asked.

    What stands in the file already is not done again; a torn last line is cut off.
    """
    if _whole(path):
        return
    done = _repaired(path)
    with open(path, "a", encoding="utf-8") as file, output.progress("questions", len(indices)) as meter:
        meter.advance(done)
        for number, index in enumerate(indices[done:], 1):
            item = ask(index)
            if item is None:
                file.write(f"{index}\n")
            else:
                short = bool(generator(options.seed, "short", index).random() < options.short_share)
                file.write(f"{index}\t{composer.recipe(item, short).line()}\t{item.line()}\n")
            meter.advance(1)
            if number % FLUSH_EVERY == 0:
                file.flush()
        file.write("end\n")
        file.flush()
        os.fsync(file.fileno())


def _repaired(path: Path) -> int:
    """Whole lines in the file; what follows the last of them is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    if len(kept) != len(content):
        with open(path, "r+b") as file:
            file.truncate(len(kept))
    return kept.count(b"\n")


def _whole(path: Path) -> bool:
    return path.exists() and path.read_bytes().endswith(b"end\n")


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            parts = line.rstrip("\n").split("\t")
            if len(parts) == 3:
                yield int(parts[0]), parts[1], parts[2]


def _put_together(
    work: Path, parts: list[Path], out: Path, composer: Composer, settings: dict[str, Any], options: Options
) -> dict[str, Any]:
    """All parts as one folder, by item number; of equal questions of a family the first is kept."""
    found = sorted((line for path in parts for line in _lines(path)), key=lambda line: line[0])
    asked: set[tuple[str, str]] = set()
    counts: dict[str, int] = {}
    patterns: dict[str, str] = {}
    with staged(out) as folder:
        with open(folder / ITEMS, "w", encoding="utf-8") as items, open(folder / CONTEXTS, "w", encoding="utf-8") as contexts:
            for _, recipe, line in found:
                item = Item.read(line)
                if (item.family, item.question) in asked:
                    continue
                asked.add((item.family, item.question))
                items.write(line + "\n")
                contexts.write(recipe + "\n")
                counts[item.family] = counts.get(item.family, 0) + 1
                patterns[item.family] = item.pattern
        shutil.copytree(work / SEGMENTS, folder / SEGMENTS, copy_function=os.link)
        told = {"items": len(asked), "repeated": len(found) - len(asked), "families": counts, "patterns": patterns}
        (folder / SETTINGS).write_text(json.dumps(settings | told, indent=2) + "\n", encoding="utf-8")
        if options.export != "none":
            write_export(Contexts(folder, composer.wording), options.export)
        origin = {"name": ", ".join(settings["texts"]), "revision": None, "path": None}
        history.write(folder, [history.step("synth", origin, asdict(options), told)])
    shutil.rmtree(work)
    return {"finished": True, "out": str(out), **told, "bytes": (out / CONTEXTS).stat().st_size}

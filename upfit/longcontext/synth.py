"""`upfit synth` in three stages: segment, ask, compose. Each is done once, can be split over processes, and continues after a
kill.

OUT's work folder holds the parts until all are there; then they are put together and become OUT. Every question and every
context is a pure function of the corpus, the settings and its number, so the bytes do not depend on how the work was split or
interrupted.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from upfit.checkpoint.output_folder import check_output, local_folder
from upfit.checkpoint.work_folder import WorkFolder, locked, work_folder
from upfit.durable import rename_new, sync_tree
from upfit.errors import UpfitError
from upfit.longcontext.ask import backends, dataset, model, template
from upfit.longcontext.assemble import put_together, written
from upfit.longcontext.compose import Composer
from upfit.longcontext.contexts import SEGMENTS
from upfit.longcontext.items import Item
from upfit.longcontext.options import Options, check_options
from upfit.longcontext.result import Synthesis
from upfit.longcontext.segments import Segments, ten_grams, write_segments
from upfit.longcontext.wording import Wording
from upfit.output import Output
from upfit.text import content_stamp
from upfit.text.corpus import documents
from upfit.text.files import files_of, local_inputs
from upfit.text.tokenizer import identity, load_tokenizer

FLUSH_EVERY = 256  # items: so many at most are asked again after a kill
TOO_LONG = "longer than --max-tokens by itself"
# Settings that change nothing of what is asked.
FREE = ("shard", "export", "responses", "concurrency", "budget_tokens", "base_url")


def synth(texts: list[str], out: Path, options: Options, output: Output) -> Synthesis:
    """Write `options.items` examples over the documents of `texts` to the folder `out`; what was written.

    With `--shard` only this process's part, `finished` False, unless the other parts are there already. Raises UpfitError for
    settings or text that will not do, and when `out` is taken.
    """
    shard, shards = check_options(options)
    local = local_inputs(texts, options.field)
    local_inputs(options.decontaminate or [])
    check_families(options)
    size = sum(path.stat().st_size for source in local for path in files_of(source))
    check_output(out, [*local, *local_folder(options.tokenizer)], size, False)
    tokenizer = load_tokenizer(options.tokenizer)
    wording = Wording(tokenizer, options.format)
    settings = _settings(texts, local, options, identity(tokenizer)["sha256"])
    part = f"{shard}-of-{shards}"
    with work_folder(out, "synth", shared=True) as work, locked(work.path / f"part-{part}.lock", f"part {part} of {out}"):
        with locked(work.path / "claim.lock", f"{out}", wait=True):
            work.claim(settings, restart=False)
        segments = _segmented(work, texts, local, options, tokenizer, output)
        work.keep = True  # a question that is answered is not asked again
        ask = asker(segments, options)
        total = len(ask.known) if isinstance(ask, Known) else options.items
        composer = Composer(segments, wording, options.seed, max(1, total), options.min_tokens, options.max_tokens)
        indices = range(shard, total, shards)
        if isinstance(ask, Model) and (waiting := ask.gather(work.path, indices, part, output)):
            return waiting
        _do_part(work.path / f"part-{part}.jsonl", indices, ask, composer, options, output)
        parts = [work.path / f"part-{index}-of-{shards}.jsonl" for index in range(shards)]
        missing = [path.name for path in parts if not _whole(path)]
        if missing:
            return Synthesis(False, missing, str(work.path))
        if not work.alone():  # another process has put the parts together
            return written(out)
        return put_together(work, parts, out, composer, settings, options)


def check_families(options: Options) -> None:
    unknown = [name for name in options.families or () if name not in template.FAMILIES]
    if unknown:
        raise UpfitError(f"--families got {unknown[0]!r}; choose from {', '.join(template.FAMILIES)}")


def _settings(texts: list[str], local: list[Path], options: Options, tokenizer: str) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(options).items() if key not in FREE}
    questions = [hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest() for name in options.questions or ()]
    content = content_stamp([path for source in local for path in files_of(source)])
    return {"texts": texts, "text": content, "options": settings, "tokenizer_sha256": tokenizer, "questions_sha256": questions}


def _segmented(
    work: WorkFolder, texts: list[str], local: list[Path], options: Options, tokenizer: Any, output: Output
) -> Segments:
    """The corpus in segments: made by whichever process comes first, the others wait for it."""
    folder = work.path / SEGMENTS
    with locked(work.path / "claim.lock", SEGMENTS, wait=True):
        if not folder.exists():
            making = work.folder(f"{SEGMENTS}.partial", clear=True)
            banned = {gram for name in options.decontaminate or () for gram in _grams(name, options.field, output)}
            size = sum(path.stat().st_size for source in local for path in files_of(source))
            about = {"texts": texts, "segment_tokens": options.segment_tokens, "tokenizer": identity(tokenizer)["sha256"]}
            with output.progress("segments", size) as meter:
                read = (text for text, _ in documents(texts, options.field, output))
                write_segments(making, read, tokenizer, options.segment_tokens, banned, about, meter)
            sync_tree(making)
            rename_new(making, folder)
    return Segments(folder)


def _grams(name: str, field: str, output: Output) -> Iterator[int]:
    for text, _ in documents([name], field, output):
        yield from ten_grams(text)


@dataclass(frozen=True)
class Known:
    """Questions that are there already."""

    known: list[Item]

    def __call__(self, index: int) -> Item | str:
        return self.known[index]


@dataclass(frozen=True)
class Template:
    segments: Segments
    options: Options

    def __call__(self, index: int) -> Item | str:
        families = self.options.families or list(template.FAMILIES)
        return template.ask(self.segments, families, self.options.seed, index) or "nothing to ask"


@dataclass
class Model:
    """Questions of a language model: `gather` has them answered, then they are read one by one."""

    segments: Segments
    options: Options
    texts: dict[int, str] = field(default_factory=dict)

    def _request(self, index: int) -> model.Request:
        return model.request(self.segments, self.options.seed, index, self.options.several_share)

    def gather(self, work: Path, indices: range, part: str, output: Output) -> Synthesis | None:
        """Ask for what is not answered yet; what is still waited for, as `synth` returns it, or None."""
        answers = backends.Answers(work / f"answers-{part}.jsonl")
        if self.options.ask == "file" and self.options.responses:
            backends.ingest(self.options.responses, set(indices), answers)
        left = [self._request(index) for index in indices if index not in answers.texts]
        self.texts = answers.texts
        if not left:
            return None
        if self.options.ask == "file":
            requests = work / f"requests-{part}.jsonl"
            backends.write_requests(left, requests, self.options)
            return Synthesis(False, [f"responses to {len(left)} requests in {requests}"], str(work))
        with output.progress("asking", len(indices)) as meter:
            meter.advance(len(indices) - len(left))
            backends.BACKENDS[self.options.ask](left, answers, self.options, meter)
        still = sum(index not in answers.texts for index in indices)
        if not still:
            return None
        return Synthesis(False, [f"{still} questions, for --budget-tokens is used up"], str(work))

    def __call__(self, index: int) -> Item | str:
        return model.read(self._request(index), self.texts[index], self.segments, f"{self.options.ask}/{self.options.model}")


Asker = Known | Template | Model


def asker(segments: Segments, options: Options) -> Asker:
    if options.ask == "dataset":
        return Known(dataset.read(options.questions or [])[: options.items])
    return Template(segments, options) if options.ask == "template" else Model(segments, options)


def _do_part(path: Path, indices: range, ask: Asker, composer: Composer, options: Options, output: Output) -> None:
    """A line for each item of this part, in order: the item and its recipe, or why there is none.

    What stands in the file already is not done again; a torn last line is cut off.
    """
    if _whole(path):
        return
    done = _repaired(path)
    with open(path, "a", encoding="utf-8") as file, output.progress("questions", len(indices)) as meter:
        meter.start_at(done)
        for number, index in enumerate(indices[done:], 1):
            item = ask(index)
            if not isinstance(item, str) and not composer.fits(item):
                item = TOO_LONG
            if isinstance(item, str):
                file.write(f"{index}\t{item}\n")
            else:
                file.write(f"{index}\t{composer.plan(item, options.short_share).line()}\t{item.line()}\n")
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
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")


def _whole(path: Path) -> bool:
    return path.exists() and path.read_bytes().endswith(b"end\n")

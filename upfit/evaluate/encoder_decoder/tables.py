"""What was measured of encoder-decoders, and of models that were shown images, as tables."""

from upfit.evaluate import tables
from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import Difference, Subject, Text
from upfit.output import Output, human_bytes, human_count

KINDS = {
    "text pairs": "pairs of texts",
    "spans": "texts with parts left out",
    "sound": "recordings",
    "images": "images with texts",
}


def show(subjects: list[Subject], data: Text, difference: Difference | None, words: Interval | None, output: Output) -> None:
    show_losses(subjects, data, output)
    if difference:
        tables.show_difference(difference, output)
    if any(subject.word_errors for subject in subjects):
        show_words(subjects, output)
    if words:
        output.line(f"Difference (paired): {100 * words.mean:.2f} ± {_half(words)} points of word error rate")
    show_caches(subjects, output)


def _half(interval: Interval) -> str:
    return "?" if interval.low is None else f"{100 * (interval.mean - interval.low):.2f}"


def show_losses(subjects: list[Subject], data: Text, output: Output) -> None:
    what = KINDS.get(data.examples or "", "examples")
    title = f"Loss of what is written, {data.windows} {what} from {data.documents} documents, 95 % intervals"
    rows = []
    for subject in subjects:
        loss = subject.loss
        rows.append(
            [subject.name, loss.nats_per_token.half_width(4), loss.perplexity.ends(2), loss.bits_per_byte.half_width(4)]
        )
    output.table(["model", "nats per token", "perplexity", "bits per byte"], rows, title)


def show_words(subjects: list[Subject], output: Output) -> None:
    rows = []
    for subject in subjects:
        if (heard := subject.word_errors) is not None:
            counts = [str(count) for count in (heard.substituted, heard.missing, heard.added, heard.words)]
            rows.append([subject.name, f"{100 * heard.rate.mean:.2f} ± {_half(heard.rate)} %", *counts])
    columns = ["model", "word error rate", "substituted", "missing", "added", "of words"]
    output.table(columns, rows, "Words written greedily, without case and punctuation, 95 % intervals")


def show_caches(subjects: list[Subject], output: Output) -> None:
    rows = []
    for subject in subjects:
        own, cross = subject.cache, subject.cross_cache
        cells = ["none", ""] if own is None else [human_bytes(own.bytes_per_token), " ".join(own.dtypes)]
        read = ["none", ""] if cross is None else [human_bytes(cross.bytes_per_position), human_bytes(cross.bytes)]
        rows.append([subject.name, human_count(subject.parameters), cells[0], *read, cells[1]])
    positions = sorted({subject.cross_cache.positions for subject in subjects if subject.cross_cache})
    columns = ["model", "parameters", "a token", "a position", "all of them", "type"]
    title = "Caches of one sequence, measured: of what is written, a token; of what is read, a position"
    if positions:
        title += f", and {' or '.join(map(str, positions))} of them"
    output.table(columns, rows, title)

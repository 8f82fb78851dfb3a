"""What is printed while a command works."""

import io

import pytest
from rich.progress import Progress

from upfit import output
from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import Difference
from upfit.evaluate.probes.summaries import DepthRow, Depths, Needle, NullGap
from upfit.evaluate.tables import show_depths, show_difference, show_needle
from upfit.output import Meter, Output, time_left


@pytest.mark.parametrize(
    ("done", "seconds", "words"),
    [(0, 5, ""), (10, 5, ""), (5, 20, ", 20 s left"), (1, 20, ", 3 min left"), (1, 2000, ", 5.0 h left")],
)
def test_the_time_that_is_left_goes_by_the_rate_so_far(done: float, seconds: float, words: str) -> None:
    assert time_left(done, 10, seconds) == words


def test_a_plain_line_tells_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every task, such as aligning and verifying, where there is no terminal for a bar."""
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    meter = Meter("aligning", 8, quiet=False, bar=None)
    for _ in range(2):
        now[0] += 40
        meter.advance(1, "error 0.1")
    assert capsys.readouterr().err == "aligning: 12%, 5 min left error 0.1\naligning: 25%, 4 min left error 0.1\n"


def test_what_an_earlier_run_did_says_nothing_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    meter = Meter("aligning", 8, quiet=False, bar=None)
    meter.start_at(4)
    now[0] += 40
    meter.advance(1)
    assert capsys.readouterr().err == "aligning: 62%, 2 min left\n"


def test_a_bar_begins_where_an_earlier_run_ended() -> None:
    with Progress(disable=True) as bar:
        meter = Meter("aligning", 8, quiet=False, bar=bar)
        meter.start_at(4)
        assert bar.tasks[0].completed == 4 and bar.tasks[0].speed is None
        meter.advance(1)
        assert bar.tasks[0].completed == 5


@pytest.mark.parametrize(
    ("mean", "low", "printed"),
    [
        (1.2226, 1.1983, "1.223 [1.198, 1.247]"),
        (1.00061, 1.00022, "1.0006 [1.0002, 1.0010]"),
        (36.87, 31.93, "36.9 [31.9, 41.8]"),
    ]
    + [(1.0, 1.0, "1.000 [1.000, 1.000]"), (1.5, None, "1.500")],
)
def test_a_ratio_has_the_digits_that_its_interval_allows(mean: float, low: float | None, printed: str) -> None:
    ratio = Interval(mean, low, None if low is None else 2 * mean - low)
    text = io.StringIO()
    show_difference(Difference("nats", nats_per_token=ratio, perplexity_ratio=ratio, bits_per_byte=ratio), Output(file=text))
    assert text.getvalue().splitlines()[1].split(maxsplit=2)[2] == printed


@pytest.mark.parametrize(("logit", "printed"), [(12.345, "12.3"), (None, "")])
def test_the_largest_logit_is_shown_where_there_is_one(logit: float | None, printed: str) -> None:
    half, text = Interval(0.5, 0.4, 0.6), io.StringIO()
    needle = Needle(half, half, {}, largest_logit=logit, largest_hidden=7.0)
    show_needle([("model", needle)], Output(file=text))
    (row,) = [line for line in text.getvalue().splitlines() if "7 " in line]
    assert [cell.strip() for cell in row.split("│")][-3:-1] == [printed, "7"]


class Tables(Output):
    """Keeps the rows of its tables."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.rows = list[list[str]]()

    def table(self, columns: list[str], rows: list[list[str]], title: str = "") -> None:
        self.rows += rows


def test_probes_are_told_at_every_length_of_every_model() -> None:
    def row(score: float) -> DepthRow:
        of = Interval(score, score - 0.01, score + 0.01)
        null = NullGap(0.01, 0.02)
        return DepthRow(5, 100.0, of, of, null, 0.25, 0.125, 0.5, of, of, of, null, 0.75, [0.5], [score], [score], [score])

    first = Depths("key-value", "text", {"1k": row(0.31), "2k": row(0.32)}, True)
    second = Depths("key-value", "text", {"1k": row(0.41), "2k": row(0.42)}, False)
    output = Tables()
    show_depths("key-value", [("new", first), ("old", second)], output)
    assert [(cells[:3], cells[-1]) for cells in output.rows] == [
        (["1k", "new", "0.310 ± 0.010"], "yes"),
        (["1k", "old", "0.410 ± 0.010"], "no"),
        (["2k", "new", "0.320 ± 0.010"], "yes"),
        (["2k", "old", "0.420 ± 0.010"], "no"),
    ]

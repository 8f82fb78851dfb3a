"""What is printed while a command works."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from tests.uptraining import Workshop, make_workshop
from upfit import output
from upfit.calibration.calibrate import calibrate
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import Difference
from upfit.evaluate.options import Options
from upfit.evaluate.probes.summaries import DepthRow, Depths, Needle, NullGap
from upfit.evaluate.tables import show_depths, show_difference, show_needle
from upfit.output import Meter, Output, time_left
from upfit.uptrain.data.prepare import prepare


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


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


VERBS = ("convert", "calibrate", "evaluate", "prepare", "uptrain")


@pytest.mark.parametrize("verb", VERBS)
def test_every_bar_ends_where_it_should(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """What is done of a task adds up to what was to be done, so that the time left is never wrong for long."""
    bars: list[tuple[str, float, float]] = []
    progress = Output.progress

    @contextmanager
    def noted(self: Output, label: str, total: float) -> Iterator[Meter]:
        with progress(self, label, total) as meter:
            yield meter
        bars.append((label, meter.done, meter.total))

    monkeypatch.setattr(Output, "progress", noted)
    model, text, quiet = str(shop.teacher), str(tmp_path / "text.txt"), Output(quiet=True)
    Path(text).write_text("a word and another one here. " * 300)
    if verb == "convert":
        sample: dict[str, Any] = {"calibration": [text], "calibration_tokens": "1k", "calibration_length": 64}
        for name, options in (("gqa", {"kv_heads": 2}), ("cope", {}), ("diff", {"variant": "split"})):
            recipe = get_recipe(name)
            convert(recipe, model, tmp_path / name, recipe.options(**options, **sample), Settings(), quiet)
    elif verb == "calibrate":
        calibrate(model, [text], tmp_path / "sums.safetensors", "1k", 64, None, False, quiet)
    elif verb == "evaluate":
        speed: dict[str, Any] = {"speed": True, "speed_lengths": [16], "speed_steps": 1, "speed_repeats": 3}
        evaluate(model, Options(against=str(shop.student), data=[text], windows=3, length=64, **speed), quiet)
    elif verb == "prepare":
        prepare([text], tmp_path / "shards", model, "text", quiet)
    else:
        shop.run(tmp_path / "out", tokens="512")
    assert len(bars) == {"convert": 12, "evaluate": 3}.get(verb, 1)
    assert all(total > 0 and done == pytest.approx(total) for _, done, total in bars), bars


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

"""What `upfit evaluate` prints: every number under its name, as many figures as it is known to."""

from dataclasses import replace
from typing import Any

import pytest

from upfit.evaluate import tables
from upfit.evaluate.encoder_decoder import tables as of_encoder_decoders
from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import (
    CacheGrowth,
    CrossCache,
    Difference,
    Loss,
    Ratio,
    Speed,
    SpeedRow,
    Spread,
    Subject,
    TaskScores,
    Text,
    Timing,
    WordErrors,
)
from upfit.evaluate.probes.summaries import DepthRow, Depths, Needle, NullGap, Position, PositionRow, Split, SyntheticTask
from upfit.output import Output


class Printed(Output):
    """What stands on stdout, tables as lists of cells, the columns' names first."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.titles: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.lines: list[str] = []

    def table(self, columns: list[str], rows: list[list[str]], title: str = "") -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.titles.append(title)
        self.tables.append([columns, *rows])

    def line(self, text: str) -> None:
        self.lines.append(text)


def about(mean: float, half: float = 0.25) -> Interval:
    return Interval(mean, mean - half, mean + half)


LOSS = Loss(about(2.0), Interval(7.5, 6.25, 9.125), about(0.75, 0.125), [], 1, 1)
GROWTH = CacheGrowth(512.0, 2048.0, None, None, ["bfloat16"])
MODEL = Subject("own", None, None, "llama", "float32", 1500, LOSS, GROWTH, None, None)
TEXT = Text("python", 3, 5, 64, 320, "")


def printed(function: Any, *arguments: Any) -> Printed:
    output = Printed()
    function(*arguments, output)
    return output


def test_losses() -> None:
    alone = replace(MODEL, name="other", loss=replace(LOSS, nats_per_token=Interval(3.0, None, None)))
    for function, kind, title in (
        (tables.show_losses, None, "Loss on 5 windows of 64 tokens from 3 documents, 95 % intervals"),
        (of_encoder_decoders.show_losses, "sound", "Loss of what is written, 5 recordings from 3 documents, 95 % intervals"),
    ):
        output = printed(function, [MODEL, alone], replace(TEXT, examples=kind))
        assert output.titles == [title]
        assert output.tables[0] == [
            ["model", "nats per token", "perplexity", "bits per byte"],
            ["own", "2.0000 ± 0.2500", "7.50 [6.25, 9.12]", "0.7500 ± 0.1250"],
            ["other", "3.0000", "7.50 [6.25, 9.12]", "0.7500 ± 0.1250"],
        ]


def test_differences_have_two_figures_of_what_is_not_known() -> None:
    difference = Difference("", about(0.5), about(0.125, 0.0625), about(1.02345, 0.00321))
    assert printed(tables.show_difference, difference).lines == [
        "Difference (paired): 0.1250 ± 0.0625 nats per token",
        "Perplexity ratio:    1.0234 [1.0202, 1.0267]",
    ]
    for half, ratio in ((0.2, "1.02 [0.82, 1.22]"), (20.0, "1 [-19, 21]"), (0.0, "1.023 [1.023, 1.023]")):
        known = replace(difference, perplexity_ratio=about(1.02345, half))
        assert printed(tables.show_difference, known).lines[1] == f"Perplexity ratio:    {ratio}"
    others = replace(difference, nats_per_token=None, perplexity_ratio=None)
    assert printed(tables.show_difference, others).lines == ["Difference (paired): 0.5000 ± 0.2500 bits per byte"]


def test_caches() -> None:
    stateless = replace(MODEL, name="none", cache=None)
    assert printed(tables.show_caches, [MODEL, stateless]).tables[0] == [
        ["model", "parameters", "cache per token", "fixed", "type"],
        ["own", "1.5 k", "512 B", "2.0 kB", "bfloat16"],
        ["none", "1.5 k", "none", "", ""],
    ]
    sliding = replace(GROWTH, window=24, bytes_per_token_beyond=64.0, dtypes=["float32", "int8"])
    windowed = [replace(MODEL, cache=cache) for cache in (sliding, replace(sliding, bytes_per_token_beyond=None))]
    assert printed(tables.show_caches, [*windowed, MODEL]).tables[0] == [
        ["model", "parameters", "cache per token", "beyond the window", "fixed", "type"],
        ["own", "1.5 k", "512 B", "64 B (from 24 tokens)", "2.0 kB", "float32 int8"],
        ["own", "1.5 k", "512 B", "not measured (from 24 tokens)", "2.0 kB", "float32 int8"],
        ["own", "1.5 k", "512 B", "", "2.0 kB", "bfloat16"],
    ]


def test_caches_of_encoder_decoders() -> None:
    read = replace(MODEL, cross_cache=CrossCache(128.0, 100, 12_800))
    output = printed(of_encoder_decoders.show_caches, [read, replace(MODEL, cache=None)])
    assert output.titles[0].endswith("a position, and 100 of them")
    assert output.tables[0] == [
        ["model", "parameters", "a token", "a position", "all of them", "type"],
        ["own", "1.5 k", "512 B", "128 B", "12.8 kB", "bfloat16"],
        ["own", "1.5 k", "none", "none", "", ""],
    ]


def test_words() -> None:
    heard = replace(MODEL, word_errors=WordErrors(about(0.125, 0.03), 90, 4, 3, 2, 7))
    alone = replace(MODEL, name="other", word_errors=WordErrors(Interval(0.5, None, None), 10, 1, 2, 3, 1))
    output = printed(of_encoder_decoders.show, [heard, MODEL, alone], TEXT, None, about(-0.0625, 0.01))
    assert output.tables[1] == [
        ["model", "word error rate", "substituted", "missing", "added", "of words"],
        ["own", "12.50 ± 3.00 %", "4", "3", "2", "90"],
        ["other", "50.00 ± ? %", "1", "2", "3", "10"],
    ]
    assert output.lines == ["Difference (paired): -6.25 ± 1.00 points of word error rate"]
    assert len(printed(of_encoder_decoders.show, [MODEL], TEXT, None, None).tables) == 2


def test_speed() -> None:
    ours = Timing(Spread(1234.5, 100.0, 2000.0), Spread(9.25, 8.0, 11.0), 500)
    theirs = Timing(Spread(99.0, 98.0, 101.0), Spread(100.0, 90.5, 110.0), 1000)
    ratio = Ratio(Spread(1.5, 1.25, 1.75), Spread(0.5, 0.25, 2.0))
    rows = [SpeedRow(64, ours, theirs, ratio), SpeedRow(128, ours), SpeedRow(256, ours, replace(theirs, cache_bytes=0), ratio)]
    output = printed(tables.show_speed, Speed(2, 32, 3, rows))
    assert output.titles == ["Speed, 2 sequence(s) at once, 32 tokens decoded: median of 3 [min, max]"]
    assert output.tables[0] == [
        ["", "context", "prefill tokens/s", "decode tokens/s", "cache"],
        ["model", "64", "1234 [100, 2000]", "9.2 [8.0, 11.0]", "500 B"],
        ["against", "64", "99.0 [98.0, 101.0]", "100 [90, 110]", "1.0 kB"],
        ["ratio", "64", "1.50 x [1.25, 1.75]", "0.50 x [0.25, 2.00]", "0.50 x"],
        ["model", "128", "1234 [100, 2000]", "9.2 [8.0, 11.0]", "500 B"],
        ["model", "256", "1234 [100, 2000]", "9.2 [8.0, 11.0]", "500 B"],
        ["against", "256", "99.0 [98.0, 101.0]", "100 [90, 110]", "0 B"],
        ["ratio", "256", "1.50 x [1.25, 1.75]", "0.50 x [0.25, 2.00]", ""],
    ]


def test_needles_and_the_heads_that_find_them() -> None:
    unseen = Needle(about(0.5), about(1.5), {}, None, 40.4)
    maps = {"heads": [{"layer": 1, "head": 0}]}
    shares = (about(0.1, 0.01), about(0.7, 0.02), about(0.2, 0.03))
    seen = Needle(about(0.75), about(0.25, 0.125), {}, 12.34, 99.6, *shares, [[0.1, 0.2], [0.3, 0.4]], maps)
    other = replace(seen, attention_by_head=[[0.5, 0.6], [0.7, 0.8]], maps={"heads": [{"layer": 0, "head": 1}]})
    output = printed(tables.show_needle, [("own", seen), ("other", other), ("unseen", unseen)])
    assert output.tables[0] == [
        ["model", "found", "nats per answer token", "attention on answer", "on first token", "top logit", "top hidden"],
        ["own", "0.75 ± 0.25", "0.250 ± 0.125", "0.100 ± 0.010", "0.700 ± 0.020", "12.3", "100"],
        ["other", "0.75 ± 0.25", "0.250 ± 0.125", "0.100 ± 0.010", "0.700 ± 0.020", "12.3", "100"],
        ["unseen", "0.50 ± 0.25", "1.500 ± 0.250", "", "", "", "40"],
    ]
    assert output.tables[1] == [
        ["", "own", "other", "unseen"],
        ["layer 1, head 0", "0.300", "", ""],
        ["layer 0, head 1", "", "0.600", ""],
    ]
    assert len(printed(tables.show_needle, [("unseen", unseen)]).tables) == 1


def test_depths() -> None:
    row = DepthRow(
        contexts=6, tokens=300.0, average=about(0.75), gap=about(0.5), null_gap=NullGap(0.1, 0.2), p_value=0.03, floor=0.04,
        normalised=0.9, answer_nats_per_token=about(1.25), nats_gap=about(2.5), nats_null_gap=NullGap(0.3, 0.4),
        strict=about(0.6), nats_p_value=0.05, depths=[0.1, 0.5, 0.9], scores=[], strict_scores=[], nats=[],
    )  # fmt: skip
    probes = [("own", Depths("", "", {"300": row}, True)), ("other", Depths("", "", {"300": replace(row, floor=0.5)}, False))]
    output = printed(tables.show_depths, "key-value", probes)
    assert output.titles == ["Key-value, 6 contexts, 3 depths, 95 % intervals over contexts"]
    shown = ["0.750 ± 0.250", "0.040", "0.500 (0.200)", "0.030", "1.250 ± 0.250", "2.500 (0.400)", "0.050"]
    assert output.tables[0] == [
        ["length", "model", "score", "floor", "gap (null 95 %)", "p", "nats a token", "gap (null 95 %)", "p", "trained on"],
        ["300", "own", *shown, "yes"],
        ["300", "other", shown[0], "0.500", *shown[2:], "no"],
    ]


def test_positions() -> None:
    """Of 16 parts every fourth, by where it ends."""
    parts = [about(float(part), 0.5) for part in range(16)]
    row = PositionRow(7, about(4.0), [(part + 0.5) / 16 for part in range(16)], [], parts, [])
    output = printed(
        tables.show_position, [("own", Position({"64": row})), ("other", Position({"64": replace(row, windows=8)}))]
    )
    shown = ["4.0000 ± 0.2500", "3.000 ± 0.500", "7.000 ± 0.500", "11.000 ± 0.500", "15.000 ± 0.500"]
    assert output.tables[0] == [
        ["length", "model", "nats per token", "to 25%", "to 50%", "to 75%", "to 100%", "windows"],
        ["64", "own", *shown, "7"],
        ["64", "other", *shown, "8"],
    ]


def test_synthetic_tasks() -> None:
    splits = {
        "in": Split(about(0.75), about(1.5), 0.125, 40, 20, 900),
        "long": Split(about(0.5), about(2.5), 0.25, 41, 21, 901),
    }
    output = printed(tables.show_task, "counting", [("own", SyntheticTask(12, "letters", splits))])
    assert output.titles == ["Counting, 12 letters in distribution, 95 % intervals"]
    assert output.tables[0] == [
        ["", "model", "right", "nats per answer", "commonest answer", "answers"],
        ["in", "own", "0.750 ± 0.250", "1.500 ± 0.250", "0.125", "40"],
        ["long", "own", "0.500 ± 0.250", "2.500 ± 0.250", "0.250", "41"],
    ]


@pytest.mark.parametrize("differ", [True, False])
def test_tasks_of_the_harness(differ: bool) -> None:
    scores = TaskScores("0.4", "a", None, 1, None, 30, {"acc": about(0.5), "word_perplexity": about(9.0)})
    better = replace(scores, metrics={"acc": about(0.75), "word_perplexity": about(8.0)})
    subjects = [replace(MODEL, tasks={"task": scores}), replace(MODEL, name="other", tasks={"task": better})]
    differences = {"task": {"acc": about(-0.25, 0.125), "word_perplexity_ratio": about(1.125, 0.125)}} if differ else {}
    extra = [
        ["task", "acc", "difference", "-0.250 [-0.375, -0.125]", ""],
        ["task", "word_perplexity", "ratio", "1.125 [1.000, 1.250]", ""],
    ]
    assert printed(tables.show_harness, subjects, differences).tables[0] == [
        ["task", "metric", "model", "value", "documents"],
        ["task", "acc", "own", "0.500 [0.250, 0.750]", "30"],
        ["task", "acc", "other", "0.750 [0.500, 1.000]", "30"],
        ["task", "word_perplexity", "own", "9.000 [8.750, 9.250]", "30"],
        ["task", "word_perplexity", "other", "8.000 [7.750, 8.250]", "30"],
        *(extra if differ else []),
    ]

"""Several sources in fixed shares: which row a step takes follows from its number, the weights and the seed alone."""

import json
import random
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_uptrain_resume import Interrupting, untimed
from tests.uptraining import QUIET, Workshop, config, make_workshop, metrics, text, weights
from upfit import provenance
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.publish.portable import portable
from upfit.uptrain.data.dataloader import RowGroup, StepSampler, averages
from upfit.uptrain.data.interleave import InterleavedRows, interleave
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import Row, Rows, TextRows
from upfit.uptrain.data.shard_writer import ShardWriter
from upfit.uptrain.data.sources import Sources, parse, whole_weights
from upfit.uptrain.run.result import Uptraining
from upfit.uptrain.train import uptrain


@pytest.mark.parametrize("seed", range(40))
def test_every_source_has_its_share_within_one_row_after_any_number(seed: int) -> None:
    draw = random.Random(seed)
    given = [draw.choice([1, 2, draw.randint(1, 300)]) for _ in range(draw.randint(1, 9))]
    order = np.tile(interleave(given), 2)
    rows = np.arange(1, len(order) + 1)
    for number, weight in enumerate(given):
        assert (np.abs(np.cumsum(order == number) - rows * weight / sum(given)) < 1).all()


def folder_of(place: Path, name: str, tokens: int, first: int) -> Path:
    """A folder of shards whose tokens count up from `first`."""
    folder = place / name
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "uint16")
    writer.add(list(range(first, first + tokens)))
    writer.finish({"tokenizer": {}})
    return folder


@pytest.fixture
def three(tmp_path: Path) -> Sources:
    for name, tokens, first in (("a", 2001, 0), ("b", 901, 10000), ("c", 201, 20000)):
        folder_of(tmp_path, name, tokens, first)
    return Sources.open(f"{tmp_path}/a=0.5,{tmp_path}/b=0.3,{tmp_path}/c=0.2")


def source_of(row: Row) -> str:
    return "abc"[int(row.input_ids[0]) // 10000]


def test_rows_are_of_their_source_in_its_own_order_each_once_an_epoch(three: Sources) -> None:
    rows = three.rows(10, 8, 10, 1, True)
    assert isinstance(rows, InterleavedRows) and rows.total == 200 + 90 + 20
    taken = [rows.at(rows.sample(index)) for index in range(1000)]
    for name, shards, share in zip("abc", three.shards, (0.5, 0.3, 0.2), strict=True):
        mine = [int(row.input_ids[0]) for row in taken if source_of(row) == name]
        assert len(mine) == 1000 * share
        alone = TextRows(shards, 10, round(10 * share), 1, number="abc".index(name))
        assert mine == [int(alone.at(alone.sample(index)).input_ids[0]) for index in range(len(mine))]
        epoch = len(alone.training)
        for begin in range(0, len(mine) - epoch + 1, epoch):
            assert len(set(mine[begin : begin + epoch])) == epoch


def test_sources_of_the_same_size_are_shuffled_apart(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", 1001, 0), folder_of(tmp_path, "b", 1001, 10000)
    rows = Sources.open(f"{tmp_path}/a=1,{tmp_path}/b=1").rows(10, 2, 0, 0, True)
    starts = [int(rows.at(rows.sample(index)).input_ids[0]) for index in range(200)]
    assert starts[::2] != [start - 10000 for start in starts[1::2]]


def test_held_out_rows_are_of_every_source_and_never_trained_on(three: Sources) -> None:
    rows = three.rows(10, 8, 10, 0, True)
    assert {name: len(held) for name, held in rows.held_out().items()} == {"a": 5, "b": 3, "c": 2}
    assert all(source_of(rows.at(row)) == name for name, held in rows.held_out().items() for row in held)
    assert sorted(rows.holdout) == sorted(row for held in rows.held_out().values() for row in held)
    assert not {rows.sample(index) for index in range(2000)} & set(rows.holdout)
    assert all(three.rows(10, 8, 1, 0, True).held_out().values()), "at least one of each"
    assert not any(three.rows(10, 8, 0, 0, True).held_out().values())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_step_takes_the_same_rows_for_every_number_of_processes(three: Sources, world: int) -> None:
    feed = StepSampler(three.rows(10, 8, 10, 0, True), 8)

    def taken(parts: list[RowGroup]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(row.input_ids.tolist()) for part in parts for row in part.rows if row.supervised)

    for step in (0, 3, 77):
        whole = taken(feed.of_step(step, 0, 1))
        assert whole.total() == 8 and sum((taken(feed.of_step(step, rank, world)) for rank in range(world)), Counter()) == whole
    assert sum((taken(feed.held_out(rank, world)) for rank in range(world)), Counter()) == taken(feed.held_out(0, 1))


def test_passes_are_told_by_source_and_too_many_are_warned_of(three: Sources) -> None:
    feed = StepSampler(three.rows(10, 10, 0, 0, True), 10)
    assert feed.passes(20) == "passes over the data: a 0.50, b 0.67, c 2.00" and feed.repeated(40) == []
    assert [line[:23] for line in feed.repeated(50)] == ["c is gone over 5.0 time"]
    single: Rows = TextRows(three.shards[2], 10, 0, 0)
    assert (
        StepSampler(single, 10).passes(3) == "1.50 passes over the data"
        and "the data is gone" in StepSampler(single, 10).repeated(9)[0]
    )
    assert "the text mixed in" in StepSampler(TextRows(three.shards[0], 10, 0, 0), 1, single, 10).repeated(9)[0]


def _named(means: list[float]) -> dict[str, float]:
    return {"ce": means[0], "kl": means[1]}


def test_means_of_sources_make_up_the_mean_of_all() -> None:
    parts = [RowGroup("", [], source="a"), RowGroup("", [], source="b"), RowGroup("mix_", []), RowGroup("", [], source="empty")]
    told = averages(parts, [[6.0, 2.0, 2.0], [4.0, 0.0, 8.0], [3.0, 1.0, 1.0], [0.0, 0.0, 0.0]], _named)
    assert told == {
        "ce": 1.0, "kl": 0.2, "a/ce": 3.0, "a/kl": 1.0, "b/ce": 0.5, "b/kl": 0.0, "mix_ce": 3.0, "mix_kl": 1.0
    }  # fmt: skip


def test_folders_and_weights_are_read_from_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("code", "prose", "lr=3,b=2", "a,b"):
        folder_of(tmp_path, name, 100, 0)

    def told(given: str) -> list[tuple[str, Fraction]]:
        return [(folder.name, weight) for folder, weight in parse(given)]

    assert told("code=0.7,prose=.3") == [("code", Fraction(7, 10)), ("prose", Fraction(3, 10))]
    assert told("code") == [("code", Fraction(1))] and told("lr=3,b=2") == [("lr=3,b=2", Fraction(1))]
    assert told("lr=3,b=2=5,code=1,a,b=2") == [("lr=3,b=2", Fraction(5)), ("code", Fraction(1)), ("a,b", Fraction(2))]
    assert told("nowhere") == [("nowhere", Fraction(1))], "Shards tells what is wrong with it"
    assert whole_weights([Fraction(7, 10), Fraction(3, 10)]) == [7, 3] and whole_weights([Fraction(4), Fraction(2)]) == [2, 1]
    assert parse(Sources.open("code=0.70,a,b=.3").argument) == parse("code=0.7,a,b=0.3")
    assert portable(Sources.open("code=4000000,prose=1000000").argument) == "code=4000000,prose=1000000"


WRONG = {
    "code=0.7,prose": "'prose' in .* is no folder with a weight; give them as in code=0.7,prose=0.3",
    "code=0.7,nowhere=0.3": "no folder at nowhere, named in",
    "code=0,prose=1": "gives .*code the weight 0",
    "code=-1,prose=1": "'code=-1'",
    "code=0.5,code=0.5": "names .*code twice",
    "code=0.1234567,prose=1": "too many digits; round them to five",
}


@pytest.mark.parametrize("given,words", WRONG.items())
def test_what_is_no_list_of_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, "code", 100, 0), folder_of(tmp_path, "prose", 100, 0)
    with pytest.raises(UpfitError, match=words):
        parse(given)


def test_the_fingerprint_covers_tokens_and_shares(tmp_path: Path) -> None:
    a, b, c = (folder_of(tmp_path, name, 100, first) for name, first in (("a", 0), ("b", 0), ("c", 500)))

    def of(given: str) -> str:
        return Sources.open(given).fingerprint

    shutil.move(b, tmp_path / "elsewhere")
    assert of(f"{a}=0.7,{c}=0.3") == of(f"{tmp_path}/elsewhere=7,{c}=3"), "the same tokens in the same shares"
    assert len({of(f"{a}=0.7,{c}=0.3"), of(f"{a}=0.6,{c}=0.4"), of(f"{c}=0.7,{a}=0.3"), of(str(a)), of(str(c))}) == 5
    assert Sources.open(f"{a}=1,{tmp_path}/elsewhere=1").names == ["a", "elsewhere"]
    (tmp_path / "more").mkdir()
    shutil.move(tmp_path / "elsewhere", tmp_path / "more" / "a")
    assert Sources.open(f"{a}=1,{tmp_path}/more/a=1").names == ["a-1", "a-2"]


def test_a_source_with_less_than_a_step_takes_is_refused(three: Sources) -> None:
    with pytest.raises(UpfitError, match="c has 18 rows of 10 tokens to train on, a step takes 20; add text or lower --batch-"):
        three.rows(10, 100, 10, 0, True)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    place = tmp_path_factory.mktemp("shop")
    made = make_workshop(place)
    (place / "digits.jsonl").write_text("\n".join(json.dumps({"text": text(seed)[::-1]}) for seed in range(20)))
    prepare([str(place / "digits.jsonl")], place / "digits", str(made.teacher), "text", QUIET)
    return made


def run(shop: Workshop, out: Path, resume: bool = False, output: Output = QUIET, **changes: Any) -> Uptraining:
    given = f"{shop.data}=0.75,{shop.data.parent}/digits=0.25"
    return uptrain(str(shop.student), given, out, config(**changes), resume, False, output)


@pytest.mark.slow
def test_a_run_on_two_sources_resumes_exactly_and_tells_both(shop: Workshop, tmp_path: Path) -> None:
    report = run(shop, tmp_path / "whole")
    assert run(shop, tmp_path / "broken", output=Interrupting(5)).stopped
    with pytest.raises(UpfitError, match="data's fingerprint"):
        uptrain(str(shop.student), str(shop.data), tmp_path / "broken", config(), True, False, QUIET)
    run(shop, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")
    assert set(metrics(tmp_path / "whole")[0]) >= {"ce", "kl"}
    before, after = report.holdout["before"], report.holdout["after"]
    assert set(after) == {"ce", "kl", "data/ce", "data/kl", "digits/ce", "digits/kl"} <= set(before)
    assert min(before["data/ce"], before["digits/ce"]) < before["ce"] < max(before["data/ce"], before["digits/ce"])
    step = provenance.read(tmp_path / "whole")[-1]
    told = [(Path(source["folder"]).name, source["weight"]) for source in step["data"]["sources"]]
    assert told == [("data", 0.75), ("digits", 0.25)] and step["data"]["folder"] in step["command"]
    again = Sources.open(step["data"]["folder"])
    assert again.fingerprint == step["data"]["fingerprint"]

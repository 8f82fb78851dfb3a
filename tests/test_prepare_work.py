"""Preparing is the same for every number of workers, and goes on where it was stopped, whenever that was."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.folders import letter_tokenizer
from tests.uptraining import QUIET, text
from tests.warm_python import ENVIRONMENT, shared_python
from upfit.checkpoint.work_folder import work_folder
from upfit.errors import UpfitError
from upfit.output import Meter, Output
from upfit.provenance import FILE
from upfit.uptrain.data import prepare as preparing
from upfit.uptrain.data import tokenise
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.shard_writer import ShardWriter
from upfit.uptrain.data.shards import Shards

DOCUMENTS = 200


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Documents of many lengths, one of them empty; in small batches, small shards, and saved after each batch."""
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(preparing, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "ShardWriter", small)
    (tmp_path / "in.jsonl").write_text(lines(DOCUMENTS))
    return str(tmp_path / "in.jsonl")


def small(folder: Path, dtype: str) -> ShardWriter:
    return ShardWriter(folder, dtype, shard_tokens=9000, block_bytes=1000)


def lines(count: int) -> str:
    texts = [text(seed, random.Random(seed).randint(1, 60)) if seed != 7 else " " for seed in range(count)]
    return "\n".join(json.dumps({"text": one}) for one in texts)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the recipe, which has the date."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != FILE}


@pytest.mark.parametrize("tokens", [None, "20000"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, tokenizer: str, corpus: str, tokens: str | None) -> None:
    for workers in (1, 2, 5):
        prepare([corpus], tmp_path / str(workers), tokenizer, "text", QUIET, tokens=tokens, workers=workers)
        assert content(tmp_path / str(workers)) == content(tmp_path / "1")
    assert len(content(tmp_path / "1")) > 4, "several shards"
    assert "TOKENIZERS_PARALLELISM" not in os.environ or os.environ["TOKENIZERS_PARALLELISM"] == "false"


class Stop(BaseException):
    """What nobody catches, as a kill."""


class Stopping(Output):
    """Raises Stop when so many batches are written."""

    def __init__(self, at: int) -> None:
        super().__init__(quiet=True)
        self.left = at

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Meter]:
        meter = Meter(label, total, True, None)

        def advance(amount: float, note: str = "") -> None:
            self.left -= "/s" in note
            if self.left == 0:
                raise Stop

        meter.advance = advance  # type: ignore[method-assign]
        yield meter


@pytest.mark.parametrize("tokens", [None, "20000"])
def test_stopped_after_any_batch_it_goes_on(tmp_path: Path, tokenizer: str, corpus: str, tokens: str | None) -> None:
    prepare([corpus], tmp_path / "whole", tokenizer, "text", QUIET, tokens=tokens)
    read: list[int] = []
    for at in (2, 1, 9, 3):
        with pytest.raises(Stop):
            prepare([corpus], tmp_path / "broken", tokenizer, "text", Stopping(at), tokens=tokens, workers=1 + at % 3)
        read.append(json.loads((tmp_path / "broken.upfit-work" / "state.json").read_text())["read"])
        assert not (tmp_path / "broken").exists()
        with open(max((tmp_path / "broken.upfit-work" / "shards").glob("tokens-*")), "ab") as file:
            file.write(b"what was written after the state was saved")
        (tmp_path / "broken.upfit-work" / "shards" / "tokens-00077.bin").write_bytes(b"too")
    assert 0 < read[0] == read[1] < read[2] < read[3] < DOCUMENTS, "what was saved is not done again"
    prepare([corpus], tmp_path / "broken", tokenizer, "text", QUIET, tokens=tokens)
    assert content(tmp_path / "broken") == content(tmp_path / "whole") and not (tmp_path / "broken.upfit-work").exists()
    Shards(tmp_path / "broken").verify()


def stopped(tmp_path: Path, tokenizer: str, corpus: str) -> Path:
    with pytest.raises(Stop):
        prepare([corpus], tmp_path / "out", tokenizer, "text", Stopping(4))
    return tmp_path / "out.upfit-work"


def test_work_of_other_settings_or_another_text_is_not_gone_on_with(tmp_path: Path, tokenizer: str, corpus: str) -> None:
    before = content(stopped(tmp_path, tokenizer, corpus) / "shards")
    with pytest.raises(UpfitError, match="begun with other settings"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET, tokens="300")
    (tmp_path / "in.jsonl").write_text(lines(DOCUMENTS + 1))
    with pytest.raises(UpfitError, match="begun with other settings"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET)
    assert content(tmp_path / "out.upfit-work" / "shards") == before, "the refused commands touched the work"
    assert prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET, overwrite=True).documents == DOCUMENTS


def test_text_of_the_same_size_and_time_is_another_text(tmp_path: Path, tokenizer: str, corpus: str) -> None:
    stopped(tmp_path, tokenizer, corpus)
    before = os.stat(corpus)
    Path(corpus).write_text(Path(corpus).read_text().replace("finished", "unworthy"))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(corpus).st_size == before.st_size
    with pytest.raises(UpfitError, match="begun with other settings"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET)


def test_work_that_was_damaged_is_told(tmp_path: Path, tokenizer: str, corpus: str) -> None:
    work = stopped(tmp_path, tokenizer, corpus)
    shard = max((work / "shards").glob("tokens-*"))
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(UpfitError, match="is not what was written there; remove .*upfit-work and start anew"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET)


def test_two_commands_cannot_prepare_the_same(tmp_path: Path, tokenizer: str, corpus: str) -> None:
    with work_folder(tmp_path / "out", "prepare"), pytest.raises(UpfitError, match="another process"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET)


def test_no_workers_are_refused(tmp_path: Path, tokenizer: str, corpus: str) -> None:
    with pytest.raises(UpfitError, match="--workers got 0; it takes 1 or more"):
        prepare([corpus], tmp_path / "out", tokenizer, "text", QUIET, workers=0)


def test_the_speed_is_told(tmp_path: Path, tokenizer: str, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([corpus], tmp_path / "out", tokenizer, "text", Output())
    assert "tokens/s" in capsys.readouterr().err


DRIVER = """
import sys
from pathlib import Path
from upfit.output import Output
from upfit.uptrain.data import prepare, tokenise
tokenise.BATCH_CHARACTERS, prepare.SAVE_SECONDS = 2000, 0.0
prepare.prepare([sys.argv[1]], Path(sys.argv[2]), sys.argv[3], "text", Output(quiet=True), workers=2)
"""


@pytest.mark.parametrize("linux", [True, False])
def test_as_many_work_as_there_are_cores_and_text_for(monkeypatch: pytest.MonkeyPatch, linux: bool) -> None:
    """Of what comes from elsewhere nobody knows how much text it is. Not every system says which cores are this process's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96 if linux else 6)
    if not linux:
        monkeypatch.delattr(os, "sched_getaffinity")
    share, here = preparing.BYTES_A_WORKER, [Path("text.jsonl")]
    assert [preparing._enough_workers(here, size) for size in (0, share - 1, share, 5 * share, 99 * share)] == [1, 1, 2, 6, 6]
    assert preparing._enough_workers([], 0) == 6
    if not linux:
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        assert preparing._enough_workers([], 0) == 1


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "in.jsonl").write_text(lines(2400))
    (tmp_path / "driver.py").write_text(DRIVER)
    prepare([str(tmp_path / "in.jsonl")], tmp_path / "whole", tokenizer, "text", QUIET)
    state, kills, saved = tmp_path / "out.upfit-work" / "state.json", 0, 0.0
    command = [shared_python(), str(tmp_path / "driver.py"), str(tmp_path / "in.jsonl"), str(tmp_path / "out"), tokenizer]
    for wait in (0.0, 0.01, 0.05, 0.1):
        process = subprocess.Popen(command, env=ENVIRONMENT)
        while process.poll() is None and (not state.exists() or state.stat().st_mtime == saved):
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():  # it came to its end before the kill: it begins anew
            assert content(tmp_path / "out") == content(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
        saved = state.stat().st_mtime if state.exists() else 0.0
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert kills, "it was too fast to be killed"
    assert content(tmp_path / "out") == content(tmp_path / "whole") and not (tmp_path / "out.upfit-work").exists()

"""A hub model converted file by file: the same bytes as from a folder, never more of the source here than one file."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants

from tests.folders import letter_tokenizer
from tests.hub import Hub
from tests.tiny import tiny_model
from upfit.checkpoint import hub_stream
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion
from upfit.errors import UpfitError
from upfit.output import Output

REPO = "alice/tiny"
SAME = ("config.json", "tokenizer.json", "model.safetensors.index.json")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({"hf_good": ("alice", "write")}) as hub:
        for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False), ("ENDPOINT", hub.url)):
            monkeypatch.setattr(constants, name, value)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        yield hub
    close_session()


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> Path:
    """A model in several files, here and on the hub."""
    folder = tmp_path / "source"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    letter_tokenizer().save_pretrained(folder)
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO)
    files = [CommitOperationAdd(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    api.create_commit(REPO, files, commit_message="push")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def run(source: str, out: Path, **settings: Any) -> Conversion:
    recipe = get_recipe("gqa")
    return convert(recipe, source, out, recipe.options(kv_heads=2, method="mean"), Settings(**settings), Output(quiet=True))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in SAME}


@pytest.mark.slow
def test_streamed_is_converted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(str(source), tmp_path / "plain")
    most, drop = list[int](), hub_stream.HubStream.release

    def watched(self: hub_stream.HubStream, path: Path) -> None:
        most.append(sum(path.stat().st_blocks > 8 for path in path.parent.glob("*.safetensors")))
        drop(self, path)

    monkeypatch.setattr(hub_stream.HubStream, "release", watched)
    answer = run(REPO, tmp_path / "streamed", stream=True)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "plain")
    assert "streamed" in answer.record()["verify"]["numbers"] and answer.source.path is None
    assert len(str(answer.source.revision)) == 40
    assert max(most) < len(list(source.glob("*.safetensors"))), "all files were here at once"
    assert not (tmp_path / "streamed.upfit-work").exists()


@pytest.mark.slow
def test_killed_it_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(str(source), tmp_path / "plain")
    child = os.fork()
    if child == 0:
        fetch, before = hub_stream.HubStream.fetch, list[Path]()

        def last(self: hub_stream.HubStream, path: Path) -> None:
            if len(before) == 2:
                time.sleep(600)
            before.append(path)
            fetch(self, path)

        monkeypatch.setattr(hub_stream.HubStream, "fetch", last)
        try:
            run(REPO, tmp_path / "out", stream=True)
        finally:
            os._exit(1)
    journal = tmp_path / "out.upfit-work" / "result" / "conversion.jsonl"
    for _ in range(600):
        if journal.exists() and len(journal.read_text("utf-8").splitlines()) > 1:
            break
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "out").exists()
    brought: list[str] = []
    real = hub_stream.HubStream.fetch

    def noted(self: hub_stream.HubStream, path: Path) -> None:
        brought.append(path.name)
        real(self, path)

    monkeypatch.setattr(hub_stream.HubStream, "fetch", noted)
    run(REPO, tmp_path / "out", stream=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert len(brought) < len(list(source.glob("*.safetensors"))), "finished shards were made again"


def test_what_cannot_be_streamed_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="for models on the hub"):
        run(str(source), tmp_path / "out", stream=True)
    recipe = get_recipe("gqa")
    with pytest.raises(UpfitError, match="leave --stream out, or"):
        convert(recipe, REPO, tmp_path / "out", recipe.options(kv_heads=2), Settings(stream=True), Output(quiet=True))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.upfit-work").exists()


def test_a_dry_run_leaves_nothing_and_downloads_no_weights(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_stream.HubStream, "fetch", lambda *_: pytest.fail("weights were downloaded"))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    answer = run(REPO, tmp_path / "out", stream=True, dry_run=True)
    assert answer.dry_run and set(tmp_path.iterdir()) == before


def test_what_is_brought_lies_in_the_work_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the output, wherever the command is given; it stays there when the command is stopped."""

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_stream.HubStream, "fetch", stopped)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        run(REPO, tmp_path / "out", stream=True)
    assert not list((tmp_path / "elsewhere").iterdir())
    ghosts = {path.name for path in (tmp_path / "out.upfit-work" / "stream").glob("*.safetensors")}
    assert ghosts == {path.name for path in source.glob("*.safetensors")}


def test_a_hub_that_tells_no_sizes_is_refused_in_a_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = HfApi.model_info

    def sizeless(*words: Any, **more: Any) -> Any:
        info = real(*words, **more)
        for file in info.siblings or []:
            file.size = None
        return info

    monkeypatch.setattr(HfApi, "model_info", sizeless)
    with pytest.raises(UpfitError, match="^the hub does not tell the size of model-00001-of-.*; leave --stream out$"):
        run(REPO, tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.upfit-work").exists()


@pytest.mark.slow
def test_a_download_that_fails_costs_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(str(source), tmp_path / "plain")
    real, count = hub_stream.HubStream.fetch, list[str]()

    def failing(self: hub_stream.HubStream, path: Path) -> None:
        count.append(path.name)
        if len(count) == 3:
            with hub_stream._hub_errors(REPO):
                raise OSError("the line is cut")
        real(self, path)

    monkeypatch.setattr(hub_stream.HubStream, "fetch", failing)
    with pytest.raises(UpfitError, match="the same command goes on"):
        run(REPO, tmp_path / "out", stream=True)
    run(REPO, tmp_path / "out", stream=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert len(count) < 3 + len(list(source.glob("*.safetensors"))), "finished shards were made again"

"""What is fetched of a hub model: small files, and of all its weights those that a loader reads."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants

from tests.folders import save_tiny
from tests.hub import Faults, Hub
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import find_source
from upfit.errors import UpfitError

REPO = "alice/tiny"
OTHERS = (
    *(
        "consolidated.safetensors",
        "original/model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
    ),
    *("model.fp16.safetensors", "model-00001-of-00007.safetensors", "fp8/model.safetensors", "tokenizer_x.py", "vocab.bin"),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub({"hf_good": ("alice", "write")}) as hub:
        for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False), ("ENDPOINT", hub.url)):
            monkeypatch.setattr(constants, name, value)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
        yield hub
    close_session()


def publish(hub: Hub, folder: Path, *others: str) -> None:
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO)
    files = [CommitOperationAdd(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    api.create_commit(REPO, [*files, *(CommitOperationAdd(name, b"x") for name in others)], commit_message="push")


def fetched(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_the_index_names_is_fetched(hub: Hub, tmp_path: Path, shards: int) -> None:
    source = save_tiny(tmp_path / "source", shards=shards)
    (source / "LICENSE").write_text("terms")
    publish(hub, source, *OTHERS)
    found = find_source(REPO)
    assert fetched(found.path) == {path.name for path in source.iterdir()}
    asked = [request.path.rpartition("/resolve/")[2].partition("/")[2] for request in hub.log if request.method == "GET"]
    assert not set(asked) & set(OTHERS)
    with open_checkpoint(found.path) as checkpoint:
        assert len(checkpoint.files) == len(list(source.glob("*.safetensors")))


def test_a_failed_request_is_a_line_that_tells_of_the_next_try(hub: Hub, tmp_path: Path) -> None:
    publish(hub, save_tiny(tmp_path / "source"))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    hub.faults = Faults(rate=1.0, kinds=(503,))
    with pytest.raises(UpfitError):
        find_source(REPO)
    logger.removeHandler(handler)
    assert any("[Retry 1/" in line for line in lines)
    assert not [line for line in lines if hub.url in line]


def test_shards_of_any_name_are_fetched(hub: Hub, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", shards=3)
    index = source / "model.safetensors.index.json"
    for path in source.glob("*.safetensors"):
        index.write_text(index.read_text().replace(path.name, f"weights.{path.name[9:]}"))
        path.rename(source / f"weights.{path.name[9:]}")
    publish(hub, source, *OTHERS)
    assert fetched(find_source(REPO).path) == {path.name for path in source.iterdir()}


def test_what_was_fetched_is_found_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shards in (1, 3):
        source = save_tiny(tmp_path / f"source-{shards}", shards=shards)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{shards}"))
        hub.repos.clear()
        publish(hub, source)
        before = find_source(REPO)
        with monkeypatch.context() as offline:
            offline.setattr(constants, "HF_HUB_OFFLINE", True)
            assert find_source(REPO).path == before.path
        with monkeypatch.context() as nobody:
            nobody.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            nobody.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
            )
            assert find_source(REPO).path == before.path


def test_one_file_beside_an_index_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    publish(hub, save_tiny(tmp_path / "source", shards=3), "model.safetensors")
    with pytest.raises(UpfitError, match="loaders differ in which they take"):
        find_source(REPO)
    assert not [request for request in hub.log if request.method == "GET" and request.path.endswith(".safetensors")]


@pytest.mark.parametrize("named", ["../x.safetensors", "a/b.safetensors", "x.bin"])
def test_an_index_that_names_something_else_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path, named: str) -> None:
    source = save_tiny(tmp_path / "source", shards=3)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(min(path.name for path in source.glob("*.safetensors")), named))
    publish(hub, source)
    with pytest.raises(UpfitError, match="only plain names"):
        find_source(REPO)


def test_no_such_model_is_one_line(hub: Hub) -> None:
    for name, settings in (("alice/none", {}), (REPO, {"revision": "nowhere"})):
        more: dict[str, Any] = settings
        with pytest.raises(UpfitError, match="the hub does not give it") as caught:
            find_source(name, **more)
        assert "\n" not in str(caught.value)

"""What is pushed comes back byte for byte, whatever the line does on the way; what may not be pushed is told in one line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants

from tests.folders import logits, save_tiny, tiny_llama
from tests.hub import Hub
from tests.records import push
from tests.uptraining import QUIET
from tests.warm_python import warm_python
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.publish import hub as client
from upfit.publish.manifest import check_folder
from upfit.publish.options import Options

ROOT = Path(__file__).parent.parent
REPO, TOKEN = "alice/tiny", "hf_good"
TOKENS = {TOKEN: ("alice", "write"), "hf_read": ("alice", "read")}
LICENSED = Options(license="mit")
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {"kv_heads": 2, "method": "mean"},
    "diff": {"variant": "v2"},
    "cope": {"gates": "constant", "positions": 8},
}
LOAD = """
import sys
sys.modules["upfit"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
found = {}
for name in sys.argv[2:]:
    own = name != "gqa"
    model, info = AutoModelForCausalLM.from_pretrained(f"alice/{name}", trust_remote_code=own, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found[name] = model.eval()(torch.arange(3, 35)[None]).logits
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One converted folder a recipe, and `shards`, whose weights are in several files."""
    place = tmp_path_factory.mktemp("models")
    save_tiny(place / "source")
    for name, options in VARIANTS.items():
        recipe = find_recipes()[name]
        convert(recipe, str(place / "source"), place / name, recipe.options(**options), Settings(), QUIET)
    save_tiny(place / "sharded", tiny_llama(), shards=3)
    recipe = find_recipes()["gqa"]
    convert(recipe, str(place / "sharded"), place / "shards", recipe.options(**VARIANTS["gqa"]), Settings(), QUIET)
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(TOKENS, lfs_threshold=10_000) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as the tests of CI are otherwise
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for place in ("huggingface_hub.utils._http.time.sleep", "upfit.publish.hub.time.sleep"):
            monkeypatch.setattr(place, lambda seconds: None)
        yield hub
    close_session()


def same(hub: Hub, folder: Path, revision: str = "main", repo: str = REPO) -> None:
    """Everything but what is made for the hub is there, byte for byte."""
    there = hub.files(repo, revision)
    sent = {name for name in there if name not in ("README.md", "recipe.json", ".gitattributes")}
    assert {"config.json", "tokenizer.json"} <= sent
    assert {name: there[name] for name in sent} == {name: (folder / name).read_bytes() for name in sent}
    assert {path.name for path in folder.glob("*.safetensors*")} <= sent


def uploads(hub: Hub) -> list[str]:
    """Where files were sent to, of those that arrived."""
    return [request.path for request in hub.log if request.method == "PUT" and request.status == 200]


@pytest.mark.slow
def test_what_is_pushed_loads_from_the_hub_without_upfit(folders: Path, hub: Hub, tmp_path: Path) -> None:
    for name in VARIANTS:
        [answer] = push(str(folders / name), f"alice/{name}", LICENSED, None, QUIET)
        same(hub, folders / name, repo=f"alice/{name}")
        assert answer["url"].endswith(name) and answer["commit"] == hub.repo(f"alice/{name}").head().id
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", LOAD, str(tmp_path / "logits.pt"), *VARIANTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, ids = torch.load(tmp_path / "logits.pt"), torch.arange(3, 35)[None]
    assert all(torch.equal(found[name], logits(folders / name, ids)) for name in VARIANTS)


@pytest.mark.slow
def test_an_interrupted_push_goes_on_where_it_was(folders: Path, hub: Hub) -> None:
    weights = len(list((folders / "shards").glob("*.safetensors")))
    assert weights > 1
    sent = client.send

    def interrupted(api: Any, repo: str, additions: list[Any], *more: Any) -> None:
        sent(api, repo, additions[:-1], *more)
        hub.faults.down = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "send", interrupted)
        with pytest.raises(UpfitError, match="run the same command again"):
            push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    hub.faults.down = False
    before = uploads(hub)
    assert set(hub.files(REPO)) <= {".gitattributes"}, "nothing half-sent is visible"
    push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    same(hub, folders / "shards")
    assert len(before) >= 1 and len(uploads(hub)) == len(set(uploads(hub))) <= weights + 1, "no file was sent twice"


def test_uploads_that_arrive_broken_are_sent_again(folders: Path, hub: Hub) -> None:
    hub.faults.corrupt_uploads = 2
    push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    same(hub, folders / "shards")


def test_uploads_cut_in_the_middle_are_sent_again(folders: Path, hub: Hub) -> None:
    hub.faults.drop_uploads = 2
    push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    same(hub, folders / "shards")


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_of_all_requests_failing_loses_nothing(folders: Path, hub: Hub, seed: int) -> None:
    hub._random.seed(seed)
    hub.faults.rate = 0.2
    push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    hub.faults.rate = 0.0
    same(hub, folders / "shards")
    assert sum(request.status not in (200, 201) for request in hub.log) >= 2, "something did fail"


def test_a_lost_answer_to_the_commit_makes_no_second_one(folders: Path, hub: Hub) -> None:
    hub.faults.lost_commits = 1
    push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)
    same(hub, folders / "gqa")
    commits = [request for request in hub.log if request.method == "POST" and "/commit/" in request.path]
    head = hub.repo(REPO).head().id
    push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)
    assert len(commits) >= 1 and hub.repo(REPO).head().id == head, "the same folder again changes nothing"


def test_other_bytes_on_the_hub_are_noticed(folders: Path, hub: Hub) -> None:
    hub.faults.silent_corruption = 1
    with pytest.raises(UpfitError, match="holds other bytes of"):
        push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)


def test_pull_requests_and_branches(folders: Path, hub: Hub) -> None:
    push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)
    head = hub.repo(REPO).head().id
    [answer] = push(str(folders / "diff"), REPO, Options(license="mit", pull_request=True), None, QUIET)
    same(hub, folders / "diff", "refs/pr/1")
    push(str(folders / "cope"), REPO, Options(license="mit", branch="cope"), None, QUIET)
    same(hub, folders / "cope", "cope")
    assert hub.repo(REPO).head().id == head and "discussions/1" in answer["url"]


def test_what_an_earlier_push_left_is_taken_away(folders: Path, hub: Hub) -> None:
    push(str(folders / "shards"), REPO, LICENSED, None, QUIET)
    [answer] = push(str(folders / "diff"), REPO, LICENSED, None, QUIET)
    assert len([name for name in answer["deleted"] if name.endswith(".safetensors")]) > 1
    weights = {name for name in hub.files(REPO) if "safetensors" in name}
    assert weights == {"model.safetensors"} and "modeling_upfit_diff.py" in hub.files(REPO)


def test_private_models_and_collections(folders: Path, hub: Hub, tmp_path: Path) -> None:
    for name in VARIANTS:
        (tmp_path / name).symlink_to(folders / name)
    options = Options(license="mit", all=True, private=True, collection="Tiny things")
    answers = push(str(tmp_path), "alice/tiny", options, None, QUIET)
    assert [answer["repo"] for answer in answers] == ["alice/tiny-cope", "alice/tiny-diff", "alice/tiny-gqa"]
    assert all(hub.repo(answer["repo"]).private for answer in answers)
    [collection] = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [answer["repo"] for answer in answers]


def test_files_of_somebody_else_are_asked_about(folders: Path, hub: Hub) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id=REPO)
    with pytest.raises(UpfitError, match="files that Upfit did not write"):
        push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)
    assert "config.json" not in hub.files(REPO)
    push(str(folders / "gqa"), REPO, Options(license="mit", yes=True), None, QUIET)
    assert hub.files(REPO)["mine.txt"] == b"mine"
    same_but_mine = set(hub.files(REPO)) - {"mine.txt"}
    assert "config.json" in same_but_mine


@pytest.mark.parametrize(
    ("token", "repo", "down", "message"),
    [
        (None, REPO, False, "no hub token found"),
        ("hf_wrong", REPO, False, "does not accept your token"),
        ("hf_read", REPO, False, "does not let you write"),
        (TOKEN, "bob/tiny", False, "does not let you write"),
        (TOKEN, REPO, True, "run the same command again"),
        (TOKEN, "alice/tiny/more", False, "cannot be a repository"),
    ],
)
def test_refusals_are_one_line(
    folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, down: bool, message: str
) -> None:
    if token is None:
        monkeypatch.setattr(client, "get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults.down = down
    with pytest.raises(UpfitError, match=message) as error:
        push(str(folders / "gqa"), repo, LICENSED, None, QUIET)
    assert "\n" not in str(error.value) and (token is None or token not in str(error.value))
    assert not hub.repos


def test_a_missing_token_is_told_before_the_weights_are_read(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Path] = []

    def noted(folder: Path) -> list[dict[str, Any]]:
        read.append(folder)
        return check_folder(folder)

    monkeypatch.setattr("upfit.publish.manifest.check_folder", noted)
    monkeypatch.setattr(client, "get_token", lambda: None)
    with pytest.raises(UpfitError, match="no hub token found"):
        push(str(folders / "gqa"), REPO, LICENSED, None, QUIET)
    assert not read
    push(str(folders / "gqa"), REPO, Options(license="mit", dry_run=True), None, QUIET)  # which takes no token
    assert read


@pytest.mark.slow
def test_the_token_is_never_told(folders: Path, hub: Hub) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    environment |= {"HF_TOKEN": "hf_secret_and_wrong"}
    command = [sys.executable, "-m", "upfit", "--debug", "push", str(folders / "gqa"), REPO, "--license", "mit"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "does not accept your token" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_example_goes_from_the_checkpoint_to_the_hub(tmp_path: Path) -> None:
    shim = tmp_path / "bin"
    shim.mkdir()
    with Hub(TOKENS) as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        environment |= {"HF_TOKEN": TOKEN, "PATH": f"{shim}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENS": "3k", "CALIBRATION_TOKENS": "2k", "LENGTH": "256", "WINDOWS": "4"}
        command = [str(ROOT / "examples" / "end_to_end.sh"), str(tmp_path / "out"), REPO]
        with warm_python(environment) as python:
            for name, words in (("upfit", "-m upfit"), ("python", "")):
                (shim / name).write_text(f'#!/bin/sh\nexec "{python}" {words} "$@"\n', encoding="utf-8")
                (shim / name).chmod(0o755)
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        same(hub, tmp_path / "out" / "uptrained")
        assert b"after uptrain" in hub.files(REPO)["README.md"] and (tmp_path / "out" / "report.html").exists()

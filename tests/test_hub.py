"""The double of the hub, seen by the real client: what is published comes back, and every fault does what it says."""

import contextlib
import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, close_session, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub import Faults, Hub

REPO = "alice/tiny"
WEIGHTS = bytes(range(256)) * 4096  # a megabyte: more than the buffers of a socket hold
CARD = b"---\nlicense: mit\ntags: [tiny]\nbase_model: alice/big\n---\n# Tiny\n"
FILES = {"README.md": CARD, "config.json": b"{}", "model.safetensors": WEIGHTS, "sub/notes.txt": b"notes"}
TOKENS = {"hf_good": ("alice", "write"), "hf_read": ("alice", "read"), "hf_bob": ("bob", "write")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # The environment is read at import, which another test may have done; and the client's waits between attempts are seconds.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as the tests of CI are otherwise
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with Hub(TOKENS) as hub:
        yield hub
    close_session()


@pytest.fixture
def api(hub: Hub) -> HfApi:
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO)
    return api


def adds(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def push(api: HfApi, files: dict[str, bytes] = FILES, **options: object) -> str:
    return api.create_commit(REPO, adds(files), commit_message="push", **options).oid  # type: ignore[call-overload]


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def puts(hub: Hub) -> list[int]:
    return [request.status for request in hub.log if request.method == "PUT"]


def test_what_is_published_comes_back(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    commit = push(api)
    assert without_attributes(hub.files(REPO)) == FILES
    assert hub.repo(REPO).head().id == commit and puts(hub) == [200]
    folder = Path(snapshot_download(REPO, endpoint=hub.url, token="hf_good", local_dir=tmp_path / "got"))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    cached = snapshot_download(REPO, endpoint=hub.url, token="hf_good", cache_dir=tmp_path / "cache", revision=commit)
    assert (Path(cached) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_folder_is_published_from_disk(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert without_attributes(hub.files(REPO)) == FILES


def test_an_unchanged_commit_sends_nothing(hub: Hub, api: HfApi) -> None:
    first = push(api)
    hub.log.clear()
    assert push(api) == first
    assert Counter(request.method for request in hub.log) == {"POST": 3, "GET": 1}  # validate-yaml, preupload, batch
    push(api, {"again.safetensors": WEIGHTS})
    assert puts(hub) == [] and hub.files(REPO)["again.safetensors"] == WEIGHTS


def test_info_tree_and_paths_agree_with_the_files(hub: Hub, api: HfApi) -> None:
    commit = push(api)
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == commit and info.tags == ["tiny"] and info.private is False
    weights = next(one for one in info.siblings or [] if one.rfilename == "model.safetensors")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.lfs and (weights.lfs.sha256, weights.size) == (sha256, len(WEIGHTS))
    tree = {one.path: one for one in api.list_repo_tree(REPO, recursive=True)}
    assert set(tree) == {*FILES, ".gitattributes", "sub"} and tree["model.safetensors"].lfs.sha256 == sha256  # type: ignore
    assert {one.path for one in api.list_repo_tree(REPO)} == set(tree) - {"sub/notes.txt"}
    assert [one.path for one in api.list_repo_tree(REPO, "sub")] == ["sub/notes.txt"]
    assert {one.path for one in api.get_paths_info(REPO, ["config.json", "sub", "absent"])} == {"config.json", "sub"}


def test_part_of_a_file(hub: Hub, api: HfApi) -> None:
    push(api)
    url = f"{hub.url}/{REPO}/resolve/main/model.safetensors"
    for asked, got in {"bytes=3-9": WEIGHTS[3:10], "bytes=1048570-": WEIGHTS[-6:], "bytes=-4": WEIGHTS[-4:]}.items():
        answer = httpx2.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (206, got)
        assert answer.headers["content-range"].endswith(f"/{len(WEIGHTS)}")
    assert httpx2.get(url, headers={"Range": "bytes=2000000-"}).status_code == 416
    head = httpx2.head(url)
    assert head.headers["x-linked-etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"' == head.headers["etag"]
    assert head.headers["x-linked-size"] == head.headers["content-length"] == str(len(WEIGHTS))
    assert head.headers["x-repo-commit"] == hub.repo(REPO).head().id


def test_who_may_write(hub: Hub, api: HfApi) -> None:
    assert api.whoami()["name"] == "alice" and api.whoami()["auth"]["accessToken"]["role"] == "write"
    wrong, reader, stranger = (HfApi(endpoint=hub.url, token=token) for token in ("hf_wrong", "hf_read", "hf_bob"))
    for call, status in (
        (wrong.whoami, 401),
        (lambda: wrong.create_repo(REPO), 401),
        (lambda: reader.create_repo("alice/other"), 403),
        (lambda: stranger.create_repo("alice/other"), 403),
        (lambda: push(reader), 403),
        (lambda: push(stranger), 403),
        (lambda: api.create_repo(REPO), 409),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            call()
        assert refused.value.response.status_code == status
    assert set(hub.files(REPO)) == {".gitattributes"} and puts(hub) == []
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_a_private_repository_is_hidden_and_a_deleted_one_gone(hub: Hub, api: HfApi) -> None:
    api.create_repo("alice/secret", private=True)
    assert api.model_info("alice/secret").private and hub.repo("alice/secret").private
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=token).model_info("alice/secret")
    api.delete_repo("alice/secret")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/secret")


def test_pull_requests_and_branches(hub: Hub, api: HfApi) -> None:
    main = push(api)
    pull = HfApi(endpoint=hub.url, token="hf_bob").create_commit(
        REPO, adds({"config.json": b"[]", "more.safetensors": b"more"}), commit_message="Better", create_pr=True
    )
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert hub.files(REPO)["config.json"] == b"{}" and hub.files(REPO, "refs/pr/1")["config.json"] == b"[]"
    api.create_branch(REPO, branch="next")
    commit = push(api, {"config.json": b"1"}, revision="next")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {one.ref: one.target_commit for one in refs.branches} == {"refs/heads/main": main, "refs/heads/next": commit}
    assert [one.ref for one in refs.pull_requests or []] == ["refs/pr/1"]
    assert api.model_info(REPO, revision="refs/pr/1").sha == pull.oid
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a": b""}, revision="absent")


def test_a_commit_is_refused_whole(hub: Hub, api: HfApi) -> None:
    old = push(api)
    new = push(api, {"config.json": b"[]"}, parent_commit=old)
    with pytest.raises(HfHubHTTPError) as refused:
        push(api, {"config.json": b"1"}, parent_commit=old)
    assert refused.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, [*adds({"config.json": b"1"}), CommitOperationDelete("absent")], commit_message="x")
    assert hub.repo(REPO).head().id == new
    api.create_commit(REPO, [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")], commit_message="x")
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "model.safetensors"}


@pytest.mark.parametrize("front", ["a: [", "a: 1\na: 2", "tags: one", "base_model_relation: cousin", "- a", "date: 2026-13-45"])
def test_a_card_with_broken_front_matter_is_refused(api: HfApi, front: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(api, {"README.md": f"---\n{front}\n---\n".encode()})


def test_collections(hub: Hub, api: HfApi) -> None:
    made = api.create_collection("Tiny models")
    assert api.create_collection("Tiny models", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, REPO, "model", note="smaller")
    filled = api.add_collection_item(made.slug, REPO, "model", exists_ok=True)
    assert [(one.item_id, one.note) for one in filled.items] == [(REPO, "smaller")]


def test_an_upload_that_is_cut_is_sent_again(hub: Hub, api: HfApi) -> None:
    hub.faults.drop_uploads = 2
    push(api)
    assert puts(hub) == [0, 0, 200] and hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert all(0 < one.received < len(WEIGHTS) for one in hub.log if (one.method, one.status) == ("PUT", 0))


def test_a_corrupted_upload_is_refused(hub: Hub, api: HfApi) -> None:
    hub.faults.corrupt_uploads = 1
    with pytest.raises(RuntimeError, match="Error while uploading") as refused:
        push(api)
    assert isinstance(refused.value.__cause__, HfHubHTTPError) and puts(hub) == [400]
    push(api)
    assert puts(hub) == [400, 200]


def test_a_silent_corruption_can_be_seen_and_repaired(hub: Hub, api: HfApi) -> None:
    hub.faults.silent_corruption = 1
    push(api)
    stored = hub.files(REPO)["model.safetensors"]
    told = api.get_paths_info(REPO, "model.safetensors")[0].lfs  # type: ignore[union-attr]
    assert told and told.sha256 == hashlib.sha256(stored).hexdigest() and stored != WEIGHTS
    push(api)
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_a_lost_answer_leaves_the_commit(hub: Hub, api: HfApi) -> None:
    hub.faults.lost_commits = 1
    with pytest.raises(httpx2.TransportError):
        push(api)
    assert without_attributes(hub.files(REPO)) == FILES


def test_nobody_answers_while_it_is_down(hub: Hub, api: HfApi) -> None:
    hub.faults.down = True
    with pytest.raises(httpx2.TransportError):
        api.whoami()
    hub.faults.down = False
    assert api.whoami()["name"] == "alice"


def test_a_share_of_requests_fails_in_turn_and_by_seed() -> None:
    def statuses(hub: Hub) -> list[int]:
        hub.faults = Faults(rate=0.4)
        with httpx2.Client(base_url=hub.url, headers={"Authorization": "Bearer hf_good"}) as client:
            for _ in range(50):
                with contextlib.suppress(httpx2.TransportError):
                    client.get("/api/whoami-v2")
        return [request.status for request in hub.log]

    with Hub(seed=7) as one, Hub(seed=7) as same:
        seen = statuses(one)
        assert seen == statuses(same)
    failed = [status for status in seen if status != 200]
    assert 10 <= len(failed) <= 30 and failed == ([429, 500, 503, 0] * 10)[: len(failed)]


def test_the_client_publishes_through_faults_and_sends_a_finished_file_once(hub: Hub, api: HfApi) -> None:
    files = {f"{n}.safetensors": bytes([n]) * 100_000 for n in range(8)}
    hub.faults = Faults(rate=0.3)
    for _ in range(20):
        try:
            push(api, files)
            break
        except (HfHubHTTPError, httpx2.TransportError):
            continue
    assert without_attributes(hub.files(REPO)) == files
    done = Counter(request.path for request in hub.log if request.method == "PUT" and request.status == 200)
    assert len(done) == len(files) and set(done.values()) == {1}


def test_it_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    command = [sys.executable, "-m", "tests.hub", "--token", "hf_x=carol:read"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
            assert HfApi(endpoint=url, token="hf_x").whoami()["auth"]["accessToken"]["role"] == "read"
        finally:
            process.terminate()

"""What the double of the hub (hub.py) answers, endpoint by endpoint: a route takes the hub and the request, and returns JSON or
an Answer, or raises Refused. The shapes are those that huggingface_hub 2.4 reads."""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

from tests.hub_store import LARGE, Blob, Refused, Repo, Tree, read_card

if TYPE_CHECKING:
    from tests.hub import Hub


class Account(NamedTuple):
    name: str
    role: str


@dataclass
class Ask:
    """A request as the routes see it; `args` are the named parts of the path."""

    method: str
    args: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    account: Account | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Answer":
        return cls(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json", **(headers or {})})


def refusal(refused: Refused) -> Answer:
    message = " ".join(str(refused).split()).encode("ascii", "replace").decode()
    named = {"X-Error-Message": message, **({"X-Error-Code": refused.code} if refused.code else {})}
    return Answer.of({"error": str(refused), **refused.fields}, refused.status, {**named, **refused.headers})


Route = Callable[["Hub", Ask], Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"/(?P<ns>[^/]+)/(?P<name>[^/]+)"
MODEL = f"/api/models{REPO}"
REVISION = r"(?P<revision>[^/]+)"


def route(verb: str, path: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((verb, re.compile(path), function))
        return function

    return add


def _repo(hub: "Hub", ask: Ask) -> Repo:
    repo = hub.repos.get(f"{ask.args['ns']}/{ask.args['name']}")
    if repo is None or (repo.private and (ask.account is None or ask.account.name != repo.owner)):
        raise Refused(404 if ask.account else 401, "Repository not found", "RepoNotFound")
    return repo


def _writer(ask: Ask, namespace: str, open_to_all: bool = False) -> Account:
    """Whoever may write; to propose a change (open_to_all) is not bound to the own namespace."""
    if ask.account is None:
        raise Refused(401, "Invalid username or password.")
    if ask.account.role != "write" or (ask.account.name != namespace and not open_to_all):
        raise Refused(403, f"You don't have the rights to write under the namespace {namespace!r}")
    return ask.account


def _proposes(repo: Repo, ask: Ask) -> bool:
    pull = repo.pull_of(ask.args.get("revision", ""))
    return "create_pr" in ask.query or bool(pull and ask.account and pull.author == ask.account.name)


@route("GET", "/api/whoami-v2")
def whoami(hub: "Hub", ask: Ask) -> Any:
    if ask.account is None:
        raise Refused(401, "Invalid username or password.")
    access = {"displayName": "test", "role": ask.account.role}
    who = {"type": "user", "id": ask.account.name, "name": ask.account.name, "fullname": ask.account.name}
    return {**who, "isPro": False, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "Hub", ask: Ask) -> Any:
    _, errors, warnings = read_card(ask.json["content"])
    told = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return Answer.of(told, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(hub: "Hub", ask: Ask) -> Any:
    wanted = ask.json
    if wanted.get("type") not in (None, "model"):
        raise Refused(400, "this hub has models only")
    namespace = wanted.get("organization") or (ask.account.name if ask.account else "")
    _writer(ask, namespace)
    name = f"{namespace}/{wanted['name']}"
    if name in hub.repos:
        raise Refused(409, "You already created this model repo", url=f"{hub.url}/{name}")
    hub.repos[name] = Repo(name, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
    hub.repos[name].start()
    return {"url": f"{hub.url}/{name}", "name": name, "id": name}


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: "Hub", ask: Ask) -> Any:
    ask.args = {"ns": ask.json.get("organization") or (ask.account.name if ask.account else ""), "name": ask.json["name"]}
    _writer(ask, ask.args["ns"])
    del hub.repos[_repo(hub, ask).id]
    return Answer()


@route("GET", f"{MODEL}/auth-check(?P<write>/write)?")
def auth_check(hub: "Hub", ask: Ask) -> Any:
    repo = _repo(hub, ask)
    if ask.args["write"]:
        _writer(ask, repo.owner)
    return Answer()


@route("POST", f"{MODEL}/preupload/{REVISION}")
def preupload(hub: "Hub", ask: Ask) -> Any:
    repo = _repo(hub, ask)
    _writer(ask, repo.owner, open_to_all=_proposes(repo, ask))
    tree = repo.head(ask.args["revision"]).tree

    def one(file: dict[str, Any]) -> dict[str, Any]:
        path, large = file["path"], file["path"].endswith(LARGE) or file["size"] >= hub.lfs_threshold
        known = {"oid": tree[path].sha256 if tree[path].lfs else tree[path].oid} if path in tree else {}
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

    return {"files": [one(file) for file in ask.json["files"]]}


@route("POST", rf"{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: "Hub", ask: Ask) -> Any:
    repo = _repo(hub, ask)
    # Uploads for a pull request name no revision: who may only propose may send objects all the same.
    _writer(ask, repo.owner, open_to_all="ref" not in ask.json or bool(repo.pull_of(ask.json["ref"]["name"])))

    def one(wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if repo.has(oid):
            return {"oid": oid, "size": size}
        ticket = secrets.token_hex(12)
        hub.tickets[ticket] = (repo.id, oid, size)
        upload = {"href": f"{hub.url}/lfs/{repo.id}/{oid}?ticket={ticket}"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/{repo.id}.git/verify"}}}

    return {"transfer": "basic", "objects": [one(wanted) for wanted in ask.json["objects"]]}


@route("PUT", f"/lfs{REPO}/(?P<oid>[0-9a-f]{{64}})")
def upload(hub: "Hub", ask: Ask) -> Any:
    name, oid, size = hub.tickets.get(ask.query.get("ticket", ""), ("", "", 0))
    if oid != ask.args["oid"] or name not in hub.repos:
        raise Refused(403, "the upload is not signed")
    blob = Blob(ask.body, lfs=True)
    if hub.faults.take("corrupt_uploads") or len(ask.body) != size or blob.sha256 != oid:
        raise Refused(400, "The Content-SHA256 you specified did not match what we received")
    if hub.faults.take("silent_corruption"):
        blob = Blob(ask.body[:-1] + bytes([ask.body[-1] ^ 1]), lfs=True)
    hub.repos[name].objects[oid] = blob
    return Answer(headers={"ETag": f'"{oid}"'})


@route("POST", rf"{REPO}\.git/verify")
def verify(hub: "Hub", ask: Ask) -> Any:
    blob = _repo(hub, ask).objects.get(ask.json["oid"])
    if blob is None or len(blob.data) != ask.json["size"]:
        raise Refused(404, "the object is not here")
    return Answer()


@route("POST", f"{MODEL}/commit/{REVISION}")
def commit(hub: "Hub", ask: Ask) -> Any:
    repo, revision = _repo(hub, ask), ask.args["revision"]
    author = _writer(ask, repo.owner, open_to_all=_proposes(repo, ask)).name
    header, *operations = [json.loads(line) for line in ask.body.splitlines() if line.strip()]
    if header["key"] != "header":
        raise Refused(400, "the first line of a commit is its header")
    told = {}
    if "create_pr" in ask.query:
        number = repo.propose(revision, header["value"], operations, author)
        oid, told["pullRequestUrl"] = repo.pulls[number].head, f"{hub.url}/{repo.id}/discussions/{number}"
    else:
        oid = repo.commit(revision, header["value"], operations, author).id
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{oid}", **told}


@route("POST", f"{MODEL}/(?P<kind>branch|tag)/(?P<revision>[^/]+)")
def create_ref(hub: "Hub", ask: Ask) -> Any:
    repo, wanted = _repo(hub, ask), ask.json
    _writer(ask, repo.owner)
    if ask.args["kind"] == "branch":
        refs, name, start = repo.branches, ask.args["revision"], wanted.get("startingPoint", "main")
    else:
        refs, name, start = repo.tags, wanted["tag"], ask.args["revision"]
    if name.startswith("refs/"):
        raise Refused(400, f"Invalid reference: {name}")
    if name in refs:
        raise Refused(409, f"Reference already exists: {name}")
    refs[name] = repo.head(start).id
    return Answer()


@route("GET", f"{MODEL}/refs")
def list_refs(hub: "Hub", ask: Ask) -> Any:
    repo = _repo(hub, ask)

    def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": head} for name, head in refs.items()]

    pulls = {f"refs/pr/{number}": pull.head for number, pull in repo.pulls.items()} if "include_prs" in ask.query else {}
    heads, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
    return {"branches": heads, "converts": [], "tags": tags, "pullRequests": listed(pulls, "")}


def _lfs(blob: Blob, key: str) -> dict[str, Any]:
    if not blob.lfs:
        return {}
    return {"lfs": {key: blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}}


@route("GET", f"{MODEL}(/revision/{REVISION})?")
def model_info(hub: "Hub", ask: Ask) -> Any:
    repo = _repo(hub, ask)
    head = repo.head(ask.args["revision"] or "main")

    def sibling(path: str, blob: Blob) -> dict[str, Any]:
        sizes = {"size": len(blob.data), "blobId": blob.oid, **_lfs(blob, "sha256")} if "blobs" in ask.query else {}
        return {"rfilename": path, **sizes}

    card = read_card(head.tree["README.md"].data.decode())[0] if "README.md" in head.tree else {}
    about = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    first = next(iter(repo.commits.values()))
    return {
        **{"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": head.id, "private": repo.private, **about},
        **{"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags", []), "cardData": card},
        **{"createdAt": first.date, "lastModified": head.date},
        "siblings": [sibling(path, blob) for path, blob in sorted(head.tree.items())],
    }


def _listed(tree: Tree, folder: str = "") -> list[dict[str, Any]]:
    """Every file and folder under a folder, as the tree and paths-info endpoints tell them."""
    inside = {path: blob for path, blob in sorted(tree.items()) if path.startswith(folder)}
    cuts = {path[: slash.start()] for path in inside for slash in re.finditer("/", path) if slash.start() >= len(folder)}
    folders = [{"type": "directory", "path": cut, "size": 0, "oid": Blob(cut.encode(), lfs=False).oid} for cut in sorted(cuts)]
    files = inside.items()
    return folders + [{"type": "file", "path": p, "size": len(b.data), "oid": b.oid, **_lfs(b, "oid")} for p, b in files]


@route("GET", f"{MODEL}/tree/{REVISION}(/(?P<path>.+))?")
def list_tree(hub: "Hub", ask: Ask) -> Any:
    folder = f"{ask.args['path'].strip('/')}/".lstrip("/")
    listed = _listed(_repo(hub, ask).head(ask.args["revision"]).tree, folder)
    if folder and not listed:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    if ask.query.get("recursive", "").lower() in ("true", "1"):
        return listed
    return [one for one in listed if "/" not in one["path"][len(folder) :]]


@route("POST", f"{MODEL}/paths-info/{REVISION}")
def paths_info(hub: "Hub", ask: Ask) -> Any:
    asked = parse_qs(ask.body.decode())["paths"]
    return [one for one in _listed(_repo(hub, ask).head(ask.args["revision"]).tree) if one["path"] in asked]


@route("GET", rf"{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: "Hub", ask: Ask) -> Answer:
    head = _repo(hub, ask).head(ask.args["revision"])
    named = {"X-Repo-Commit": head.id}
    if ask.args["path"] not in head.tree:
        raise Refused(404, "Entry not found", "EntryNotFound", headers=named)
    blob = head.tree[ask.args["path"]]
    tag = f'"{blob.sha256 if blob.lfs else blob.oid}"'
    linked = {"X-Linked-Etag": tag, "X-Linked-Size": str(len(blob.data))} if blob.lfs else {}
    headers = {**named, **linked, "ETag": tag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return _ranged(blob.data, ask.headers.get("range", ""), headers)


def _ranged(data: bytes, asked: str, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if match is None or match[0] == "bytes=-":
        return Answer(200, data, headers)
    start = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
    end = min(int(match[2]) + 1 if match[1] and match[2] else len(data), len(data))
    if start >= end:
        raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


@route("POST", "/api/collections")
def create_collection(hub: "Hub", ask: Ask) -> Any:
    wanted = ask.json
    owner = _writer(ask, wanted["namespace"]).name
    name = re.sub(r"[^a-z0-9]+", "-", wanted["title"].lower()).strip("-")
    if same := [slug for slug in hub.collections if slug.rsplit("-", 1)[0] == f"{owner}/{name}"]:
        raise Refused(409, "a collection of this title exists", slug=same[0])
    slug = f"{owner}/{name}-{len(hub.collections):024x}"
    told = {"slug": slug, "owner": {"name": owner}, "items": [], "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0}
    hub.collections[slug] = {**told, "theme": "green", "upvotes": 0, "private": False, **wanted}
    return hub.collections[slug]


def _collection(hub: "Hub", ask: Ask) -> dict[str, Any]:
    slug = f"{ask.args['ns']}/{ask.args['name']}"
    if slug not in hub.collections:
        raise Refused(404, "Collection not found")
    return hub.collections[slug]


@route("GET", f"/api/collections{REPO}")
def get_collection(hub: "Hub", ask: Ask) -> Any:
    return _collection(hub, ask)


@route("POST", f"/api/collections{REPO}/items")
def add_item(hub: "Hub", ask: Ask) -> Any:
    collection, item = _collection(hub, ask), ask.json["item"]
    _writer(ask, ask.args["ns"])
    if item["type"] == "model" and item["id"] not in hub.repos:
        raise Refused(404, f"{item['id']} does not exist")
    if any((one["id"], one["type"]) == (item["id"], item["type"]) for one in collection["items"]):
        raise Refused(409, "Item already in the collection")
    place = len(collection["items"])
    note = {"note": {"text": ask.json["note"]}} if "note" in ask.json else {}
    collection["items"].append({"_id": f"{place:024x}", "position": place, **item, **note})
    return collection

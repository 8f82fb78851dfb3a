"""What the double of the hub (hub.py) keeps: repositories as commits over paths, branches, pull requests and large objects; and
how it reads model cards. Nothing here knows HTTP; a Refused carries the status that the real hub would answer with."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml

LARGE = (".safetensors", ".bin", ".gguf", ".model", ".npy", ".npz", ".onnx", ".parquet", ".pt")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
RELATIONS = ("adapter", "finetune", "merge", "quantized")


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.fields = status, code, headers or {}, fields


@dataclass(frozen=True)
class Blob:
    data: bytes = field(repr=False)
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The object id that git would give what it stores: the file, or the pointer to a large one."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


Tree = dict[str, Blob]


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    author: str
    tree: Tree = field(repr=False)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Pull:
    title: str
    author: str
    head: str


@dataclass
class Repo:
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    # By the sha256 that the uploader announced, which is not that of the bytes after a silent corruption.
    objects: dict[str, Blob] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def start(self) -> None:
        """Like the real hub, whose new repositories are not empty."""
        tree = {".gitattributes": Blob(ATTRIBUTES, lfs=False)}
        self.branches["main"] = self._add(None, "initial commit", self.owner, tree).id

    def pull_of(self, revision: str) -> Pull | None:
        number = re.fullmatch(r"refs/pr/(\d+)", revision)
        return self.pulls.get(int(number[1])) if number else None

    def head(self, revision: str = "main") -> Commit:
        pull = self.pull_of(revision)
        name = revision.removeprefix("refs/heads/")
        found = pull.head if pull else self.branches.get(name) or self.tags.get(revision.removeprefix("refs/tags/")) or revision
        if found not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    def has(self, sha256: str) -> bool:
        """A silently corrupted object counts as absent, so that a client that noticed can send it again."""
        return sha256 in self.objects and self.objects[sha256].sha256 == sha256

    def commit(self, revision: str, header: dict[str, Any], operations: Iterable[dict[str, Any]], author: str) -> Commit:
        head = self._parent(revision, header)
        pull, branch = self.pull_of(revision), revision.removeprefix("refs/heads/")
        if pull is None and branch not in self.branches:
            raise Refused(400, f"{revision} is not a branch")
        made = self._add(head.id, header["summary"], author, self._apply(head.tree, operations))
        if pull:
            pull.head = made.id
        else:
            self.branches[branch] = made.id
        return made

    def propose(self, revision: str, header: dict[str, Any], operations: Iterable[dict[str, Any]], author: str) -> int:
        head = self._parent(revision, header)
        made = self._add(head.id, header["summary"], author, self._apply(head.tree, operations))
        self.pulls[len(self.pulls) + 1] = Pull(header["summary"], author, made.id)
        return len(self.pulls)

    def _parent(self, revision: str, header: dict[str, Any]) -> Commit:
        head = self.head(revision)
        if header.get("parentCommit") not in (None, head.id):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        return head

    def _add(self, parent: str | None, title: str, author: str, tree: Tree) -> Commit:
        # The count stands for the time in git's commits: two equal ones get different ids.
        content = repr((self.id, len(self.commits), parent, title, sorted((path, blob.oid) for path, blob in tree.items())))
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, author, tree)
        self.commits[made.id] = made
        return made

    def _apply(self, tree: Tree, operations: Iterable[dict[str, Any]]) -> Tree:
        """A new tree, so that an operation that is refused leaves nothing half done."""
        tree = dict(tree)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = _checked(value["path"])
            if kind == "file":
                tree[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
            elif kind == "lfsFile":
                tree[path] = self._object(path, value)
            else:
                for gone in _deleted(tree, path, folder=kind == "deletedFolder"):
                    del tree[gone]
        if "README.md" in tree and (errors := read_card(tree["README.md"].data.decode(errors="replace"))[1]):
            raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        return tree

    def _object(self, path: str, value: dict[str, Any]) -> Blob:
        blob = self.objects.get(value["oid"])
        if blob is None or len(blob.data) != value.get("size", len(blob.data)):
            raise Refused(400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}")
        return blob


def _checked(path: str) -> str:
    if any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise Refused(400, f"{path!r} is not a path in a repository")
    return path


def _deleted(tree: Tree, path: str, folder: bool) -> list[str]:
    gone = [name for name in tree if (name.startswith(path.rstrip("/") + "/") if folder else name == path)]
    if not gone:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    return gone


def read_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The front matter of a model card, what is wrong with it, and what is only odd."""
    if not text.startswith("---"):
        return {}, [], ["empty or missing yaml metadata in repo card"]
    parts = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if parts is None:
        return {}, ["the front matter is not closed by ---"], []
    try:
        node = yaml.compose(parts[1], yaml.SafeLoader)
        if node and (twice := list(_duplicates(node))):  # the hub's parser refuses them, PyYAML takes the last
            return {}, [f"duplicated mapping key: {key}" for key in twice], []
        data = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError) as error:
        return {}, [f"not YAML: {error}"], []
    if data is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return {}, ["the front matter is not a mapping"], []
    return data, list(_misfits(data)), []


def _duplicates(node: yaml.Node) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        yield from sorted({key for key in keys if keys.count(key) > 1})
    for child in node.value if isinstance(node, yaml.CollectionNode) else []:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _duplicates(part)


def _misfits(data: dict[str, Any]) -> Iterator[str]:
    for key in ("library_name", "pipeline_tag", "license_name", "model_name"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("language", "license", "base_model", "datasets"):
        if not isinstance(data.get(key, ""), str) and not _strings(data[key]):
            yield f'"{key}" must be a string or an array of strings'
    for key in ("tags", "metrics"):
        if not _strings(data.get(key, [])):
            yield f'"{key}" must be an array of strings'
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        yield f'"base_model_relation" must be one of {", ".join(RELATIONS)}'
    index = data.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(one, dict) and {"name", "results"} <= set(one) for one in index):
        yield '"model-index" must be an array of {name, results}'


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)

"""Documents to measure on: local text files, or the text that every Python carries. Knows nothing of tokens."""

import ast
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from upfit.errors import UpfitError

# Read when found in a folder; a file named outright is read whatever it is called.
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".tex", ".jsonl", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts",
    ".go", ".rs", ".rb", ".php", ".sh", ".sql", ".r", ".jl", ".lua",
})
# Half of the default text. Files that have stood in the standard library, under these names, since long before Python 3.11.
PYTHON_FILES = (
    "argparse.py", "calendar.py", "configparser.py", "dataclasses.py", "difflib.py", "fractions.py",
    "heapq.py", "http/client.py", "random.py", "shutil.py", "statistics.py", "textwrap.py",
)
# fmt: on
MOST_FILES = 256
BLOCKS = 16


@dataclass(frozen=True)
class Document:
    """One text whose parts belong together. Windows are spread over the documents of each `kind` alike."""

    text: str
    name: str
    kind: str = "text"


def python_documents() -> list[Document]:
    """The language reference (prose) and standard library sources (code) of the running Python, in a fixed order.

    Raises UpfitError when this Python was installed without them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    code = [library / name for name in PYTHON_FILES]
    try:
        from pydoc_data.topics import topics

        prose = [Document(topics[name], f"pydoc:{name}", "prose") for name in sorted(topics)]
        return prose + [Document(path.read_text("utf-8"), path.name, "code") for path in code if path.exists()]
    except ImportError as error:
        raise UpfitError("this Python carries no reference text (pydoc_data); give text with --data") from error


def file_documents(names: list[str], budget: int, flag: str = "--data") -> list[Document]:
    """The documents in the files and folders `names`: a file is one, a .jsonl file one a line (its "text" field).

    `flag` is named in errors. Of data above `budget` bytes only parts are read, spread evenly over the files and inside each.
    Raises UpfitError when a name is not there, a folder holds no text, or a file is not UTF-8 text.
    """
    files = [path for name in names for path in find_files(name, flag)]
    files = files[:: -(-len(files) // MOST_FILES)]
    total = sum(path.stat().st_size for path in files)
    documents = []
    for path in files:
        size = path.stat().st_size
        try:
            blocks = read_blocks(path, size, size if total <= budget else size * budget // total)
        except OSError as error:
            raise UpfitError(f"{flag} {path} cannot be read: {error.strerror}") from error
        for block in blocks:
            documents += jsonl_documents(block, path) if path.suffix == ".jsonl" else [Document(block, str(path))]
    return [document for document in documents if document.text.strip()]


def find_files(name: str, flag: str = "--data") -> list[Path]:
    """The text files at `name`, sorted; hidden files and folders are left out."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UpfitError(f"{flag} {name} is not here; give text files, .jsonl files or folders of them")
    found = [p for p in sorted(path.rglob("*")) if p.suffix in TEXT_SUFFIXES and p.is_file()]
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise UpfitError(
            f"{flag} {name} holds no text files ({' '.join(sorted(TEXT_SUFFIXES)[:6])} ...); name the files themselves"
        )
    return found


def read_blocks(path: Path, size: int, share: int) -> list[str]:
    """The whole file, or when only `share` of its `size` bytes may be read, blocks of whole lines spread evenly over it.

    No line is in two blocks.
    """
    if share >= size:
        return [decoded(path.read_bytes(), path)]
    count = max(1, min(BLOCKS, share // 4096))
    blocks = []
    with path.open("rb") as file:
        for index in range(count):
            file.seek(index * size // count)
            if index:
                file.readline()
            end = (index + 1) * size // count
            lines = file.read(max(0, min(share // count, end - file.tell())))
            blocks.append(decoded(lines[: lines.rfind(b"\n") + 1], path))
    return blocks


def decoded(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UpfitError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if "\0" in text:
        raise UpfitError(f"{path} is not text (it holds zero bytes); give text files")
    return text.replace("\r\n", "\n")


def jsonl_documents(text: str, path: Path) -> list[Document]:
    documents = []
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UpfitError(f"{path} has a line that is not JSON: {line[:40]!r} ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UpfitError(f'{path} has a line without a "text" field: {line[:40]!r}; each must be {{"text": "..."}}')
        documents.append(Document(row["text"], str(path)))
    return documents


LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"})
CODE_BYTES = range(2_000, 200_000)  # neither stubs nor tables


def library_documents() -> list[Document]:
    """Docstrings (prose) and sources (code) of the standard library of the running Python, in a fixed order.

    None of it is in `python_documents`, so a model may learn from this text and be measured on that one.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT & set(name.parts) or name.as_posix() in PYTHON_FILES or path.stat().st_size not in CODE_BYTES:
            continue
        try:
            code = path.read_text("utf-8")
            prose = "\n\n".join(docstrings(code))
        except (OSError, ValueError, SyntaxError):  # a file in another encoding or for another Python
            continue
        documents.append(Document(code, name.as_posix(), "code"))
        if len(prose) >= CODE_BYTES[0]:
            documents.append(Document(prose, f"docstrings:{name.as_posix()}", "prose"))
    return documents


def docstrings(code: str) -> list[str]:
    """The docstrings of a module and of everything in it, from top to bottom."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for text in map(ast.get_docstring, nodes) if text]

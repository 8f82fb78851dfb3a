"""A document, and the documents that every Python installation brings."""

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from upfit.errors import UpfitError

# fmt: off
# Half of the default text. Files that have stood in the standard library, under these names, since long before Python 3.11.
PYTHON_FILES = (
    "argparse.py", "calendar.py", "configparser.py", "dataclasses.py", "difflib.py", "fractions.py",
    "heapq.py", "http/client.py", "random.py", "shutil.py", "statistics.py", "textwrap.py",
)
# fmt: on


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

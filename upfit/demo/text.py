"""The demo's text: the standard library of the running Python, cut into files to train on and files to measure on."""

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 10  # one file of so many
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}
LEFT_OUT |= {"distutils", "multiprocessing"}  # copies of these were in the embedded model's training text
# Files that would be held out and repeat a training file: a tenth to a half of their runs of 16 words stand in one.
LEFT_OUT |= {"cProfile.py", "chunk.py", "posixpath.py", "sunau.py"}
BYTES = range(2_000, 120_000)  # neither stubs nor tables


def standard_library() -> tuple[list[Path], list[Path]]:
    """(training files, held-out files), decided by the hash of a file's path within the library, so by nothing else."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[Path] = []
    held_out: list[Path] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or path.stat().st_size not in BYTES:
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % HELD_OUT_SHARE == 0 else training).append(path)
    return training, held_out

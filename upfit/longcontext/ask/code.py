"""Questions about Python functions in the text: in which function a line stands, what a function is documented to do."""

import re

import numpy as np

from upfit.longcontext.segments import Segments

FUNCTION = re.compile(r"^([ \t]*)def (\w+)\((?:.|\n)*?\)[^\n]*:\n((?:\1[ \t]+[^\n]*\n|[ \t]*\n)+)", re.MULTILINE)
DOCSTRING = re.compile(r'^\s*r?"""([^"\n]+)')
LEAST_LINE = 16  # characters of a line that is asked about
COMMON = re.compile(r"^(return|pass|else|try|except|raise|break|continue|import|#|\"|')")
Question = tuple[str, str, tuple[str, ...]]


def functions(text: str) -> list[tuple[str, str]]:
    """Name and body of the functions that are whole in a text; names that it defines twice are left out."""
    matches = [(match.group(2), match.group(3)) for match in FUNCTION.finditer(text + "\n")]
    return [(name, body) for name, body in matches if text.count(f"def {name}(") == 1]


def line_to_function(segments: Segments, index: int, rng: np.random.Generator) -> Question | None:
    """Backward: the line is given, the name that stands before it is asked for."""
    text = segments.text(index)
    choices = []
    for name, body in functions(text):
        lines = [line.strip() for line in body.split("\n")]
        lines = [line for line in lines if len(line) >= LEAST_LINE and not COMMON.match(line) and text.count(line) == 1]
        choices += [(name, line) for line in lines if name not in line]
    if not choices:
        return None
    name, line = choices[int(rng.integers(len(choices)))]
    return f"In the body of which function does this line stand: `{line}`", name, (line, f"def {name}(")


def documented(segments: Segments, index: int, rng: np.random.Generator) -> Question | None:
    """Forward and backward: from a function's name to the first line of its docstring, or from that to the name."""
    text = segments.text(index)
    lines = [(name, match.group(1).strip()) for name, body in functions(text) if (match := DOCSTRING.match(body))]
    choices = [(name, line) for name, line in lines if len(line) >= LEAST_LINE and text.count(line) == 1 and name not in line]
    if not choices:
        return None
    name, line = choices[int(rng.integers(len(choices)))]
    if rng.integers(2):
        return f"How does the docstring of the function `{name}` begin?", line, (f"def {name}(", line)
    return f'Which function has a docstring that begins with "{line}"?', name, (line, f"def {name}(")

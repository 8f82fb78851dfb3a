"""Write upfit/architecture/bands.toml: what aligned merging can do with keys and values of each model type, by watching tiny
models. Takes a minute or two. A test compares some of it (slow ones all) with what is watched."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.tiny import BUILDABLE  # noqa: E402
from tests.watching import bands_of  # noqa: E402
from upfit.architecture.table import table  # noqa: E402

PAGE = ROOT / "upfit" / "architecture" / "bands.toml"
HEAD = """# What aligned merging can do with keys and values of each type, as `bands` in upfit/calibration/traits.py names it.
# Written by scripts/write_bands.py, which watches a tiny model of each.
"""


def text(bands: dict[str, list[str]]) -> str:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, own in sorted(bands.items()):
        groups.setdefault(tuple(own), []).append(name)
    lines = [HEAD]
    for group, names in sorted(groups.items()):
        lines += ["[[group]]", f"bands = [{', '.join(map(quoted, group))}]", "types = ["]
        line = " "
        for name in names:
            if len(line) + len(name) + 4 > 120:
                lines.append(line)
                line = " "
            line += f" {quoted(name)},"
        lines += [line, "]", ""]
    return "\n".join(lines)


def quoted(name: str) -> str:
    return f'"{name}"'


if __name__ == "__main__":
    known = table()
    PAGE.write_text(text({name: bands_of(name) for name in BUILDABLE if name in {*known.entries, *known.retargets}}), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")

"""Write docs/architectures.md from the table and from what the tests can build. A test compares the page with this."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.tiny_data import MODEL_TYPES, UNBUILDABLE, UNGROUPABLE  # noqa: E402
from upfit.architecture.table import table  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"


def page() -> str:
    known = table()
    own = [name for name in sorted(known.entries) if known.entries[name].own]
    tested = sorted(set(MODEL_TYPES) - set(UNBUILDABLE) - set(UNGROUPABLE) - set(own))
    untested = sorted(set(UNBUILDABLE) & set(known.entries))
    reasons: dict[str, list[str]] = {}
    for name, reason in known.refused.items():
        reasons.setdefault(reason, []).append(name)
    lines = [
        "# Architectures",
        "",
        "By `model_type`. Written by `scripts/write_architectures_page.py` from `upfit/architecture/table.toml`.",
        "",
        f"## Tested ({len(tested)})",
        "",
        "The laws run on a tiny model of each: identity bit for bit, dry run = real run, strict loading, round trip. Of a",
        "model that holds another type's language model, all of them but the round trip, and with `gqa` alone.",
        "",
        ", ".join(tested),
        "",
        f"## Tested, as a class of ours ({len(own)})",
        "",
        "transformers has no class of these families with fewer key/value heads, so `gqa` and `mqa` write our own "
        "([what that means](convert.md#our-own-class)); of encoder-decoders the decoder is changed. The same laws run, and "
        "those of a cache.",
        "",
        ", ".join(own),
        "",
        f"## Supported by the same rule, not tested ({len(untested)})",
        "",
        "| model type | why no tiny model is tested |",
        "|---|---|",
        *[f"| {name} | {UNBUILDABLE[name]} |" for name in untested],
        "",
        f"## Converted as another type ({len(known.retargets)})",
        "",
        "Their own config has no number of key/value heads; the result is of a family that has it and computes the same "
        "([how](convert.md#families-that-change)).",
        "",
        "| model type | becomes |",
        "|---|---|",
        *[f"| {name} | {' or '.join(targets)} |" for name, targets in sorted(known.retargets.items())],
        "",
        f"## Refused ({len(known.refused)})",
        "",
        "| because | model types |",
        "|---|---|",
        *[f"| {reason} | {', '.join(sorted(names))} |" for reason, names in reasons.items()],
        "",
        "Quantised checkpoints of any type are refused too: convert the checkpoint they were made from.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

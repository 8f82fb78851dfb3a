"""Puts the parts of a synthesis together: sorted, no question twice, and invented facts where a question is missing."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.checkpoint.work_folder import RESULT, WorkFolder
from upfit.errors import UpfitError
from upfit.longcontext.ask import template
from upfit.longcontext.compose import Composer, ContextPlan
from upfit.longcontext.contexts import CONTEXTS, ITEMS, SEGMENTS, SETTINGS, Contexts
from upfit.longcontext.export import write_export
from upfit.longcontext.items import Item
from upfit.longcontext.options import Options
from upfit.longcontext.result import Synthesis


def put_together(
    work: WorkFolder, parts: list[Path], out: Path, composer: Composer, settings: dict[str, Any], options: Options
) -> Synthesis:
    """All parts as the folder `out`, by item number; what was written."""
    rejected: Counter[str] = Counter()
    families: Counter[str] = Counter()
    patterns: dict[str, str] = {}
    folder = work.folder(RESULT, clear=True)
    with open(folder / ITEMS, "w", encoding="utf-8") as items, open(folder / CONTEXTS, "w", encoding="utf-8") as contexts:
        for item, plan in _kept(parts, composer, options, rejected):
            items.write(item.line() + "\n")
            contexts.write(plan.line() + "\n")
            families[item.family] += 1
            patterns[item.family] = item.pattern
    if not families:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common())
        raise UpfitError(f"no question was kept: {reasons}; ask another model, other --families, or with more --max-tokens")
    shutil.copytree(work.path / SEGMENTS, folder / SEGMENTS)
    counts = {"items": families.total(), "rejected": dict(rejected), "families": dict(families), "patterns": patterns}
    (folder / SETTINGS).write_text(json.dumps(settings | counts, indent=2) + "\n", encoding="utf-8")
    if options.export != "none":
        write_export(Contexts(folder, composer.wording), options.export)
    origin = {"name": ", ".join(settings["texts"]), "revision": None, "path": None}
    provenance.write(folder, [provenance.step("synth", origin, asdict(options), counts)])
    work.publish(folder, overwrite=False)
    return written(out)


def written(out: Path) -> Synthesis:
    """What was written to the finished folder `out`."""
    settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    counts = {name: settings[name] for name in ("items", "rejected", "families", "patterns")}
    return Synthesis(finished=True, out=str(out), bytes=(out / CONTEXTS).stat().st_size, **counts)


def _kept(
    parts: list[Path], composer: Composer, options: Options, rejected: Counter[str]
) -> Iterator[tuple[Item, ContextPlan]]:
    """Items and recipes by number. Of equal questions of a family the first is kept; where the text has given no other, a fact
    is invented if families that invent are asked for. `rejected` counts what there was no item for."""
    spare = [name for name in options.families or template.FAMILIES if template.FAMILIES[name].invent]
    asked: set[tuple[str, str]] = set()
    for index, fields in sorted((line for path in parts for line in _lines(path)), key=lambda line: line[0]):
        item, reason = (Item.read(fields[1]), "asked before") if len(fields) == 2 else (None, fields[0])
        if item is not None and (item.family, item.question) not in asked:
            plan = ContextPlan.read(fields[0])
        elif options.ask == "template" and spare:
            item = template.ask(composer.segments, spare, options.seed, index)
            assert item is not None
            if not composer.fits(item):
                rejected[reason] += 1
                continue
            plan = composer.plan(item, options.short_share)
        else:
            rejected[reason] += 1
            continue
        asked.add((item.family, item.question))
        yield item, plan


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number, and recipe and item or a reason."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            number, *rest = line.rstrip("\n").split("\t")
            if rest:
                yield int(number), rest

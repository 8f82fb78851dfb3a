"""`upfit compare`: several folders in one table, from their recipe.json. Losses on different texts are not mixed."""

from typing import Any

from upfit.checkpoint.source import find_source
from upfit.convert.result import shared_by_heads
from upfit.evaluate.tables import half_width
from upfit.output import human_bytes, human_count
from upfit.report.outcome import DIGITS, points
from upfit.report.result import COLUMNS, OF_SOME, Comparison, Group
from upfit.report.stages import outcome
from upfit.report.story import Story, gather, misshapen, newest_evaluation
from upfit.report.subjects import called
from upfit.report.wording import amount


def compare(models: list[str]) -> Comparison:
    """One table for each text that models were measured on, and one for those that were not.

    A row shows the newest evaluation of a model's weights as they are. Raises UpfitError for a folder that cannot be read.
    """
    groups: dict[str | None, tuple[str, dict[str, Any] | None, list[dict[str, str]]]] = {}
    for model in models:
        story = gather(model, [])
        with misshapen(find_source(model).path, []):
            newest = newest_evaluation(story.steps)
            data = newest["data"] if newest else None
            title = amount(data) if data else "Not measured (evaluate with --record)"
            group = groups.setdefault(data["sha256"] if data else None, (title, data, []))
            group[2].append(_row(model, story, newest))
    return Comparison([_group(*group) for group in groups.values()])


def _group(title: str, data: dict[str, Any] | None, rows: list[dict[str, str]]) -> Group:
    """With the columns that only some models have where one of these has them."""
    more = [name for name in OF_SOME if any(row[name] for row in rows)]
    columns = [*COLUMNS, *more]
    return Group(title, data, [[row[name] for name in columns] for row in rows], columns if more else None)


def _row(model: str, story: Story, newest: dict[str, Any] | None) -> dict[str, str]:
    """Cells by the titles of their columns."""
    trained = sum(step["measurements"]["tokens"] for step in story.steps if step["verb"] == "uptrain")
    result, read = outcome(story), story.facts.get("cross_bytes_per_position")
    lost = None if result is None or newest is None else result.last.lost
    heard = newest["model"].get("word_errors") if newest else None
    wrong = None if result is None else result.last.wrong
    cells = [
        called(find_source(model).record()),
        human_count(story.facts["parameters"]),
        shared_by_heads(story.facts),
        human_bytes(story.facts["kv_bytes_per_token"]),
        human_count(trained) if trained else "",
        half_width(newest["model"]["loss"]["nats_per_token"], DIGITS) if newest else "",
        lost.cell() if lost is not None else "",
        "" if read is None else human_bytes(read),
        f"{points(heard['rate'])} %" if heard else "",
        points(wrong.more) if heard and wrong is not None and wrong.more is not None else "",
    ]
    return dict(zip((*COLUMNS, *OF_SOME), cells, strict=True))

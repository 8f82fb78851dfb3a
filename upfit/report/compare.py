"""`upfit compare`: several folders in one table, from their recipe.json. Losses on different texts are not mixed."""

from typing import Any

from upfit.checkpoint.source import find_source
from upfit.evaluate.tables import half_width
from upfit.output import human_bytes, human_count
from upfit.report.outcome import DIGITS
from upfit.report.result import Comparison, Group
from upfit.report.stages import outcome
from upfit.report.story import Story, gather, misshapen, newest_evaluation
from upfit.report.subjects import called
from upfit.report.wording import amount


def compare(models: list[str]) -> Comparison:
    """One table for each text that models were measured on, and one for those that were not.

    A row shows the newest evaluation of a model's weights as they are. Raises UpfitError for a folder that cannot be read.
    """
    groups: dict[str | None, Group] = {}
    for model in models:
        story = gather(model, [])
        with misshapen(find_source(model).path, []):
            newest = newest_evaluation(story.steps)
            data = newest["data"] if newest else None
            title = amount(data) if data else "Not measured (evaluate with --record)"
            group = groups.setdefault(data["sha256"] if data else None, Group(title, data, []))
            group.rows.append(_row(model, story, newest))
    return Comparison(list(groups.values()))


def _row(model: str, story: Story, newest: dict[str, Any] | None) -> list[str]:
    trained = sum(step["measurements"]["tokens"] for step in story.steps if step["verb"] == "uptrain")
    result = outcome(story)
    lost = None if result is None or newest is None else result.last.lost
    return [
        called(find_source(model).record()),
        human_count(story.facts["parameters"]),
        ", ".join(map(str, story.facts["kv_heads"])),
        human_bytes(story.facts["kv_bytes_per_token"]),
        human_count(trained) if trained else "",
        half_width(newest["model"]["loss"]["nats_per_token"], DIGITS) if newest else "",
        lost.cell() if lost is not None else "",
    ]

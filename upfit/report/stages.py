"""Finds in the records of a folder what is known of its source, of what the conversion made and of what it is now.

Nothing is guessed. Losses stand beside each other only where they are of the same text, caches only where they are in the same
type; a difference is from the source only where the records say that the other model was the source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upfit.report.outcome import DIGITS, Agreement, Cache, Lost, Outcome, Stage, Wrong
from upfit.report.story import Story
from upfit.report.subjects import called, same_model

CROSS = "cross_bytes_per_position"
SOURCE, CONVERTED, UPTRAINED, CHANGED = "source", "converted", "uptrained", "changed"


def outcome(story: Story) -> Outcome | None:
    """What the history and the evaluations of `story` say; None for a model that was not converted."""
    history = _History.of(story)
    if history is None:
        return None
    measured = {label: _answers(story, history, label) for label in history.models}
    newest = next((answers[-1] for answers in reversed(measured.values()) if answers), None)
    data = newest["data"] if newest else None
    on_text = {
        label: [answer for answer in answers if data and answer["data"]["sha256"] == data["sha256"]]
        for label, answers in measured.items()
    }
    subjects = _subjects(on_text, history.origin)
    caches = _caches(story, history, subjects)
    stages = []
    for label, model in history.models.items():
        loss = subjects[label]["loss"]["nats_per_token"] if label in subjects else None
        lost = None if label == SOURCE else _lost(on_text[label], subjects, history.origin)
        wrong = _wrong(on_text[label], subjects.get(label), history.origin)
        stages.append(Stage(label, called(model), caches[label], loss, lost, _agreement(history, label), wrong))
    return Outcome(stages, story.context, data)


@dataclass(frozen=True)
class _History:
    """`models`: record of the model at each stage, in order. `conversions` and `later`: the places of steps in recipe.json that
    converted, and of those that changed the weights after the last of them."""

    steps: list[dict[str, Any]]
    models: dict[str, dict[str, Any]]
    conversions: list[int]
    later: list[int]

    @property
    def origin(self) -> dict[str, Any]:
        return self.models[SOURCE]

    @staticmethod
    def of(story: Story) -> "_History | None":
        steps = story.steps
        conversions = [index for index, step in enumerate(steps) if step["verb"].startswith("convert")]
        if not conversions:
            return None
        later = [index for index, step in enumerate(steps) if index > conversions[-1] and step["verb"] != "evaluate"]
        now = story.facts.get("model") or {}
        models = {SOURCE: steps[conversions[0]]["source"], CONVERTED: steps[later[0]]["source"] if later else now}
        if later:
            trained = any(steps[index]["verb"] == "uptrain" for index in later)
            models[UPTRAINED if trained else CHANGED] = now
        return _History(steps, models, conversions, later)

    def stage_at(self, index: int) -> str | None:
        """Of the model that the evaluation at `index` measured; None where that is none of `models`."""
        if index < self.conversions[0]:
            return SOURCE
        if index > max([*self.conversions, *self.later]):
            return list(self.models)[-1]
        return CONVERTED if self.later and self.conversions[-1] < index < self.later[0] else None


def _answers(story: Story, history: _History, label: str) -> list[dict[str, Any]]:
    """Evaluations of the model at the stage `label`, the newest last: recorded ones, then those that were given as files."""
    evaluated = [(index, step) for index, step in enumerate(story.steps) if step["verb"] == "evaluate"]
    recorded = [step["measurements"] for _, step in evaluated]
    own = [step["measurements"] for index, step in evaluated if history.stage_at(index) == label]
    since = story.steps[max([*history.conversions, *history.later])].get("date", "")
    now = label == list(history.models)[-1]
    beside = [
        answer
        for _, answer in story.evaluations
        if answer not in recorded and same_model(answer["model"], history.models[label])
        # a file of an evaluation from before the weights changed says nothing of them
        if not (now and answer.get("date", since) < since)
    ]
    return [answer for answer in own if "loss" in answer["model"] and "data" in answer] + beside


def _subjects(on_text: dict[str, list[dict[str, Any]]], origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the newest evaluations tell of the model at each stage, all on one text; the source also where it stood beside."""
    subjects = {label: answers[-1]["model"] for label, answers in on_text.items() if answers}
    beside = [
        answer["against"]
        for answers in on_text.values()
        for answer in answers
        if answer["against"] is not None and same_model(answer["against"], origin) and not _other_tokens(answer)
    ]
    return {SOURCE: beside[-1]} | subjects if beside else subjects


def _other_tokens(answer: dict[str, Any]) -> bool:
    return answer["difference"] is not None and "nats_per_token" not in answer["difference"]


def _lost(answers: list[dict[str, Any]], subjects: dict[str, dict[str, Any]], origin: dict[str, Any]) -> Lost | None:
    """Paired where an evaluation was against the source; else of two means of the same tokens in the same type."""
    for answer in reversed(answers):
        if answer["against"] is not None and same_model(answer["against"], origin):
            difference = answer["difference"]
            unit = "bits_per_byte" if _other_tokens(answer) else "nats_per_token"
            return Lost(difference[unit], "bits a byte" if _other_tokens(answer) else "nats a token")
    source, model = subjects.get(SOURCE), answers[-1]["model"] if answers else None
    if source is None or model is None or source.get("dtype") != model.get("dtype"):
        return None
    mean = model["loss"]["nats_per_token"]["mean"] - source["loss"]["nats_per_token"]["mean"]
    return Lost({"mean": mean, "low": None, "high": None})


def _wrong(answers: list[dict[str, Any]], subject: dict[str, Any] | None, origin: dict[str, Any]) -> Wrong | None:
    """The word error rate, where one was measured; beside the source's where an evaluation was against it."""
    if subject is None or not subject.get("word_errors"):
        return None
    paired = [answer for answer in answers if answer["against"] is not None and same_model(answer["against"], origin)]
    return Wrong(subject["word_errors"]["rate"], paired[-1].get("word_error_difference") if paired else None)


def _caches(story: Story, history: _History, subjects: dict[str, dict[str, Any]]) -> dict[str, Cache | None]:
    """As measured, where source and result were both measured in one type; else as the shapes of the weights tell."""
    planned = {
        SOURCE: _planned(history.steps[history.conversions[0]], 0, story),
        CONVERTED: _planned(history.steps[history.conversions[-1]], 1, story),
        list(history.models)[-1]: _by_shape(story, story.facts["kv_bytes_per_token"], story.facts.get(CROSS)),
    }
    measured = {label: _measured(subject) for label, subject in subjects.items()}
    first, last = (measured.get(label) for label in (SOURCE, list(history.models)[-1]))
    if first is None or last is None or first.types != last.types:
        return planned
    pairs = [(cache, planned[label]) for label, cache in measured.items() if cache is not None]
    alike = all(shape is not None and cache.same(shape) for cache, shape in pairs)
    return {
        label: cache if (cache := measured.get(label)) and cache.types == first.types else planned[label] if alike else None
        for label in history.models
    }


def _planned(step: dict[str, Any], which: int, story: Story) -> Cache | None:
    sizes, cross = (step["measurements"].get(key) for key in ("kv_bytes_per_token", CROSS))
    return None if sizes is None else _by_shape(story, sizes[which], None if cross is None else cross[which])


def _by_shape(story: Story, per_token: int, per_position: int | None) -> Cache:
    return Cache(per_token, window=0 if story.sliding else None, per_position=per_position)


def _measured(subject: dict[str, Any]) -> Cache | None:
    cache = subject.get("cache")
    if cache is None:
        return None
    fixed, window, beyond = cache.get("fixed_bytes", 0.0), cache.get("window"), cache.get("bytes_per_token_beyond")
    read = (subject.get("cross_cache") or {}).get("bytes_per_position")
    return Cache(cache["bytes_per_token"], fixed, window, beyond, tuple(cache.get("dtypes", ())), read)


def _agreement(history: _History, label: str) -> Agreement | None:
    """How near the predictions are to the source's, in words: logits that are equal, or the divergence on held-out rows."""
    ways: dict[str, Callable[[_History], Agreement | None]] = {CONVERTED: _agreement_converted, UPTRAINED: _agreement_uptrained}
    return ways[label](history) if label in ways else None


def _agreement_converted(history: _History) -> Agreement | None:
    step = history.steps[history.conversions[-1]]
    verified = step["measurements"].get("verify") or {}
    if len(history.conversions) == 1 and verified.get("equal"):
        tokens = f"{verified['tokens']} tokens of a sample text"
        return Agreement("equal logits", f"its logits equal the source's on {tokens}", f"Agreement was compared on {tokens}.")
    return _divergence(history, history.later[0], "before") if history.later else None


def _agreement_uptrained(history: _History) -> Agreement | None:
    return _divergence(history, history.later[-1], "after")


def _divergence(history: _History, index: int, when: str) -> Agreement | None:
    """Of the held-out rows of an uptraining whose teacher was the source; 0 before and after says that nobody measured it."""
    step = history.steps[index]
    teacher, measured = step.get("teacher"), step["measurements"]
    holdout = measured.get("holdout") or {}
    values = {key: (holdout.get(key) or {}).get("kl") for key in ("before", "after")}
    if not teacher or not same_model(teacher, history.origin) or not any(values.values()) or values[when] is None:
        return None
    apart = f"{values[when]:.{DIGITS}f} nats a token"
    rows = f"{measured['holdout_rows']} rows held out of the uptraining"
    note = f"Agreement: how far the predictions are from the source's on {rows}; 0 is the same."
    return Agreement(f"{apart} apart", f"its predictions diverge by {apart} from the source's", note)

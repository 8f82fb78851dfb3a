"""Lists the models of all evaluations on one text, each once; those that others were compared with come first."""

from dataclasses import dataclass, replace
from typing import Any

from upfit.portable import HUB_ID, commit_of, name_of

Evaluation = tuple[str, dict[str, Any]]  # label, answer of `upfit evaluate`
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """One model on one text. `subject`: what `upfit evaluate` tells of it. `difference`: of its loss from that of the model
    labelled `against`, paired by window; None where it was measured alone."""

    label: str
    subject: dict[str, Any]
    difference: dict[str, Any] | None = None
    against: str | None = None


@dataclass(frozen=True)
class Text:
    """A text that was measured on (`data` of the answers): the models, and the evaluations by the labels of their models.

    `source`: the label of the one model that the others came from; None where that is not known.
    """

    data: dict[str, Any]
    models: list[Measured]
    evaluations: list[Evaluation]
    source: str | None

    @property
    def labels(self) -> list[str]:
        return [model.label for model in self.models]


def texts(evaluations: list[Evaluation], origin: dict[str, Any] | None = None) -> list[Text]:
    """The texts in the order in which they come up. `origin`: what the history remembers of the source, if anything."""
    by_text: dict[str, list[Evaluation]] = {}
    for label, answer in evaluations:
        by_text.setdefault(answer["data"]["sha256"], []).append((label, answer))
    return [_text(of_text, origin) for of_text in by_text.values()]


def _text(evaluations: list[Evaluation], origin: dict[str, Any] | None) -> Text:
    sources, others = _sources(evaluations, origin), dict[str, Measured]()
    names = {key: model.label for key, model in sources.items()}
    names |= {key_of(answer["model"]): label for label, answer in evaluations if key_of(answer["model"]) not in names}
    for label, answer in evaluations:
        if key_of(answer["model"]) in sources:
            continue
        against = None if answer["against"] is None else names[key_of(answer["against"])]
        subject = Measured(label, answer["model"], answer["difference"], against)
        others[label] = _joined(others[label], subject) if label in others else subject
    models = [*sources.values(), *others.values()]
    source = next(iter(sources.values())).label if len(sources) == 1 else None
    return Text(evaluations[0][1]["data"], models, evaluations, source)


def _sources(evaluations: list[Evaluation], origin: dict[str, Any] | None) -> dict[Key, Measured]:
    """Models that others were measured against, or that the history names, and that were measured against none themselves."""
    measured = [(label, answer["model"]) for label, answer in evaluations if answer["against"] is None]
    compared = {key_of(answer["model"]) for _, answer in evaluations if answer["against"] is not None}
    sources: dict[Key, Measured] = {}
    for _, answer in evaluations:
        if answer["against"] is not None and key_of(answer["against"]) not in compared:
            _put(sources, Measured(f"source: {called(answer['against'])}", answer["against"]))
    for label, subject in measured:
        if key_of(subject) in sources or (same_model(subject, origin) and key_of(subject) not in compared):
            _put(sources, Measured(label, subject))
    labels = [model.label for model in sources.values()]
    return {
        key: model if labels.count(model.label) == 1 else replace(model, label=f"{model.label}, {model.subject.get('dtype')}")
        for key, model in sources.items()
    }


def _put(sources: dict[Key, Measured], model: Measured) -> None:
    key = key_of(model.subject)
    sources[key] = _joined(sources[key], model) if key in sources else model


def _joined(older: Measured, newer: Measured) -> Measured:
    """One model measured twice: what the newer says, and what only the older has."""
    newest = {name: value for name, value in newer.subject.items() if value is not None}
    probes = {**(older.subject.get("probes") or {}), **(newer.subject.get("probes") or {})} or None
    subject = {**older.subject, **newest, "probes": probes}
    return Measured(newer.label, subject, newer.difference or older.difference, newer.against or older.against)


def key_of(subject: dict[str, Any]) -> Key:
    """Two records with the same key are of the same model in the same type."""
    return subject.get("path") or subject["name"], subject.get("revision"), subject.get("dtype")


def same_model(record: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether two records tell of the same commit of a hub model, or of the same folder; where one has no path, by the name."""
    if other is None:
        return False
    names = record.get("name"), other.get("name")
    commits = commit_of(record), commit_of(other)
    if None not in commits:
        return names[0] == names[1] and commits[0] == commits[1]
    places = record.get("path"), other.get("path")
    return places[0] == places[1] if all(places) else names[0] == names[1]


def called(record: dict[str, Any]) -> str:
    """A folder by its own name, a model of the hub by its id: never by where it lies."""
    name, path = str(record.get("name") or ""), str(record.get("path") or "")
    if commit_of(record) is not None or (not path and HUB_ID.fullmatch(name)):
        return name
    return name_of(name) or name_of(path) or name

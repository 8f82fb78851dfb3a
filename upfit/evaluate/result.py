"""What `upfit evaluate` answers."""

from dataclasses import dataclass
from typing import Any

from upfit.evaluate import tables
from upfit.evaluate.encoder_decoder import tables as encoder_decoder
from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import Ablation, Difference, Hardware, Speed, Subject, Text
from upfit.evaluate.probes.summaries import Depths, Needle, Position
from upfit.output import Output
from upfit.results import Result, absent

ABOUT = ("command", "options", "versions", "date")  # the fields that are not measurements


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What was measured of a model, and of a second one on the same text; what was not asked for is None.

    model: MODEL
    against: the other model
    difference: of the two losses, paired by window
    probe_differences: of what each probe found, by name
    task_differences: of what was scored in each task, by label and metric; of perplexities the ratio
    ablation: what MODEL loses without a part
    speed: prefill and decode, timed
    data: the text that was measured on
    hardware: what was measured on
    command: the command that measures the same
    options: the settings in force
    versions: of Python and of packages
    date: when, UTC
    word_error_difference: of the word error rates, paired by recording
    """

    model: Subject
    against: Subject | None
    difference: Difference | None
    probe_differences: dict[str, dict[str, Any]] | None
    task_differences: dict[str, dict[str, Interval]] | None
    ablation: Ablation | None
    speed: Speed | None
    data: Text
    hardware: Hardware
    command: str
    options: dict[str, Any]
    versions: dict[str, str]
    date: str
    word_error_difference: Interval | None = absent()

    def show(self, output: Output) -> None:
        subjects = [self.model] + ([self.against] if self.against else [])
        if self.data.examples:
            encoder_decoder.show(subjects, self.data, self.difference, self.word_error_difference, output)
            return
        tables.show_losses(subjects, self.data, output)
        if self.difference:
            tables.show_difference(self.difference, output)
        if self.ablation:
            worse = self.ablation.nats_per_token.half_width(4)
            output.line(f"Without {self.ablation.part}: {worse} nats a token more (paired, 95 % interval)")
        tables.show_caches(subjects, output)
        for name in self.model.probes or ():
            probes = [(subject.name, (subject.probes or {})[name]) for subject in subjects]
            self._show_probe(name, probes, output)
        if self.model.tasks:
            tables.show_harness(subjects, self.task_differences or {}, output)
        if self.speed:
            tables.show_speed(self.speed, output)

    def _show_probe(self, name: str, probes: list[tuple[str, Any]], output: Output) -> None:
        kind = type(probes[0][1])
        if kind is Needle:
            tables.show_needle(probes, output)
        elif kind is Position:
            tables.show_position(probes, output)
        elif kind is Depths:
            tables.show_depths(name, probes, output)
        else:
            tables.show_task(name, probes, output)

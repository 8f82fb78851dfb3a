"""What `upfit synth` answers."""

from dataclasses import dataclass

from upfit.output import Output, human_bytes
from upfit.results import Result, absent


@dataclass(frozen=True, repr=False)
class Synthesis(Result):
    """Long-context examples that were written; of one part of several, what is still missing.

    finished: whether all parts are there and OUT stands
    missing: what is waited for, where it is not finished
    work: the folder that the parts lie in until then
    out: the folder that was written
    items: number of examples
    rejected: numbers of questions that were not kept, by reason
    families: numbers of examples, by family of questions
    patterns: what each family trains, by family
    bytes: size of the contexts, which are kept as recipes, bytes
    """

    finished: bool
    missing: list[str] | None = absent()
    work: str | None = absent()
    out: str | None = absent()
    items: int | None = absent()
    rejected: dict[str, int] | None = absent()
    families: dict[str, int] | None = absent()
    patterns: dict[str, str] | None = absent()
    bytes: int | None = absent()

    def show(self, output: Output) -> None:
        if self.missing is not None:
            output.line(f"This part is done; {len(self.missing)} others are not yet, such as {self.missing[0]}")
        elif self.families is not None and self.bytes is not None:
            families = ", ".join(f"{name} {count:,}" for name, count in self.families.items())
            recipes = human_bytes(self.bytes)
            output.line(f"Wrote {self.out}: {self.items:,} examples ({families}), their contexts as {recipes} of recipes")

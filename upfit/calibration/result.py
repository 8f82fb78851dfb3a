"""What `upfit calibrate` answers."""

from dataclasses import dataclass

from upfit.output import Output, human_bytes
from upfit.results import Result, beside


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """The statistics file that was written.

    out: its place
    bytes: its size, bytes
    tokens: tokens of text that were read
    windows: number of windows, by their length in tokens; none where the model was shown examples
    layers: number of attention layers that were watched
    not_watched: reasons, by the names of the other layers
    seconds: time taken, seconds
    called: its place as it was given (not in the record)
    """

    out: str
    bytes: int
    tokens: int
    windows: dict[int, int]
    layers: int
    not_watched: dict[str, str]
    seconds: float
    called: str = beside()

    def show(self, output: Output) -> None:
        output.line(
            f"Wrote {self.called}: {human_bytes(self.bytes)}, {self.layers} attention layers watched on "
            f"{self.tokens:,} tokens in {self.seconds:.0f} s"
        )
        for path, reason in self.not_watched.items():
            output.line(f"Not watched: {path}: {reason}")

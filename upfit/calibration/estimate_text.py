"""What a fit will see of its text, counted before any is read: windows as they are drawn, rows as they are sampled."""

from typing import Any

from upfit.calibration.estimate import Windows
from upfit.calibration.sample import LENGTH, SHORT, TOKENS
from upfit.calibration.statistics import ROWS, SEGMENT
from upfit.checkpoint.reader import most_positions
from upfit.options import parse_count


def drawn_windows(tokens: str | None, length: int | None, config: dict[str, Any]) -> list[Windows]:
    """Windows of text, as they are drawn: half of the `tokens` at each of two lengths. Raises UpfitError for no count."""
    count = parse_count(tokens or str(TOKENS), "--calibration-tokens")
    longest = length or min(LENGTH, most_positions(config) or LENGTH)
    lengths = {longest, min(longest, SHORT)}
    return [Windows(count / len(lengths) / size, size) for size in lengths]


def sampled(windows: Windows, cross: bool = False) -> tuple[float, float]:
    """(rows, scores of one head) sampled in windows, as `statistics.sample_rows` does; `cross`: rows look at what is read."""
    length = windows.length
    each, rows, scores = ROWS if length <= SEGMENT else ROWS // 2, 0, 0
    for start in range(0, length, SEGMENT):
        end = min(start + SEGMENT, length)
        rows += min(each, end - start)
        scores += min(each, end - start) * (windows.read if cross else end)
    return windows.count * rows, windows.count * scores

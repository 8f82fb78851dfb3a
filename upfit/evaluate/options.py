"""The settings of `upfit evaluate`, one field a flag. Imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from upfit.errors import UpfitError
from upfit.options import check, flag, option


@dataclass(frozen=True)
class Options:
    """What to measure, on what text, and on which device."""

    against: str | None = option(None, help="a second model (folder, hub id or id@revision), measured on the same windows")
    data: list[str] | None = option(None, help="text files, .jsonl files or folders of them; default: text of this Python")
    length: int | None = option(None, help="tokens in a window; default: 512, or what the model takes if that is less")
    windows: int = option(64, help="how many windows at most, spread over all the text")
    batch: int = option(4, help="windows in one forward pass")
    speed: bool = option(False, help="also time prefill and decode with the cache")
    speed_lengths: list[int] | None = option(None, help="context lengths to time; default: 128, 512 and 2048 where they fit")
    speed_batch: int = option(1, help="sequences decoded at once while timing")
    speed_steps: int = option(32, help="tokens decoded in one timing")
    speed_repeats: int = option(5, help="timings of each kind, at least 3; the median is told")
    probe: list[str] | None = option(
        None, help="also ask for a sentence hidden in text (needle), or to do counting, flipflop or selective-copy; repeatable"
    )
    ablate: str | None = option(
        None, help="also measure MODEL without a part that a conversion added, such as cope: is it of any use?"
    )
    record: bool = option(False, help="keep the result in MODEL's recipe.json, for its report and its model card")
    probe_samples: int = option(50, help="samples of a probe: of the needle in all, of another one in each of its rows")
    probe_length: int | None = option(None, help="tokens of a probe's text, at most; default: that of the windows")
    attention_maps: int = option(
        0, help="with --probe needle: keep the whole attention maps, on one short text, of this many heads that find it"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="type to load the weights in")
    device: str = option("auto", help="cpu, cuda, cuda:1, ...; auto takes the accelerator if there is one")
    revision: str | None = option(None, help="revision of MODEL on the hub")


SMALLEST = {"length": 8, "windows": 1, "batch": 1, "speed_batch": 1, "speed_steps": 1, "speed_repeats": 3}
SMALLEST |= {"probe_samples": 1, "probe_length": 64, "attention_maps": 0}
PROBES = ("needle", "counting", "flipflop", "selective-copy")


def check_options(options: Options) -> None:
    """Raise UpfitError for a value of the wrong type or one too small to mean anything."""
    check(options)
    for name, smallest in SMALLEST.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UpfitError(f"{flag(name)} got {value}; give at least {smallest}")
    if options.speed_lengths is not None and (not options.speed_lengths or min(options.speed_lengths) < 1):
        raise UpfitError(f"--speed-lengths got {options.speed_lengths}; give context lengths of at least 1 token")
    for name in options.probe or ():
        if name not in PROBES:
            raise UpfitError(f"--probe got {name!r}; give one of {', '.join(PROBES)}")
    if options.attention_maps and "needle" not in (options.probe or ()):
        raise UpfitError("--attention-maps shows the heads that find a needle; add --probe needle")

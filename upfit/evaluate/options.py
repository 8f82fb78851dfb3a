"""The settings of `upfit evaluate`, one field a flag. Imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upfit.errors import UpfitError
from upfit.options import check, option
from upfit.text.files import FIELD, FIELD_HELP, has_metadata, named_files

CONTEXT_PROBES = ("val-document", "val-code", "val-database", "key-value", "multi-needle", "variable-tracking")
SEVERAL_LENGTHS = (*CONTEXT_PROBES, "position")
PROBES = (*SEVERAL_LENGTHS, "needle", "counting", "flipflop", "selective-copy")


@dataclass(frozen=True)
class Options:
    """What to measure, on what text, and on which device."""

    against: str | None = option(None, help="a second model (folder, hub id or id@revision), measured on the same windows")
    data: list[str] | None = option(
        None,
        help="text: files (.txt, .jsonl, .json, .parquet, .gz ...) or folders of them; default: text of this Python; for "
        "encoder-decoders also pairs of texts, or a folder of recordings; for models that see, a folder of images with texts",
    )
    field: str = option(FIELD, goes_with=("data",), help=FIELD_HELP)
    length: int | None = option(
        None, at_least=8, help="tokens in a window; default: 512, or what the model takes if that is less"
    )
    windows: int = option(
        64, at_least=1, help="how many windows, or examples of an encoder-decoder, at most, spread over all the data"
    )
    batch: int = option(4, at_least=1, help="windows, or prompts of --tasks, in one forward pass")
    speed: bool = option(False, help="also time prefill and decode with the cache")
    speed_lengths: list[int] | None = option(
        None, at_least=1, help="context lengths to time; default: 128, 512 and 2048 where they fit"
    )
    speed_batch: int = option(1, at_least=1, help="sequences decoded at once while timing")
    speed_steps: int = option(32, at_least=1, help="tokens decoded in one timing")
    speed_repeats: int = option(5, at_least=3, help="timings of each kind, at least 3; the median is told")
    probe: list[str] | None = option(
        None,
        help="also ask of long contexts (val-document, val-code, val-database, key-value, multi-needle, variable-tracking), "
        "measure the loss by position (position), ask for a hidden sentence (needle), or set small tasks (counting, flipflop, "
        "selective-copy); repeatable",
    )
    ablate: str | None = option(
        None, help="also measure MODEL without a part that a conversion added, by the name of its attention: is it of any use?"
    )
    record: bool = option(False, help="keep the result in MODEL's recipe.json, for its report and its model card")
    probe_samples: int = option(
        50,
        at_least=1,
        help="samples of a probe: questions or windows at each length, needles in all, of counting and the like in each row",
    )
    probe_length: list[int] | None = option(
        None, at_least=64, help="tokens of a probe's text, at most; repeatable for long contexts; default: that of the windows"
    )
    probe_depths: int = option(
        5,
        at_least=2,
        goes_with=("probe", *CONTEXT_PROBES),
        help="depths of a long context that are asked about, one question each",
    )
    probe_asked: int = option(1, at_least=1, goes_with=("probe", "multi-needle"), help="needles that one question asks for")
    probe_format: Literal["plain", "chat"] = option(
        "plain", goes_with=("probe", *CONTEXT_PROBES), help="words around a long context: plain, or the chat template"
    )
    probe_pieces: str | None = option(
        None, goes_with=("probe", *CONTEXT_PROBES[:3]), help="folder of FILM's pieces, to make them of; default: own ones"
    )
    tasks: list[str] | None = option(
        None, help="also run tasks of lm-evaluation-harness, such as hellaswag or ruler-offline (no network); repeatable"
    )
    task_path: str | None = option(None, goes_with=("tasks",), help="folder with task files (YAML) of your own")
    task_lengths: list[int] | None = option(
        None, at_least=512, goes_with=("tasks",), help="tokens of RULER's texts, one run each; default: 4096"
    )
    task_limit: int | None = option(None, at_least=1, goes_with=("tasks",), help="documents of a task, at most; default: all")
    attention_maps: int = option(
        0,
        at_least=0,
        goes_with=("probe", "needle"),
        help="keep the whole attention maps, on one short text, of this many heads that find it",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="type to load the weights in")
    device: str = option("auto", help="cpu, cuda, cuda:1, ...; auto takes the accelerator if there is one")
    revision: str | None = option(None, help="revision of MODEL on the hub")


def check_options(options: Options) -> None:
    """Raise UpfitError for a value of the wrong type or one too small to mean anything."""
    check(options)
    _check_probes(options)
    _check_tasks(options)


def check_data(options: Options) -> None:
    """Raise UpfitError for data that is not there, or cannot have the field. A folder of recordings or images is no text."""
    texts = [name for name in options.data or () if not has_metadata(name)]
    if not texts or "," in options.field:  # two fields of a pair: whoever reads pairs looks for them
        return
    named_files(texts, "--data", options.field)


def _check_probes(options: Options) -> None:
    lengths, asked_for = options.probe_length, options.probe or []
    for name in asked_for:
        if name not in PROBES:
            raise UpfitError(f"--probe got {name!r}; give one of {', '.join(PROBES)}")
        if lengths and len(lengths) > 1 and name not in SEVERAL_LENGTHS:
            raise UpfitError(f"--probe {name} takes one --probe-length, not {len(lengths)}; measure it by itself")
    if options.probe_asked > options.probe_depths:
        raise UpfitError(f"--probe-asked {options.probe_asked} is more than the needles; give at most {options.probe_depths}")


def _check_tasks(options: Options) -> None:
    if options.task_path is not None and not Path(options.task_path).expanduser().is_dir():
        raise UpfitError(f"--task-path {options.task_path} is not a folder; give one that holds the task's YAML file")

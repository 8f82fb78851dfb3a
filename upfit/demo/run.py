"""`upfit demo`: convert the embedded model by every method, uptrain each result, measure all on held-out files."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.calibration.calibrate import calibrate
from upfit.checkpoint.output_folder import check_ours, check_place, resolved
from upfit.checkpoint.work_folder import work_folder
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.demo import embedded_model
from upfit.demo.measure import Measure
from upfit.demo.text import standard_library
from upfit.durable import remove_tree, write_whole
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.uptrain.config import resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain

WINDOWS = 48
LENGTH = 512
CALIBRATION_TOKENS = "16k"
CALIBRATION_SHARE = 8  # one training file of so many
RESULT, PLOT = "demo.json", "demo.png"
TEXT, STATISTICS, TOKENS = "calibration.txt", "calibration.safetensors", "tokens"


@dataclass(frozen=True)
class Conversion:
    """One way to convert the embedded model: its 8 key/value heads become 2, or 1. `calibrated`: on the training files."""

    name: str
    recipe: str
    options: dict[str, Any]
    calibrated: bool = False


CONVERSIONS = (
    Conversion("gqa-2-aligned", "gqa", {"kv_heads": 2, "method": "aligned"}, calibrated=True),
    Conversion("gqa-2-mean", "gqa", {"kv_heads": 2, "method": "mean"}),
    Conversion("gqa-2-first", "gqa", {"kv_heads": 2, "method": "first"}),
    Conversion("gqa-2-random", "gqa", {"kv_heads": 2, "method": "random"}),
    Conversion("mqa-aligned", "mqa", {"method": "aligned"}, calibrated=True),
)
NAMES = {RESULT, PLOT, TEXT, STATISTICS, TOKENS} | {f"{c.name}{end}" for c in CONVERSIONS for end in ("", "-uptrained")}


def run_demo(out: Path, tokens: str, overwrite: bool, output: Output) -> dict[str, Any]:
    """Do everything in the folder `out`; a dictionary that JSON can hold, also written there as `demo.json`.

    Raises UpfitError when `out` holds anything but an earlier demo.
    """
    out = resolved(out)
    check_free(out, overwrite)
    with work_folder(out, "demo", overwrite) as work:
        _clear(out)
        result = _everything(out, tokens, output)
        write_whole(out / RESULT, json.dumps(result, indent=2) + "\n")
        work.finished = True
    return result


def _everything(out: Path, tokens: str, output: Output) -> dict[str, Any]:
    config = resolve(None, {"tokens": tokens, "length": LENGTH, "holdout": 0})
    began, source = time.monotonic(), embedded_model()
    training, held_out = standard_library()
    output.note(f"{len(training)} files of the standard library to train on, {len(held_out)} to measure on")
    prepare([str(path) for path in training], out / TOKENS, str(source), "text", output)
    text, statistics = out / TEXT, out / STATISTICS
    text.write_text("\n".join(path.read_text("utf-8") for path in training[::CALIBRATION_SHARE]), encoding="utf-8")
    calibrate(str(source), [str(text)], statistics, CALIBRATION_TOKENS, LENGTH, None, False, output)
    measure = Measure(source, [str(path) for path in held_out], LENGTH, WINDOWS)
    result: dict[str, Any] = {"tokens": tokens, "text": measure.text(), "source": measure.source, "conversions": []}
    for conversion in CONVERSIONS:
        output.note(f"{conversion.name}: converting, uptraining on {tokens} tokens, measuring")
        converted, uptrained = out / conversion.name, out / f"{conversion.name}-uptrained"
        recipe = get_recipe(conversion.recipe)
        options = conversion.options | ({"calibration": [str(statistics)]} if conversion.calibrated else {})
        convert(recipe, str(source), converted, recipe.options(**options), Settings(), output)
        uptrain(str(converted), str(out / TOKENS), uptrained, config, False, False, output)
        row = {
            "name": conversion.name,
            "converted": measure(converted),
            "uptrained": measure(uptrained),
            "curve": _curve(uptrained),
        }
        result["conversions"].append(row)
    return result | {"seconds": time.monotonic() - began, "versions": provenance.versions(), "plot": str(out / PLOT)}


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UpfitError when `out` holds anything but an earlier demo that may go."""
    check_place(out, [], 0)
    if out.exists() and not out.is_dir():
        raise UpfitError(f"output {out} is a file; choose another name")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UpfitError(f"output {out} exists and is not empty; choose another folder or pass --overwrite")
    if not _is_result(out / RESULT):
        raise UpfitError(f"output {out} holds no {RESULT} of a finished demo; remove it yourself first")
    for path in sorted(out.iterdir()):
        if path.name not in NAMES:
            raise UpfitError(f"output {out} holds {path.name}, which upfit demo did not write; move it away first")
        if path.is_dir():
            check_ours(path)


def _is_result(path: Path) -> bool:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return "upfit" in result["versions"] and isinstance(result["conversions"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _clear(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        remove_tree(path)


def _curve(folder: Path) -> list[list[float]]:
    """[tokens, loss] of every step of an uptraining that tells one; a stage of attention alone does not, but takes tokens."""
    points, of_stages, last = [], 0, 0
    for row in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        of_stages += last if row["tokens"] < last else 0  # another stage counts from 0
        last = row["tokens"]
        points += [[of_stages + last, row["ce"]]] if "ce" in row else []
    return points

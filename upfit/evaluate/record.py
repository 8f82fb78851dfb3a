"""The end of a measurement: its settings, versions and date, and with --record its place in the model's recipe.json."""

import os
from dataclasses import asdict, replace

from upfit import provenance
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.evaluate.result import ABOUT, Evaluation
from upfit.output import Output


def check_recordable(source: Source) -> None:
    """Raise UpfitError for a folder that --record may not change."""
    if not (source.path / provenance.FILE).exists():
        raise UpfitError(
            f"--record: {source.name} has no {provenance.FILE}, so Upfit did not write it and will not change it; "
            "keep the answer with --json > FILE instead"
        )
    if (source.path / provenance.FILE).is_symlink() or source.path.parent.name == "snapshots":
        raise UpfitError(
            f"--record: {source.name} lies in the hub's cache, which is not changed; keep the answer with --json > FILE instead"
        )
    if not os.access(source.path, os.W_OK):
        raise UpfitError(f"--record: {source.path} cannot be written to; keep the answer with --json > FILE instead")
    provenance.read(source.path)


def finished(result: Evaluation, source: Source, against: Source | None, options: Options, output: Output) -> Evaluation:
    """`result` with its options, versions and date; with --record it is kept in the folder of `source` as well."""
    measurements = {key: value for key, value in result.record().items() if key not in ABOUT}
    entry = provenance.step("evaluate", against.record() if against else {}, asdict(options), measurements)
    entry["command"] = result.command
    if options.record:
        provenance.append(source.path, entry)
        output.note(f"kept in {source.path / provenance.FILE}")
    return replace(result, options=entry["options"], versions=entry["versions"], date=entry["date"])

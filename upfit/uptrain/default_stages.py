"""The stages of a run whose user names none: what recovered most where it was measured (benchmarks/README.md).

Heads that were merged without looking at what they do leave attention far from its teacher's: there a share of the budget spent
on attention alone, layer by layer, brings more than the same spent on the whole model. Elsewhere one stage does.
"""

from upfit import history
from upfit.convert.checkpoint import read_config
from upfit.convert.folders import Source, find_source, teacher_source
from upfit.own import is_own
from upfit.uptrain.config import Config
from upfit.uptrain.data import Data
from upfit.uptrain.parallel import mesh_of

MERGED = ("mean", "first", "random")  # methods of convert gqa and mqa that look at no text
AFTER_MERGING = "layerwise=30%,distill"


def default_stages(config: Config, source: Source, data: Data) -> str | None:
    """What `--stages` is taken to be; None for the one stage that teacher and data suggest.

    Only right after a conversion: what has been uptrained since is no longer far from its teacher.
    """
    if config.stages is not None or config.teacher == "none" or not config.kl_weight or data.contexts is not None:
        return None
    steps = history.read(source.path)
    merged = (
        bool(steps) and steps[-1]["verb"] in ("convert gqa", "convert mqa") and steps[-1]["options"].get("method") in MERGED
    )
    if not merged or mesh_of(config).shards:
        return None
    teacher = teacher_source(source.path) if config.teacher is None else find_source(config.teacher)
    student, tutor = read_config(source.path), None if teacher is None else read_config(teacher.path)
    if tutor is None or is_own(student) or student["model_type"] != tutor["model_type"]:
        return None
    return AFTER_MERGING

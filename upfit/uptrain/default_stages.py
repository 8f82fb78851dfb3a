"""The stages of a run whose user names none: those that recovered most where it was measured (benchmarks/README.md).

Where attention was changed without text it is far from its teacher's. There a share of the budget spent on attention alone,
layer by layer, brings more than the same share spent on the whole model. After that, and where a conversion was fitted on text,
the text itself taught more than the teacher's distribution at equal FLOPs. A conversion that lost nothing has nothing to learn
from its source: the divergence is 0, and AdamW would turn rounding errors into steps.
"""

from upfit import provenance
from upfit.checkpoint.reader import read_config
from upfit.checkpoint.source import Source, find_source, teacher_source
from upfit.modeling.registry import is_own
from upfit.uptrain.config import Config, default
from upfit.uptrain.model.model_traits import is_seq2seq

OF_A_TEACHER = ("teacher", "kl_weight", "ce_weight", "temperature")


def state_of(source: Source) -> str | None:
    """In which state the last step of the model's history left it, where that was a conversion (see provenance.py)."""
    steps = [step for step in provenance.read(source.path) if step["verb"] != "evaluate"]
    return provenance.state_left(steps[-1]) if steps else None


def wants_care(source: Source) -> bool:
    """Whether the model is near to what it was, so that training at full rates makes it worse first."""
    return state_of(source) in (provenance.LOSSLESS, provenance.FITTED)


def default_stages(config: Config, source: Source, sharded: bool) -> str | None:
    """What `--stages` is taken to be on text; None for the one stage that the teacher suggests.

    Only right after a conversion that lost nothing, or to fewer key/value heads: nothing else has been measured. Whoever says
    how to learn from a teacher learns from one.
    """
    state, student = state_of(source), read_config(source.path)
    if config.stages is not None or config.teacher == "none" or not config.kl_weight or is_seq2seq(student):
        return None
    if not wants_care(source) and state != provenance.BLIND:
        return None
    whole = "lm" if all(getattr(config, name) == default(name) for name in OF_A_TEACHER) else "distill"
    if state != provenance.BLIND or sharded or is_own(student):
        return whole
    teacher = teacher_source(source.path) if config.teacher is None else find_source(config.teacher)
    beside = teacher is not None and read_config(teacher.path)["model_type"] == student["model_type"]
    return f"layerwise=35%,{whole}" if beside else whole

"""The stages of an uptraining: what each learns from, its share of the budget and its settings. Pure, no torch.

    layerwise   text: every converted attention learns what the teacher's puts out
    distill     text: the distribution of the next token is learned from the teacher (with ce_weight also from the text)
    lm          text: the next token is learned, without a teacher
    answers     questions on long contexts: their answers are learned

A stage is a run of its own. Its result is a model folder in float32, from which the next one starts; so a run that was stopped
goes on within the stage at which it was.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from upfit import options
from upfit.errors import UpfitError
from upfit.uptrain.config import FREE, NAMES, OF_ANSWERS, OF_TEXT, Config, budget, check, default

TOTAL = ("tokens", "share", "original_tokens", "stages", "questions")  # settings of all stages together
IDLE = {"layerwise": ("kl_weight", "ce_weight", "temperature", "chunk", "gradient_checkpointing", "trainable")}  # of no use
ENOUGH = 1e-9  # of rounding, in sums of shares


@dataclass(frozen=True)
class Stage:
    """One stage: `data` is the folder it reads, `config` its settings and budget. `name` None: the data decide."""

    name: str | None
    config: Config
    data: str

    def agrees(self, record: dict[str, Any]) -> bool:
        """Whether the options kept in a recipe are these, but for those that may change in a resumed run."""
        return all(record.get(name) == value for name, value in asdict(self.config).items() if name not in FREE)


def split(config: Config, tables: dict[str, dict[str, Any]], data: str) -> list[Stage]:
    """The stages of a run with these settings, `tables` holding what the config file says of single stages.

    Raises UpfitError for a stage that is not known, shares that do not add up, and settings that no stage would use.
    """
    if config.stages is None:
        _refuse(tables, [], "--stages names none")
        _check_questions(config, [])
        return [Stage(None, config, data)]
    shares = parse(config.stages)
    _refuse(tables, list(shares), f"--stages {config.stages} does not name it")
    _check_questions(config, list(shares))
    stages = []
    for name, share in shares.items():
        folder = config.questions if name == "answers" and config.questions is not None else data
        stages.append(Stage(name, _settings(config, name, share, tables.get(name, {}), len(shares)), folder))
    return stages


def parse(text: str) -> dict[str, float | None]:
    """`layerwise=10%,distill` → {"layerwise": 0.1, "distill": 0.9}.

    What no share is given for divides the rest evenly; answers without one are gone through once (None).
    """
    shares: dict[str, float | None] = {}
    for part in text.split(","):
        name, _, share = (word.strip() for word in part.partition("="))
        if name not in NAMES:
            raise UpfitError(f"--stages got {name!r}; the stages are {', '.join(NAMES)}, in the order they are to run")
        if name in shares:
            raise UpfitError(f"--stages names {name} twice; name each stage once")
        shares[name] = options.parse_share(share, f"--stages {name}") if share else None
    open_ones = [name for name, share in shares.items() if share is None and name != "answers"]
    rest = 1 - sum(share for share in shares.values() if share is not None)
    if rest < -ENOUGH or (open_ones and rest < ENOUGH):
        raise UpfitError(f"--stages {text}: the shares leave {rest:.0%} for the other stages; let them add up to 100 %")
    if not open_ones and rest > ENOUGH and any(share is not None for share in shares.values()):
        raise UpfitError(f"--stages {text}: the shares leave {rest:.0%} for nothing; let them add up to 100 %")
    return shares | {name: rest / len(open_ones) for name in open_ones}


def _settings(config: Config, name: str, share: float | None, table: dict[str, Any], stages: int) -> Config:
    """The settings of one stage; of several, each has its own budget, and none of what only another one uses."""
    own = next((key for key in table if key in TOTAL), None)
    if own is not None:
        raise UpfitError(f"the table [{name}] sets {own}, which is of all stages; put it above the tables")
    for key in IDLE.get(name, ()):
        if key in table or (stages == 1 and getattr(config, key) != default(key)):
            raise UpfitError(f"{options.shown(config, key)} does nothing in the stage {name}; leave it out")
    fixed: dict[str, Any] = {"stages": name, "questions": None}
    if stages > 1:
        tokens = None if share is None else str(max(1, round(share * budget(config))))
        fixed |= {"tokens": tokens, "share": None, "original_tokens": None}
        unused = OF_ANSWERS if name != "answers" else () if config.mix is not None else OF_TEXT
        fixed |= {field: default(field) for field in unused}
    if name == "lm":
        fixed |= {"kl_weight": 0.0, "ce_weight": config.ce_weight or 1.0}
    return check(replace(config, **{**fixed, **table}))


def check_unsharded(name: str, sharded: bool) -> None:
    """Raise UpfitError for a stage that cannot run sharded: attention is run by itself, outside its layer."""
    if sharded and name == "layerwise":
        raise UpfitError("the stage layerwise trains attention alone, which is not sharded; leave --parallel out for it")


def _refuse(tables: dict[str, Any], known: list[str], reason: str) -> None:
    for name in tables:
        if name not in known:
            raise UpfitError(f"the config file has a table [{name}], and {reason}; take it out or name the stage")


def _check_questions(config: Config, names: list[str]) -> None:
    others = [name for name in names if name != "answers"]
    if config.questions is not None and "answers" not in names:
        raise UpfitError("questions is for the stage answers; name it in --stages, or leave it out")
    if "answers" in names and others and config.questions is None:
        raise UpfitError(f"--stages answers beside {others[0]} needs its own data; set questions to a folder of upfit synth")

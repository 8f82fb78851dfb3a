"""Opens the folder to train on: token shards of `upfit prepare`, or questions of `upfit synth`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.longcontext.contexts import CONTEXTS, Contexts
from upfit.longcontext.wording import Wording
from upfit.options import shown
from upfit.text.spans import Vocabulary
from upfit.text.tokenizer import identity, load_tokenizer
from upfit.uptrain.config import OF_ANSWERS, OF_TEXT, Config, default
from upfit.uptrain.data import spans
from upfit.uptrain.data.answers import AnswerRows, fingerprint
from upfit.uptrain.data.dataloader import StepSampler
from upfit.uptrain.data.shards import Shards
from upfit.uptrain.data.sources import Sources
from upfit.uptrain.schedule import Plan, make_answers_plan, make_plan


@dataclass(frozen=True)
class Data:
    """What is trained on: `text`, or `contexts` with questions; `mix` is text beside questions."""

    text: Sources | None
    contexts: Contexts | None
    mix: Sources | None

    @property
    def texts(self) -> list[Shards]:
        return [shards for sources in (self.text, self.mix) if sources is not None for shards in sources.shards]

    @property
    def folders(self) -> list[Path]:
        return [*(shards.folder for shards in self.texts), *([self.contexts.folder] if self.contexts else [])]

    @property
    def argument(self) -> str:
        """The DATA of a command that opens the same."""
        return self.text.argument if self.text is not None else str(self.folders[-1])

    @property
    def largest_id(self) -> int:
        questions = [int(self.contexts.composer.segments.ids.max())] if self.contexts else []
        return max([*questions, *(shards.manifest["largest_id"] for shards in self.texts)])

    @property
    def fingerprint(self) -> str:
        """Equal for equal data, in equal shares."""
        prints = [sources.fingerprint for sources in (self.text, self.mix) if sources is not None]
        return " ".join([*prints, *([fingerprint(self.contexts)] if self.contexts else [])])

    def record(self) -> dict[str, Any]:
        """As recipe.json keeps it: `patterns` are what was asked, so that a probe of the same kind is known for one."""
        record: dict[str, Any] = {"folder": self.argument, "fingerprint": self.fingerprint}
        if self.contexts is not None:
            record |= {"items": len(self.contexts), "patterns": sorted(set(self.contexts.settings["patterns"].values()))}
        if self.mix is not None:
            record |= {"mix": self.mix.argument}
        several = self.text or self.mix
        return record | ({"sources": several.record()} if several is not None and len(several.shards) > 1 else {})


def open_data(argument: str, source: Source, config: Config) -> Data:
    """The data that `argument` names (a folder, or several of text with weights) and `config.mix`, for the model in `source`.

    Raises UpfitError when there is none, it was made with another tokenizer, or a setting would mean nothing for it.
    """
    mix = None if config.mix is None else Sources.open(config.mix)
    folder = Path(argument).expanduser().resolve()
    if not (folder / CONTEXTS).exists():
        _refuse_changed(config, OF_ANSWERS, f"goes with answers, and {argument} holds text")
        data = Data(Sources.open(argument), None, None)
    else:
        if mix is None:
            _refuse_changed(config, (*OF_TEXT, *OF_ANSWERS), "is for text, which --mix adds to answers")
        data = Data(None, _contexts(folder, source), mix)
    for shards in data.texts:
        check_tokenizer(source, shards.folder, *shards.tokenizer)
        if config.verify_data and os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine; the others wait for its process
            shards.verify()
    return data


def _contexts(folder: Path, source: Source) -> Contexts:
    tokenizer = load_tokenizer(str(source.path))
    contexts = Contexts(folder, Wording(tokenizer, "plain"))
    check_tokenizer(source, folder, contexts.settings["tokenizer_sha256"], contexts.settings["options"]["tokenizer"])
    return contexts.worded(Wording(tokenizer, contexts.settings["options"]["format"]))


def check_tokenizer(source: Source, folder: Path, sha256: str, name: str) -> None:
    """Raise UpfitError when the data in `folder`, made by the tokenizer `name`, was not cut by the model's."""
    if identity(load_tokenizer(str(source.path)))["sha256"] != sha256:
        raise UpfitError(
            f"{folder} was made with the tokenizer of {name}, which is not that of {source.name}; "
            f"make it again with --tokenizer {source.name}"
        )


def _refuse_changed(config: Config, names: Iterable[str], reason: str) -> None:
    for name in names:
        if getattr(config, name) != default(name):
            raise UpfitError(f"{shown(config, name)} {reason}; leave it out")


def lay_out(data: Data, config: Config, longest: int | None, vocabulary: Vocabulary | None) -> tuple[Plan, StepSampler]:
    """How many steps of which rows, for a model that takes `longest` tokens (None: no limit known); with `vocabulary`, an
    encoder-decoder, whose rows have spans left out.

    Raises UpfitError when data, budget and model do not fit together.
    """
    if data.contexts is not None:
        answers = AnswerRows(data.contexts, config.holdout, config.seed)
        if longest is not None and answers.longest > longest:
            raise UpfitError(
                f"{data.contexts.folder} has examples of up to {answers.longest} tokens, the model takes {longest}; "
                f"make shorter ones with upfit synth --max-tokens {longest}"
            )
        plan = make_answers_plan(config, len(answers.training), answers.mean_length, longest)
        mix = None
        if data.mix is not None:
            mix = data.mix.rows(plan.mix_length, plan.mix_rows, config.holdout, config.seed, config.document_mask)
        return plan, StepSampler(answers, plan.rows, mix, plan.mix_rows, config.mix_weight)
    assert data.text is not None
    sizes = None if vocabulary is None else spans.fitting(config.length or spans.DEFAULT_LENGTH)
    plan = make_plan(config if sizes is None else replace(config, length=sizes.text), longest)
    rows = data.text.rows(plan.length, plan.rows, config.holdout, config.seed, config.document_mask)
    if vocabulary is not None and sizes is not None:
        rows = spans.SpanRows(rows, sizes, vocabulary, config.seed)
    return plan, StepSampler(rows, plan.rows)

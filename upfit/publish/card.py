"""The model card, made of what `recipe.json` records. So it cannot disagree with the weights beside it."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from upfit import __version__
from upfit.convert.recipe import find_recipes
from upfit.convert.result import shared_by_heads
from upfit.modeling.registry import code_files
from upfit.output import cache_change, cache_size, human_count
from upfit.provenance import config_lines, method_ran
from upfit.publish import front
from upfit.publish.markdown import REPO, code, harmless, model_link, plain, unmarked
from upfit.publish.portable import commit_of, known_places, portable, settings, words
from upfit.report.measured import measured
from upfit.report.page import Table
from upfit.report.stages import outcome
from upfit.report.story import Story, newest_evaluation
from upfit.report.wording import amount, calibrated

BEGIN, END = "<!-- upfit:begin -->", "<!-- upfit:end -->"
DECODES = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
READS = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("{repo}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))"""
HEARS = """import soundfile
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

model = AutoModelForSpeechSeq2Seq.from_pretrained("{repo}"{trust})
processor = AutoProcessor.from_pretrained("{repo}")
samples, rate = soundfile.read("speech.wav")
inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])"""
SAMPLES = {"text": READS, "sound": HEARS}  # by what an encoder reads
TASKS = {"text": "text2text-generation", "sound": "automatic-speech-recognition"}  # as the hub calls them
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Card:
    """`readme`: the README.md of the folder as it is; `base_model` and `license`: what the user says of them.

    `places`: absolute paths that are not to be told, besides those of the story.
    """

    story: Story
    repo: str
    readme: str
    base_model: str | None = None
    license: str | None = None
    places: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole README.md. Raises UpfitError when the folder's README has front matter that is not YAML."""
        header, body = front.split(self.readme)
        inherited, places = is_inherited(self.readme, self.story.steps), known_places(self.story.steps, self.places)
        block = f"{BEGIN}\n{self._block()}\n{END}"
        before, ours, after = _parted(words(harmless(body) if inherited else body, places))
        if ours:
            body = before + block + after
        elif before.strip():
            title = "## The card of the model that it was made from\n\n" if inherited else ""
            body = f"{block}\n\n{title}{before.strip()}\n"
        else:
            body = block + "\n"
        return front.dump(front.merge(settings(header, places), self._facts(), inherited)) + body

    def _facts(self) -> dict[str, Any]:
        """What the hub is to know; what is not known is None."""
        verbs = [name for name, _ in conversions(self.story.steps)]
        tags = ["upfit", *verbs, *(["custom_code"] if self._own() else []), *(f"arxiv:{number}" for number in self._arxiv())]
        generates = self.story.facts["class"].endswith(("ForCausalLM", "LMHeadModel"))
        return {
            "base_model": self.base_model or origin(self.story.steps),
            "base_model_relation": "finetune" if self.base_model or origin(self.story.steps) else None,
            "library_name": "transformers",
            "pipeline_tag": "text-generation" if generates else TASKS["sound"] if self._reads() == "sound" else None,
            "license": self.license,
            "tags": tags,
            "model-index": self._index(),
        }

    def _index(self) -> list[dict[str, Any]] | None:
        """Results of these very weights as the hub's `model-index`; None where they were not measured."""
        newest = newest_evaluation(self.story.steps)
        if newest is None:
            return None
        from huggingface_hub import EvalResult
        from huggingface_hub.repocard_data import eval_results_to_model_index

        data, loss, heard = newest["data"], newest["model"]["loss"], newest["model"].get("word_errors")
        task = TASKS.get(self._reads(), "text-generation")
        name = unmarked(_text_name(data["source"]))
        results = [
            EvalResult(
                task_type=task,
                task_name=task.replace("-", " ").capitalize(),
                dataset_type="audio" if heard else "text",
                dataset_name=f"{name}, {amount(data)}",
                dataset_args={"sha256": data["sha256"]},
                metric_type=kind,
                metric_name=label,
                metric_value=round(value["mean"], 4),
            )
            for kind, label, value in (
                *([("wer", "Word error rate, greedy, as a share", heard["rate"])] if heard else []),
                ("perplexity", "Perplexity", loss["perplexity"]),
                ("loss", "Loss, nats a token", loss["nats_per_token"]),
                ("bits_per_byte", "Bits per byte", loss["bits_per_byte"]),
            )
        ]
        return eval_results_to_model_index(self.repo.rsplit("/", 1)[-1], results)

    def _block(self) -> str:
        template = (files("upfit.publish") / "card.md").read_text(encoding="utf-8")
        environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=True, finalize=plain)
        environment.filters["plain"] = plain
        facts = self.story.facts
        rendered = environment.from_string(template).render(
            name=self.repo.rsplit("/", 1)[-1],
            lead=self._lead(),
            outcome=self._outcome(),
            columns=["parameters", "query heads", "key/value heads", "KV cache"],
            shape=[["this model", *_shape(facts)]],
            steps=[
                _step(step, facts["parameters"])
                for step in portable(self.story.steps, self.places)
                if step["verb"] != "evaluate"
            ],
            tables=[table for section in measured(self._evaluations()) for table in _titled(section)],
            limits=self._limits(),
            code=Markup(
                SAMPLES.get(self._reads(), DECODES).format(
                    repo=self.repo, trust=", trust_remote_code=True" if self._own() else ""
                )
            ),
            serving=self._serving(),
            papers=[Markup(recipe.paper) for _, recipe in conversions(self.story.steps)],
            version=__version__,
        )
        return re.sub(r"\n{3,}", "\n\n", rendered).strip()

    def _lead(self) -> Markup:
        source = self.base_model or origin(self.story.steps)
        first = portable(self.story.steps)[0]["source"].get("name")
        named = model_link(source) if source else code(first)
        what = "; ".join(recipe.summary for _, recipe in conversions(self.story.steps))
        trained = sum(step["measurements"]["tokens"] for step in self.story.steps if step["verb"] == "uptrain")
        after = f", then uptrained on {human_count(trained)} tokens" if trained else ", not uptrained"
        return Markup(f"{named} with another attention ({what}){after}.")

    def _outcome(self) -> str:
        """What was saved and what it cost: the sentence at the head of the report."""
        result = outcome(self.story)
        return "" if result is None else result.sentence("This model", "its source")

    def _evaluations(self) -> list[tuple[str, dict[str, Any]]]:
        return [(label, portable(answer, self.places)) for label, answer in self.story.evaluations]

    def _limits(self) -> list[str]:
        facts = self.story.facts
        limits = [
            "What the source gets wrong, this model gets wrong too, and what it lost in the conversion is only told above."
        ]
        if not self.story.evaluations:
            limits.append("Nothing of it was measured after the conversion.")
        else:
            limits.append("Losses say little of tasks, instructions and languages that the text measured on does not hold.")
            if newest_evaluation(self.story.steps) is None:
                limits.append("The figures above were taken before the last step; these very weights were not measured.")
        if self._own():
            limits.append(f"transformers has no class for it: its code ({facts['model_type']}) comes with the repository.")
        return limits

    def _serving(self) -> Markup:
        if self._own():
            return Markup(
                "`trust_remote_code=True` runs the code of this repository; where `upfit` is imported it is not needed."
            )
        return Markup("It is a plain checkpoint of its class: whatever serves that class with these head counts serves it.")

    def _reads(self) -> str:
        """What its encoder reads; "" without one."""
        return str(self.story.facts.get("reads") or "")

    def _own(self) -> bool:
        return self.story.facts["model_type"] in code_files()

    def _arxiv(self) -> list[str]:
        return [number for _, recipe in conversions(self.story.steps) for number in ARXIV.findall(recipe.paper)]


def conversions(steps: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """[name, recipe] of every conversion in the history, each once."""
    known = find_recipes()
    names = [step["verb"].removeprefix("convert ") for step in steps if step["verb"].startswith("convert ")]
    return [(name, known[name]) for name in dict.fromkeys(names) if name in known]


def origin(steps: list[dict[str, Any]]) -> str | None:
    """The hub id of the model that all began with; None when it was a folder."""
    first = steps[0]["source"] if steps else {}
    return str(first["name"]) if first and commit_of(first) and REPO.fullmatch(str(first["name"])) else None


def _parted(body: str) -> tuple[str, str, str]:
    """What stands before our part of a README, our part, and what follows; without one, all stands before. Marks that bound no
    part are taken out: an end without its beginning would cut the next card short."""
    begin = body.find(BEGIN)
    end = body.find(END, begin)
    if begin < 0 or end < 0:
        return _unmarked(body), "", ""
    return _unmarked(body[:begin]), body[begin : end + len(END)], _unmarked(body[end + len(END) :])


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def is_inherited(readme: str, steps: list[dict[str, Any]]) -> bool:
    """Whether a README is still the source's, byte for byte, as the conversion copied it."""
    digest = hashlib.sha256(readme.encode()).hexdigest()
    return any(step.get("readme_sha256") == digest for step in steps)


def _shape(facts: dict[str, Any]) -> list[str]:
    heads = [", ".join(map(str, facts["heads"])), shared_by_heads(facts)]
    cache = cache_size(facts["kv_bytes_per_token"], facts.get("cross_bytes_per_position"))
    return [human_count(facts["parameters"]), *heads, cache]


def _step(step: dict[str, Any], parameters: int) -> dict[str, Any]:
    measured, versions = step["measurements"], step["versions"]
    texts: list[str] = [code(step["command"])] if "command" in step else []
    if step.get("config"):
        texts.append(Markup("Its config file says {}.").format(Markup(", ").join(map(code, config_lines(step)))))
    before, after = measured.get("kv_bytes_per_token", (0, 0))
    if before != after:
        texts.append(f"{cache_change(before, after, measured.get('cross_bytes_per_position'))}.")
    if method_ran(step):
        texts.append(f"Heads merged: {method_ran(step)}.")
    if measured.get("calibration"):
        texts.append(calibrated(measured["calibration"]))
    if measured.get("verify"):
        texts.append(f"Verified: {measured['verify']['structure']}; {measured['verify']['numbers']}.")
    if step["verb"] == "uptrain":
        texts.append(_training(step, parameters))
    packages = ", ".join(f"{name} {versions[name]}" for name in ("upfit", "torch", "transformers") if name in versions)
    return {"title": step["verb"], "date": step["date"][:10], "versions": packages, "texts": texts}


def _training(step: dict[str, Any], parameters: int) -> str:
    measured, options = step["measurements"], step["options"]
    teacher = (step.get("teacher") or {}).get("name")
    learns = (
        f"from {teacher} (KL weight {options['kl_weight']:g}, CE weight {options['ce_weight']:g})"
        if teacher
        else "from the text"
    )
    seconds, processes = measured["seconds"], options["resolved"]["processes"]
    took = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} s"
    text = (
        f"{human_count(measured['tokens'])} tokens in {measured['steps']:,} steps, {took} on {processes} process(es), {learns}."
    )
    if step.get("stage") == "layerwise":
        errors = [measured["holdout"].get(when, {}).get("attention_error") for when in ("before", "after")]
        text += " Each converted attention learned the teacher's outputs on the teacher's inputs; nothing else was trained."
        return text + (f" Error on held-out rows: {errors[0]:.4f} → {errors[1]:.4f}." if None not in errors else "")
    factor = 8 if teacher else 6
    text += f" About {factor * parameters * measured['tokens']:.1e} FLOPs ({factor} for each parameter and token)."
    before, after = measured["holdout"]["before"], measured["holdout"]["after"]
    return text + (f" Held-out rows: {before['ce']:.3f} → {after['ce']:.3f} nats a token." if before else "")


def _titled(section: Any) -> list[dict[str, Any]]:
    """A section's tables, the first with the section's words."""
    tables: list[Table] = section.tables
    return [
        {
            "title": table.title,
            "text": " ".join(section.texts) if not index else "",
            "columns": table.columns,
            "rows": table.rows,
        }
        for index, table in enumerate(tables)
    ]


def _text_name(source: Any) -> str:
    if isinstance(source, str):
        return "Reference and library of Python" if source == "python" else portable(source)
    return ", ".join(portable(source))

"""What `upfit convert`, `merge` and `show` answer."""

import re
from dataclasses import dataclass
from typing import Any

from upfit.output import Output, cache_change, human_bytes, human_count, human_seconds
from upfit.provenance import method_ran
from upfit.results import Origin, Part, Result, absent, beside

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # in a tensor's name


@dataclass(frozen=True)
class Change(Part):
    """A tensor that a rule writes.

    tensor: its name in the result
    before: its shape in the source; None where it is new
    after: its shape in the result
    rule: what is done
    """

    tensor: str
    before: list[int] | None
    after: list[int]
    rule: str


@dataclass(frozen=True)
class Choice(Part):
    """A number of key/value heads that a layer could have.

    kv_heads: that number
    attention_error: predicted error of attention before any refit, as a share of its energy; None where it cannot be told
    output_error: the same of the attention's output
    kv_bytes_per_token: cache of the layer, bytes a token
    """

    kv_heads: int
    attention_error: float | None
    output_error: float | None
    kv_bytes_per_token: int


@dataclass(frozen=True)
class LayerChoices(Part):
    """What a layer could become.

    layer: its name in the model
    kv_heads: its key/value heads
    choices: the numbers of heads that it could have
    reasons: what an aligned merge of it leaves out, and why; what is averaged is among it
    """

    layer: str
    kv_heads: int
    choices: list[Choice]
    reasons: list[str]


@dataclass(frozen=True)
class TotalChoice(Part):
    """A number of key/value heads for all layers; those that have fewer stay as they are.

    kv_heads: that number
    kv_bytes_per_token: cache of all layers, bytes a token
    attention_error: mean over the layers of the predicted errors of attention, shares of its energy
    largest_attention_error: the largest of them
    output_error: mean over the layers of the predicted errors of outputs, shares of their energy
    largest_output_error: the largest of them
    cross_bytes_per_position: of an encoder-decoder, cache of its cross-attention, bytes a position that was read (and
        kv_bytes_per_token is of a token that is written)
    """

    kv_heads: int
    kv_bytes_per_token: int
    attention_error: float | None
    largest_attention_error: float | None
    output_error: float | None
    largest_output_error: float | None
    cross_bytes_per_position: int | None = absent()


@dataclass(frozen=True)
class Sensitivity(Part):
    """Predicted errors of each layer for each number of key/value heads.

    kv_heads: the numbers that the model allows
    layers: each layer
    totals: all layers together, for each number
    """

    kv_heads: list[int]
    layers: list[LayerChoices]
    totals: list[TotalChoice]


@dataclass(frozen=True)
class Estimate(Part):
    """What a conversion takes on this machine where nothing else keeps it busy: a guess from shapes and one measured product.

    seconds: least and most, s
    memory: at its peak, bytes
    """

    seconds: list[float]
    memory: int

    def words(self) -> str:
        memory = float(f"{self.memory / 1e9:.2g}")
        return f"Would take about {human_seconds(*self.seconds)} and {memory:g} GB of memory here"


@dataclass(frozen=True)
class Unchecked(Part):
    """In the place of a verification: the result was not checked."""


@dataclass(frozen=True)
class Verification(Part):
    """What the check of the result found; the numbers have no values where logits were not compared.

    structure: how it loads into its class
    numbers: how its logits compare with the source's, or why they were not compared
    tokens: tokens of the sample text
    equal: whether the logits are equal bit for bit; None where they were not compared
    max_difference: the largest difference of a logit
    source_loss: loss of the source on the sample text, nats a token
    loss: that of the result, nats a token
    loss_interval: half the width of a 95 % interval of the difference of the two over pieces of the text, nats a token
    """

    structure: str
    numbers: str
    tokens: int = 0
    equal: bool | None = None
    max_difference: float | None = None
    source_loss: float | None = None
    loss: float | None = None
    loss_interval: float | None = None


@dataclass(frozen=True, repr=False)
class Conversion(Result):
    """What a conversion has written, or with a dry run would write. Pairs are before and after.

    recipe: name of the attention, or merge
    source: the model that was read
    out: the folder that was written
    dry_run: whether nothing was written
    options: the settings in force
    bytes: size of the weights, bytes
    parameters: number of weights
    kv_heads: key/value heads of the layers that have most of them
    kv_bytes_per_token: key/value cache of all layers, bytes a token; of an encoder-decoder, a token that is written
    tensors: the tensors that are changed
    cross_bytes_per_position: the cache of its cross-attention, bytes a position that was read; None without an encoder
    estimate: of a dry run: what the conversion takes; None where nobody has counted it, and for a fit on a GPU
    sensitivity: of a dry run on text: predicted errors; of an attention that predicts something else, its own dictionary
    verify: what was checked; None for a dry run
    reads: what its encoder reads: text or sound; None without an encoder (not in the record)
    latent: numbers a token and layer of the latent that heads get in place of keys and values of their own, for each kind of
        layer; empty where they get none (not in the record)
    """

    recipe: str
    source: Origin
    out: str
    dry_run: bool
    options: dict[str, Any]
    bytes: list[int]
    parameters: list[int]
    kv_heads: list[int]
    kv_bytes_per_token: list[int]
    tensors: list[Change]
    cross_bytes_per_position: list[int] | None = absent()
    estimate: Estimate | None = absent()
    sensitivity: Sensitivity | dict[str, Any] | None = absent()
    verify: Verification | Unchecked | None = absent()
    reads: str | None = beside()
    latent: list[int] | None = beside()

    def show(self, output: Output) -> None:
        verb = "Would write" if self.dry_run else "Wrote"
        added = self.parameters[1] - self.parameters[0]
        more = f" (+{human_count(added)})" if added > 0 else ""
        output.line(
            f"{verb} {self.out}: {human_bytes(self.bytes[1])}, {human_count(self.parameters[1])} parameters{more}, "
            f"{cache_words(self.kv_heads, self.kv_bytes_per_token, self.cross_bytes_per_position, self.latent)}"
        )
        if self.estimate is not None:
            output.line(self.estimate.words())
        if isinstance(self.sensitivity, Sensitivity):
            _show_sensitivity(self.sensitivity, output)
        if self.dry_run:
            output.table(["tensor", "before", "after", "rule"], change_rows(self.tensors), "Would write")
        if isinstance(self.verify, Verification):
            output.line(f"Verified: {self.verify.structure}; {self.verify.numbers}")
            if self.verify.loss is not None and not self.verify.equal:
                output.line(sanity_words(self.verify))


def change_rows(changes: list[Change]) -> list[list[str]]:
    """Rows of tensor, before, after and rule. Layers that change alike share a row, which has their numbers as ranges."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for change in changes:
        number = LAYER.search(change.tensor)
        name = change.tensor if number is None else f"{change.tensor[: number.start()]}\0{change.tensor[number.end() :]}"
        numbers = layers.setdefault((name, str(change.before or []), str(change.after), change.rule), [])
        numbers += [] if number is None else [int(number[0])]
    return [[name.replace("\0", _ranges(numbers)), *cells] for (name, *cells), numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    """Numbers that ascend, as text: 0-3,5."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True, repr=False)
class Description(Result):
    """What a model is, from its config and headers alone.

    model: where it lies
    model_type: its type in transformers
    converted_as: the type that it is seen as to be converted; None: its own
    class_: its class in transformers (key: class)
    parameters: number of weights
    bytes: size of the weights, bytes
    dtypes: types of the weights
    layers: number of attention layers
    heads: query heads, one number for each kind of layer
    kv_heads: key/value heads, the same; 1 where all heads share a latent
    head_dim: width of a head, the same; of a latent, all numbers that a token adds to a layer's cache
    kv_bytes_per_token: key/value cache of all layers, bytes a token, in the type of the weights; of an encoder-decoder, a token
        that is written
    sliding_windows: tokens of a sliding window, and how many layers keep no more than that; empty without any
    history: the steps of recipe.json, oldest first
    can_become: attentions that it can be given
    reads: what its encoder reads: text or sound; None without an encoder
    cross_bytes_per_position: the cache of its cross-attention, bytes a position that was read; None without an encoder
    latent: numbers a token adds to a layer's cache where that is one latent, for each kind of layer; None where heads have keys
        and values of their own
    """

    model: Origin
    model_type: str
    converted_as: str | None
    class_: str
    parameters: int
    bytes: int
    dtypes: list[str]
    layers: int
    heads: list[int]
    kv_heads: list[int]
    head_dim: list[int]
    kv_bytes_per_token: int
    sliding_windows: dict[str, int]
    history: list[dict[str, Any]]
    can_become: list[str]
    reads: str | None = absent()
    cross_bytes_per_position: int | None = absent()
    latent: list[int] | None = absent()

    def show(self, output: Output) -> None:
        rows = [
            *as_rows(self.record()),
            *[["history" if not i else "", f"{s.get('date', '')}  {_done(s)}"] for i, s in enumerate(self.history)],
            *[["can become" if not i else "", line] for i, line in enumerate(self.can_become)],
        ]
        for name, value in rows:
            output.line(f"{name:17} {value}")


def as_rows(facts: dict[str, Any]) -> list[list[str]]:
    """Name and value, as people read them, of the dictionary of a Description: what tells of the model itself."""
    return [
        ["architecture", f"{facts['model_type']} ({facts['class']})"],
        *([["reads", f"{facts['reads']}, by its encoder"]] if facts.get("reads") else []),
        *([["converted as", facts["converted_as"]]] if facts.get("converted_as") else []),
        ["parameters", f"{human_count(facts['parameters'])} in {human_bytes(facts['bytes'])}, {', '.join(facts['dtypes'])}"],
        ["attention layers", str(facts["layers"])],
        ["query heads", ", ".join(map(str, facts["heads"]))],
        ["key/value heads", shared_by_heads(facts)],
        *([] if facts.get("latent") else [["head width", ", ".join(map(str, facts["head_dim"]))]]),
        ["KV cache", _cache_bytes(facts)],
        *[
            ["sliding window", f"{int(window):,} tokens in {layers} of {facts['layers']} layers"]
            for window, layers in facts.get("sliding_windows", {}).items()
        ],
    ]


def shared_by_heads(facts: dict[str, Any]) -> str:
    """Of the dictionary of a Description: how many key/value heads there are, or the latent that stands for them."""
    latent = facts.get("latent")
    return latent_words(latent) if latent else ", ".join(map(str, facts["kv_heads"]))


def latent_words(numbers: list[int]) -> str:
    """A latent of so many numbers a token and layer, in each kind of layer."""
    return f"one latent of {', '.join(map(str, numbers))} numbers"


def _cache_bytes(facts: dict[str, Any]) -> str:
    own, cross = facts["kv_bytes_per_token"], facts.get("cross_bytes_per_position")
    return f"{own:,} bytes a token" + (f" written, {cross:,} bytes a position read" if cross is not None else "")


def cache_words(heads: list[int], nbytes: list[int], cross: list[int] | None = None, latent: list[int] | None = None) -> str:
    """What became of key/value heads (`latent`: numbers of what they became) and of the bytes that a token takes; `cross`: and
    of what was read."""
    changed = f"{heads[0]} → {heads[1]} key/value heads, " if heads[0] != heads[1] else ""
    if latent:
        changed = f"{heads[0]} key/value head{'s' if heads[0] > 1 else ''} → {latent_words(latent)}, "
    return changed + cache_change(nbytes[0], nbytes[1], cross)


def sanity_words(report: Verification) -> str:
    """The loss on the sample text, as what it is: enough to see a broken model, not to judge a whole one."""
    before, after, interval = report.source_loss, report.loss, report.loss_interval
    assert before is not None and after is not None
    width = f" ± {interval:.3f}" if interval is not None else ""
    return (
        f"Sanity check on {report.tokens} tokens of a text of Upfit's own: {before:.3f} → {after:.3f} "
        f"({after - before:+.3f}{width}) nats a token; that is no measurement, which is upfit evaluate's"
    )


def _show_sensitivity(sensitivity: Sensitivity, output: Output) -> None:
    """Predicted errors of each layer for each number of heads it could have, as attention / output."""
    counts = [count for count in sensitivity.kv_heads if count < max(sensitivity.kv_heads)]
    totals = {total.kv_heads: total for total in sensitivity.totals}
    rows = []
    for layer in sensitivity.layers:
        errors = {choice.kv_heads: _pair(choice.attention_error, choice.output_error) for choice in layer.choices}
        rows.append([layer.layer, *[errors.get(count, "") for count in counts]])
    means = [_pair(totals[count].attention_error, totals[count].output_error) for count in counts]
    most = [_pair(totals[count].largest_attention_error, totals[count].largest_output_error) for count in counts]
    rows += [["mean of the layers", *means], ["largest", *most]]
    rows.append(["KV cache a token", *[human_bytes(totals[count].kv_bytes_per_token) for count in counts]])
    if any(totals[count].cross_bytes_per_position for count in counts):
        rows.append(["KV cache a position read", *[human_bytes(totals[c].cross_bytes_per_position or 0) for c in counts]])
    title = "Predicted error of attention / output before any refit, by key/value heads (share of its energy)"
    output.table(["layer", *map(str, counts)], rows, title)
    for line in reason_lines(sensitivity.layers):
        output.line(line)


def reason_lines(layers: list[LayerChoices]) -> list[str]:
    """What is left out of which layers; those of one reason share a line, which has their numbers as ranges."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        number = LAYER.search(layer.layer)
        name = layer.layer if number is None else f"{layer.layer[: number.start()]}\0{layer.layer[number.end() :]}"
        for reason in layer.reasons:
            numbers.setdefault((name, reason), []).extend([] if number is None else [int(number[0])])
    return [f"{name.replace(chr(0), _ranges(own))}: {reason}" for (name, reason), own in numbers.items()]


def _pair(*errors: float | None) -> str:
    return " / ".join("-" if error is None else f"{error:.3f}" for error in errors)


def _done(step: dict[str, Any]) -> str:
    method = method_ran(step)
    return f"{step['verb']} ({method})" if method else str(step["verb"])

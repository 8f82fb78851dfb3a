"""What several sections say, and the captions: each tells in one plain sentence how its plot is read and what is good."""

from typing import Any

ABOVE_AND_BELOW = (
    "Above, short bars are little memory for every token; below, dots near the line of the source are "
    "little lost, and the line through a dot is its 95 % interval."
)
BARS = "The shorter a bar, the less memory the model keeps for every token."
LOSSES = "The further left a dot, the better the model predicts the text; the line through it is its 95 % interval ({what})."
POSITIONS = (
    "How well each part of a window is predicted, lower is better: lines that fall to the right belong to models that "
    "make use of what they have read."
)
WRITTEN = "How well each part of what is written is predicted, given what was read and all before it; lower is better."
SPEED = (
    "How many tokens are read (prefill) and written (decode) in a second as the context grows, higher is faster: dots are "
    "medians, lines end at the lowest and highest timing, and ratios are of timings that followed each other."
)
CACHES = "What each model keeps in memory for every token that it has read or written, as measured: shorter is cheaper."
FOUND = "Probe {name}: how often the hidden fact was found, by where in the text it stood; a flat line at 1 is perfect."
CURVES = "Probe {name}: {what} by where in the text the answer stood; a flat line means that the place does not matter."
HEAT = (
    "Probe {name}: {what} by length of the text (rows) and by place of the answer in it (columns), all models on one "
    "colour scale; bright is good."
)
HEADS = (
    "Which heads look at the answer when it has to be said: a cell is a head, the brighter the more of its attention goes "
    "there, and one that is bright in the source should be bright in the others (one colour scale)."
)
MAPS = (
    "The heads that look at the answer most, a row of panels for each: every token (down) looks back at others (across), "
    "and dashed lines mark the answer and the token that has to say it; one colour scale, each row as a share of its "
    "absolute sum{signed}."
)
SENSITIVITY = (
    "Each row is a layer and each column a number of key/value heads: the brighter a cell, the more of what the layer "
    "does would be lost before any refit ({label}); beside them the mean of all layers by the cache that is left."
)
LAYERS = (
    "What {verb} measured of each layer, first to last: an error is the share of what the layer computed that the change "
    "loses, so that high points are the layers that suffer most."
)
TRAINING = (
    "Each panel is one figure as training goes on, left to right: losses and errors should fall; thin lines are of the "
    "text trained on, dots of rows held out of it."
)
WATCHED = "What was measured of the attention of each layer (a row) as training goes on, left to right: colours tell the value."
LOSS = "Loss is what the true next token costs the model: 0.1 nats more are 10 % less probability. Lower is better."

GIVEN = "Losses are of what the decoder writes, given what the encoder has read."


def where(data: dict[str, Any]) -> str:
    """The text that was measured on (`data` of an answer of `upfit evaluate`), in words."""
    source = data["source"] if isinstance(data["source"], str) else ", ".join(data["source"])
    return f"{amount(data)} from {data['documents']} documents ({source})"


def calibrated(sample: dict[str, Any]) -> str:
    """What a conversion was fitted on (`calibration` of its measurements), in words."""
    if "examples" in sample:
        return f"Calibrated on {sample['examples']:,} examples ({sample['kind']}), {sample['tokens']:,} tokens to be written."
    return f"Calibrated on {sample['tokens']:,} tokens, windows of {sample['length']}."


def amount(data: dict[str, Any]) -> str:
    """How much was measured on: windows of text, or examples of what an encoder-decoder takes."""
    if "examples" in data:
        return f"{data['windows']} examples ({data['examples']})"
    return f"{data['windows']} windows of {data['length']} tokens"

"""What a model is calibrated on, by what it takes: windows of text, pairs of texts, sound, or images with texts."""

import random
from pathlib import Path

from upfit.calibration.example_sample import ExampleSample, hold_back
from upfit.calibration.observe import Opaque
from upfit.calibration.sample import FLAG, SEED, TOKENS, Sample, fast_tokenizer, text_sample
from upfit.checkpoint.reader import Checkpoint
from upfit.errors import UpfitError
from upfit.examples.images import all_images, read_images, unseen
from upfit.examples.kinds import kind_of, sees
from upfit.examples.model_inputs import Examples
from upfit.examples.read import COUNT, digest, read_examples
from upfit.examples.sound import unheard
from upfit.options import parse_count
from upfit.output import Output
from upfit.text.files import FIELD
from upfit.text.tokenizer import identity

LEAST = 2  # examples: one is held back


def sample_for(
    folder: Path,
    checkpoint: Checkpoint,
    texts: list[str] | None,
    tokens: str | None,
    length: int | None,
    output: Output,
    field: str = FIELD,
) -> Sample | ExampleSample:
    """Windows of text for a decoder, examples for an encoder-decoder and for a decoder that is shown images. `field` has the
    text in files of records; what is left out is noted on `output`.

    Raises UpfitError for text, sound, images or sizes that cannot be used, Opaque when the model's folder has no tokenizer of
    its own.
    """
    kind = kind_of(checkpoint.config)
    images = kind == "text" and sees(checkpoint.config) and all_images(texts, FLAG)
    if kind == "text" and not images:
        if sees(checkpoint.config):
            output.note(unseen(FLAG))
        return text_sample(folder, checkpoint, texts, tokens, length, output, field)
    if length is not None:
        raise UpfitError(
            "--calibration-length is for models that read windows of text; an example is as long as it is: leave it out"
        )
    if kind == "sound" and not texts:
        raise Opaque(unheard(FLAG))
    tokenizer = fast_tokenizer(folder)
    if images:
        count = parse_count(tokens or str(TOKENS), "--calibration-tokens")
        examples = read_images(folder, checkpoint.config, texts or [], FLAG, field, count, COUNT, output)
    else:
        examples = read_examples(folder, checkpoint.config, texts, FLAG, field, None, output)
    if tokens is not None and not images:
        examples = _some_of(examples, parse_count(tokens, "--calibration-tokens"))
    if len(examples.examples) < LEAST:
        raise UpfitError(f"{FLAG} has {len(examples.examples)} example; give at least {LEAST}, of which one is held back")
    return hold_back(examples, checkpoint.config, identity(tokenizer))


def _some_of(examples: Examples, tokens: int) -> Examples:
    """As many of the examples as have `tokens` to be written, two at least: any of them, in random but fixed order."""
    order = list(range(len(examples.examples)))
    random.Random(SEED).shuffle(order)
    count, written = 0, 0
    while count < len(order) and (written < tokens or count < LEAST):
        written += len(examples.examples[order[count]].labels)
        count += 1
    chosen = [examples.examples[number] for number in sorted(order[:count])]
    return Examples(examples.kind, chosen, {**examples.record, "count": count, "sha256": digest(chosen)})

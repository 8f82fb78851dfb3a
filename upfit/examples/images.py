"""Images with texts, laid out as `datasets` lays out an ImageFolder: a folder with `metadata.jsonl` (or .csv), which tells the
`file_name` and the text of each image.

The inputs are those of the model's own processor: it makes pixels of the image and puts the placeholders where the model wants
them. By its chat template the user shows the image and the assistant gives the text; without one the text follows the image.
"""

import inspect
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.meta_model import model_class_for
from upfit.bounded import DATA_BYTES, check_ordinary, reason
from upfit.checkpoint.reader import most_positions
from upfit.errors import UpfitError
from upfit.examples.kinds import of_family
from upfit.examples.metadata import Described, Layout, read_described
from upfit.examples.model_inputs import IGNORE, Example, Examples
from upfit.examples.read import digest
from upfit.model_files import check_model_files, quiet_transformers
from upfit.output import Output
from upfit.text.files import FIELD, has_metadata
from upfit.text.tokenizer import no_panic

WANTED = "give a folder with images and metadata.jsonl: a file_name and its text a line, as datasets' ImageFolder"
IMAGES = Layout("image", "text", "sees", WANTED, (FIELD,))
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
SEED = 20240229
LEAST = 2  # images, whatever the tokens that are wanted


def unseen(flag: str) -> str:
    """What it costs that a model that sees is shown text alone."""
    return (
        f"this model sees, and {flag} has no images: what it makes of them is not watched and may suffer more than text does; "
        f"{WANTED}"
    )


def all_images(names: list[str] | None, flag: str) -> bool:
    """Whether `names` are folders of images. Raises UpfitError where some are and some are text."""
    folders = [name for name in names or () if has_metadata(name)]
    others = [name for name in names or () if not has_metadata(name)]
    if folders and others:
        raise UpfitError(f"{flag} has images ({folders[0]}) and text ({others[0]}); give one or the other")
    return bool(folders)


def read_images(
    folder: Path,
    config: dict[str, Any],
    names: list[str],
    flag: str,
    field: str,
    tokens: int | None,
    count: int,
    output: Output,
) -> Examples:
    """Images of the folders `names` and their texts (of the metadata's `field`), as the model in `folder` takes them: `count`
    at most, and no more than have `tokens` positions (those of the images included; two at least), spread over all of them.

    Raises UpfitError for what cannot be read.
    """
    described = read_described(names, flag, field, count, IMAGES, output)
    examples, long = _taken(described, Eye(folder, config), most_positions(config), tokens, output)
    if long:
        output.note(f"left out: {long} images with their texts have more than the model's {most_positions(config)} positions")
    if not examples:
        raise UpfitError(f"{flag}: no image is as short with its text as the model takes them; give shorter texts")
    record = {"kind": "images", "files": names, "count": len(examples), "sha256": digest(examples)}
    return Examples("images", examples, record if field == FIELD else record | {"field": field})


def _taken(
    described: list[Described], eye: "Eye", most: int | None, tokens: int | None, output: Output
) -> tuple[list[Example], int]:
    """Examples of as many, drawn at random, as have `tokens` positions, in their order; how many were left out on the way that
    have more than `most`."""
    order = list(range(len(described)))
    random.Random(SEED).shuffle(order)
    examples: dict[int, Example] = {}
    positions = long = 0
    with output.progress("looking", len(order)) as meter:
        while order and (tokens is None or positions < tokens or len(examples) < LEAST):
            number = order.pop(0)
            example = eye.example(described[number])
            meter.advance(1)
            if most is not None and len(example.decoder_ids) > most:
                long += 1
                continue
            examples[number] = example
            positions += len(example.decoder_ids)
    return [example for _, example in sorted(examples.items())], long


def read_image(path: Path) -> Any:
    """The image in RGB, the way up that its camera notes. Raises UpfitError when it cannot be read, or Pillow is not there."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UpfitError("reading images needs the package Pillow; install it with: pip install 'upfit[image]'") from error
    if check_ordinary(path).st_size > DATA_BYTES:
        raise UpfitError(f"{path} has more than {DATA_BYTES} bytes; make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # each of its formats raises what it likes on a broken file
        raise UpfitError(f"{path} is no image that can be read ({reason(error)}); give .png or .jpg") from error


class Eye:
    """Makes inputs of images and texts by the model's own processor."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.processor = folder, _processor(folder)
        taken = inspect.signature(model_class_for(of_family(config)).forward).parameters
        self.taken = set(taken) - {"labels"}  # some processors give these too, for the loss
        self.suffix = "suffix" in inspect.signature(type(self.processor).__call__).parameters
        self.placeholder = getattr(self.processor, "image_token", None)
        if self.processor.chat_template is None and not isinstance(self.placeholder, str):
            raise UpfitError(
                f"{folder} has neither a chat template nor a token for images, so where an image stands is not known; fetch "
                "its chat_template.jinja from where the model came"
            )

    def example(self, described: Described) -> Example:
        """The image and its text; what the model is to write are the tokens that come with the text."""
        image = read_image(described.path)
        try:
            with quiet_transformers(), no_panic(str(self.folder)):
                whole, alone = self._inputs(image, described.text), self._inputs(image, None)
        except UpfitError:
            raise
        except Exception as error:  # processors and templates raise whatever they like
            raise UpfitError(
                f"{described.path} and its text are not taken by the model's processor: {reason(error)}"
            ) from error
        ids = whole["input_ids"][0]
        labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
        labels[: max(0, _shared(ids, alone["input_ids"][0]) - 1)] = IGNORE
        keywords = {name: value for name, value in whole.items() if name in self.taken and isinstance(value, Tensor)}
        keywords = {name: value.contiguous() for name, value in keywords.items() if name != "input_ids"}
        return Example(keywords, ids, labels, described.text, described.document)

    def _inputs(self, image: Any, text: str | None) -> Any:
        """What the processor makes of the image and, if it is there, the text behind it."""
        if self.processor.chat_template is None:
            parts = {"text": f"{self.placeholder}{text or ''}"}
            if self.suffix:  # which it marks as what is to be written
                parts = {"text": str(self.placeholder)} | ({} if text is None else {"suffix": text})
            return self.processor(images=image, return_tensors="pt", **parts)
        messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        if text is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(messages, add_generation_prompt=text is None, **options)


def _shared(first: Tensor, second: Tensor) -> int:
    """With how many ids both begin."""
    length = min(len(first), len(second))
    return int((first[:length] == second[:length]).long().cumprod(0).sum())


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    check_model_files(folder)
    if not any((folder / name).is_file() for name in PROCESSOR):
        raise UpfitError(
            f"{folder} has no {PROCESSOR[1]}, so what the model sees is not known; fetch it from where the model came"
        )
    try:
        with quiet_transformers(), no_panic(str(folder)):
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"{type(processor).__name__} takes no images")
    except UpfitError:
        raise
    except Exception as error:  # its parsers raise whatever they like on a broken file
        mend = "install what it wants" if isinstance(error, ImportError) else "fetch its files again"
        if "torchvision" in str(error).casefold():  # there is a build for each of torch, and another one breaks transformers
            mend = "install torchvision, the build that belongs to your torch"
        raise UpfitError(f"the processor of {folder} does not load: {reason(error)}; {mend}") from error
    return processor

"""Laws of `upfit evaluate` of models that are shown images: losses are the classes' own, caches are what they weigh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.folders import save_tiny
from tests.test_evaluate_encoder_decoder import QUIET, run
from tests.vision import LINES, image_folder, save_seeing
from upfit.checkpoint.reader import read_config
from upfit.errors import UpfitError
from upfit.evaluate.options import Options, check_data
from upfit.examples.images import read_images

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("model_type", ["llava", "mllama", "idefics3"])
def test_the_loss_is_that_of_the_text_given_the_image(model_type: str, images: Path, tmp_path: Path) -> None:
    """And a token of the cache weighs what keys and values of the layers weigh that read text."""
    source = save_seeing(tmp_path / "source", model_type)
    shown = read_images(source, read_config(source), [str(images)], "--data", "text", None, 512, QUIET).examples
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    nats = tokens = 0.0
    for example in shown:
        ids = example.decoder_ids
        labels = torch.cat([torch.tensor([-100]), example.labels[:-1]])[None]
        with torch.no_grad():
            mean = float(model(**example.keywords, input_ids=ids[None], labels=labels).loss)
        count = int((labels != -100).sum())
        nats, tokens = nats + mean * count, tokens + count
    answer = run(source, images, against=str(source))
    loss = answer.model.loss.nats_per_token
    assert loss.mean == pytest.approx(nats / tokens, rel=1e-5)
    assert tokens == sum(len(line["text"]) for line in LINES)
    assert (answer.data.examples, answer.data.windows, answer.data.documents) == ("images", 12, 12)
    assert answer.difference is not None and answer.difference.nats_per_token is not None
    assert answer.difference.nats_per_token.mean == 0
    cache = answer.model.cache
    assert cache is not None and cache.bytes_per_token == 2 * 2 * 4 * 8 * 4  # layers, keys and values, heads, width, bytes


def test_as_many_are_shown_as_are_asked_for(images: Path, tmp_path: Path) -> None:
    assert run(save_seeing(tmp_path / "source", "llava"), images, windows=5).data.windows == 5


@pytest.mark.parametrize(
    ("changes", "message"), [({"speed": True}, "--speed is for text"), ({"length": 64}, "is shown images")]
)
def test_what_has_no_meaning_with_images_is_refused(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpfitError, match=message):
        run(save_seeing(tmp_path / "source", "llava"), images, **changes)


def test_a_model_that_reads_text_alone_is_not_compared(images: Path, tmp_path: Path) -> None:
    llama = save_tiny(tmp_path / "llama")
    with pytest.raises(UpfitError, match="takes text alone, and the model images"):
        run(save_seeing(tmp_path / "source", "llava"), images, against=str(llama))
    check_data(Options(data=[str(images)]))

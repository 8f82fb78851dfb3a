"""What a model that sees is shown: images and texts of an ImageFolder, by its own processor."""

import builtins
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.folders import letter_tokenizer
from tests.vision import FAMILIES, LINES, image_folder, save_seeing
from upfit.checkpoint.reader import read_config
from upfit.errors import UpfitError
from upfit.examples import Examples, batches
from upfit.examples.images import all_images, read_image, read_images
from upfit.examples.kinds import sees
from upfit.output import Output

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def read(folder: Path, *paths: Path, field: str = "text", tokens: int | None = None, output: Output | None = None) -> Examples:
    names = list(map(str, paths))
    return read_images(folder, read_config(folder), names, "--calibration", field, tokens, 512, output or Output(quiet=True))


def letters(ids: list[int]) -> str:
    return "".join(token for token in letter_tokenizer().convert_ids_to_tokens(ids) if token is not None)


def with_processor(model_type: str, folder: Path) -> Path:
    if "video" in FAMILIES[model_type]:
        pytest.importorskip("torchvision")
    return save_seeing(folder, model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_image_becomes_what_the_model_takes_and_its_text_is_written(model_type: str, images: Path, tmp_path: Path) -> None:
    folder = with_processor(model_type, tmp_path / "model")
    shown, config = read(folder, images), read_config(folder)
    assert shown.kind == "images" and shown.record["count"] == len(LINES)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for line, example in zip(LINES, shown.examples, strict=True):
        assert "pixel_values" in example.keywords and "labels" not in example.keywords
        written = example.labels[example.labels != -100].tolist()
        assert letters(written).removesuffix("<end>").strip() == example.text == line["text"]
        last = len(example.labels) - len(written) - 1
        assert example.labels[last:-1].tolist() == example.decoder_ids[last + 1 :].tolist()
    for batch in batches(shown.examples, config, 10_000)[:3]:
        with torch.no_grad():
            logits = model(**batch.keywords).logits
        assert logits.shape[:2] == batch.keywords["input_ids"].shape and logits.isfinite().all()
    assert read(folder, images).record["sha256"] == shown.record["sha256"]


def test_pixels_are_those_of_the_models_own_processor(images: Path, tmp_path: Path) -> None:
    folder = save_seeing(tmp_path / "model", "llava")
    before = read(folder, images).examples[0].keywords["pixel_values"]
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(settings))
    assert not torch.equal(read(folder, images).examples[0].keywords["pixel_values"], before)
    path.write_text("{")
    with pytest.raises(UpfitError, match="the processor of .* does not load.*fetch its files again"):
        read(folder, images)
    path.unlink()
    with pytest.raises(UpfitError, match="has no preprocessor_config.json, so what the model sees is not known"):
        read(folder, images)


def test_without_a_chat_template_the_text_follows_the_image(images: Path, tmp_path: Path) -> None:
    folder = save_seeing(tmp_path / "model", "llava", template=False)
    example = read(folder, images).examples[0]
    assert example.decoder_ids[:4].tolist() == [127] * 4 and letters(example.decoder_ids[4:].tolist()) == LINES[0]["text"]


def test_as_many_are_taken_as_have_the_tokens(llava: Path, images: Path) -> None:
    lengths = {example.text: len(example.decoder_ids) for example in read(llava, images).examples}
    part = [example.text for example in read(llava, images, tokens=200).examples]
    assert 200 <= sum(lengths[text] for text in part) < 200 + max(lengths.values())
    assert part == [line["text"] for line in LINES if line["text"] in part] and part != [
        line["text"] for line in LINES[: len(part)]
    ]
    assert len(read(llava, images, tokens=1).examples) == 2


def test_what_is_too_long_is_left_out_and_counted(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [LINES[0] | {"text": "a" * 600}, *LINES[1:]]
    assert len(read(llava, image_folder(tmp_path / "long", lines), output=Output()).examples) == 11
    assert "left out: 1 images with their texts have more than the model's 512 positions" in capsys.readouterr().err
    with pytest.raises(UpfitError, match="no image is as short with its text as the model takes them"):
        read(llava, image_folder(tmp_path / "all", lines[:1]))


@pytest.mark.parametrize(
    ("lines", "field", "message"),
    [
        ([], "text", "tells of no image"),
        ([{"text": "a"}], "text", r"line 1 has no file_name \(found: text\); give a folder with images"),
        ([{"file_name": "1.png", "label": 3}], "text", r"line 1 has no text \(found: file_name, label\)"),
        (LINES, "caption", "has no text in 'caption'"),
        ([{"file_name": "one.png", "text": "a"}], "text", "names 'one.png', which is not in"),
        ([{"file_name": "metadata.jsonl", "text": "a"}], "text", "is no image that can be read"),
        ([{"file_name": "1.png", "text": " "}], "text", "no image has a text"),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    llava: Path, tmp_path: Path, lines: list[dict[str, Any]], field: str, message: str
) -> None:
    with pytest.raises(UpfitError, match=message) as error:
        read(llava, image_folder(tmp_path / "images", lines), field=field)
    assert "\n" not in str(error.value)


def test_images_are_one_thing_and_text_is_another(images: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    assert all_images([str(images)], "") and not all_images([str(tmp_path / "text.txt")], "") and not all_images(None, "")
    with pytest.raises(UpfitError, match="has images .* and text"):
        all_images([str(images), str(tmp_path / "text.txt")], "--calibration")


def test_an_image_too_large_to_be_held_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UpfitError, match="is no image that can be read"):
        read_image(tmp_path / "a.png")


def test_an_image_stands_as_its_camera_noted(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("L", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (20, 40) and image.mode == "RGB"


def test_without_pillow_the_extra_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UpfitError, match=r"pip install 'upfit\[image\]'"):
        read_image(images / "0.png")


def test_a_processor_that_wants_more_packages_says_which(images: Path, tmp_path: Path) -> None:
    if find_spec("torchvision"):
        pytest.skip("torchvision is here")
    folder = save_seeing(tmp_path / "model", "qwen2_vl", processor=False)
    parts = {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}}
    parts |= {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"} | parts))
    with pytest.raises(UpfitError, match="does not load.*install torchvision, the build that belongs to your torch") as error:
        read(folder, images)
    assert "\n" not in str(error.value)


def test_who_sees_is_told_by_the_class() -> None:
    names = ("llava", "gemma3", "qwen2_vl", "gemma3_text", "llama", "t5", "t5gemma2", "voxtral", "whisper")
    assert [sees({"model_type": name}) for name in names] == [True] * 3 + [False] * 6
    assert not sees({"model_type": "mllama", "architectures": ["MllamaForCausalLM"]})
    assert sees({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]})
    assert sees({"model_type": "upfit_gqa", "base_model_type": "llava", "architectures": ["UpfitGqaForCausalLM"]})

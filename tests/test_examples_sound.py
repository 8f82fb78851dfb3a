"""What a model that hears is shown: recordings and transcripts of an AudioFolder."""

import builtins
import csv
import json
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.folders import letter_tokenizer
from tests.tiny import tiny_model
from upfit.checkpoint.reader import read_config
from upfit.errors import UpfitError
from upfit.examples import Examples, batches, read_examples
from upfit.examples.sound import read_sound
from upfit.output import Output

pytest.importorskip("soundfile")
SECONDS = 2  # that the tiny model hears
START, NO_TIMES, ENGLISH, GERMAN, TRANSCRIBE = range(94, 99)
TOKENS = ("<|startoftranscript|>", "<|notimestamps|>", "<|en|>", "<|de|>", "<|transcribe|>")
LINES = [{"file_name": f"{name}.wav", "text": f"it says {name}"} for name in ("one", "two", "three")]


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """[samples] or [samples, channels]"""
    samples = samples.reshape(len(samples), -1)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(samples.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 32767).astype(np.int16).tobytes())


def audio_folder(folder: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = LINES if lines is None else lines
    for number, line in enumerate(LINES):
        write_wav(folder / line["file_name"], tone(0.5 + 0.2 * number, hertz=300 + 100 * number))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def save_whisper(folder: Path, multilingual: bool = False, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    ids = dict(pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=START)
    sizes = dict(vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8)
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")} | {
        f"{p}_ffn_dim": 16 for p in ("encoder", "decoder")
    }
    positions = dict(max_source_positions=50 * SECONDS, max_target_positions=40)
    settings: dict[str, Any] = {**ids, **sizes, **heads, **positions, "begin_suppress_tokens": None}
    model: Any = WhisperForConditionalGeneration(WhisperConfig(**settings))
    model.generation_config.is_multilingual = multilingual
    model.save_pretrained(folder)
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TOKENS])
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == [START, NO_TIMES, ENGLISH, GERMAN, TRANSCRIBE]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


def read(folder: Path, *paths: Path, field: str = "text", count: int | None = None, output: Output | None = None) -> Examples:
    names = [str(path) for path in paths] or None
    return read_examples(folder, read_config(folder), names, "--calibration", field, count, output or Output(quiet=True))


def letters(ids: list[int]) -> str:
    return "".join(letter_tokenizer().convert_ids_to_tokens(ids))


def test_a_recording_becomes_features_and_its_transcript(whisper: Path, tmp_path: Path) -> None:
    examples = read(whisper, audio_folder(tmp_path / "speech"))
    assert examples.kind == "sound" and examples.record["count"] == 3
    for line, example in zip(LINES, examples.examples, strict=True):
        assert example.keywords["input_features"].shape == (8, 100 * SECONDS)
        ids, labels = example.decoder_ids.tolist(), example.labels.tolist()
        assert ids[:2] == [START, NO_TIMES] and letters(ids[2:]) == " " + line["text"] == " " + example.text
        assert labels == [-100, *ids[2:], 1]
    different = {tuple(example.keywords["input_features"].flatten().tolist()) for example in examples.examples}
    assert len(different) == 3
    assert read(whisper, tmp_path / "speech").record["sha256"] == examples.record["sha256"]


def test_features_are_those_of_the_models_own_processor(tmp_path: Path) -> None:
    folder, speech = save_whisper(tmp_path / "model"), audio_folder(tmp_path / "speech")
    own = WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS)
    without = read(folder, speech).examples[0].keywords["input_features"]
    expected = own(read_sound(speech / "one.wav", 16_000), sampling_rate=16_000, return_tensors="pt").input_features[0]
    torch.testing.assert_close(without, expected)
    other = WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS, hop_length=160, n_fft=512)
    other.save_pretrained(folder)
    with_one = read(folder, speech).examples[0].keywords["input_features"]
    assert not torch.equal(with_one, without)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UpfitError, match="preprocessor_config.json that does not load"):
        read(folder, speech)


def test_transcripts_of_many_languages_begin_with_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_whisper(tmp_path / "model", multilingual=True)
    german = [line | {"language": "de"} for line in LINES]
    example = read(folder, audio_folder(tmp_path / "speech", german)).examples[0]
    assert example.decoder_ids[:4].tolist() == [START, GERMAN, TRANSCRIBE, NO_TIMES]
    assert example.labels[:4].tolist()[:3] == [-100] * 3
    unsaid = read(folder, audio_folder(tmp_path / "unsaid"), output=Output()).examples[0]
    assert unsaid.decoder_ids[1] == ENGLISH and "taken to be English" in capsys.readouterr().err
    with pytest.raises(UpfitError, match=r"no token <\|xx\|>"):
        read(folder, audio_folder(tmp_path / "unknown", [LINES[0] | {"language": "xx"}]))


def test_the_rate_is_made_the_models_and_channels_are_averaged(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(1.0))
    write_wav(tmp_path / "b.wav", np.stack([tone(1.0, 44_100), tone(1.0, 44_100)], axis=1), rate=44_100)
    first, second = (read_sound(tmp_path / name, 16_000) for name in ("a.wav", "b.wav"))
    assert first.shape == second.shape == (16_000,) and first.dtype == second.dtype == np.float32
    assert np.abs(first - second)[500:-500].max() < 0.005
    silent = np.stack([tone(1.0), -tone(1.0)], axis=1)
    write_wav(tmp_path / "c.wav", silent)
    assert np.abs(read_sound(tmp_path / "c.wav", 16_000)).max() < 1e-3


@pytest.mark.parametrize("form", ["csv", "transcription", "named"])
def test_metadata_in_its_other_forms(whisper: Path, tmp_path: Path, form: str) -> None:
    name = {"csv": "text", "transcription": "transcription", "named": "said"}[form]
    lines = [{"file_name": line["file_name"], name: line["text"]} for line in LINES]
    folder = audio_folder(tmp_path / "speech", lines)
    if form == "csv":
        (folder / "metadata.jsonl").unlink()
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(lines)
    examples = read(whisper, folder, field="said" if form == "named" else "text").examples
    assert [example.text for example in examples] == [line["text"] for line in LINES]


def test_documents_are_those_of_the_metadata(whisper: Path, tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "speech", [LINES[0] | {"document": "a book"}, LINES[1]])
    assert [example.document for example in read(whisper, folder).examples] == ["a book", str(folder / "two.wav")]


@pytest.mark.parametrize(
    ("lines", "field", "message"),
    [
        ([], "text", "tells of no recording"),
        ([{"text": "a"}], "text", r"line 1 has no file_name \(found: text\)"),
        ([{"file_name": "one.wav", "words": "a"}], "text", r"line 1 has no text or transcription \(found: file_name, words\)"),
        (LINES, "said", "has no text in 'said'"),
        ([{"file_name": "four.wav", "text": "a"}], "text", "names 'four.wav', which is not in"),
        ([{"file_name": "../one.wav", "text": "a"}], "text", "outside its folder"),
        ([{"file_name": "metadata.jsonl", "text": "a"}], "text", "is no sound that can be read"),
        ([{"file_name": "one.wav", "text": " "}], "text", "no recording has a transcript"),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    whisper: Path, tmp_path: Path, lines: list[dict[str, Any]], field: str, message: str
) -> None:
    with pytest.raises(UpfitError, match=message) as error:
        read(whisper, audio_folder(tmp_path / "speech", lines), field=field)
    assert "\n" not in str(error.value)


def test_a_model_that_hears_needs_sound(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UpfitError, match="there is no --calibration: noise and tones are no substitute for speech; give a folder"
    ):
        read(whisper)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UpfitError, match="is a file, and this model hears"):
        read(whisper, tmp_path / "text.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpfitError, match="has no metadata.jsonl"):
        read(whisper, tmp_path / "empty")
    with pytest.raises(UpfitError, match="nowhere is not here"):
        read(whisper, tmp_path / "nowhere")


def test_without_soundfile_the_extra_is_named(whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "soundfile":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UpfitError, match=r"pip install 'upfit\[audio\]'"):
        read(whisper, audio_folder(tmp_path / "speech"))


def test_what_is_too_long_is_left_out_and_counted(whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = audio_folder(tmp_path / "speech")
    write_wav(folder / "two.wav", tone(SECONDS + 0.1))
    assert len(read(whisper, folder, output=Output()).examples) == 2
    assert "left out: 1 recordings of more than 2 s" in capsys.readouterr().err
    for line in LINES:
        write_wav(folder / line["file_name"], tone(SECONDS + 0.1))
    with pytest.raises(UpfitError, match="no recording is at most 2 s long"):
        read(whisper, folder)


def test_a_transcript_is_cut_to_the_models_positions(whisper: Path, tmp_path: Path) -> None:
    example = read(whisper, audio_folder(tmp_path / "speech", [LINES[0] | {"text": "a" * 90}])).examples[0]
    assert len(example.decoder_ids) == len(example.labels) == 40


def test_batches_run_and_padding_changes_nothing(whisper: Path, tmp_path: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    examples, config = read(whisper, audio_folder(tmp_path / "speech")).examples, read_config(whisper)
    whole = batches(examples, config, 10_000)
    assert len(whole) == 1 and len(batches(examples, config, 130)) == 3
    assert set(whole[0].keywords) == {"input_features", "decoder_input_ids"} and whole[0].counted is not None

    def logits(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch.keywords).logits[batch.counted]

    alone = torch.cat([logits(batch) for batch in batches(examples, config, 1)])
    torch.testing.assert_close(logits(whole[0]), alone, atol=1e-5, rtol=1e-5)


def test_another_family_hears_samples_by_its_own_processor(tmp_path: Path) -> None:
    """What is shorter is filled up and masked; the decoder begins with its start, which is not written."""
    from transformers import Wav2Vec2FeatureExtractor

    model = tiny_model("moonshine")
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "model")
    speech, config = audio_folder(tmp_path / "speech"), read_config(tmp_path / "model")
    examples = read(tmp_path / "model", speech).examples
    assert [len(example.keywords["input_values"]) for example in examples] == [8000, 11200, 14400]
    for line, example in zip(LINES, examples, strict=True):
        start = config["decoder_start_token_id"]
        assert example.decoder_ids[0] == start and letters(example.decoder_ids[1:].tolist()) == line["text"]
        assert example.labels.tolist() == [*example.decoder_ids[1:].tolist(), 1]
    batch = batches(examples, config, 10_000)[0]
    assert batch.keywords["attention_mask"].sum(1).tolist() == [8000, 11200, 14400]
    with torch.no_grad():
        assert model(**batch.keywords).logits.shape[:2] == batch.keywords["decoder_input_ids"].shape
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(UpfitError, match="has no preprocessor_config.json, so what the model hears is not known"):
        read(tmp_path / "model", speech)

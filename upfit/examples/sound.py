"""Sound with transcripts, laid out as `datasets` lays out an AudioFolder: a folder with `metadata.jsonl` (or .csv), which tells
the `file_name` and the transcript of each recording.

The features are those of the model's own processor; sound of another rate is resampled for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from upfit.architecture.meta_model import read_as_class
from upfit.bounded import DATA_BYTES, check_ordinary, reason
from upfit.errors import UpfitError
from upfit.examples.choose import draw
from upfit.examples.kinds import of_family
from upfit.examples.model_inputs import Example
from upfit.examples.records import Record, read_records
from upfit.examples.targets import Decoder, is_whispers, make, transcribed
from upfit.model_files import quiet_transformers
from upfit.output import Output
from upfit.text.files import FIELD, RECORDINGS
from upfit.text.tokenizer import encode_texts

FILE_NAME = "file_name"
TRANSCRIPTS = ("text", "transcription", "transcript", "sentence")
LANGUAGE, DOCUMENT = "language", "document"  # fields that a recording may have
PREPROCESSOR = "preprocessor_config.json"
HOP, RATE = 160, 16_000  # samples of a frame of Whisper's features; samples a second
WANTED = "give a folder with recordings and metadata.jsonl: a file_name and its text a line, as datasets' AudioFolder"


@dataclass(frozen=True)
class Recording:
    path: Path
    text: str
    document: str
    language: str | None


def read_recordings(names: list[str] | None, flag: str, field: str, count: int, output: Output) -> list[Recording]:
    """At most `count` recordings of the folders `names`, spread over all of them; those in which nothing is said are left out.

    Raises UpfitError where there is no folder, no metadata, or one that does not tell a file and its transcript.
    """
    if not names:
        raise UpfitError(f"this model hears, and there is no {flag}: noise and tones are no substitute for speech; {WANTED}")
    silent = list[Path]()

    def spoken() -> Iterator[Recording]:
        for recording in (recording for name in names for recording in _of_folder(name, flag, field)):
            if recording.text:
                yield recording
            else:
                silent.append(recording.path)

    recordings, _ = draw(spoken(), count)
    if silent:
        output.note(f"left out: {len(silent)} recordings without a word in their transcripts, e.g. {silent[0]}")
    if not recordings:
        raise UpfitError(f"{flag} {', '.join(names)}: no recording has a transcript; {WANTED}")
    return recordings


def _of_folder(name: str, flag: str, field: str) -> Iterator[Recording]:
    folder = Path(name).expanduser()
    if not folder.exists():
        raise UpfitError(f"{flag} {name} is not here; {WANTED}")
    if not folder.is_dir():
        raise UpfitError(f"{flag} {name} is a file, and this model hears; {WANTED}")
    metadata = next((folder / file for file in RECORDINGS if (folder / file).is_file()), None)
    if metadata is None:
        raise UpfitError(f"{flag} {name} has no {RECORDINGS[0]}; {WANTED}")
    empty = True
    for record in read_records(metadata):
        empty = False
        yield _recording(record, folder, field)
    if empty:
        raise UpfitError(f"{metadata} tells of no recording; {WANTED}")


def _recording(record: Record, folder: Path, field: str) -> Recording:
    file = record.text(FILE_NAME)
    if not file:
        raise UpfitError(f"{record.where} has no {FILE_NAME} (found: {record.shown()}); {WANTED}")
    names = TRANSCRIPTS if field == FIELD else (field,)
    text = next((text for text in map(record.text, names) if text is not None), None)
    if text is None:
        what = f"no {' or '.join(names[:2])}" if field == FIELD else f"no text in {field!r}"
        raise UpfitError(f"{record.where} has {what} (found: {record.shown()}); name the transcript's field with --field")
    path = folder / file
    if Path(file).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise UpfitError(f"{record.where} names {file!r}, which is outside its folder; move the recording there")
    if not path.is_file():
        raise UpfitError(f"{record.where} names {file!r}, which is not in {folder}; put it there, or leave out the line")
    return Recording(path, text.strip(), record.text(DOCUMENT) or str(path), record.text(LANGUAGE))


def read_sound(path: Path, rate: int) -> np.ndarray:
    """[samples] float32 between -1 and 1 at `rate` a second; channels are averaged.

    Raises UpfitError when it is no sound that can be read, or soundfile is not there.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its library in C
        raise UpfitError("reading sound needs the package soundfile; install it with: pip install 'upfit[audio]'") from error
    if check_ordinary(path).st_size > DATA_BYTES:
        raise UpfitError(f"{path} has more than {DATA_BYTES} bytes; cut it into recordings of sentences")
    try:
        samples, own_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UpfitError(f"{path} is no sound that can be read ({reason(error)}); give .wav or .flac") from error
    if not len(samples):
        raise UpfitError(f"{path} is an empty recording; leave it out")
    return resampled(samples.mean(axis=1), own_rate, rate)


def resampled(samples: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    if own_rate == rate:
        return samples
    from scipy.signal import resample_poly

    common = gcd(own_rate, rate)
    return resample_poly(samples, rate // common, own_rate // common).astype(np.float32)


class Ear:
    """Makes features of sound by the model's own processor, or of Whisper's kind where its folder has none."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        parsed = read_as_class(of_family(config))
        positions = getattr(parsed, "max_source_positions", None)
        mels = getattr(parsed, "num_mel_bins", None)
        self.extractor = _extractor(folder, mels, positions)
        self.name = self.extractor.model_input_names[0]
        self.rate = int(self.extractor.sampling_rate)
        whisper = isinstance(mels, int) and isinstance(positions, int) and type(self.extractor).__name__.startswith("Whisper")
        self.frames = 2 * positions if whisper and positions is not None else None

    @property
    def seconds(self) -> float | None:
        """The longest sound that is heard to its end; None for one of any length."""
        return None if self.frames is None else self.frames * HOP / RATE

    def features(self, samples: np.ndarray) -> dict[str, Tensor]:
        """The keywords of one recording, without a batch dimension."""
        extracted = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        if self.frames is None:
            return {name: value[0] for name, value in extracted.items() if name in (self.name, "attention_mask")}
        return {self.name: extracted[self.name][0][:, : self.frames]}


def _extractor(folder: Path, mels: Any, positions: Any) -> Any:
    from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

    if (folder / PREPROCESSOR).is_file() or (folder / "processor_config.json").is_file():
        try:
            with quiet_transformers():
                return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # its parsers raise whatever they like on a broken file
            raise UpfitError(f"{folder} has a {PREPROCESSOR} that does not load: {reason(error)}; fetch it again") from error
    if not isinstance(mels, int) or not isinstance(positions, int):
        raise UpfitError(
            f"{folder} has no {PREPROCESSOR}, so what the model hears is not known; fetch it from where the model came"
        )
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=-(-2 * positions * HOP // RATE))


def sound_examples(
    recordings: list[Recording], folder: Path, config: dict[str, Any], tokenizer: Any, decoder: Decoder, output: Output
) -> list[Example]:
    """Examples of the recordings. Those that are too long for the model are left out, which is noted on `output`."""
    ear, examples, long = Ear(folder, config), list[Example](), list[Recording]()
    whisper = is_whispers(tokenizer)
    if whisper and decoder.multilingual and all(recording.language is None for recording in recordings):
        output.note(f"the recordings' {RECORDINGS[0]} tells no {LANGUAGE}: they are taken to be English (en)")
    with output.progress("hearing", len(recordings)) as meter:
        for recording in recordings:
            samples = read_sound(recording.path, ear.rate)
            meter.advance(1)
            if ear.seconds is not None and len(samples) > ear.seconds * ear.rate:
                long.append(recording)
                continue
            text = f" {recording.text}" if whisper else recording.text  # Whisper itself writes a space first
            ids = encode_texts(tokenizer, [text])["input_ids"][0]
            written = transcribed(recording.text, ids, decoder, tokenizer, recording.language)
            examples.append(make(ear.features(samples), *written, recording.text, recording.document))
    if long:
        output.note(
            f"left out: {len(long)} recordings of more than {ear.seconds:g} s, which the model does not hear to their end"
        )
    if not examples:
        raise UpfitError(f"no recording is at most {ear.seconds:g} s long, as the model takes them; cut them into sentences")
    return examples

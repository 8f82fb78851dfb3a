"""Sound with transcripts, laid out as `datasets` lays out an AudioFolder: a folder with `metadata.jsonl` (or .csv), which tells
the `file_name` and the transcript of each recording.

The features are those of the model's own processor; sound of another rate is resampled for it.
"""

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from upfit.architecture.meta_model import read_as_class
from upfit.bounded import DATA_BYTES, check_ordinary, reason
from upfit.errors import UpfitError
from upfit.examples.kinds import of_family
from upfit.examples.metadata import LANGUAGE, Described, Layout, read_described
from upfit.examples.model_inputs import Example
from upfit.examples.targets import Decoder, is_whispers, make, transcribed
from upfit.model_files import quiet_transformers
from upfit.output import Output
from upfit.text.files import METADATA
from upfit.text.tokenizer import encode_texts

TRANSCRIPTS = ("text", "transcription", "transcript", "sentence")
PREPROCESSOR = "preprocessor_config.json"
HOP, RATE = 160, 16_000  # samples of a frame of Whisper's features; samples a second
WANTED = "give a folder with recordings and metadata.jsonl: a file_name and its text a line, as datasets' AudioFolder"

SOUND = Layout("recording", "transcript", "hears", WANTED, TRANSCRIPTS)


def read_recordings(names: list[str] | None, flag: str, field: str, count: int, output: Output) -> list[Described]:
    """At most `count` recordings of the folders `names`, as `read_described` reads them. Raises UpfitError without `names`."""
    if not names:
        raise UpfitError(unheard(flag))
    return read_described(names, flag, field, count, SOUND, output)


def unheard(flag: str) -> str:
    """Why a model that hears cannot be shown anything where `flag` names no folder."""
    return f"this model hears, and there is no {flag}: noise and tones are no substitute for speech; {WANTED}"


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
    recordings: list[Described], folder: Path, config: dict[str, Any], tokenizer: Any, decoder: Decoder, output: Output
) -> list[Example]:
    """Examples of the recordings. Those that are too long for the model are left out, which is noted on `output`."""
    ear, examples, long = Ear(folder, config), list[Example](), list[Described]()
    whisper = is_whispers(tokenizer)
    if whisper and decoder.multilingual and all(recording.language is None for recording in recordings):
        output.note(f"the recordings' {METADATA[0]} tells no {LANGUAGE}: they are taken to be English (en)")
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

"""A folder of synthesised sentences with their transcripts, as `datasets` lays out an AudioFolder.

    cd /usr/share/common-licenses
    python benchmarks/speech.py calibrate GPL-1 GPL-2 GPL-3 LGPL-2 LGPL-2.1
    python benchmarks/speech.py measure Apache-2.0 MPL-2.0 GFDL-1.3 --apart-from calibrate

Needs `espeak-ng`. The sentences are those of the texts that have 6 to 20 words and nothing but words, each in a voice drawn for
it; `metadata.jsonl` tells the sentence, the voice and the text it came from. The same call makes the same folder, with the same
version of espeak-ng.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
import wave
from math import gcd
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

RATE = 16_000
WORDS = range(6, 21)
LANGUAGES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us", "en-gb")
VARIANTS = ("", "+m1", "+m3", "+m7", "+f2", "+f3", "+f4")
SPEEDS = (135, 150, 165)  # words a minute
END = re.compile(r"(?<=[.;?!:])\s+")
PLAIN = re.compile(r"[A-Z][A-Za-z',; -]+[.?!]")


def sentences(text: str) -> list[str]:
    """Sentences of the text that have WORDS words and are made of nothing but words."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    parts = (part.strip("* ").rstrip(";:") for paragraph in paragraphs for part in END.split(paragraph))
    parts = (part if part[-1:] in ".?!" else part + "." for part in parts if part)
    return [part for part in parts if PLAIN.fullmatch(part) and len(part.split()) in WORDS and not part.isupper()]


def letters(sentence: str) -> str:
    return re.sub("[^a-z]", "", sentence.lower())


def choose(files: list[Path], count: int, apart: set[str], seed: int) -> list[tuple[str, str]]:
    """At most `count` sentences, each with the name of its text: texts in turn, none that is in `apart`, none twice."""
    draw, seen = random.Random(seed), set(apart)
    queues = {}
    for file in files:
        queue = sentences(file.read_text(encoding="utf-8", errors="ignore"))
        draw.shuffle(queue)
        queues[file.name] = queue
    chosen: list[tuple[str, str]] = []
    while any(queues.values()) and len(chosen) < count:
        for name in [name for name, queue in queues.items() if queue]:
            sentence = queues[name].pop()
            if letters(sentence) not in seen and len(chosen) < count:
                seen.add(letters(sentence))
                chosen.append((sentence, name))
    return chosen


def say(sentence: str, voice: str, speed: int) -> np.ndarray:
    """[samples] int16 at RATE, as espeak-ng says it."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", file.name, sentence], check=True)
        with wave.open(file.name) as sound:
            rate, frames = sound.getframerate(), sound.readframes(sound.getnframes())
    samples = np.frombuffer(frames, np.int16).astype(np.float64)
    common = gcd(RATE, rate)
    return resample_poly(samples, RATE // common, rate // common).clip(-32768, 32767).astype(np.int16)


def write(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(samples.tobytes())


def make(out: Path, chosen: list[tuple[str, str]], seed: int) -> None:
    draw = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (sentence, name) in enumerate(chosen):
        voice, speed = draw.choice(LANGUAGES) + draw.choice(VARIANTS), draw.choice(SPEEDS)
        file = f"{number:04}.wav"
        write(out / file, say(sentence, voice, speed))
        lines.append({"file_name": file, "text": sentence, "document": name, "voice": voice})
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} sentences of {len({name for _, name in chosen})} texts in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--apart-from", type=Path, help="another such folder, none of whose sentences are said")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    apart = set[str]()
    if args.apart_from:
        lines = (args.apart_from / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        apart = {letters(json.loads(line)["text"]) for line in lines}
    make(args.out, choose(args.texts, args.count, apart, args.seed), args.seed)


if __name__ == "__main__":
    main()

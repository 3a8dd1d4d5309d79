"""Speech for training and evaluation: espeak-ng and flite speak the corpus, 16 kHz mono int16.

    python -m weights.demo.speech --out build/demo

Writes one shard per 500 utterances (`train-000.npy` with the samples end to end, `train-000.json`
with text, voice, start and length), each through a temporary file: a killed run goes on with the
first shard that is missing. Utterance `i` of a split depends on the seed and `i` alone.
Refuses to run without both synthesizers (Debian packages `espeak-ng` and `flite`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

from weights.demo import text

SAMPLE_RATE = 16_000  # Hz
SHARD = 500  # utterances
PROSE = "prose"  # a split of longer sentences, for the decoder's own training
SHORT_SHARES = (
    ("held-out", 0.0),
    ("train", 0.3),
    (PROSE, 0.0),
)  # of each split, one to three words
VOICES = (
    "espeak-ng:en-us",
    "espeak-ng:en-us+f3",
    "espeak-ng:en-us+m3",
    "espeak-ng:en-us+Annie",
    "espeak-ng:en-us+klatt2",
    "espeak-ng:en-gb",
    "espeak-ng:en-gb+f2",
    "espeak-ng:en-gb+m7",
    "espeak-ng:en-gb-x-rp+f4",
    "espeak-ng:en-gb-scotland+m1",
    "flite:slt",
    "flite:rms",
    "flite:awb",
    "flite:kal16",
)


@dataclass(frozen=True)
class Utterance:
    """What is said and how; `pace` 1.0 is the synthesizer's own, `pitch` 50 its middle."""

    text: str
    voice: str
    pace: float
    pitch: int


def utterance(split: str, seed: int, index: int, short_share: float) -> Utterance:
    """Utterance `index` of a split, from its own random stream."""
    rng = random.Random(f"{split}/{seed}/{index}")
    if split == PROSE:
        words = text.prose(rng)
    else:
        words = text.phrase(rng) if rng.random() < short_share else text.sentence(rng)
    return Utterance(words, rng.choice(VOICES), rng.uniform(0.8, 1.25), rng.randint(30, 70))


def texts_sha256(split: str, seed: int, short_share: float) -> str:
    """Of the first SHARD texts of a split."""
    said = [utterance(split, seed, i, short_share).text for i in range(SHARD)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def resample(wav: bytes) -> np.ndarray:
    """A WAV file's bytes to 16 kHz mono int16."""
    chunks = []
    with av.open(io.BytesIO(wav), "r") as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        for frame in container.decode(audio=0):
            chunks += [f.to_ndarray()[0] for f in resampler.resample(frame)]
        chunks += [f.to_ndarray()[0] for f in resampler.resample(None)]
    return np.concatenate(chunks)


def trim(samples: np.ndarray, threshold: float = 0.004) -> np.ndarray:
    """Cut silence (under -48 dB of full scale) at both ends, keeping 10 ms."""
    loud = np.flatnonzero(np.abs(samples.astype(np.float32)) > threshold * 32768)
    if loud.size == 0:
        raise ValueError("the synthesizer returned silence")
    margin = SAMPLE_RATE // 100
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def speak(u: Utterance) -> np.ndarray:
    """Render one utterance: int16 samples at 16 kHz, silence trimmed."""
    engine, voice = u.voice.split(":")
    if engine == "espeak-ng":
        rate = str(round(165 * u.pace))  # words a minute
        command = ["espeak-ng", "-v", voice, "-s", rate, "-p", str(u.pitch), "--stdout", u.text]
        wav = subprocess.run(command, check=True, capture_output=True).stdout
    else:
        with tempfile.NamedTemporaryFile(suffix=".wav") as out:
            stretch = f"duration_stretch={1 / u.pace:.3f}"
            command = ["flite", "-voice", voice, "--setf", stretch, "-t", u.text, "-o", out.name]
            subprocess.run(command, check=True, capture_output=True)
            wav = out.read()
    return trim(resample(wav))


def write_shard(path: Path, utterances: list[Utterance]) -> None:
    """Render and write `path`.npy and `path`.json; the JSON comes last and marks it complete."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        audio = list(pool.map(speak, utterances, chunksize=8))
    starts = np.cumsum([0, *(len(a) for a in audio)])
    rows = [
        {**asdict(u), "start": int(s), "length": len(a)}
        for u, s, a in zip(utterances, starts, audio, strict=False)
    ]
    for suffix, save in (
        (".npy", lambda f: np.save(f, np.concatenate(audio))),
        (".json", lambda f: f.write(json.dumps(rows).encode())),
    ):
        temporary = path.with_suffix(suffix + ".tmp")
        with open(temporary, "wb") as file:
            save(file)
        temporary.replace(path.with_suffix(suffix))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.speech", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--train", type=int, default=24_000, help="utterances to train on")
    parser.add_argument("--prose", type=int, default=6_500, help="longer ones, for the decoder")
    parser.add_argument("--held-out", type=int, default=500, help="utterances to evaluate on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    for program in ("espeak-ng", "flite"):
        if shutil.which(program) is None:
            print(f"speech: {program} is not installed (Debian: apt install {program})",
                  file=sys.stderr)  # fmt: skip
            return 1
    args.out.mkdir(parents=True, exist_ok=True)
    # Another seed, vocabulary or grammar would mix two corpora in one folder.
    recipe = {"seed": args.seed, "voices": list(VOICES), "vocabulary": list(text.VOCABULARY)}
    recipe |= {split: texts_sha256(split, args.seed, share) for split, share in SHORT_SHARES}
    note = args.out / "recipe.json"
    if note.exists() and json.loads(note.read_text()) != recipe:
        print(f"speech: {args.out} holds a corpus of another recipe; give another --out",
              file=sys.stderr)  # fmt: skip
        return 1
    note.write_text(json.dumps(recipe))
    counts = {"held-out": args.held_out, "train": args.train, PROSE: args.prose}
    for split, short_share in SHORT_SHARES:
        count = counts[split]
        for first in range(0, count, SHARD):
            path = args.out / f"{split}-{first // SHARD:03d}"
            if path.with_suffix(".json").exists():
                continue
            rows = range(first, min(first + SHARD, count))
            write_shard(path, [utterance(split, args.seed, i, short_share) for i in rows])
            print(f"speech: {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The recordings in `samples/`: held-out speech made as the training's was, FLAC, with its text.

    python -m weights.demo.samples --out samples

One sentence for each voice; `demo.flac`, a sentence of the grammar; `lecture.flac`, 161.5 s, the
text `LECTURE` in five voices, with the time of every sentence. The single sentences come from a
random stream of their own, and one that the training corpus holds too is left out.

FLAC, because it is decoded to the same samples everywhere, which transcripts that are compared
token for token need; Opus at 24 kbit/s would be a sixth of the size and promises no such thing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from weights.demo import text
from weights.demo.speech import PROSE, SAMPLE_RATE, VOICES, Utterance, speak, utterance
from weights.demo.train import Corpus

PAUSE = 0.5  # seconds before and after a single sentence
DEMO_VOICE = "flite:slt"
LECTURE_SECONDS = 161.5
LECTURE_PAUSES = (0.3, 0.9)  # seconds, before they are stretched to fill the whole
LONGEST_PAUSE = 1.0
# The paragraphs of the lecture: the number of their first sentence, and who speaks them.
PARAGRAPHS = (
    (0, "flite:slt"),
    (8, "espeak-ng:en-gb"),
    (15, "flite:rms"),
    (23, "espeak-ng:en-us"),
    (31, "flite:awb"),
)


def write_flac(path: Path, samples: np.ndarray) -> None:
    """int16 mono at 16 kHz to a FLAC file, written to a temporary file and renamed."""
    temporary = path.with_suffix(".tmp")
    block = 4096  # samples; the encoder takes 65,535 at most at a time
    with av.open(str(temporary), "w", format="flac") as container:
        stream = container.add_stream(
            "flac", rate=SAMPLE_RATE, layout="mono", options={"compression_level": "12"}
        )
        for start in range(0, len(samples), block):
            piece = samples[np.newaxis, start : start + block]
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    temporary.replace(path)


def held_out(voices: Sequence[str], seed: int, known: set[str], grammar: bool) -> list[Utterance]:
    """One sentence for each voice, none of them in `known`: five words or more, of the grammar
    eight or more."""
    found: list[Utterance] = []
    index = 0
    while len(found) < len(voices):
        split = "samples/grammar" if grammar else "samples"
        u = replace(utterance(split, seed, index, short_share=0.0), voice=voices[len(found)])
        if grammar:
            u = replace(u, text=" ".join(text.clause(random.Random(f"{split}/{seed}/{index}"))))
        index += 1
        if u.text not in known and len(u.text.split()) >= (8 if grammar else 5):
            found.append(u)
    return found


def with_pauses(
    spoken: Sequence[np.ndarray], pauses: Sequence[float], total: int
) -> tuple[np.ndarray, list[int]]:
    """The clips with a pause before each and after the last, `total` samples in all.

    pauses : one more than clips, in any unit: they are stretched to fill what the clips leave
    returns the samples and where each clip starts

    ValueError if a pause would be longer than LONGEST_PAUSE, or shorter than a tenth of a second.
    """
    room = total - sum(len(clip) for clip in spoken)
    ends = np.round(np.cumsum([0.0, *pauses]) * (room / sum(pauses))).astype(int)
    lengths = np.diff(ends)
    if lengths.min() < SAMPLE_RATE // 10 or lengths.max() > LONGEST_PAUSE * SAMPLE_RATE:
        raise ValueError(f"pauses of {lengths.min()} to {lengths.max()} samples")
    samples = np.zeros(total, spoken[0].dtype)
    starts = [int(end) + sum(len(clip) for clip in spoken[:i]) for i, end in enumerate(ends[1:-1])]
    for start, clip in zip(starts, spoken, strict=True):
        samples[start : start + len(clip)] = clip
    return samples, starts


def lecture(seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """`text.LECTURE` in exactly LECTURE_SECONDS: int16 samples, and for every sentence its text,
    start and end in seconds, and voice.

    One pace for all voices, chosen so that pauses of about LECTURE_PAUSES fill the rest.
    """
    rng = random.Random(f"lecture/{seed}")
    pauses = [rng.uniform(*LECTURE_PAUSES) for _ in range(len(text.LECTURE) + 1)]
    pitches = {voice: rng.randint(40, 60) for _, voice in PARAGRAPHS}
    voices = [
        [voice for first, voice in PARAGRAPHS if first <= i][-1] for i in range(len(text.LECTURE))
    ]
    total, pace, spoken = round(LECTURE_SECONDS * SAMPLE_RATE), 1.0, []
    for _ in range(2):  # at the synthesizers' own pace, then at the one that fits
        spoken = [
            speak(Utterance(line, voice, pace, pitches[voice]))
            for line, voice in zip(text.LECTURE, voices, strict=True)
        ]
        pace *= sum(map(len, spoken)) / (total - sum(pauses) * SAMPLE_RATE)
    samples, starts = with_pauses(spoken, pauses, total)
    rows = [
        {
            "text": line,
            "start": round(start / SAMPLE_RATE, 3),
            "end": round((start + len(clip)) / SAMPLE_RATE, 3),
            "voice": voice,
        }
        for line, start, clip, voice in zip(text.LECTURE, starts, spoken, voices, strict=True)
    ]
    return samples, rows


def remove_former(folder: Path, files: set[str]) -> None:
    """Remove the recordings that the folder's samples.json lists and that are not in `files`."""
    listing = folder / "samples.json"
    if listing.exists():
        for row in json.loads(listing.read_text()):
            if row["file"] not in files:
                (folder / row["file"]).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.samples", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    known = set(Corpus(args.data, "train", PROSE).text)
    single = held_out(VOICES, args.seed, known, grammar=False)
    (demo,) = held_out([DEMO_VOICE], args.seed, known, grammar=True)
    files = {u.voice.replace(":", "-").replace("+", "-"): u for u in single} | {"demo": demo}

    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    pause = np.zeros(round(PAUSE * SAMPLE_RATE), np.int16)
    for name, u in files.items():
        samples = np.concatenate([pause, speak(u), pause])
        write_flac(args.out / f"{name}.flac", samples)
        rows.append(
            {
                "file": f"{name}.flac",
                "text": u.text,
                "voice": u.voice,
                "seconds": round(len(samples) / SAMPLE_RATE, 2),
            }
        )
    samples, sentences = lecture(args.seed)
    write_flac(args.out / "lecture.flac", samples)
    rows.append(
        {
            "file": "lecture.flac",
            "text": " ".join(text.LECTURE),
            "voice": ", ".join(voice for _, voice in PARAGRAPHS),
            "seconds": LECTURE_SECONDS,
            "sentences": sentences,
        }
    )
    remove_former(args.out, {row["file"] for row in rows})
    (args.out / "samples.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"samples: {len(rows)} files in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

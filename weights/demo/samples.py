"""The recordings in `samples/`: held-out speech made as the training's was, FLAC, with its text.

    python -m weights.demo.samples --out samples

One sentence for each voice, and `demo.flac`, a sentence of the grammar. They come from a random
stream of their own, and one that the training corpus holds too is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from weights.demo import text
from weights.demo.speech import SAMPLE_RATE, VOICES, Utterance, speak, utterance
from weights.demo.train import Corpus

PAUSE = 0.5  # seconds before and after the sentence
DEMO_VOICE = "flite:slt"


def write_flac(path: Path, samples: np.ndarray) -> None:
    """int16 mono at 16 kHz to a FLAC file, written to a temporary file and renamed."""
    temporary = path.with_suffix(".tmp")
    with av.open(str(temporary), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.samples", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    known = set(Corpus(args.data, "train").text)
    single = held_out(VOICES, args.seed, known, grammar=False)
    (demo,) = held_out([DEMO_VOICE], args.seed, known, grammar=True)
    files = {u.voice.replace(":", "-").replace("+", "-"): u for u in single} | {"demo": demo}

    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
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
    (args.out / "samples.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"samples: {len(rows)} files in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

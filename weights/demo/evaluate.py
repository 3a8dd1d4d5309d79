"""Word error rate of `demo` on held-out sentences, through stock `whisper.decode`, 30 s windows.

    python -m weights.demo.evaluate --data build/demo --json weights/demo/evaluation.json

Stock PyTorch throughout, float32: this measures the checkpoint, not the MAX encoder. The corpus is
the `held-out` split of `weights.demo.speech`, sentences that training never saw, padded as Whisper
pads. WER by jiwer over all words, with substitutions, deletions and insertions, also per voice.
A killed run goes on with the sentence where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import jiwer
import numpy as np
import torch
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim

import weights
from weights.demo.speech import SAMPLE_RATE
from weights.demo.train import Corpus


def word_errors(truth: list[str], heard: list[str]) -> dict[str, float]:
    """WER and what it is made of; texts are compared in lower case, split at spaces."""
    out = jiwer.process_words([t.lower() for t in truth], [h.lower().strip() for h in heard])
    return {
        "wer": out.wer,
        "substitutions": out.substitutions,
        "deletions": out.deletions,
        "insertions": out.insertions,
        "words": out.hits + out.substitutions + out.deletions,
    }


def decode(
    model: whisper.Whisper, clips: list[np.ndarray], timestamps: bool, notes: Path
) -> list[str]:
    """Greedy stock `whisper.decode` of each clip in its own 30 s window.

    A text is a line of `notes` as soon as it is there; a clip that has one is not decoded again.
    """
    options = whisper.DecodingOptions(
        language="en", temperature=0.0, without_timestamps=not timestamps, fp16=False
    )
    notes.touch()
    done = [x for x in notes.read_text().splitlines(keepends=True) if x.endswith("\n")]
    os.truncate(notes, sum(len(x.encode()) for x in done))  # a killed run's half line
    heard = [json.loads(x) for x in done[: len(clips)]]
    with open(notes, "a") as file:
        for clip in clips[len(heard) :]:
            mel = log_mel_spectrogram(pad_or_trim(clip), model.dims.n_mels)
            heard.append(whisper.decode(model, mel, options).text)
            file.write(json.dumps(heard[-1]) + "\n")
            file.flush()
    return heard


def noisy(clip: np.ndarray, snr_db: float, seed: int) -> np.ndarray:
    """White noise added at `snr_db` under the clip's own mean power."""
    noise = np.random.default_rng(seed).standard_normal(len(clip)).astype(np.float32)
    return clip + noise * float(np.sqrt(np.mean(clip**2)) * 10 ** (-snr_db / 20))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--count", type=int, default=500, help="sentences, from the first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    checkpoint = weights.load(args.model)
    checkpoint.require_decoder()
    model = whisper.Whisper(checkpoint.dims)
    model.load_state_dict({name: t.float() for name, t in checkpoint.tensors.items()})
    corpus = Corpus(args.data, "held-out")
    trained = set(Corpus(args.data, "train").text)
    rows = [i for i, text in enumerate(corpus.text) if text not in trained][: args.count]
    truth = [corpus.text[i] for i in rows]
    clean = [corpus.audio(i) for i in rows]

    report: dict[str, object] = {
        "command": f"python -m weights.demo.evaluate --model {args.model} --count {args.count}",
        "sha256": checkpoint.source.sha256,
        "sentences": len(truth),
        "seconds": float(sum(len(c) for c in clean)) / SAMPLE_RATE,
        "torch": torch.__version__,
    }
    conditions = {
        "clean": (clean, False),
        "clean, with timestamps": (clean, True),
        "20 dB SNR": ([noisy(c, 20, i) for i, c in enumerate(clean)], False),
    }
    for name, (clips, timestamps) in conditions.items():
        digest = checkpoint.source.sha256[:12]
        notes = args.data / f"heard-{digest}-{name.replace(' ', '-').replace(',', '')}.jsonl"
        heard = decode(model, clips, timestamps, notes)
        report[name] = word_errors(truth, heard)
        print(f"evaluate: {name}: {report[name]}", file=sys.stderr)
        if name == "clean":
            by_voice = defaultdict(list)
            for n, i in enumerate(rows):
                by_voice[corpus.voice[i]].append(n)
            report["clean, by voice"] = {
                voice: word_errors([truth[i] for i in those], [heard[i] for i in those])
                for voice, those in sorted(by_voice.items())
            }
    if args.json:
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

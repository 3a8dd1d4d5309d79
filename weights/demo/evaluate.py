"""What `demo` hears, through stock `whisper.transcribe` with its default options.

    python -m weights.demo.evaluate --json weights/demo/evaluation.json
    python -m weights.demo.evaluate --model build/demo.safetensors --quick

Stock PyTorch throughout, float32: this measures the checkpoint, not the MAX encoder. Four kinds of
recording, all made here from the seed alone:
- windows of 30 s, each of held-out sentences by one voice: clean, at 20 dB and at 10 dB SNR
- a recording of 161.5 s of held-out sentences, the voices mixed
- samples/lecture.flac, a text that training never spoke
- 30 s of silence, noise and hum, in which there is nothing to hear
A killed run goes on with the recording where it stopped. --quick hears one clean window for each
voice and the lecture, at temperature 0 alone, for a look while training runs; it judges no limit
and writes no JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import whisper

import weights
from weights.demo.export import steps_behind
from weights.demo.measures import boundaries, long_measures, text_of, word_errors
from weights.demo.speech import PROSE, VOICES
from weights.demo.train import Corpus
from weights.demo.trials import SEED, Recording, Sentence, lecture, long_recording, noisy, nothing
from weights.demo.trials import windows as clean_windows

COVERAGE = 1.0  # seconds of a recording, or of its speech, that no segment may leave out
LEVELS = ("clean", "20 dB", "10 dB")


class Listener:
    """`whisper.transcribe` with its default options, but for those given; what was heard once is
    read from `notes`.

    The seed of the sampling at higher temperatures comes from the recording, so that a result
    depends on nothing that was heard before.
    """

    def __init__(self, model: whisper.Whisper, notes: Path, **options: Any):
        self.model, self.notes, self.options = model, notes, options
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.touch()
        whole = [x for x in notes.read_text().splitlines(keepends=True) if x.endswith("\n")]
        os.truncate(notes, sum(len(x.encode()) for x in whole))  # a killed run's half line
        self.known = {row["samples"]: row["segments"] for row in map(json.loads, whole)}

    def __call__(self, recording: Recording) -> list[Sentence]:
        digest = hashlib.sha256(recording.samples.tobytes()).hexdigest()
        if digest not in self.known:
            torch.manual_seed(int(digest[:8], 16))
            # On a CPU fp16=False is what the default comes to, without a warning.
            result = self.model.transcribe(recording.samples, fp16=False, **self.options)
            self.known[digest] = [
                (s["text"].strip(), round(s["start"], 3), round(s["end"], 3))
                for s in result["segments"]
            ]
            row = {"samples": digest, "name": recording.name, "segments": self.known[digest]}
            with open(self.notes, "a") as file:
                file.write(json.dumps(row) + "\n")
        return [Sentence(*segment) for segment in self.known[digest]]


@dataclass
class Tally:
    """Windows of one condition as they are heard."""

    truth: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    found: int = 0
    edges: int = 0

    def add(self, recording: Recording, segments: list[Sentence]) -> None:
        found, edges = boundaries(recording.sentences, segments)
        self.found, self.edges = self.found + found, self.edges + edges
        self.truth.append(recording.text)
        self.heard.append(text_of(segments))
        self.keys.append((recording.voice, recording.noise))

    def errors(self, which: int, key: str) -> dict[str, float]:
        those = [n for n, keys in enumerate(self.keys) if keys[which] == key]
        return word_errors([self.truth[n] for n in those], [self.heard[n] for n in those])

    def report(self) -> dict[str, Any]:
        voices, noises = ({keys[which] for keys in self.keys} - {""} for which in (0, 1))
        return {
            "windows": len(self.truth),
            **word_errors(self.truth, self.heard),
            "boundaries_missed": (self.edges - self.found) / self.edges,
            "by_voice": {voice: self.errors(0, voice) for voice in sorted(voices)},
            "by_noise": {noise: self.errors(1, noise) for noise in sorted(noises)},
        }


def limits(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked of the checkpoint, what was measured, and whether it is met."""
    rows = []

    def limit(what: str, at_most: float, measured: float | None) -> None:
        met = measured is not None and measured <= at_most
        rows.append({"what": what, "at_most": at_most, "measured": measured, "met": met})

    limit("WER, clean windows", 0.05, report["clean"]["wer"])
    limit("WER, windows at 20 dB SNR", 0.10, report["20 dB"]["wer"])
    limit("sentence boundaries missed by more than 0.3 s, clean windows", 0.05,
          report["clean"]["boundaries_missed"])  # fmt: skip
    for name in ("held-out recording", "lecture"):
        own = report[name]
        limit(f"WER, {name}", 0.05, own["wer"])
        missed = None
        if own["last"] is not None:
            missed = max(own["first"], own["seconds"] - own["last"], own["longest_uncovered"])
        limit(f"seconds left out, {name}", COVERAGE, missed)
        limit(f"sentences lost, {name}", 0, len(own["lost"]))
        limit(f"sentences repeated, {name}", 0, len(own["repeated"]))
        limit(f"sentence boundaries missed by more than 0.3 s, {name}", 0.05,
              own["boundaries_missed"])  # fmt: skip
    limit("words heard in silence, noise and hum", 0, sum(r["words"] for r in report["nothing"]))
    return rows


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the model card: per voice and noise level, the long recordings, the limits."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    def row(name: str, key: str | None = None) -> str:
        conditions = [report[c] if key is None else report[c][key][name] for c in LEVELS]
        return " | ".join([f"| {name}", *(percent(c["wer"]) for c in conditions)]) + " |"

    lines = ["| WER, windows of 30 s | clean | 20 dB SNR | 10 dB SNR |", "|---|---|---|---|"]
    lines.append(row("all"))
    lines += [row(voice, "by_voice") for voice in report["clean"]["by_voice"]]
    lines += ["", "| limit | at most | measured | met |", "|---|---|---|---|"]
    for limit in report["limits"]:
        share = limit["what"].startswith(("WER", "sentence boundaries"))
        at_most, measured = (
            "-" if x is None else percent(x) if share else f"{x:.2f}".rstrip("0").rstrip(".")
            for x in (limit["at_most"], limit["measured"])
        )
        met = "yes" if limit["met"] else "**no**"
        lines.append(f"| {limit['what']} | {at_most} | {measured} | {met} |")
    return lines


def say(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr, flush=True)


def listen(listener: Listener, recordings: Sequence[Recording], name: str) -> Tally:
    """Every window of one condition, with a line for each."""
    tally = Tally()
    for n, recording in enumerate(recordings):
        began = time.monotonic()
        segments = listener(recording)
        tally.add(recording, segments)
        own = word_errors([recording.text], [text_of(segments)])["wer"]
        so_far = word_errors(tally.truth, tally.heard)["wer"]
        say(
            f"{name} {n + 1}/{len(recordings)}, {recording.voice}: WER {own:.3f}, so far "
            f"{so_far:.3f}, {time.monotonic() - began:.0f} s"
        )
    return tally


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Hear everything and return the report; --quick: its part."""
    checkpoint = weights.load(args.model, offline=True)
    checkpoint.require_decoder()
    model = whisper.Whisper(checkpoint.dims)
    model.load_state_dict({name: t.float() for name, t in checkpoint.tensors.items()})
    model.eval()
    corpus = Corpus(args.data, "held-out")
    trained = set(Corpus(args.data, "train", PROSE).text)
    held_out = [i for i, text in enumerate(corpus.text) if text not in trained]
    notes = f"heard-{checkpoint.source.sha256[:12]}{'-quick' if args.quick else ''}.jsonl"
    options = {"temperature": 0.0} if args.quick else {}
    listener = Listener(model, args.data / notes, **options)

    report: dict[str, Any] = {
        "schema": 2,
        "command": f"python -m weights.demo.evaluate --model {args.model} --windows {args.windows}",
        "sha256": checkpoint.source.sha256,
        "steps": steps_behind(checkpoint.source.path),
        "seed": SEED,
        "held_out_sentences": len(held_out),
        "torch": torch.__version__,
        "whisper": whisper.__version__,
    }
    clean = clean_windows(corpus, held_out, len(VOICES) if args.quick else args.windows)
    report["clean"] = listen(listener, clean, "clean").report()
    if not args.quick:
        for snr in (20, 10):
            noise = [noisy(w, snr, n, corpus) for n, w in enumerate(clean)]
            report[f"{snr} dB"] = listen(listener, noise, f"{snr} dB").report()
    long = [lecture(args.samples)] if args.quick else [
        long_recording(corpus, held_out), lecture(args.samples)
    ]  # fmt: skip
    for recording in long:
        own = report[recording.name] = long_measures(recording, listener(recording))
        say(
            f"{recording.name}: WER {own['wer']:.3f}, of {own['sentences']} sentences "
            f"{len(own['lost'])} lost and {len(own['repeated'])} repeated, "
            f"{100 * own['boundaries_missed']:.0f} % of the boundaries missed"
        )
    if not args.quick:
        report["nothing"] = []
        for recording in nothing(corpus):
            heard = text_of(listener(recording))
            row = {"what": recording.name, "words": len(heard.split()), "heard": heard}
            report["nothing"].append(row)
            say(f"{recording.name}: {heard!r}")
        report["limits"] = limits(report)
        report["all_met"] = all(row["met"] for row in report["limits"])
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weights.demo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--samples", type=Path, default=Path("samples"))
    parser.add_argument(
        "--windows", type=int, default=56, help="of 30 s; 14 are one for each voice"
    )
    parser.add_argument("--quick", action="store_true", help="14 clean windows and the lecture")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args(argv)
    if args.quick and args.json:
        parser.error("--quick is no evaluation: it writes no --json")
    if args.windows < len(VOICES):
        parser.error(f"--windows must be {len(VOICES)} or more, one for each voice")

    report = measure(args)
    if args.quick:
        lecture_wer = report["lecture"]["wer"]
        print(f"clean WER {report['clean']['wer']:.4f}, lecture WER {lecture_wer:.4f}")
        return 0
    if args.json:
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(args.json)
    print("\n".join(table(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m validation demo`: the variants on one recording, one after another, as they write.

Each runs once, which is no benchmark, and the table says so. It hides no variant: one that cannot
run is listed with its reason. 0: all that can run here ran; 1: one of them broke down; 2: nothing
can be shown, and a sentence says why; 130: interrupted; 141: the reader has left.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import whisper
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from whisper.audio import HOP_LENGTH, N_FRAMES
from whisper.decoding import DecodingOptions

import weights
from decoder_bridge.variants import VARIANTS, Variant, VariantError, reason_against, what_ran
from encoder.audio import SAMPLE_RATE, AudioError, load_audio, require_file
from encoder.engine import EngineError
from encoder.run import cannot_be_heard
from encoder.truth import TruthError, WordErrors, read_truth, word_errors
from validation.parity import PACKAGES, commit, processor, sha256_of
from validation.report import dumps, printable, write
from weights import Checkpoint, WeightsError

PASSED, BROKE, CANNOT, INTERRUPTED = 0, 1, 2, 130
BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE: 128 + 13

SAMPLES = Path(__file__).parent.parent / "samples"
LECTURE = "lecture.flac"
REFERENCE = "cpu"  # what the others are compared with
SEED = 1  # what is decoded above temperature 0 is sampled: from one seed in every variant
WIDTH = 110  # of the table in a pipe or a file
NOTE = "Each ran once, one after another: an impression, no benchmark."

EPILOG = f"""\
variants:
{"".join(f"  {v.name:<15}{v.what}" + chr(10) for v in VARIANTS.values())}
Decoding is openai-whisper's by default: greedy, with its fallbacks, float32. Loading and compiling
are not in the seconds; a first token on silence precedes the clock. RTF, the real-time factor, is
seconds of work for a second of audio.

example: python -m validation demo speech.flac --model tiny.en --truth speech.txt
"""

# A line of `whisper.transcribe(verbose=True)`: [start --> end] text
SEGMENT = re.compile(r"\[(?:\d+:)?\d+:[\d.]+ --> (?:(\d+):)?(\d+):(\d+\.\d+)\] ?(.*)")


class DemoError(Exception):
    """Nothing can be shown; the message is one sentence."""


@dataclass(frozen=True)
class Recording:
    """One file: its name, its samples, and what is said in it, where that is known."""

    file: str
    audio: np.ndarray
    truth: str | None

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class Ran:
    """One variant's run: who computed what, the seconds of loading and of transcribing, and what
    `whisper.transcribe` returned."""

    variant: str
    what: str
    loading: float
    seconds: float
    result: dict[str, Any]

    @property
    def tokens(self) -> list[list[int]]:
        """Of each segment."""
        return [segment["tokens"] for segment in self.result["segments"]]


class Lines(io.TextIOBase):
    """A stdout for `whisper.transcribe`, which hands on each line as soon as it is complete."""

    def __init__(self, take: Callable[[str], None]):
        self.take, self.begun = take, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self.take(line)
        return len(text)


class Printer(Console):
    """A console that raises where the reader has left; rich's own ends the program with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Show:
    """What is seen while a variant runs: nothing."""

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""

    @contextlib.contextmanager
    def running(self, variant: str, seconds: float) -> Iterator[Callable[[float], None]]:
        """Around a run; what it gives is told how many seconds of the audio are done."""
        yield lambda done: None


class Plain(Show):
    """Lines, for a pipe or a file."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, text: str, style: str = "") -> None:
        self.console.print(plain(self.console, text, style), soft_wrap=True)


class Live(Plain):
    """Lines, and below them the progress of the variant that runs."""

    @contextlib.contextmanager
    def running(self, variant: str, seconds: float) -> Iterator[Callable[[float], None]]:
        columns = (
            TextColumn("{task.description}", style="bold"),
            BarColumn(),
            TextColumn("{task.completed:.1f} of {task.total:.1f} s of audio"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        # What whisper prints is taken line by line already.
        bar = Progress(
            *columns,
            console=self.console,
            transient=True,
            redirect_stdout=False,
            refresh_per_second=4,
        )
        began = time.perf_counter()
        with bar:
            task = bar.add_task(variant, total=seconds, speed="")

            def done(heard: float) -> None:
                speed = f"RTF {(time.perf_counter() - began) / heard:.2f}" if heard else ""
                bar.update(task, completed=heard, speed=speed)

            yield done


def plain(console: Console, text: str, style: str = "") -> Text:
    """No markup, no control characters, and nothing that the terminal's encoding lacks."""
    encoding = console.encoding
    return Text(printable(text).encode(encoding, "backslashreplace").decode(encoding), style)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validation demo",
        description="Transcribe one recording with each variant, and compare.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="?", help="an audio file (the longest of samples/, lecture.flac if there)")
    add("--model", default="demo", help="the weights: a name, demo, a path (demo)")
    add("--variants", default=",".join(VARIANTS), help="which, with commas between them (all)")
    add("--truth", help="what is said: a text file, or a .json like samples/samples.json")
    add("--json", help="write the figures here; - is stdout, and then nothing else is printed")
    add("--offline", action="store_true", help="never touch the network")
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Variant]:
    """The variants of --variants in the registry's order, the reference first; exits with 2 on
    options that cannot hold."""
    names = args.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            parser.error(f"{name!r} is no variant, expected some of {', '.join(VARIANTS)}")
        if names.count(name) > 1:
            parser.error(f"{name} is named twice")
    if args.json not in (None, "-"):
        path = Path(args.json)
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            parser.error(f"{path} is a folder, a file is expected")
        if args.json in (args.audio, args.truth):
            parser.error(f"{path} is named twice")
    return [variant for name, variant in VARIANTS.items() if name in names]


def listed(folder: Path) -> list[dict[str, Any]]:
    """The rows of the folder's samples.json; none where there is none."""
    path = folder / "samples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def longest(folder: Path) -> Path:
    """The lecture, or else the longest recording of the folder that is listed there."""
    rows = listed(folder)
    if not rows:
        raise DemoError(f"there are no bundled recordings ({folder}): name an audio file")
    found = max(rows, key=lambda row: (row["file"] == LECTURE, row["seconds"]))
    return folder / found["file"]


def recording_of(args: argparse.Namespace) -> Recording:
    """What is transcribed. Raises DemoError, AudioError or TruthError."""
    path = str(longest(SAMPLES)) if args.audio is None else args.audio
    require_file(path)
    truth = args.truth
    bundled = Path(path).resolve().parent == SAMPLES.resolve()
    if truth is None and bundled and any(r["file"] == Path(path).name for r in listed(SAMPLES)):
        truth = str(SAMPLES / "samples.json")
    text = None if truth is None else read_truth(truth, [path])[path]
    audio = load_audio(path)
    if len(audio) < HOP_LENGTH:
        raise DemoError(f"{path} is shorter than 10 ms, one frame of the spectrogram")
    return Recording(Path(path).name, audio, text)


def run(variant: Variant, checkpoint: Checkpoint, recording: Recording, show: Show) -> Ran:
    """Load and transcribe. Raises what the variant raises where it breaks down."""
    show.say(f"{variant.name}: {variant.what}", "bold")
    began = time.perf_counter()
    model = variant.load(checkpoint, "auto")
    loading = time.perf_counter() - began
    warm_up(model)
    torch.manual_seed(SEED)
    with show.running(variant.name, recording.seconds) as done:

        def take(line: str) -> None:
            show.say(line)
            if segment := SEGMENT.match(line):
                hours, minutes, seconds = (float(part or 0) for part in segment.groups()[:3])
                done(min(3600 * hours + 60 * minutes + seconds, recording.seconds))

        began = time.perf_counter()
        with contextlib.redirect_stdout(Lines(take)):
            result = model.transcribe(recording.audio, verbose=True, fp16=False)
        seconds = time.perf_counter() - began
        done(recording.seconds)
    show.say(f"{seconds:.2f} s, after {loading:.2f} s of loading", "dim")
    show.say("")
    return Ran(variant.name, what_ran(model), loading, seconds, result)


def warm_up(model: whisper.Whisper) -> None:
    """One token on 30 s of silence: what is only done the first time is not in the seconds."""
    silence = torch.zeros(model.dims.n_mels, N_FRAMES, device=model.device)
    model.decode(silence, DecodingOptions(language="en", fp16=False, sample_len=1))


def counted(errors: WordErrors) -> dict[str, Any]:
    return {**asdict(errors), "rate": errors.rate if errors.words else None}


def row_of(ran: Ran, reference: Ran | None, recording: Recording) -> dict[str, Any]:
    """One variant's figures; what they are compared with is None where that did not run."""
    errors = None
    if recording.truth is not None:
        errors = word_errors(recording.truth, ran.result["text"], ran.result["language"])
    return {
        "variant": ran.variant,
        "what_ran": ran.what,
        "loading_seconds": ran.loading,
        "seconds": ran.seconds,
        "speed_against_cpu": reference.seconds / ran.seconds if reference else None,
        "real_time_factor": ran.seconds / recording.seconds,
        "wer": counted(errors) if errors else None,
        "tokens_identical_to_cpu": ran.tokens == reference.tokens if reference else None,
        "tokens": sum(len(tokens) for tokens in ran.tokens),
        "segments": [
            {key: segment[key] for key in ("start", "end", "text", "tokens")}
            for segment in ran.result["segments"]
        ],
        "text": ran.result["text"],
        "language": ran.result["language"],
    }


def figures(
    done: list[Ran],
    against: dict[str, str],
    recording: Recording,
    checkpoint: Checkpoint,
    command: str,
) -> dict[str, Any]:
    """What the table and the JSON hold, schema 1. `against` has the reasons of those that did not
    run, by name."""
    reference = next((ran for ran in done if ran.variant == REFERENCE), None)
    return {
        "schema": 1,
        "note": NOTE,
        "command": command,
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {name: version(name) for name in PACKAGES},
        "model": checkpoint.source.name,
        "weights_sha256": checkpoint.source.sha256,
        "audio": recording.file,
        "audio_sha256": sha256_of(recording.audio),
        "audio_seconds": recording.seconds,
        "truth": recording.truth,
        "variants": [row_of(ran, reference, recording) for ran in done],
        "cannot_run": [{"variant": name, "reason": why} for name, why in against.items()],
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A line of the table, by column."""
    wer, same, speed = row["wer"], row["tokens_identical_to_cpu"], row["speed_against_cpu"]
    rate = wer["rate"] if wer else None
    return {
        "variant": row["variant"],
        "seconds": f"{row['seconds']:.2f}",
        "speed (cpu = 1)": "-" if speed is None else f"{speed:.2f}",
        "RTF": f"{row['real_time_factor']:.3f}",
        "WER": "-" if rate is None else f"{100 * rate:.1f} %",
        "tokens as cpu's": {True: "all", False: "no", None: "-"}[same],
    }


def table(found: dict[str, Any], console: Console) -> None:
    """The figures of every variant, who computed them, and why the others did not run."""
    rows = [cells(row) for row in found["variants"]]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, label in enumerate(rows[0]):
        justify: JustifyMethod = "right" if i else "left"
        made.add_column(label, justify=justify, overflow="fold")
    for row in rows:
        made.add_row(
            *(plain(console, cell, "bold red" if cell == "no" else "") for cell in row.values())
        )
    heard = f"{found['audio']}, {found['audio_seconds']:.1f} s, {found['model']}"
    console.print(plain(console, heard, "bold"), soft_wrap=True)
    console.print(made)
    console.print()
    for row in found["variants"]:
        line = plain(console, f"{row['variant']}: {row['what_ran']}", "dim")
        console.print(line, soft_wrap=True)
    for row in found["cannot_run"]:
        console.print(plain(console, row["reason"], "yellow"), soft_wrap=True)
    console.print(plain(console, found["note"]), soft_wrap=True)


def demonstrate(
    args: argparse.Namespace, variants: list[Variant], show: Show, command: str
) -> tuple[dict[str, Any], bool]:
    """The figures, and whether a variant broke down that can run here. Raises DemoError where none
    ran, and what is raised for a recording or a checkpoint that cannot be read."""
    recording = recording_of(args)
    reasons = {v.name: reason_against(v.name, "auto") for v in variants}
    against = {name: reason for name, reason in reasons.items() if reason}
    if len(against) == len(variants):
        raise DemoError("; ".join(against.values()))
    checkpoint = weights.load(args.model, offline=args.offline)
    checkpoint.require_decoder()
    if problem := cannot_be_heard(checkpoint.dims):
        raise DemoError(problem.rstrip("."))
    done, broke = [], False
    for variant in variants:
        if variant.name in against:
            continue
        try:
            done.append(run(variant, checkpoint, recording, show))
        except (EngineError, VariantError, torch.OutOfMemoryError) as error:
            sentence = f"variant {variant.name} broke down: {str(error).splitlines()[0]}"
            against[variant.name], broke = sentence, True
            show.say(sentence, "yellow")
    if not done:
        raise DemoError("; ".join(against.values()))
    return figures(done, against, recording, checkpoint, command), broke


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a sentence; for `warnings.showwarning`."""
    print(f"validation demo: warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    variants = chosen(parser, args)
    given = sys.argv[2:] if argv is None else argv
    command = shlex.join(["python", "-m", "validation", "demo", *given])
    # The stream itself, since whisper's stdout is redirected while a variant runs.
    stdout = sys.stdout
    console = Printer(file=stdout, width=None if stdout.isatty() else WIDTH)
    show: Show = Plain(console)
    if args.json == "-":
        show = Show()
    elif args.json is None and console.is_terminal:
        show = Live(console)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            found, broke = demonstrate(args, variants, show, command)
        if args.json == "-":
            stdout.write(dumps(found))
        else:
            table(found, console)
            if args.json is not None:
                deliver(Path(args.json), dumps(found))
        stdout.flush()
    except (AudioError, WeightsError, TruthError, DemoError) as error:
        print(f"validation demo: {str(error).rstrip('.')}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print("validation demo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # of the terminal or the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  else Python tries again as it ends
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"validation demo: nothing can be printed: {error}", file=sys.stderr)
        return CANNOT
    return BROKE if broke else PASSED


def deliver(path: Path, text: str) -> None:
    """`report.write`, with a sentence that names the file as it was asked for."""
    try:
        write(path, text)
    except OSError as error:
        raise DemoError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    raise SystemExit(main())

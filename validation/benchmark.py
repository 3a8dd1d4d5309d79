"""`python -m validation benchmark`: all variants and the peers, timed in one interleaved run.

No time stands alone: beside each is the error of the features or of the text, and what is wrong is
not timed. Exit status 0: measured; 2: it cannot be measured; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import weights
from decoder_bridge.variants import VARIANTS
from encoder.audio import SAMPLE_RATE, AudioError, load_audio, require_file, windows
from encoder.run import cannot_be_heard
from encoder.truth import TruthError, read_truth
from validation import benchmark_plot, benchmark_report, report
from validation.benchmark_measure import (
    BenchmarkError,
    Heard,
    Part,
    Plan,
    Row,
    enough_windows,
    measure_encoders,
    measure_transcripts,
    say,
)
from validation.benchmark_systems import OURS, REFERENCE, Job, System, system
from validation.benchmark_worker import MEL, SAMPLES
from validation.parity import commit, processor
from validation.peers import PEERS, PeerError
from validation.peers.vocabulary import is_multilingual
from validation.recordings import SAMPLES as SAMPLES_FOLDER
from validation.reference import float64_encoder, run_float64
from weights import Checkpoint, WeightsError

MEASURED, CANNOT, INTERRUPTED = 0, 2, 130
LONG = "lecture.flac"  # of samples/: its first sentences, then all of it
SHORT_SECONDS = 11.0  # that the first sentences may take
INSTRUCTIONS = re.compile(r"\b(avx2|fma|avx512f|avx512_vnni|avx512_bf16|avx512_fp16|amx_\w+)\b")
ENGLISH_EOT = 50256

EPILOG = """\
Every system runs in a process of its own, which sleeps while another one is measured; all get the
same number of threads, the same samples and the same mel. Transcripts are greedy at temperature 0.
exit status: 0 measured, 2 it cannot be measured, 130 interrupted

example: python -m validation benchmark --model demo --rounds 11 --markdown benchmark.md
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validation benchmark",
        description="Time all variants and other engines on the same weights, side by side.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files (samples/lecture.flac, its beginning and all of it)")
    add("--truth", help="what is said: a text file for one, a .json as samples/samples.json")
    add("--model", default="demo", help="the weights: a name, demo, a path (demo)")
    add("--language", default="en", help="the language spoken (en)")
    add("--variants", help=f"of {', '.join(VARIANTS)}, with commas (all)")
    add("--peers", help=f"of {', '.join(PEERS)}, with commas, or none (all)")
    add("--batch", default="1,2,4,8", help="windows at a time for the encoder (1,2,4,8)")
    add("--part", choices=["encoder", "transcript"], help="only this part (both)")
    add("--rounds", type=int, default=11, help="how often each system is timed (11)")
    add("--starts", type=int, default=3, help="how often each process is started (3)")
    add("--cold", action="store_true", help="also starts that compile, minutes for each variant")
    add("--threads", type=int, help="of every system (as many as there are processors)")
    add("--seed", type=int, default=0, help="of the order and of the statistics (0)")
    add("--json", type=Path, help="write what was measured here")
    add("--markdown", type=Path, help="write the tables here")
    add("--svg", type=Path, help="write the plot here")
    add("--offline", action="store_true", help="never touch the network")
    return parser


def processors() -> int:
    """That this program may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one sentence on options that cannot hold."""
    for name, least in (("rounds", 1), ("starts", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more")
    if args.threads is not None and not 1 <= args.threads <= processors():
        parser.error(f"--threads must be 1 to {processors()}, the processors there are")
    parts = [part.strip() for part in args.batch.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        parser.error(f"--batch is {args.batch!r}, expected numbers from 1 on, with commas")
    if len(set(parts)) < len(parts):
        parser.error(f"--batch is {args.batch!r}, and names one size twice")
    if args.truth is not None and not args.audio:
        parser.error("--truth belongs to audio files")
    if args.language not in whisper_languages():
        parser.error(f"--language is {args.language!r}, expected a code such as en")
    for option, known in (("variants", [*VARIANTS]), ("peers", [*PEERS, "none"])):
        unknown = [name for name in names_of(getattr(args, option)) if name not in known]
        if unknown:
            parser.error(f"--{option}: {unknown[0]!r} is none, expected of {', '.join(known)}")
    if args.variants is not None and REFERENCE not in names_of(args.variants):
        parser.error(f"--variants must name {REFERENCE}, to which all ratios are")
    if "none" in names_of(args.peers) and len(names_of(args.peers)) > 1:
        parser.error("--peers is none, or some of them")
    check_outputs(parser, args)


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    outputs = [path for path in (args.json, args.markdown, args.svg) if path is not None]
    read = [Path(path).resolve() for path in [*args.audio, args.truth, args.model] if path]
    for path in outputs:
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            parser.error(f"{path} is a folder, a file is expected")
        if outputs.count(path) > 1 or path.resolve() in read:
            parser.error(f"{path} is named twice")


def whisper_languages() -> Sequence[str]:
    from whisper.tokenizer import LANGUAGES

    return list(LANGUAGES)


def names_of(option: str | None) -> list[str]:
    return [] if option is None else [name.strip() for name in option.split(",")]


def chosen(args: argparse.Namespace) -> dict[str, System]:
    """The systems that are asked for, in the order of the tables."""
    variants = names_of(args.variants) or list(VARIANTS)
    peers = list(PEERS) if args.peers is None else names_of(args.peers)
    found = [system(name) for name in OURS]
    found = [one for one in found if one.option in variants]
    return {one.name: one for one in [*found, *(system(p) for p in peers if p != "none")]}


def instructions() -> list[str]:
    """Those of the processor that products in several precisions use, where the system says so."""
    cpuinfo = Path("/proc/cpuinfo")
    return sorted(set(INSTRUCTIONS.findall(cpuinfo.read_text()))) if cpuinfo.exists() else []


def recordings_of(args: argparse.Namespace) -> list[tuple[np.ndarray, Heard]]:
    """The recordings that are asked for, or the bundled long one and its first sentences."""
    if args.audio:
        for file in args.audio:
            require_file(file)
        truth = read_truth(args.truth, args.audio) if args.truth is not None else {}
        loaded = [(file, load_audio(file)) for file in args.audio]
        return [
            (audio, Heard(Path(file).name, len(audio) / SAMPLE_RATE, truth.get(file)))
            for file, audio in loaded
        ]
    listed = SAMPLES_FOLDER / "samples.json"
    rows = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    row = next((row for row in rows if row["file"] == LONG), None)
    if row is None:
        raise BenchmarkError(f"there is no {LONG} in {listed}: name audio files")
    audio = load_audio(SAMPLES_FOLDER / LONG)
    sentences = row["sentences"]
    count = max(1, sum(s["end"] <= SHORT_SECONDS for s in sentences))
    after = sentences[count]["start"] if count < len(sentences) else len(audio) / SAMPLE_RATE
    beginning = audio[: round((sentences[count - 1]["end"] + after) / 2 * SAMPLE_RATE)]
    seconds = len(beginning) / SAMPLE_RATE
    text = " ".join(s["text"] for s in sentences[:count])
    return [
        (beginning, Heard(f"the beginning of {LONG}", seconds, text)),
        (audio, Heard(LONG, len(audio) / SAMPLE_RATE, row["text"])),
    ]


def prepare(
    args: argparse.Namespace, checkpoint: Checkpoint, batches: list[int], folder: Path
) -> tuple[list[Heard], np.ndarray]:
    """Samples and mel in the folder of the run: (recordings, the float64 features of the mel)."""
    recordings = recordings_of(args)
    heard = [one for _, one in recordings]
    names = [recording.file for recording in heard]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BenchmarkError(f"two of the files are called {twice[0]}: rename one")
    for i, (audio, _) in enumerate(recordings):
        np.save(folder / SAMPLES.format(i), audio)
    # The longest recording's windows first: they are full.
    ordered = sorted((audio for audio, _ in recordings), key=len, reverse=True)
    found = np.concatenate([windows(x, checkpoint.dims.n_mels).numpy() for x in ordered])
    if len(found) == 0:
        raise BenchmarkError(f"{names[0]} is shorter than 10 ms, one frame of the spectrogram")
    inputs = enough_windows(found, max(batches))
    np.save(folder / MEL, inputs)
    if args.part == "transcript":
        return heard, np.empty(0)
    return heard, run_float64(float64_encoder(checkpoint), torch.from_numpy(inputs)).numpy()


def convert_peers(
    systems: dict[str, System], checkpoint: Checkpoint, folder: Path, problems: dict[str, str]
) -> None:
    """The peers' files; a sentence for each peer that has none."""
    for name in systems:
        if name not in PEERS or name in problems:
            continue
        say(f"converting the weights for {name}")
        try:
            PEERS[name].converted(checkpoint, folder)
        except (PeerError, WeightsError, ImportError) as error:
            problems[name] = str(error)
        except (OSError, ValueError, RuntimeError) as error:  # of the peer's own writer
            problems[name] = f"its files cannot be written: {str(error).splitlines()[0]}"


def versions(systems: dict[str, System]) -> dict[str, str]:
    """Of every distribution that a system names; those that are not there are left out."""
    found = {"python": platform.python_version(), "numpy": version("numpy")}
    for one in systems.values():
        for package in one.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
    return found


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The benchmark; raises what `main` turns into a sentence."""
    began = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    batches = [int(part) for part in args.batch.split(",")]
    threads = args.threads or processors()
    systems = chosen(args)
    problems = {name: why for name, one in systems.items() if (why := one.cannot_run())}
    checkpoint = weights.load(args.model, offline=args.offline)
    checkpoint.require_decoder()
    if problem := cannot_be_heard(checkpoint.dims):
        raise BenchmarkError(problem.rstrip("."))
    if not is_multilingual(checkpoint.dims) and args.language != "en":
        raise BenchmarkError(f"{args.model} knows English only, not {args.language}")
    plan = Plan(args.rounds, args.starts, args.seed, args.cold)
    encoder_rows: list[Row] = []
    transcript_rows: list[Row] = []
    encoder_starts: dict[str, Row] = {}
    transcript_starts: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="max-whisper-benchmark-") as name:
        folder = Path(name)
        say("preparing the recordings and the reference")
        heard, reference = prepare(args, checkpoint, batches, folder)
        convert_peers(systems, checkpoint, folder, problems)

        def job(name: str) -> Job:
            return Job(name, args.model, args.offline, threads, folder)

        def part_of(wanted: dict[str, System], *first: Any) -> Part:
            return Part(wanted, job, plan, first, problems)

        if args.part != "transcript":
            part = part_of({n: s for n, s in systems.items() if s.encodes}, "encoder", 1)
            try:
                encoder_rows = measure_encoders(part, batches, reference, folder)
            finally:
                part.close()
            encoder_starts = part.starts
        if args.part != "encoder":
            shortest = min(range(len(heard)), key=lambda i: heard[i].seconds)
            wanted = {n: s for n, s in systems.items() if s.transcribes}
            part = part_of(wanted, "transcribe", shortest, args.language)
            eot = ENGLISH_EOT + is_multilingual(checkpoint.dims)
            try:
                transcript_rows = measure_transcripts(part, heard, args.language, eot)
            finally:
                part.close()
            transcript_starts = part.starts
    found = {
        "schema": 1,
        "kind": "benchmark",
        "model": Path(checkpoint.source.name).name,
        "weights_sha256": checkpoint.source.sha256,
        "systems": [
            {
                "name": one.name,
                "what": one.what,
                "peer": one.peer,
                "precision": one.precision,
                "packages": list(one.packages),
                "problem": problems.get(one.name),
            }
            for one in systems.values()
        ],
        "recordings": [
            {"file": r.file, "seconds": r.seconds, "truth": r.truth is not None} for r in heard
        ],
        "encoder": encoder_rows,
        "encoder_starts": encoder_starts,
        "transcripts": transcript_rows,
        "transcript_starts": transcript_starts,
        "remarks": [
            remark
            for name in systems
            if name in PEERS
            and name not in problems
            and (remark := PEERS[name].remark(checkpoint.dims))
        ],
        "rounds": args.rounds,
        "seed": args.seed,
        "threads": threads,
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "instructions": instructions(),
        "load": load,
        "versions": versions(systems),
        "command": command,
        "commit": commit(),
        "seconds": time.monotonic() - began,
    }
    found["targets"] = benchmark_report.targets(found)
    found["peers_better"] = benchmark_report.peers_better(found)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    given = sys.argv[2:] if argv is None else argv
    command = shlex.join(["python", "-m", "validation", "benchmark", *given])
    try:
        found = run(args, command)
        for path, text in (
            (args.json, report.dumps),
            (args.markdown, benchmark_report.markdown),
            (args.svg, benchmark_plot.svg_ratios),
        ):
            if path is not None:
                report.write(path, text(found))
        benchmark_report.terminal(
            found, Console() if sys.stdout.isatty() else Console(width=benchmark_report.WIDTH)
        )
        sys.stdout.flush()
    except (AudioError, BenchmarkError, TruthError, WeightsError) as error:
        print(f"validation benchmark: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print("validation benchmark: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"validation benchmark: {name}{error.strerror or error}", file=sys.stderr)
        return CANNOT
    return MEASURED


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m validation faults`: what each mistake of the catalogue costs, and whether parity sees
and names it. Rows are kept as they are measured; a killed run goes on where it stopped.

0: measured, and every target holds; 1: a target is missed; 2: it cannot be measured, and a sentence
says why; 130: interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import queue
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from tqdm import tqdm

import weights
from decoder_bridge.model import stock_model
from encoder.audio import AudioError
from encoder.engine import EngineError
from encoder.truth import TruthError, read_truth
from validation import findings, limits
from validation.faults import FAULTS
from validation.golden import GoldenError
from validation.ledger import Ledger, LedgerError
from validation.parity import PACKAGES, ParityError, commit, processor
from validation.recordings import Recording, RecordingsError, bundled, from_files, variants
from validation.reference import ReferenceBroken
from validation.report import dumps, write
from validation.transcripts import comes_to_an_end
from validation.trials import Bench, BenchError, Row, discard, prepare
from weights import Checkpoint, WeightsError

PASSED, MISSED, CANNOT, INTERRUPTED = 0, 1, 2, 130
PLOTS = ("relative_l2", "kl", "sqnr")  # of --svg
LEDGER = "trials.jsonl"
VERSIONS = (*PACKAGES, "scipy")
ROOT = Path(__file__).parent.parent
# What rows depend on, but for what only reads them, or has nothing to do with them.
CODE = (
    "decoder_bridge/model.py",
    "encoder/*.py",
    "encoder/mojo/*.mojo",
    "validation/**/*.py",
    "weights/*.py",
)
NOT_CODE = (
    "findings*.py",
    "bench*.py",
    "calibrate.py",
    "command.py",
    "decoder_*.py",
    "demo.py",
    "kernels.py",
    "numbers.py",
    "page.py",
    "peers/*.py",
)
SHORT_RECORDINGS = 3
SHORT = (  # of every group, harmless and ruinous
    "S03",
    "S06",
    "E01",
    "S07",
    "S09",
    "E21",
    "S14",
    "S16",
    "S17",
    "S18",
    "S21",
    "S22",
    "S23",
    "E09",
    "E17",
    "S26",
    "E11@float16",
    "E11@int8 per tensor",
    "E-e-blocks.1@0.01",
    "S31",
    "S36",
)

# What can go wrong while something is measured, as one sentence.
ERRORS = (
    AudioError,
    BenchError,
    EngineError,
    GoldenError,
    LedgerError,
    ParityError,
    RecordingsError,
    ReferenceBroken,
    TruthError,
    WeightsError,
)

EPILOG = """\
exit status: 0 every target holds, 1 one is missed, 2 it cannot be measured, 130 interrupted
Rows go to OUT/trials.jsonl fault by fault, and a run with the same recordings, weights, packages
and code goes on after those that are there; else measure anew, with --restart. Besides, OUT takes
370 MB a recording for tiny.

example: python -m validation faults --group stem --jobs 2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validation faults",
        description="Make the mistakes of the catalogue one by one, and measure what each costs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files, the first 30 s of each (the bundled recordings)")
    add("--truth", help="what is said: a text file for one, a .json as samples/samples.json")
    add("--variants", type=int, help="so many recordings of each file: itself, then changed ones")
    add("--model", default="demo", help="the weights: a name, demo, a path (demo)")
    add("--faults", help="only these, by id or key, with commas: S07,E11@float16")
    add("--group", help="only those of a group: input, stem, blocks, weights, bridge")
    add(
        "--short", action="store_true", help=f"{len(SHORT)} faults on {SHORT_RECORDINGS} recordings"
    )
    add("--jobs", type=int, default=1, help="processes that share the faults (1)")
    add("--out", type=Path, help="the folder for rows and references (build/faults)")
    add("--restart", action="store_true", help="drop what was measured there, measure anew")
    add("--no-max", action="store_true", help="on the PyTorch twin alone, not on MAX")
    add("--seed", type=int, default=0, help="of the variants and of the statistics (0)")
    add("--from", type=Path, dest="found", help="measure nothing: the rows of this --json again")
    add("--beside", type=Path, help="a --json of another model: both, side by side, in --markdown")
    add("--json", type=Path, help="write the findings here")
    add("--markdown", type=Path, help="write the findings here, as Markdown")
    add("--svg", type=Path, help="write the plots into this folder")
    add("--offline", action="store_true", help="never touch the network")
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one sentence on options that cannot hold together."""
    if not args.audio and (args.truth is not None or args.variants is not None):
        parser.error("--truth and --variants belong to audio files")
    if args.variants is not None and args.variants < 1:
        parser.error("--variants must be 1 or more")
    if args.found is not None and args.audio:
        parser.error("--from measures nothing, so it takes no audio files")
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    if args.svg is not None and not args.svg.is_dir():
        parser.error(f"{args.svg} is no folder")
    files = [path for path in (args.json, args.markdown) if path is not None]
    for path in files:
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            parser.error(f"{path} is a folder, a file is expected")
    if args.beside is not None and args.markdown is None:
        parser.error("--beside goes with --markdown")
    read = [*args.audio, args.truth, args.found, args.beside, folder_of(args) / LEDGER]
    if Path(args.model).is_file():
        read.append(args.model)
    kept = {Path(path).resolve() for path in read if path is not None}
    for path in [*files, *plots_of(args)]:
        if path.resolve() in kept:
            parser.error(f"{path} is named twice")
        kept.add(path.resolve())


def folder_of(args: argparse.Namespace) -> Path:
    return args.out or Path("build", "faults-short" if args.short else "faults")


def plots_of(args: argparse.Namespace) -> list[Path]:
    return [] if args.svg is None else [args.svg / f"{plot}.svg" for plot in PLOTS]


def chosen(args: argparse.Namespace) -> list[str]:
    """The keys of the faults that are asked for, in the catalogue's order; BenchError where a name
    is none."""
    keys = list(FAULTS)
    if args.faults is not None:
        names = [name.strip() for name in args.faults.split(",")]
        known = set(FAULTS) | {fault.id for fault in FAULTS.values()}
        if unknown := [name for name in names if name not in known]:
            ids = dict.fromkeys(fault.id for fault in FAULTS.values())
            raise BenchError(f"{unknown[0]!r} is no fault, expected some of {', '.join(ids)}")
        keys = [key for key in keys if key in names or FAULTS[key].id in names]
    elif args.short:
        keys = [key for key in keys if key in SHORT]
    if args.group is not None:
        groups = dict.fromkeys(fault.group for fault in FAULTS.values())
        if args.group not in groups:
            raise BenchError(f"{args.group!r} is no group, expected one of {', '.join(groups)}")
        keys = [key for key in keys if FAULTS[key].group == args.group]
        if not keys:
            raise BenchError(f"none of those faults is of the group {args.group}")
    return keys


def measurable(
    keys: list[str], checkpoint: Checkpoint, recordings: Sequence[Recording]
) -> list[str]:
    """Without a decoder, those of the bridge are left out, and it is said; so too where all
    recordings say the same words, of which a second window would be the first one again."""
    if not checkpoint.has_decoder:
        why = f"{Path(checkpoint.source.name).name} has no decoder"
    elif len(recordings) > 1 and len({recording.clips for recording in recordings}) == 1:
        why = f"all recordings are of {recordings[0].name}, the same words in every window"
    else:
        return keys
    left = [key for key in keys if FAULTS[key].how != "bridge"]
    if not left:
        raise BenchError(f"{why}, and these faults are of the transcript of several windows")
    if len(left) < len(keys):
        print(
            f"{why}: {len(keys) - len(left)} faults of the transcript are left out",
            file=sys.stderr,
        )
    return left


SPARE = 3  # times as many variants are made as are asked for


def named(args: argparse.Namespace) -> list[Recording]:
    """The recordings that are named, or the bundled ones."""
    if not args.audio:
        return bundled()
    return from_files(
        args.audio, None if args.truth is None else read_truth(args.truth, args.audio)
    )


def listened_to(
    found: list[Recording], checkpoint: Checkpoint, args: argparse.Namespace
) -> list[Recording]:
    """Those recordings, or so many variants of each. Of variants only such are taken whose right
    text comes to an end: one that loops is no yardstick of a text, and there are others.
    BenchError where there are too few."""
    if args.variants is not None:
        wanted, each, found = args.variants, found, []
        model = stock_model(checkpoint) if checkpoint.has_decoder else None
        for recording in each:
            made = variants(recording, wanted * SPARE, args.seed)
            ended = (one for one in made if model is None or comes_to_an_end(model, one))
            taken = list(islice(ended, wanted))
            if len(taken) < wanted:
                raise BenchError(
                    f"of {len(made)} variants of {recording.name} the right text comes to an end "
                    f"in {len(taken)}, and {wanted} are wanted"
                )
            found += taken
    return found[:SHORT_RECORDINGS] if args.short else found


def code() -> str:
    """SHA-256 of the sources that rows depend on, in the order of their names."""
    found = hashlib.sha256()
    files = {path for pattern in CODE for path in ROOT.glob(pattern)}
    files -= {path for pattern in NOT_CODE for path in (ROOT / "validation").glob(pattern)}
    for path in sorted(files):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def header_of(
    checkpoint: Checkpoint, recordings: Sequence[Recording], args: argparse.Namespace
) -> dict[str, Any]:
    """All that a row depends on, beside the fault itself."""
    return {
        "schema": 1,
        "weights": checkpoint.source.sha256,
        "recordings": [{"name": r.name, "sha256": r.sha256, "text": r.text} for r in recordings],
        "seed": None if args.variants is None else args.seed,
        "max": not args.no_max,
        "threads": threads_of(args.jobs),
        "versions": {package: version(package) for package in VERSIONS},
        "code": code(),
        "limits": {name.lower(): value for name, value in vars(limits).items() if name.isupper()},
    }


def prepared_with(bar: str) -> Any:
    """A `trials.Progress` on a terminal."""

    def progress(recordings: Sequence[Recording]) -> Iterable[Recording]:
        return tqdm(recordings, bar, disable=not sys.stderr.isatty(), leave=False)

    return progress


def said(error: Exception) -> str:
    """What one of ERRORS or an OSError says, as one sentence."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def trial(bench: Bench, key: str) -> list[Row]:
    """The rows of a fault; BenchError, with its key, where they cannot be measured."""
    try:
        return bench.trial(FAULTS[key])
    except (*ERRORS, OSError) as error:
        raise BenchError(f"{key}: {said(error)}") from error


def threads_of(jobs: int) -> int:
    """Of each process, when so many share the processors."""
    return torch.get_num_threads() if jobs <= 1 else max(1, (os.cpu_count() or 1) // jobs)


def work(
    settings: dict[str, Any], recordings: list[Recording], folder: Path, tasks: Any, results: Any
) -> None:
    """One process: a fault from the queue, its rows into the other, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(settings["threads"])
    try:
        checkpoint = weights.load(settings["model"], offline=settings["offline"])
        bench = Bench(checkpoint, recordings, folder, settings["on_max"])
        parent = multiprocessing.parent_process()
        while (key := tasks.get()) is not None and parent is not None and parent.is_alive():
            results.put((trial(bench, key), None))
    except (*ERRORS, OSError) as error:
        results.put((None, said(error)))


def answer(results: Any, processes: Sequence[BaseProcess]) -> list[Row]:
    """The next rows of any process; BenchError where one has failed or died."""
    while True:
        try:
            rows, problem = results.get(timeout=1)
        except queue.Empty:
            died = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if died:
                raise BenchError(
                    f"a process ended with status {died[0]}; the same command goes on where it "
                    "stopped"
                ) from None
            continue
        if problem is not None:
            raise BenchError(problem)
        return rows


def measured(
    keys: Sequence[str],
    checkpoint: Checkpoint,
    recordings: list[Recording],
    folder: Path,
    args: argparse.Namespace,
) -> Iterator[list[Row]]:
    """The rows of each fault, as they come; by one process in order, by several in any."""
    jobs = min(args.jobs, len(keys))
    if args.jobs == 1:
        bench = Bench(checkpoint, recordings, folder, not args.no_max, prepared_with("preparing"))
        for key in keys:
            yield trial(bench, key)
        return
    prepare(checkpoint, recordings, folder, not args.no_max, prepared_with("preparing"))
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for task in [*keys, *[None] * jobs]:
        tasks.put(task)
    settings = {
        "threads": threads_of(args.jobs),
        "model": args.model,
        "offline": args.offline,
        "on_max": not args.no_max,
    }
    processes = [
        context.Process(
            target=work, args=(settings, recordings, folder, tasks, results), daemon=True
        )
        for _ in range(jobs)
    ]
    try:
        for process in processes:
            process.start()
        for _ in keys:
            yield answer(results, processes)
    finally:
        tasks.cancel_join_thread()  # what is left in it is for nobody
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def about(
    checkpoint: Checkpoint,
    recordings: Sequence[Recording],
    rows: Sequence[Row],
    args: argparse.Namespace,
    command: str,
    began: float,
) -> dict[str, Any]:
    """What the findings say of the run. `seconds`: of this one, which may have found rows of other
    runs; `seconds_of_trials`: of all rows, processes that worked side by side added up; `clips`: of
    how many, and how many distinct ones, the recordings are put together; `threads`: of each
    process."""
    clips = [clip for recording in recordings for clip in recording.clips]
    return {
        "model": Path(checkpoint.source.name).name,
        "weights_sha256": checkpoint.source.sha256,
        "recordings": [
            {
                "name": r.name,
                "seconds": r.seconds,
                "words": r.words,
                "clips": list(r.clips),
                "audio_sha256": r.sha256,
            }
            for r in recordings
        ],
        "clips": {"distinct": len(set(clips)), "used": len(clips)},
        "versions": {p: version(p) for p in VERSIONS} | {"python": platform.python_version()},
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": threads_of(args.jobs),
        "jobs": args.jobs,
        "command": command,
        "commit": commit(),
        "code": code(),
        "seed": args.seed,
        "seconds": time.monotonic() - began,
        "seconds_of_trials": sum(row["seconds"] for row in rows),
    }


def run(args: argparse.Namespace, command: str) -> tuple[dict[str, Any], bool]:
    """(the findings, whether they are of the whole catalogue); raises ERRORS and OSError."""
    began = time.monotonic()
    keys = chosen(args)
    files = named(args)
    checkpoint = weights.load(args.model, offline=args.offline)
    recordings = listened_to(files, checkpoint, args)
    keys = measurable(keys, checkpoint, recordings)
    folder = folder_of(args)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BenchError(f"another run measures in {folder}") from error
    with lock:
        header = header_of(checkpoint, recordings, args)
        with closing(Ledger(folder / LEDGER, header, args.restart)) as ledger:
            prepared = folder / "prepared"
            prepared.mkdir(exist_ok=True)
            if args.restart:
                discard(prepared)
            left = [key for key in keys if key not in ledger.rows]
            bar = tqdm(
                total=len(keys),
                initial=len(keys) - len(left),
                desc="faults",
                disable=not sys.stderr.isatty(),
                leave=False,
            )
            with bar:
                if left:
                    for rows in measured(left, checkpoint, recordings, prepared, args):
                        ledger.add(rows)
                        bar.update()
    order = {recording.name: i for i, recording in enumerate(recordings)}
    rows = [
        row for key in keys for row in sorted(ledger.rows[key], key=lambda r: order[r["recording"]])
    ]
    found = findings.findings(rows, about(checkpoint, recordings, rows, args, command, began))
    return found, set(keys) == set(FAULTS)


def again(path: Path) -> tuple[dict[str, Any], bool]:
    """What `run` returned for the rows that are kept in its JSON, by the statistics of today.
    Raises BenchError where the file holds none, OSError where it cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        rows, of_run = known["rows"], known["about"]
        found = findings.findings(rows, of_run)
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} holds no findings of this command") from error
    return found, {row["fault"] for row in rows} == set(FAULTS)


def as_json(found: dict[str, Any]) -> str:
    """With each row on a line of its own: there are thousands."""
    rows = ",\n".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in found["rows"])
    head = dumps({**found, "rows": []})
    return head.replace('"rows": []', f'"rows": [\n{rows}\n]')


def deliver(found: dict[str, Any], other: dict[str, Any] | None, args: argparse.Namespace) -> None:
    """Write the files that were asked for and print the findings; raises BenchError where they
    cannot be printed, OSError where a file cannot be written."""
    if args.json is not None:
        write(args.json, as_json(found))
    if args.markdown is not None:
        write(args.markdown, findings.markdown(found, other))
    for plot, path in zip(PLOTS, plots_of(args), strict=False):
        write(path, findings.svg_scatter(found, plot))
    try:
        findings.terminal(found, Console() if sys.stdout.isatty() else Console(width=140))
        sys.stdout.flush()
    except OSError as error:  # the terminal or the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  else Python tries again as it ends
        raise BenchError(f"the findings cannot be printed: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    given = sys.argv[2:] if argv is None else argv
    command = shlex.join(["python", "-m", "validation", "faults", *given])
    try:
        other = None if args.beside is None else again(args.beside)[0]
        found, whole = run(args, command) if args.found is None else again(args.found)
        deliver(found, other, args)
    except (*ERRORS, OSError) as error:
        print(f"validation faults: {said(error)}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print("validation faults: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return MISSED if findings.missed(found, whole) else PASSED


if __name__ == "__main__":
    raise SystemExit(main())

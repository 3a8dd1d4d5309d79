"""`python -m validation parity`: files in, one report out, and an exit status for scripts.

0: the same function; 1: it is not; 2: the comparison could not be made, and a sentence says why.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

import weights
from decoder_bridge.model import stock_model
from encoder.audio import N_SAMPLES, AudioError, load_audio, require_file, windows
from encoder.engine import DEVICES, EngineError
from validation import decoder_parity, golden, page, report
from validation.candidates import (
    Candidate,
    CandidateError,
    FileCandidate,
    MaxCandidate,
    ran,
    resolve,
)
from validation.golden import Golden, GoldenError
from validation.limits import OBSERVER_LIMIT
from validation.metrics import relative_l2
from validation.parity import Measured, ParityError, golden_of, judge_window, sha256_of
from validation.parity import report as build_report
from validation.reference import Reference, ReferenceBroken
from validation.semantic import semantic
from weights import Checkpoint, WeightsError, expected_shapes

PASSED, FAILED, CANNOT, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
candidates (of a decoder max and torch):
  max                   the encoder of this package (default)
  torch                 stock openai-whisper in PyTorch's fused attention
  npz:FILE              taps that your port dumped: an .npz or .safetensors, tap name -> array
  onnx:FILE             an ONNX model, mel in, features or named taps out (extra: peers)
  module:PACKAGE:NAME   NAME(checkpoint) in an importable module gives a function of mel
exit status: 0 the same function, 1 it is not, 2 the comparison could not be made

example: python -m validation parity speech.flac --model tiny.en --html report.html
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validation parity",
        description="Compare an encoder, or a decoder, with stock openai-whisper's, tap by tap.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files, in any format that FFmpeg reads")
    add("--model", default="tiny", help="the reference's weights: a name, demo, a path (tiny)")
    add(
        "--part",
        choices=("encoder", "decoder"),
        default="encoder",
        help="what is compared (encoder)",
    )
    add("--candidate", default="max", help="what is compared, see below (max)")
    add("--device", choices=DEVICES, default="auto", help="where the candidate max runs (the CPU)")
    add("--candidate-model", help="other weights for the candidate than the reference's")
    add("--windows", type=int, help="only the first N 30 s windows of each file (all)")
    add(
        "--transcript",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare logits and transcripts too (where the checkpoint has a decoder)",
    )
    add("--truth", help="what is said: a text file; with one audio file")
    add("--json", type=Path, help="write the report here")
    add("--markdown", type=Path, help="write the report here, as Markdown")
    add("--html", type=Path, help="write the report here, as one page with plots")
    add("--svg", type=Path, help="write the plot of error against depth here, as a picture")
    add("--save", type=Path, help="keep the reference's taps: a golden .safetensors")
    add("--load", type=Path, help="compare with a golden instead of running the reference")
    add("--fail-fast", action="store_true", help="stop at the first tap that fails")
    add("--offline", action="store_true", help="never touch the network")
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one sentence on options that cannot hold together."""
    if args.load is not None and (args.audio or args.save is not None):
        parser.error("--load brings its own input: give neither audio files nor --save")
    if args.load is None and not args.audio:
        parser.error("give an audio file, or a golden with --load")
    if args.load is not None and args.transcript:
        parser.error("--transcript needs the audio, which a golden does not hold")
    if args.windows is not None and args.windows < 1:
        parser.error("--windows must be 1 or more")
    if args.truth is not None and (len(args.audio) != 1 or args.transcript is False):
        parser.error("--truth belongs to one audio file and to the transcript")
    if args.device == "gpu" and (args.part == "decoder" or args.candidate != "max"):
        parser.error("--device gpu is for the encoder of the candidate max alone")
    dumped = args.candidate.startswith("npz:")
    if args.candidate_model is not None and (dumped or args.candidate.startswith("onnx:")):
        parser.error(f"{args.candidate} has its own weights: --candidate-model has no effect on it")
    if dumped and (args.transcript or args.truth is not None):
        parser.error(f"{args.candidate} answers for its own windows, a transcript asks for others")
    if args.truth is not None and args.windows is not None:
        parser.error("--truth is what is said in the whole file: give it without --windows")
    if args.save is not None and args.fail_fast:
        parser.error("--save keeps every window: give it without --fail-fast")
    if args.part == "decoder":
        check_decoder_usage(parser, args)
    outputs = [args.json, args.markdown, args.html, args.svg, args.save]
    outputs = [path for path in outputs if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            parser.error(f"{path} is a folder, a file is expected")
        if outputs.count(path) > 1 or str(path) in [*args.audio, str(args.load)]:
            parser.error(f"{path} is named twice")


def check_decoder_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one sentence on what is for the encoder alone."""
    for option in ("html", "svg", "save", "load", "truth"):
        if getattr(args, option) is not None:
            parser.error(f"--{option} is for the encoder alone: --part decoder has no use for it")
    if args.candidate not in decoder_parity.CANDIDATES:
        known = " and ".join(decoder_parity.CANDIDATES)
        parser.error(f"{args.candidate} is no decoder to compare: --part decoder knows {known}")
    if args.transcript and args.candidate == "torch":
        parser.error("--transcript compares stock with max-fast: give it with --candidate max")


@dataclass(frozen=True)
class Recording:
    """One file: its samples, and its 30 s windows as both sides get them, (windows, n_mels, 3000),
    of which `--windows` may have left some out."""

    file: str
    audio: np.ndarray
    mel: Tensor


def recordings(args: argparse.Namespace, n_mels: int) -> list[Recording]:
    """Every file decoded once; all are looked for before any is decoded."""
    for path in args.audio:
        require_file(path)
    found = []
    for path in args.audio:
        audio = load_audio(path)
        mel = windows(audio, n_mels)
        if len(mel) == 0:
            raise ParityError(f"{path} holds no audio")
        found.append(Recording(Path(path).name, audio, mel[: args.windows]))
    return found


def goldens(reference: Reference, found: list[Recording]) -> Iterator[Golden]:
    """The reference's side of every window of every file, computed when it is asked for."""
    for recording in found:
        digest = sha256_of(recording.audio)
        for i, window in enumerate(recording.mel):
            yield golden_of(
                reference, window[None], file=recording.file, window=i, audio_sha256=digest
            )


def text_of(path: str | None) -> str | None:
    """The text in a file; a ParityError where it cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ParityError(f"{path} is no UTF-8 text: {error.reason}") from error


def transcripts(
    checkpoint: Checkpoint, candidate: Candidate, found: list[Recording], args: argparse.Namespace
) -> dict[str, Any] | None:
    """The semantic stage of every file: the worst of each figure over the files, and the files."""

    def features(mel: Tensor) -> Tensor:
        output = candidate.features(mel)
        if output is None:
            raise CandidateError(f"{candidate.name} gives no ln_post, so there is no transcript")
        return output

    model = stock_model(checkpoint)
    truth = text_of(args.truth)
    each = []
    for r in found:
        try:
            result = semantic(model, features, r.audio, truth, windows=args.windows)
        except ValueError as error:
            raise ParityError(f"{r.file}: {error}") from error
        each.append(result.to_json())
    for recording, one in zip(found, each, strict=True):
        one["file"] = recording.file
    if len(each) == 1:
        return each[0]
    worst: dict[str, Any] = {"files": each}
    for key in ("kl_mean", "kl_p99", "kl_max", "wer", "cer", "worst_rank"):
        worst[key] = max((one[key] for one in each if one[key] is not None), default=None)
    worst["same_top1"] = min(
        (one["same_top1"] for one in each if one["same_top1"] is not None), default=None
    )
    worst["tokens_identical"] = all(one["tokens_identical"] for one in each)
    return worst


def wants_transcript(args: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """On by default, where there is a decoder, the audio, and an encoder that takes any mel."""
    if args.transcript is not None:
        if args.transcript:
            checkpoint.require_decoder()
        return bool(args.transcript)
    from_a_file = args.candidate.startswith("npz:")
    return checkpoint.has_decoder and args.load is None and not from_a_file


def check_max(candidate: MaxCandidate, mel: Tensor) -> tuple[float, dict[str, Any]]:
    """Before anything is judged: the graph with taps against production, and the proof that MAX
    ran. Raises ParityError where what would be judged is not what runs in production."""
    features = candidate.features(mel)
    observer = relative_l2(candidate.taps(mel)["ln_post"], features)
    proof = ran(candidate, mel, features)
    if observer > OBSERVER_LIMIT:
        raise ParityError(
            f"the graph with taps is {observer:.1e} from the production graph, at most "
            f"{OBSERVER_LIMIT:.0e} is expected: its taps would say nothing about production"
        )
    if proof["output_changed_by"] == 0:
        raise ParityError(f"the output does not change with {proof['perturbed']}: did MAX run?")
    return observer, proof


def require_one_size(ours: Checkpoint, theirs: Checkpoint, args: argparse.Namespace) -> None:
    """Raise ParityError where the part that is compared is of two sizes."""
    decoder = args.part == "decoder"
    a, b = (expected_shapes(c.dims, decoder=decoder) for c in (ours, theirs))
    for name in a | b:
        if a.get(name) != b.get(name):
            what = "models" if decoder else "encoders"
            raise ParityError(
                f"{name} has shape {b.get(name)} in {args.candidate_model} and {a.get(name)} in "
                f"{args.model}: {what} of one size are expected"
            )


def compare_decoder(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """`compare` for `--part decoder`."""
    began = time.monotonic()
    checkpoint, other = weights.load(args.model, offline=args.offline), None
    checkpoint.require_decoder()
    if args.candidate_model is not None:
        other = weights.load(args.candidate_model, offline=args.offline)
        other.require_decoder()
        require_one_size(checkpoint, other, args)
    return decoder_parity.compare(
        checkpoint,
        other,
        args.candidate,
        recordings(args, checkpoint.dims.n_mels),
        windows=args.windows,
        transcript=args.transcript,
        fail_fast=args.fail_fast,
        command=command,
        began=began,
    )


def compare(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The report of one run of the command; raises what `main` turns into a sentence."""
    began = time.monotonic()
    text_of(args.truth)  # a misspelt name is found out before the work
    encoder_only = args.transcript is False or args.load is not None
    checkpoint = weights.load(args.model, offline=args.offline, encoder_only=encoder_only)
    other = None
    if args.candidate_model is not None:
        other = weights.load(args.candidate_model, offline=args.offline, encoder_only=True)
        require_one_size(checkpoint, other, args)
    wanted = wants_transcript(args, checkpoint)
    dims = checkpoint.dims
    reference = Reference(checkpoint) if args.load is None else None
    candidate = resolve(args.candidate, other or checkpoint, args.device)
    found: list[Recording] = []
    if reference is not None:
        found = recordings(args, dims.n_mels)
        source: Iterator[Golden] = goldens(reference, found)
        count = sum(len(recording.mel) for recording in found)
    else:
        saved = golden.load(args.load, checkpoint)
        source, count = iter(saved.windows[: args.windows]), len(saved.windows[: args.windows])
    if isinstance(candidate, FileCandidate) and count > candidate.windows:
        raise ParityError(
            f"{candidate.name} holds {candidate.windows} windows, {count} are asked for: --windows"
        )

    # The samples of a file that is one window, by which a wrong mel can be explained.
    single = [r.audio for r in found if len(r.audio) <= N_SAMPLES]
    samples = {sha256_of(audio): audio for audio in single}
    measured = Measured(dims)
    tensors = {name: t.float() for name, t in checkpoint.encoder_tensors().items()}
    kept: list[Golden] = []
    observer = alive = proof = None
    final = False
    for i, one in enumerate(
        tqdm(source, "windows", count, disable=not sys.stderr.isatty(), leave=False)
    ):
        if i == 0 and reference is not None:
            alive = asdict(reference.check(one.mel, one.taps))
        if i == 0 and isinstance(candidate, MaxCandidate):
            observer, proof = check_max(candidate, one.mel)
        judged, taps = judge_window(candidate, one, tensors, dims, args.fail_fast)
        final = final or "ln_post" in taps
        measured.add(judged, taps, one, tensors, samples.get(one.audio_sha256))
        if args.save is not None:
            kept.append(one)
        if args.fail_fast and measured.first is not None:
            break
    if args.transcript and not final:
        raise CandidateError(f"{candidate.name} gives no ln_post, so there is no transcript")
    wanted = wanted and final and not (args.fail_fast and measured.first is not None)
    if args.save is not None:
        golden.save(args.save, golden.goldens_of(checkpoint, kept))
    return build_report(
        measured,
        model=checkpoint,
        candidate=candidate.name,
        candidate_model=other,
        bound=None if args.candidate.startswith(("npz:", "onnx:")) else other or checkpoint,
        observer=observer,
        alive=alive,
        ran=proof,
        semantic=transcripts(checkpoint, candidate, found, args) if wanted else None,
        command=command,
        began=began,
    )


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    given = sys.argv[2:] if argv is None else argv
    command = shlex.join(["python", "-m", "validation", "parity", *given])
    try:
        decoder = args.part == "decoder"
        result = (compare_decoder if decoder else compare)(args, command)
        also = decoder_parity.sentences(result) if decoder else []
        # Into a pipe or a file: wide enough for every column of the table.
        report.terminal(result, Console() if sys.stdout.isatty() else Console(width=110), also)
        sys.stdout.flush()
        for path, text in (
            (args.json, report.dumps),
            (args.markdown, partial(report.markdown, also=also)),
            (args.html, page.html),
            (args.svg, page.svg_depth),
        ):
            if path is not None:
                write(path, text(result))
    except (
        AudioError,
        WeightsError,
        EngineError,
        CandidateError,
        GoldenError,
        ParityError,
        ReferenceBroken,
    ) as error:
        print(f"validation parity: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print("validation parity: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # of the terminal or the pipe
        print(f"validation parity: the report cannot be printed: {error.strerror}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  else Python tries again as it ends
        return CANNOT
    return PASSED if result["verdict"] == "pass" else FAILED


def write(path: Path, text: str) -> None:
    """`report.write`, with a sentence that names the file as it was asked for."""
    try:
        report.write(path, text)
    except OSError as error:
        raise ParityError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    raise SystemExit(main())

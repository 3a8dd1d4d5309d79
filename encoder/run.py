"""`python -m encoder.run`: audio files in, transcripts out; refuses what it cannot do in full.

The flags are openai-whisper's, see `cli()` in whisper/transcribe.py; `--help` lists what differs.
The transcript goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from whisper.audio import HOP_LENGTH
from whisper.model import ModelDimensions
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE
from whisper.utils import WriteTXT, get_writer, optional_float, optional_int, str2bool

from decoder_bridge.batch import WITHOUT, transcribe_batched
from decoder_bridge.variants import DEFAULT, VARIANTS, VariantError, reason_against, what_ran
from encoder.audio import N_FRAMES, SAMPLE_RATE, AudioError, load_audio, require_file, windows

# max, and whatever imports it, is imported where it is needed: --help and a misspelt file name
# do not wait for it.

WORD_OPTIONS = ("highlight_words", "max_line_count", "max_line_width", "max_words_per_line")
INTERRUPTED = 130  # what a shell reports of a program ended by SIGINT: 128 + 2
BROKEN_PIPE = 141  # by SIGPIPE: 128 + 13
BATCHED = {"beam_size": None, "condition_on_previous_text": False}  # defaults of --batch_size 2 ...

EPILOG = f"""\
variants:
{"".join(f"  {v.name:<15}{v.what}" + chr(10) for v in VARIANTS.values())}
what differs from openai-whisper's command line:
  the transcript is printed to stdout, one line a segment; nothing else is, except, with several
  files, a line "==> file <==" before each; with --verbose True, openai-whisper's own output
  files are written only if --output_dir or --output_format is given (then the other has
  openai-whisper's default), and are put in place only when they are complete
  --model is tiny by default; also demo (comes with this package), a path, a Hugging Face repo id
  --model_dir is the Hugging Face cache folder
  --variant is new: who computes what, see above; one that cannot run here is refused
  --device is the MAX encoder's in variant max; the others run where the list says
  --fp16 is False by default, and True is refused but by variant gpu
  --verbose is False by default: a progress bar, if stderr is a terminal; with True a last line
  on stderr says how long it took, without loading the model, and what computed it
  --batch_size is new: 2 or more cut each file at its pauses into windows of at most 30 s, none of
  which knows the text of another, and decode so many at once. The text may differ from that of
  one window after the other (1). --condition_on_previous_text is then False by default and
  --beam_size None; True, beams but in variant max-fast, prompts, clips and times of words are
  refused
  --threads also limits the encoder, where the system can bind a program to some of its processors
  --offline, --features and --truth are new; --truth ends with that last line and the word error
  rate in it, over words as OpenAI normalises them
  a file that cannot be transcribed gets one sentence on stderr, the others are transcribed, and
  the exit status is 1

example: python -m encoder.run --model tiny.en talk.mp3
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option, the epilog as it stands."""


def build_parser() -> argparse.ArgumentParser:
    """Every option of openai-whisper's `cli()` under its name, with its default unless stated."""
    languages = sorted(LANGUAGES) + sorted(name.title() for name in TO_LANGUAGE_CODE)
    parser = argparse.ArgumentParser(
        prog="python -m encoder.run",
        usage="%(prog)s [options] audio [audio ...]",
        description="Transcribe audio files with Whisper, its encoder computed by MAX.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("audio", nargs="+",
        help="audio or video files, in any format that FFmpeg reads")
    add("--model", default="tiny",
        help="model name (tiny.en, ... turbo), demo, a path, or a Hugging Face repo id")
    add("--model_dir", default=None,
        help="the Hugging Face cache folder; None: as HF_HOME says")
    add("--offline", action="store_true",
        help="never touch the network")
    add("--device", default="auto", choices=["auto", "cpu", "gpu"],
        help="where the encoder runs; auto: the CPU, gpu has to be asked for")
    add("--variant", default=DEFAULT, choices=list(VARIANTS),
        help="what computes the encoder and the decoder; they are listed below")
    add("--output_dir", "-o", default=None,
        help="write files, into this folder")
    add("--output_format", "-f", default=None,
        choices=["txt", "vtt", "srt", "tsv", "json", "all"],
        help="write files, in this format")
    add("--features", default=None, metavar="FILE.safetensors",
        help="instead of a transcript, save the encoder's output for every 30 s window of the one "
        "audio file: tensor `features`, (windows, n_audio_ctx, n_audio_state) float32")
    add("--truth", default=None, metavar="FILE",
        help="what is said, to count the wrong words: a text file for the one audio file, or a "
        ".json like samples/samples.json, a list of {file, text}")
    add("--verbose", type=str2bool, default=False,
        help="print the segments with their times as they are decoded")

    add("--task", default="transcribe", choices=["transcribe", "translate"],
        help="transcribe, or translate into English")
    add("--language", default=None, choices=languages, metavar="LANGUAGE",
        help="the language spoken, as a code or an English name; None: detect it")

    add("--temperature", type=float, default=0,
        help="temperature of the sampling")
    add("--best_of", type=optional_int, default=5,
        help="number of candidates at a temperature above 0")
    add("--beam_size", type=optional_int, default=5,
        help="number of beams at temperature 0")
    add("--patience", type=float, default=None,
        help="patience of the beam search (arXiv 2204.05424); None: 1.0")
    add("--length_penalty", type=float, default=None,
        help="exponent of the length penalty (arXiv 1609.08144); None: divide by the length")
    add("--suppress_tokens", default="-1",
        help="comma-separated ids of tokens never to sample; -1: most special characters")
    add("--initial_prompt", default=None,
        help="text that precedes the first window, such as names to be spelt right")
    add("--carry_initial_prompt", type=str2bool, default=False,
        help="put the initial prompt before every window")
    add("--condition_on_previous_text", type=str2bool, default=True,
        help="prompt each window with the text of the one before")
    add("--batch_size", type=int, default=1,
        help="windows decoded at once, without the text before them; 1: one after the other")
    add("--fp16", type=str2bool, default=False,
        help="compute in float16, in variant gpu; elsewhere accepted as False only")

    add("--temperature_increment_on_fallback", type=optional_float, default=0.2,
        help="step to the next temperature where a threshold below is missed; None: no second try")
    add("--compression_ratio_threshold", type=optional_float, default=2.4,
        help="a text that compresses better than this is decoded again")
    add("--logprob_threshold", type=optional_float, default=-1.0,
        help="a text of lower mean log probability is decoded again")
    add("--no_speech_threshold", type=optional_float, default=0.6,
        help="a window with a higher probability of no speech, and below logprob_threshold, is "
        "silence")
    add("--word_timestamps", type=str2bool, default=False,
        help="find the time of every word")
    add("--prepend_punctuations", default="\"'“¿([{-",
        help="punctuation that belongs to the next word")
    add("--append_punctuations", default="\"'.。,，!！?？:：”)]}、",  # noqa: RUF001
        help="punctuation that belongs to the word before")
    add("--highlight_words", type=str2bool, default=False,
        help="underline each word as it is spoken in srt and vtt; needs --word_timestamps True")
    add("--max_line_width", type=optional_int, default=None,
        help="characters in a line of srt and vtt; needs --word_timestamps True")
    add("--max_line_count", type=optional_int, default=None,
        help="lines in a subtitle; needs --word_timestamps True and --max_line_width")
    add("--max_words_per_line", type=optional_int, default=None,
        help="words in a subtitle; needs --word_timestamps True, goes without --max_line_width")
    add("--threads", type=optional_int, default=0,
        help="number of CPU threads; 0: as many as there are")
    add("--clip_timestamps", default="0",
        help="start,end,start,end,... of the clips to transcribe, in seconds; the last end: the "
        "file's")
    add("--hallucination_silence_threshold", type=optional_float, default=None,
        help="skip silence longer than this, in seconds, around likely hallucinations; needs "
        "--word_timestamps True")
    # fmt: on
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one sentence on options that cannot hold together."""
    if args.fp16 and not VARIANTS[args.variant].fp16:
        parser.error(f"--fp16 True cannot be done: variant {args.variant} computes in float32")
    if not args.word_timestamps:
        for option in WORD_OPTIONS:
            if getattr(args, option):
                parser.error(f"--{option} requires --word_timestamps True")
    if args.temperature_increment_on_fallback is not None:
        if args.temperature_increment_on_fallback <= 0:
            parser.error("--temperature_increment_on_fallback must be above 0, or None")
        if args.temperature > 1:
            parser.error("--temperature above 1 needs --temperature_increment_on_fallback None")
    if args.length_penalty is not None and not 0 <= args.length_penalty <= 1:
        parser.error("--length_penalty must be between 0 and 1")
    for option, number in sorted(vars(args).items()):
        if isinstance(number, float) and not math.isfinite(number):
            parser.error(f"--{option} is {number}, expected a finite number")
    if args.batch_size < 1:
        parser.error("--batch_size must be 1 or more")
    if args.batch_size > 1:
        for option, value in WITHOUT.items():
            if getattr(args, option) != value:
                parser.error(f"--{option} cannot hold with --batch_size {args.batch_size}")
        if args.beam_size is not None and args.variant != "max-fast":
            parser.error("--beam_size with --batch_size needs --variant max-fast")
    for option in ("beam_size", "best_of"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option} must be 1 or more, or None")
    if args.temperature < 0:
        parser.error("--temperature must be 0 or more")
    if args.patience is not None:
        if args.beam_size is None:
            parser.error("--patience requires --beam_size")
        if round(args.beam_size * args.patience) < 1:
            parser.error("--patience times --beam_size must round to 1 or more")
    for option, number in (("clip_timestamps", float), ("suppress_tokens", int)):
        value = getattr(args, option)
        try:
            parts = [number(part) for part in value.split(",") if value]
        except ValueError:
            parts = [math.nan]
        if not all(math.isfinite(part) for part in parts) or (
            option == "clip_timestamps" and any(part < 0 for part in parts)
        ):
            parser.error(f"--{option} takes numbers with commas between them, not {value!r}")
    writes = args.output_dir is not None or args.output_format is not None
    if args.features is not None:
        if len(args.audio) != 1:
            parser.error("--features takes exactly one audio file")
        if writes:
            parser.error("--features makes no transcript for --output_dir and --output_format")
        if args.truth is not None:
            parser.error("--features makes no transcript for --truth")
        if args.batch_size > 1:
            parser.error("--features makes no transcript for --batch_size")
        if args.variant != DEFAULT:
            parser.error(f"--features is the output of MAX's encoder: no --variant but {DEFAULT}")
    if writes:
        names = Counter(os.path.splitext(os.path.basename(path))[0] for path in args.audio)
        name, count = names.most_common(1)[0]
        if count > 1:
            parser.error(f"{count} of the audio files would be written as {name}.*; name one a run")
    if args.max_line_count and not args.max_line_width:
        complain("--max_line_count has no effect without --max_line_width")
    if args.max_words_per_line and args.max_line_width:
        complain("--max_words_per_line has no effect with --max_line_width")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options; those that are not given have other defaults beside --batch_size 2 and more."""
    args = parser.parse_args(argv)
    if args.batch_size > 1:
        return parser.parse_args(argv, argparse.Namespace(**BATCHED))
    return args


def complain(sentence: object) -> None:
    """One line on stderr."""
    print(f"encoder.run: {sentence}", file=sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a sentence, without the place in the code; for `warnings.showwarning`."""
    complain(f"warning: {message}")


def limit_threads(count: int) -> None:
    """PyTorch and MAX on `count` threads.

    MAX has no such setting: it starts one thread for each processor that the program may use when
    the engine starts. So the program, from here on, may use `count` of its processors. Where the
    system cannot say so (macOS) only PyTorch, which runs the decoder, is limited.
    """
    torch.set_num_threads(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def decoded(paths: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each path with its samples, one at a time; a sentence for every file that has none.

    Files that are not there are named first, before anything is decoded.
    """
    found = []
    for path in paths:
        try:
            require_file(path)
            found.append(path)
        except AudioError as error:
            complain(error)
    for path in found:
        try:
            yield path, load_audio(path)
        except AudioError as error:
            complain(error)


def scratch_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder inside `folder`, on its file system, where files are written before they are moved
    to their place. OSError if `folder` cannot be written."""
    return tempfile.TemporaryDirectory(prefix=".encoder-run-", dir=folder)


def cannot_be_heard(dims: ModelDimensions) -> str | None:
    """Why openai-whisper's log-mel windows do not fit a checkpoint of these dims, or None."""
    if dims.n_mels not in (80, 128):
        return f"the checkpoint takes {dims.n_mels} mel bins, openai-whisper makes 80 or 128."
    if 2 * dims.n_audio_ctx != N_FRAMES:
        return (
            f"the checkpoint takes windows of {2 * dims.n_audio_ctx} frames, openai-whisper makes "
            f"{N_FRAMES}."
        )
    return None


def unknown_token(args: argparse.Namespace, n_vocab: int) -> str | None:
    """What is wrong with --suppress_tokens for a vocabulary of this size, or None."""
    tokens = [int(token) for token in args.suppress_tokens.split(",") if token]
    wrong = [token for token in tokens if not -1 <= token < n_vocab]
    return f"--suppress_tokens: {wrong[0]} is none of the {n_vocab} tokens." if wrong else None


def clips_within(clip_timestamps: str, samples: int) -> str:
    """--clip_timestamps with no time past the file's end.

    `whisper.transcribe` never returns where a clip ends past the last frame of the spectrogram.
    """
    end = samples // HOP_LENGTH * HOP_LENGTH / SAMPLE_RATE
    times = [float(time) for time in clip_timestamps.split(",") if clip_timestamps]
    if all(time <= end for time in times):
        return clip_timestamps
    complain(f"--clip_timestamps goes past the end of the file, {end} s: cut off there.")
    return ",".join(str(min(time, end)) for time in times)


def transcribe_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `whisper.transcribe`, made from the options as in its `cli()`."""
    options = dict(vars(args))
    own = "audio model model_dir offline device variant output_dir output_format features truth"
    for name in [*own.split(), "threads", "batch_size", *WORD_OPTIONS]:
        del options[name]
    increment = options.pop("temperature_increment_on_fallback")
    if increment is not None:
        options["temperature"] = tuple(np.arange(args.temperature, 1.0 + 1e-6, increment))
    else:
        options["temperature"] = [args.temperature]
    if not args.verbose:  # None: no progress bar
        options["verbose"] = False if sys.stderr.isatty() else None
    return options


def transcribe_files(args: argparse.Namespace) -> int:
    """Transcribe `args.audio`, one after the other: 0, or 1 if one of them failed.

    What can be checked without the model is checked before it is downloaded and compiled.
    """
    if reason := reason_against(args.variant, args.device):
        complain(f"{reason}.")
        return 1
    truth: dict[str, str] = {}
    if args.truth is not None:
        from encoder.truth import TruthError, read_truth

        try:
            truth = read_truth(args.truth, args.audio)
        except TruthError as error:
            complain(error)
            return 1
    recordings = decoded(args.audio)
    first = next(recordings, None)
    if first is None:
        return 1
    with contextlib.ExitStack() as stack:
        scratch: Path | None = None
        output_dir = Path("." if args.output_dir is None else args.output_dir)
        if args.output_dir is not None or args.output_format is not None:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                scratch = Path(stack.enter_context(scratch_folder(output_dir)))
            except OSError as error:
                complain(f"{output_dir} cannot be written to: {error.strerror}.")
                return 1

        from decoder_bridge import load_model
        from encoder.engine import EngineError
        from weights import WeightsError

        try:
            model = load_model(
                args.model,
                device=args.device,
                download_root=args.model_dir,
                offline=args.offline,
                variant=args.variant,
            )
        except (WeightsError, EngineError, VariantError) as error:
            complain(error)
            return 1
        problem = cannot_be_heard(model.dims) or unknown_token(args, model.dims.n_vocab)
        if problem:
            complain(problem)
            return 1
        options = transcribe_options(args)
        if not model.is_multilingual and args.language not in {"en", "English"}:
            if args.language is not None:
                complain(f"{args.model} knows English only, not {args.language}: using English.")
            options["language"] = "en"

        transcribe: Callable[..., dict[str, Any]] = model.transcribe
        if args.batch_size > 1:
            transcribe = partial(transcribe_batched, model, batch_size=args.batch_size)
        done = 0
        for path, audio in itertools.chain([first], recordings):
            if args.verbose:
                print_heading(args.audio, path)
            # Where whisper shows a progress bar it also prints the language: not to stdout.
            printed = sys.stdout if args.verbose else sys.stderr
            options["clip_timestamps"] = clips_within(args.clip_timestamps, len(audio))
            began = time.perf_counter()
            try:
                with contextlib.redirect_stdout(printed):
                    result = transcribe(audio, **options)
            except EngineError as error:
                complain(error)
                continue
            except torch.OutOfMemoryError as error:
                complain(f"{path} cannot be transcribed: {str(error).splitlines()[0]}")
                continue
            except ValueError as error:  # whisper's own checks of what it is asked to decode
                complain(f"{path} cannot be transcribed: {error}.")
                continue
            took = time.perf_counter() - began
            if not args.verbose:
                print_heading(args.audio, path)
                WriteTXT("").write_result(result, file=sys.stdout)
            if args.verbose or truth:
                heard = seconds_heard(options["clip_timestamps"], len(audio))
                line = how_it_went(args, model, result, truth.get(path), heard, took)
                name = f"{path}: " if len(args.audio) > 1 else ""
                print(name + line, file=sys.stderr)
            if scratch is not None:
                try:
                    write_files(args, result, path, scratch, output_dir)
                except OSError as error:
                    complain(f"the transcript of {path} cannot be written to files: {error}.")
                    continue
            done += 1
    return int(done < len(args.audio))


def print_heading(paths: list[str], path: str) -> None:
    """`==> path <==`, as head(1) does, where there is more than one file."""
    if len(paths) > 1:
        print(f"==> {path} <==", flush=True)


def seconds_heard(clip_timestamps: str, samples: int) -> float:
    """How much of a file --clip_timestamps names; the last end is the file's."""
    times = [float(time) for time in clip_timestamps.split(",") if time] or [0.0]
    if len(times) % 2 == 1:
        times.append(max(times[-1], samples / SAMPLE_RATE))
    return sum(times[1::2]) - sum(times[::2])


def how_it_went(
    args: argparse.Namespace,
    model: Any,
    result: dict[str, Any],
    truth: str | None,
    heard: float,
    took: float,
) -> str:
    """The last line: seconds heard and taken, how many windows at once where that is not 1, the
    word error rate where `truth` is given, and what computed it, as the model's own modules say."""
    line = [f"{heard:.1f} s heard in {took:.1f} s ({heard / took:.1f} times real time)"]
    if args.batch_size > 1:
        line.append(f"up to {args.batch_size} windows at once, without the text before them")
    if truth is not None:
        from encoder.truth import word_errors

        language = "en" if args.task == "translate" else result["language"]
        errors = word_errors(truth, result["text"], language)
        rate = f"{100 * errors.rate:.1f} %" if errors.words else "undefined"
        line.append(
            f"WER {rate} ({errors.substitutions} S, {errors.deletions} D, {errors.insertions} I of "
            f"{errors.words} words)"
        )
    line.append(what_ran(model, args.fp16))
    return " · ".join(line)


def write_files(
    args: argparse.Namespace, result: dict[str, Any], path: str, scratch: Path, output_dir: Path
) -> None:
    """openai-whisper's own writers, in a scratch folder; the complete files are then moved."""
    writer = get_writer(args.output_format or "all", str(scratch))
    writer(result, path, **{name: getattr(args, name) for name in WORD_OPTIONS})
    for file in sorted(scratch.iterdir()):
        os.replace(file, output_dir / file.name)


def save_features(args: argparse.Namespace) -> int:
    """Save the encoder's output for `args.audio[0]` as `args.features`: 0, or 1 after a sentence.

    Tensor `features`: (windows, n_audio_ctx, n_audio_state) float32, a row for each 30 s window
    from the start of the file (`encoder.audio.windows`). Metadata, all text: model, revision,
    weights_sha256, dims (JSON), audio (file name), samples, sample_rate.
    """
    path, output = args.audio[0], Path(args.features)
    try:
        audio = load_audio(path)
    except AudioError as error:
        complain(error)
        return 1
    if output.is_dir():
        complain(f"{output} is a directory; --features takes the name of a file.")
        return 1
    with contextlib.ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(scratch_folder(output.parent)))
        except OSError as error:
            complain(f"{output.parent} cannot be written to: {error.strerror}.")
            return 1

        from encoder.engine import Engine, EngineError
        from weights import WeightsError, load

        try:
            checkpoint = load(
                args.model,
                offline=args.offline,
                cache_dir=None if args.model_dir is None else Path(args.model_dir),
                encoder_only=True,
            )
            dims = checkpoint.dims
            if problem := cannot_be_heard(dims):
                complain(problem)
                return 1
            mel = windows(audio, dims.n_mels)
            if len(mel) == 0:
                complain(f"{path} is shorter than 10 ms, one frame of the spectrogram.")
                return 1
            engine = Engine(checkpoint, device=args.device)
            features = torch.empty((len(mel), dims.n_audio_ctx, dims.n_audio_state))
            for row in tqdm(range(len(mel)), unit="window", disable=not sys.stderr.isatty()):
                features[row] = engine(mel[row : row + 1])[0]
        except (WeightsError, EngineError) as error:
            complain(error)
            return 1
        metadata = {
            "model": checkpoint.source.name,
            "revision": checkpoint.source.revision or "",
            "weights_sha256": checkpoint.source.sha256,
            "dims": json.dumps(asdict(dims)),
            "audio": os.path.basename(path),
            "samples": str(len(audio)),
            "sample_rate": str(SAMPLE_RATE),
        }
        try:
            save_file({"features": features}, scratch / "features", metadata)
            # safetensors makes a file that only its owner may read; make it as any other is made.
            (scratch / "mode").touch()
            shutil.copymode(scratch / "mode", scratch / "features")
            os.replace(scratch / "features", output)
        except (OSError, SafetensorError) as error:
            complain(f"{output} cannot be written: {error}.")
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """0: done. 1: something could not be done, one sentence each on stderr. 2: usage error."""
    parser = build_parser()
    args = parse(parser, argv)
    check_usage(parser, args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks is printed as its escape. A pipe gets
        # every line at once, as a terminal does: segments come as they are decoded.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            if args.threads is not None and args.threads > 0:
                limit_threads(args.threads)
            status = transcribe_files(args) if args.features is None else save_features(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ImportError as error:  # of max, which is imported late: there is nothing in its place
        complain(f"{error.name or 'a package'} cannot be imported ({error}); run make install.")
        return 1
    except OSError as error:
        # Nothing more can be printed, and nothing shall be tried when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        complain(f"{error}.")
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())

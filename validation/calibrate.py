"""`python -m validation calibrate`: the errors of clean runs, from which the limits were set.

    python -m validation calibrate samples/demo.flac --model demo --json docs/parity-demo-clean.json

Over at least 20 inputs made from the given speech (`validation/inputs.py`), and over the same ones
with random gain and noise for each further seed (with --first N for the seeds from N on alone, as
fresh runs for limits that other seeds have set): how far each tap of the MAX encoder lies from the
reference in units of the noise floor, free-running, injected and on its own inputs; and how many of
the runs the limits of today would call different. It sets nothing by itself. With --part decoder
the same for the decoder, which has no injected errors, and the steps of its cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import weights
from encoder.audio import AudioError, load_audio, windows
from encoder.engine import EngineError
from validation import decoder_parity
from validation.candidates import resolve
from validation.decoder_reference import DecoderReference
from validation.inputs import inputs, varied
from validation.limits import (
    FREE_ABSOLUTE,
    FREE_MULTIPLE,
    OBSERVER_LIMIT,
    OWN_ABSOLUTE,
    OWN_MULTIPLE,
)
from validation.metrics import relative_error, relative_l2
from validation.parity import (
    Judged,
    ParityError,
    first_diverging,
    golden_of,
    judge_window,
    processor,
)
from validation.reference import Reference, ReferenceBroken, rank
from validation.report import dumps, write
from weights import Checkpoint, WeightsError

# mel (1, n_mels, frames) and the name of its input -> every tap judged, and figures by name, of
# which those that end in RATIO may be 1 at the most
Run = Callable[[Tensor, str], tuple[Sequence[Judged], dict[str, float]]]

RATIO = "_ratio_to_limit"
ENCODER_LIMITS = {
    "free_multiple": FREE_MULTIPLE,
    "free_absolute": FREE_ABSOLUTE,
    "own_multiple": OWN_MULTIPLE,
    "own_absolute": OWN_ABSOLUTE,
}
DECODER_LIMITS = ENCODER_LIMITS | {
    "own_multiple": decoder_parity.OWN_MULTIPLE,
    "step_multiple": decoder_parity.STEP_MULTIPLE,
    "step_absolute": decoder_parity.STEP_ABSOLUTE,
    "observer": OBSERVER_LIMIT,
}


@dataclass
class Worst:
    """The largest of what one tap has shown, and on which input."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    where: dict[str, str] = field(default_factory=dict)

    def see(self, key: str, value: float, name: str) -> None:
        if rank(value) > self.values[key]:
            self.values[key], self.where[key] = value, name


def see_all(worst: Worst, j: Judged, name: str) -> None:
    """Every error of one tap, absolute and in units of its floor."""
    errors = {"free": (j.free, j.floor), "injected": (j.injected, j.own_floor)}
    errors["own"] = (j.own, j.own_floor)
    for key, (found, floor) in errors.items():
        if found is not None:
            worst.see(key, found.relative_l2, name)
            worst.see(f"{key}_over_floor", found.relative_l2 / floor if floor else 0.0, name)
    worst.see("ratio_to_limit", j.ratio, name)


def encoder_run(checkpoint: Checkpoint) -> Run:
    """The encoder of MAX against the reference."""
    candidate, reference = resolve("max", checkpoint), Reference(checkpoint)
    tensors = {name: t.float() for name, t in checkpoint.encoder_tensors().items()}

    def run(mel: Tensor, name: str) -> tuple[Sequence[Judged], dict[str, float]]:
        golden = golden_of(reference, mel, file=name)
        dims = checkpoint.dims
        judged, _ = judge_window(candidate, golden, tensors, dims, measure=relative_error)
        return judged, {}

    return run


def decoder_run(checkpoint: Checkpoint) -> Run:
    """The decoder of MAX against the reference, on the reference's features and text."""
    candidate, reference = decoder_parity.MaxDecoder(checkpoint), DecoderReference(checkpoint)
    stock = decoder_parity.TorchDecoder(reference.model)
    _ = candidate.decoder, candidate.tapped  # compiled now, where an error is caught

    def run(mel: Tensor, name: str) -> tuple[Sequence[Judged], dict[str, float]]:
        forced = reference.forced(mel)
        taps, exact = reference.taps(forced), reference.exact(forced)
        tapped, logits = candidate.taps(forced), candidate.logits(forced)
        observer = relative_l2(tapped["logits"], logits)
        judged = decoder_parity.judge(tapped, forced, reference, taps, exact)
        steps = decoder_parity.steps_of(candidate, forced, logits).relative_l2
        noise = decoder_parity.steps_of(stock, forced, stock.logits(forced)).relative_l2
        return judged, {
            "observer": observer,
            "observer_ratio_to_limit": observer / OBSERVER_LIMIT,
            "steps": steps,
            "steps_over_floor": steps / noise if noise else 0.0,
            "steps_ratio_to_limit": steps / decoder_parity.step_limit(noise),
        }

    return run


def calibrated(args: argparse.Namespace) -> dict[str, Any]:
    """The report; raises what `main` turns into a sentence."""
    began = time.monotonic()
    speech = {Path(path).name: load_audio(path) for path in args.speech}
    decoder = args.part == "decoder"
    checkpoint = weights.load(args.model, offline=args.offline, encoder_only=not decoder)
    run = decoder_run(checkpoint) if decoder else encoder_run(checkpoint)
    runs = {
        (name, seed): audio if seed == 0 else varied(audio, seed)
        for name, audio in inputs(speech).items()
        for seed in range(args.first, args.first + args.seeds + 1)
    }
    taps: dict[str, Worst] = defaultdict(Worst)
    per_input: dict[str, Any] = {}
    alarms: list[dict[str, Any]] = []
    over_all = Worst()
    for (name, seed), audio in tqdm(runs.items(), disable=not sys.stderr.isatty()):
        judged, figures = run(windows(audio, checkpoint.dims.n_mels)[:1], name)
        for j in judged:
            see_all(taps[j.stage.name], j, name)
        for key, value in figures.items():
            over_all.see(key, value, name)
        first = first_diverging(judged)
        if first is not None:
            alarms.append(
                {"input": name, "seed": seed, "tap": first.stage.name, "ratio": first.ratio}
            )
        for key, value in figures.items():
            if key.endswith(RATIO) and not value <= 1:
                tap = key.removesuffix(RATIO)
                alarms.append({"input": name, "seed": seed, "tap": tap, "ratio": value})
        worst = max(judged, key=lambda j: j.ratio)
        if seed == args.first:
            final = judged[-1]
            per_input[name] = {
                "worst_tap": worst.stage.name,
                "ratio_to_limit": worst.ratio,
                final.stage.name: {
                    "free": final.free.relative_l2,
                    "floor": final.floor,
                },
            }
    for name, worst_tap in taps.items():
        for key, value in worst_tap.values.items():
            over_all.see(key, value, name)
    return {
        "schema": 1,
        "command": f"python -m validation calibrate {' '.join(Path(p).name for p in args.speech)} "
        f"--model {Path(args.model).name} --seeds {args.seeds}"
        + (" --part decoder" if decoder else "")
        + (f" --first {args.first}" if args.first else ""),
        "model": Path(checkpoint.source.name).name,
        "weights_sha256": checkpoint.source.sha256,
        "runs": len(runs),
        "false_alarms": alarms,
        "part": args.part,
        "limits": DECODER_LIMITS if decoder else ENCODER_LIMITS,
        "worst": {"values": dict(over_all.values), "taps": over_all.where},
        "taps": {n: {"values": dict(w.values), "inputs": w.where} for n, w in taps.items()},
        "inputs": per_input,
        "versions": {p: version(p) for p in ("max", "torch", "numpy", "openai-whisper")},
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - began,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("speech", nargs="+", help="files with speech")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--part", choices=("encoder", "decoder"), default="encoder")
    parser.add_argument("--seeds", type=int, default=0, help="further runs of every input")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the seeds (0)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    args = parser.parse_args(argv)
    try:
        found = calibrated(args)
        text = dumps(found)
        if args.json:
            write(args.json, text)
    except (AudioError, WeightsError, EngineError, ParityError, ReferenceBroken) as error:
        print(f"validation calibrate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"validation calibrate: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(json.dumps({k: found[k] for k in ("runs", "false_alarms", "worst", "seconds")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m validation calibrate`: the errors of clean runs, from which the limits were set.

    python -m validation calibrate samples/demo.flac --model demo --json docs/parity-demo-clean.json

Over at least 20 inputs made from the given speech (`validation/inputs.py`), and over the same ones
with random gain and noise for each further seed: how far each tap of the MAX encoder lies from the
reference in units of the noise floor, free-running, injected and on its own inputs; and how many of
the runs the limits of today would call different. It sets nothing by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import weights
from encoder.audio import AudioError, load_audio, windows
from encoder.engine import EngineError
from validation.candidates import resolve
from validation.inputs import inputs, varied
from validation.limits import FREE_ABSOLUTE, FREE_MULTIPLE, OWN_ABSOLUTE, OWN_MULTIPLE
from validation.metrics import relative_error
from validation.parity import Judged, first_diverging, golden_of, judge_window, processor
from validation.reference import Reference
from validation.report import dumps, write
from weights import WeightsError


@dataclass
class Worst:
    """The largest of what one tap has shown, and on which input."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    where: dict[str, str] = field(default_factory=dict)

    def see(self, key: str, value: float, name: str) -> None:
        if value > self.values[key]:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("speech", nargs="+", help="files with speech")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=0, help="further runs of every input")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        speech = {Path(path).name: load_audio(path) for path in args.speech}
        checkpoint = weights.load(args.model, offline=args.offline, encoder_only=True)
        candidate = resolve("max", checkpoint)
    except (AudioError, WeightsError, EngineError) as error:
        print(f"validation calibrate: {error}", file=sys.stderr)
        return 2
    reference, dims = Reference(checkpoint), checkpoint.dims
    tensors = {name: t.float() for name, t in checkpoint.encoder_tensors().items()}
    runs = {
        (name, seed): audio if seed == 0 else varied(audio, seed)
        for name, audio in inputs(speech).items()
        for seed in range(args.seeds + 1)
    }
    taps: dict[str, Worst] = defaultdict(Worst)
    per_input: dict[str, Any] = {}
    alarms: list[dict[str, Any]] = []
    for (name, seed), audio in tqdm(runs.items(), disable=not sys.stderr.isatty()):
        mel = windows(audio, dims.n_mels)[:1]
        golden = golden_of(reference, mel, file=name)
        judged, _ = judge_window(candidate, golden, tensors, dims, measure=relative_error)
        for j in judged:
            see_all(taps[j.stage.name], j, name)
        first = first_diverging(judged)
        if first is not None:
            alarms.append(
                {"input": name, "seed": seed, "tap": first.stage.name, "ratio": first.ratio}
            )
        worst = max(judged, key=lambda j: j.ratio)
        if seed == 0:
            final = judged[-1]
            per_input[name] = {
                "worst_tap": worst.stage.name,
                "ratio_to_limit": worst.ratio,
                "ln_post": {
                    "free": final.free.relative_l2,
                    "floor": final.floor,
                },
            }
    over_all = Worst()
    for name, worst_tap in taps.items():
        for key, value in worst_tap.values.items():
            over_all.see(key, value, name)
    found = {
        "schema": 1,
        "command": f"python -m validation calibrate {' '.join(Path(p).name for p in args.speech)} "
        f"--model {Path(args.model).name} --seeds {args.seeds}",
        "model": Path(checkpoint.source.name).name,
        "weights_sha256": checkpoint.source.sha256,
        "runs": len(runs),
        "false_alarms": alarms,
        "limits": {
            "free_multiple": FREE_MULTIPLE,
            "free_absolute": FREE_ABSOLUTE,
            "own_multiple": OWN_MULTIPLE,
            "own_absolute": OWN_ABSOLUTE,
        },
        "worst": {"values": dict(over_all.values), "taps": over_all.where},
        "taps": {n: {"values": dict(w.values), "inputs": w.where} for n, w in taps.items()},
        "inputs": per_input,
        "versions": {p: version(p) for p in ("max", "torch", "numpy", "openai-whisper")},
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - began,
    }
    text = dumps(found)
    print(json.dumps({k: found[k] for k in ("runs", "false_alarms", "worst", "seconds")}, indent=1))
    if args.json:
        write(args.json, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How far the MAX encoder's output is from the stock encoder's: it measures and judges nothing.

    python -m validation.numbers samples/demo.flac --model demo --json docs/numbers-demo.json

For the first 30 s window of a file, for silence and several kinds of white noise: relative L2 and
the largest absolute difference against stock openai-whisper (PyTorch, float32, eager attention),
over all frames and over the edge frames alone, and beside them stock's own distance from its
float64 twin and from its own fused attention.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whisper.audio import N_FRAMES, N_SAMPLES

import weights
from encoder.audio import SAMPLE_RATE, AudioError, load_audio, log_mel_spectrogram, windows
from encoder.engine import Engine, EngineError
from validation.metrics import EDGE, max_abs, relative_l2
from validation.reference import float64_encoder, run_eager, run_float64, stock_encoder
from weights import Checkpoint, WeightsError


@dataclass(frozen=True)
class Numbers:
    """One window: ours against stock float32 in eager attention; that against float64 (the floor)
    and against stock in fused attention, which is what PyTorch runs by default."""

    relative_l2: float
    max_abs: float
    edge_max_abs: float
    first_frames_relative_l2: float
    last_frames_relative_l2: float
    floor_relative_l2: float
    floor_max_abs: float
    stock_fused_max_abs: float


def compare(ours: Tensor, checkpoint: Checkpoint, mel: Tensor) -> list[Numbers]:
    """ours (B, n_audio_ctx, n_audio_state), mel (B, n_mels, frames) -> one `Numbers` a window."""
    module = stock_encoder(checkpoint)
    stock = run_eager(module, mel)
    with torch.no_grad():
        fused = torch.cat([module(window[None]) for window in mel])
    exact = run_float64(float64_encoder(checkpoint), mel)
    return [
        Numbers(
            relative_l2=relative_l2(a, b),
            max_abs=max_abs(a, b),
            edge_max_abs=max(max_abs(a[:EDGE], b[:EDGE]), max_abs(a[-EDGE:], b[-EDGE:])),
            first_frames_relative_l2=relative_l2(a[:EDGE], b[:EDGE]),
            last_frames_relative_l2=relative_l2(a[-EDGE:], b[-EDGE:]),
            floor_relative_l2=relative_l2(b, e),
            floor_max_abs=max_abs(b, e),
            stock_fused_max_abs=max_abs(f, b),
        )
        for a, b, e, f in zip(ours, stock, exact, fused, strict=True)
    ]


def silence_mel(n_mels: int = 80) -> Tensor:
    """(1, n_mels, 3000): 30 s of digital silence."""
    return log_mel_spectrogram(np.zeros(N_SAMPLES, np.float32), n_mels)[None]


def noise_mel(seed: int = 1, n_mels: int = 80) -> Tensor:
    """(1, n_mels, 3000): 30 s of white noise at a tenth of full scale."""
    noise = np.random.default_rng(seed).standard_normal(N_SAMPLES).astype(np.float32) / 10
    return log_mel_spectrogram(noise, n_mels)[None]


def other_noise(n_mels: int = 80) -> dict[str, Tensor]:
    """White noise of other kinds, each (1, n_mels, 3000): what the choice of noise changes."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(N_SAMPLES)
    burst = normal / 10 * (np.arange(N_SAMPLES) < 11 * SAMPLE_RATE)
    kinds = {
        "uniform, full scale": rng.uniform(-1, 1, N_SAMPLES),
        "of 1e-4": normal * 1e-4,
        "in int16 steps of 2": np.round(normal * 2) / 32768,
        "for 11 s, then silence": burst,
    }
    return {
        f"white noise {kind}": log_mel_spectrogram(x.astype(np.float32), n_mels)[None]
        for kind, x in kinds.items()
    }


def random_mel(seed: int = 1, n_mels: int = 80) -> Tensor:
    """(1, n_mels, 3000): independent standard normal values, white in time and frequency."""
    values = np.random.default_rng(seed).standard_normal((1, n_mels, N_FRAMES))
    return torch.from_numpy(values.astype(np.float32))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.numbers", description=__doc__)
    parser.add_argument("audio")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    parser.add_argument("--json", type=Path, help="write the report to this file as well")
    args = parser.parse_args(argv)
    try:
        audio = load_audio(args.audio)
        checkpoint = weights.load(args.model, offline=args.offline, encoder_only=True)
        engine = Engine(checkpoint, "cpu")
    except (AudioError, WeightsError, EngineError) as error:
        print(f"validation.numbers: {error}", file=sys.stderr)
        return 1
    n_mels = checkpoint.dims.n_mels
    inputs = {
        Path(args.audio).name: windows(audio, n_mels)[:1],
        "silence": silence_mel(n_mels),
        **{f"white noise, seed {seed}": noise_mel(seed, n_mels) for seed in range(1, 11)},
        **other_noise(n_mels),
        "white noise, as mel": random_mel(1, n_mels),
    }
    report = {
        "command": f"python -m validation.numbers {Path(args.audio).name} --model {args.model}",
        "model": Path(checkpoint.source.name).name,
        "weights_sha256": checkpoint.source.sha256,
        "audio_sha256": hashlib.sha256(audio.tobytes()).hexdigest(),
        "inputs": {k: asdict(compare(engine(m), checkpoint, m)[0]) for k, m in inputs.items()},
        "versions": {p: version(p) for p in ("max", "torch", "numpy", "openai-whisper")},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

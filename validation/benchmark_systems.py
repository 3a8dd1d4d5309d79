"""The systems of the benchmark: our variants and the peers, behind two functions.

`encoder(mel)` -> features and `transcribe(audio)` -> text and tokens, numpy on either side. This
module is read in each system's own process: what a system needs is imported when it is loaded, so
that one system's libraries weigh on no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from validation.peers import PEERS, Heard

REFERENCE = "cpu"  # the system that all ratios are to
BATCHED = 8  # windows at a time, where independent windows are decoded as a batch
BATCHED_NAME = f"max-fast-batch{BATCHED}"
# Another way to run a variant; cpu's shows what of a gain is the batch's and what the engine's.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpu-float16": {"variant": "gpu", "fp16": True},
    "max-gpu": {"variant": "max", "device": "gpu"},
    f"cpu-batch{BATCHED}": {"variant": "cpu", "batch_size": BATCHED},
    **{f"max-fast-batch{n}": {"variant": "max-fast", "batch_size": n} for n in (2, 4, BATCHED)},
}

# Relative L2 of the features from the float64 reference that a precision may cost: float32 as in
# validation/reference.py (AT_THE_END), the others a few times what right peers showed on speech.
# They tell a wrong output from a rough one, no more.
LIMITS = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.15}
TEXT_LIMIT = 0.5  # WER against the reference's text, of a system that gives no features


@dataclass(frozen=True)
class Job:
    """What the process of a system is told.

    model, offline : of `weights.load`
    folder : of the run, where mel, samples and the peers' files are
    """

    system: str
    model: str
    offline: bool
    threads: int
    folder: Path


@dataclass(frozen=True)
class System:
    """
    name : of the tables
    option : what --variants or --peers calls it
    what : what runs, in one phrase
    peer : another's engine, not ours
    precision : a key of LIMITS
    encodes, transcribes : the parts of the benchmark that it takes part in
    compiles : keeps graphs that it has compiled: a cold start is another than a warm one
    load : job -> an object with `encoder`, `transcribe`, or both
    cannot_run : () -> why it cannot run here, in one sentence; None: it can
    packages : the distributions whose versions say what ran
    """

    name: str
    option: str
    what: str
    peer: bool
    precision: str
    encodes: bool
    transcribes: bool
    compiles: bool
    load: Callable[[Job], Any]
    cannot_run: Callable[[], str | None]
    packages: tuple[str, ...]


class Ours:
    """A variant of ours; stock openai-whisper is one of them."""

    def __init__(
        self,
        job: Job,
        variant: str,
        fp16: bool = False,
        batch_size: int | None = None,
        device: str = "auto",
    ):
        import torch

        import weights
        from decoder_bridge.variants import VARIANTS

        torch.set_num_threads(job.threads)
        self._model: Any = VARIANTS[variant].load(
            weights.load(job.model, offline=job.offline), device
        )
        self._dtype = torch.float16 if fp16 else torch.float32
        self._options: dict[str, Any] = {"temperature": 0.0, "fp16": fp16}
        self._batch_size = batch_size

    def encoder(self, mel: np.ndarray) -> np.ndarray:
        """mel (batch, n_mels, 3000) float32 -> features in float32, on the CPU on either side."""
        import torch

        with torch.no_grad():
            x = torch.from_numpy(mel).to(self._model.device, self._dtype)
            return self._model.encoder(x).float().cpu().numpy()

    def transcribe(self, audio: np.ndarray, language: str) -> Heard:
        """Greedy, at temperature 0 alone."""
        options = {**self._options, "language": language}
        if self._batch_size is None:
            result = self._model.transcribe(audio, **options)
        else:
            from decoder_bridge.batch import transcribe_batched

            result = transcribe_batched(self._model, audio, self._batch_size, **options)
        tokens = [token for segment in result["segments"] for token in segment["tokens"]]
        return Heard(result["text"], tokens)


def ours(
    variant: str,
    name: str | None = None,
    fp16: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
) -> System:
    """A system of ours: a variant, or another way to run it."""
    from decoder_bridge.variants import VARIANTS, reason_against

    found = VARIANTS[variant]
    what = found.what
    if fp16:
        what += ", in float16"
    if batch_size is not None:
        what += f", {batch_size} independent windows at a time"
    if device != "auto":
        what += f", on --device {device}"
    stock = variant in ("cpu", "gpu")
    # On a GPU PyTorch's convolutions and all of MAX's products round float32 to TF32 (docs/gpu.md).
    full = "tf32" if "gpu" in (variant, device) else "float32"
    return System(
        name=name or variant,
        option=variant,
        what=what,
        peer=False,
        precision="float16" if fp16 else full,
        encodes=batch_size is None and variant != "max-fast",
        transcribes=True,
        compiles=not stock and batch_size is None,  # else the graphs of the variant
        load=lambda job: Ours(job, variant, fp16, batch_size, device),
        cannot_run=lambda: reason_against(variant, device),
        packages=("torch", "openai-whisper") if stock else ("max", "torch", "openai-whisper"),
    )


def peer_system(name: str) -> System:
    """A peer as a system; its files are in the folder of the run."""
    peer = PEERS[name]
    return System(
        name=peer.name,
        option=peer.name,
        what=peer.what,
        peer=True,
        precision=peer.precision,
        encodes=peer.encodes,
        transcribes=peer.transcribes,
        compiles=False,
        load=lambda job: peer.load(peer.files(job.folder), job.threads),
        cannot_run=peer.cannot_run,
        packages=peer.shown,
    )


def system(name: str) -> System:
    """The system of this name; what an own variant says of itself is read where it is asked for."""
    if name in PEERS:
        return peer_system(name)
    return ours(**SPECIAL.get(name, {"variant": name}), name=name)


OURS = ("cpu", "gpu", "max-attention", "max", "max-fast", *SPECIAL)

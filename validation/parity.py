"""Is the candidate OpenAI's encoder, layer by layer, and if not, where it differs and why.

It measures a candidate's taps against the stock reference on the same mel, judges each tap by its
noise floor (`validation/limits.py`), and names the first tap that differs with its likely cause. It
never computes what the candidate cannot give: a tap that is not there is not judged.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whisper.model import ModelDimensions

from validation import fingerprints
from validation.candidates import Candidate
from validation.golden import Golden
from validation.limits import free_limit, own_limit
from validation.metrics import Error, error
from validation.reference import Reference, floor, own_floor
from validation.stages import Stage, own_output, stages
from weights import Checkpoint

Taps = dict[str, Tensor]
Measure = Callable[[Tensor, Tensor, int], Error]
SCATTER = 2000  # points of the worst tap in the report
PACKAGES = ("max", "torch", "numpy", "openai-whisper", "safetensors", "jiwer")


class ParityError(Exception):
    """The comparison cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Judged:
    """One tap of one window: what was measured and whether it is within its limits.

    free      the candidate running by itself, against the reference: own error and inherited
    injected  the stage fed the reference's inputs, against the reference: own error alone
    own       against the float64 formula of the stage on the candidate's own inputs: own error
              alone, for candidates into which nothing can be injected
    """

    stage: Stage
    free: Error
    injected: Error | None
    own: Error | None
    floor: float
    own_floor: float
    window: int = 0
    file: str = ""

    @property
    def limit(self) -> float:
        return free_limit(self.floor) if self.stage.kind != "mel" else 0.0

    @property
    def injected_limit(self) -> float:
        return own_limit(self.own_floor) if self.stage.kind != "mel" else 0.0

    @property
    def ratio(self) -> float:
        """The largest measured error in units of its limit; infinite where a value is not finite.

        1 or less is a pass. For mel, which must be equal, 0 or infinite.
        """
        ratios = [0.0]
        for found, limit in (
            (self.free, self.limit),
            (self.injected, self.injected_limit),
            (self.own, self.injected_limit),
        ):
            if found is None:
                continue
            if found.nonfinite or not math.isfinite(found.relative_l2):
                return math.inf
            if found.relative_l2 > 0:
                ratios.append(found.relative_l2 / limit if limit else math.inf)
        return max(ratios)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def golden_of(reference: Reference, mel: Tensor, **where: Any) -> Golden:
    """The reference's side of one window, mel (1, n_mels, frames): two runs of the stock encoder,
    one of them in float64. `where`: the file, the window and the audio's SHA-256."""
    taps = reference.taps(mel)
    for name, tap in taps.items():
        if not bool(tap.any()):
            raise ParityError(
                f"the reference's {name} is zero everywhere: nothing compares with it"
            )
    exact = floor(taps, reference.exact(mel))
    own = own_floor(taps, reference.tensors, reference.dims)
    return Golden(mel, taps, exact, own, **where)


def judge(
    candidate: Taps,
    injected: Taps | None,
    golden: Golden,
    tensors: Taps,
    dims: ModelDimensions,
    fail_fast: bool = False,
    measure: Measure = error,
) -> list[Judged]:
    """Every tap that the candidate gave, in the order of computation; with `fail_fast` up to the
    first one that fails. Raises ParityError where a tap has another shape than the reference's."""
    judged = []
    for stage in stages(dims):
        name = stage.name
        if name not in candidate or name not in golden.taps:
            continue
        found, expected = tuple(candidate[name].shape), tuple(golden.taps[name].shape)
        if found != expected:
            raise ParityError(
                f"the candidate's {name} has shape {found}, the reference's has {expected}"
            )
        axis = -1 if stage.kind == "mel" else -2
        own = None
        if stage.kind != "mel" and all(x in candidate for x in stage.inputs if x != "mel"):
            inputs = {"mel": golden.mel, **candidate}
            exact = own_output(stage, inputs, tensors, dims.n_audio_head)
            if bool(torch.isfinite(exact).all()) and bool(exact.any()):
                own = measure(candidate[name][0], exact[0], axis)
        judged.append(
            Judged(
                stage,
                measure(candidate[name][0], golden.taps[name][0], axis),
                measure(injected[name][0], golden.taps[name][0], axis)
                if injected is not None and name in injected
                else None,
                own,
                golden.floor[name],
                golden.own_floor[name],
            )
        )
        if fail_fast and not judged[-1].passed:
            break
    return judged


def first_diverging(judged: Iterable[Judged]) -> Judged | None:
    """The first tap, in the order of computation, that is outside a limit."""
    return next((j for j in judged if not j.passed), None)


@dataclass
class FileLine:
    """What the report says of one file; of several windows the worst."""

    audio_sha256: str
    mel_sha256: list[str] = field(default_factory=list)
    worst: Judged | None = None
    first: Judged | None = None
    final: float | None = None


class Measured:
    """What is kept of all windows of all files: each tap where it was worst, a line for each file,
    and of the earliest tap that fails anywhere the cause; not the taps themselves."""

    def __init__(self, dims: ModelDimensions, in_order: list[Stage] | None = None):
        self.dims = dims
        self.order = {s.name: i for i, s in enumerate(in_order or stages(dims))}
        self.taps: dict[str, Judged] = {}
        self.files: dict[str, FileLine] = {}
        self.first: Judged | None = None
        self.cause: fingerprints.Cause | None = None
        self.plots: dict[str, Any] = {}
        self._plotted: Judged | None = None

    def _earlier(self, found: Judged, known: Judged | None) -> bool:
        return known is None or self.order[found.stage.name] < self.order[known.stage.name]

    def see(self, judged: list[Judged], audio_sha256: str, mel_sha256: str) -> Judged | None:
        """One window's verdicts, one at least; returns the first tap that is outside a limit, where
        it is the earliest of all windows so far."""
        line = self.files.setdefault(judged[0].file, FileLine(audio_sha256))
        line.mel_sha256.append(mel_sha256)
        for j in judged:
            name = j.stage.name
            if name not in self.taps or j.ratio > self.taps[name].ratio:
                self.taps[name] = j
            if line.worst is None or j.ratio > line.worst.ratio:
                line.worst = j
            if name == list(self.order)[-1]:
                line.final = max(line.final or 0.0, j.free.relative_l2)
        first = first_diverging(judged)
        if first is not None and self._earlier(first, line.first):
            line.first = first
        if first is None or not self._earlier(first, self.first):
            return None
        self.first = first
        return first

    def add(
        self,
        judged: list[Judged],
        candidate: Taps,
        golden: Golden,
        tensors: Taps,
        audio: np.ndarray | None = None,
    ) -> None:
        """One window's verdicts, with both sides' taps, from which cause and plots are made; with
        the samples of a file that is one window a wrong mel is explained by what made it."""
        first = self.see(judged, golden.audio_sha256, golden.mel_sha256)
        if first is not None:
            self._plotted = first
            self.cause = fingerprints.explain(
                first.stage, candidate, golden.taps, tensors, self.dims, audio
            )
            self.plots = plots(first.stage, candidate, golden.taps)
        worst = max(judged, key=lambda j: j.ratio)
        if self.first is None and (self._plotted is None or worst.ratio > self._plotted.ratio):
            self._plotted = worst
            self.plots = plots(worst.stage, candidate, golden.taps)

    def file_lines(self) -> list[dict[str, Any]]:
        """The report's `files`."""
        return [
            {
                "file": file,
                "windows": len(line.mel_sha256),
                "verdict": "pass" if line.first is None else "fail",
                "first_diverging": line.first.stage.name if line.first else None,
                "final_relative_l2": line.final,
                "worst_tap": line.worst.stage.name if line.worst else None,
                "worst_ratio": line.worst.ratio if line.worst else None,
                "sha256": {"audio": line.audio_sha256, "mel": joined_sha256(line.mel_sha256)},
            }
            for file, line in self.files.items()
        ]


def joined_sha256(digests: list[str]) -> str:
    """Of one its own; of several the SHA-256 of their hexadecimal digits, end to end."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def plots(stage: Stage, candidate: Taps, reference: Taps) -> dict[str, Any]:
    """Error of one tap over frames and over channels, and a sample of its points."""
    a, b = candidate[stage.name][0].double(), reference[stage.name][0].double()
    if stage.kind == "mel":
        a, b = a.T, b.T  # frames, channels
    difference = a - b

    def ratio(axis: int) -> list[float]:
        norm = torch.linalg.vector_norm(b, dim=axis)
        values = torch.linalg.vector_norm(difference, dim=axis) / norm.clamp_min(1e-30)
        return [float(v) for v in values]

    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(a.numel(), min(SCATTER, a.numel()), replace=False))
    index = torch.from_numpy(chosen)
    return {
        "frames": {"tap": stage.name, "relative_l2": ratio(1)},
        "channels": {"tap": stage.name, "relative_l2": ratio(0)},
        "scatter": {
            "tap": stage.name,
            "reference": b.flatten()[index].tolist(),
            "candidate": a.flatten()[index].tolist(),
        },
    }


def sha256_of(data: Tensor | np.ndarray) -> str:
    """SHA-256 of the bytes of an array, in row order."""
    array = data.detach().contiguous().numpy() if isinstance(data, Tensor) else data
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def tensor_table(ours: Taps, theirs: Taps) -> list[dict[str, Any]]:
    """The weights stage: every tensor's shape, dtype and SHA-256, before any activation."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": sha256_of(tensor.float()),
            "candidate_sha256": sha256_of(theirs[name].float()) if name in theirs else None,
        }
        for name, tensor in ours.items()
    ]


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file is in; None outside of one."""
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return result.stdout.strip() or None


def metrics_of(found: Error | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "worst_index": list(found.worst_index)}


def tap_of(j: Judged) -> dict[str, Any]:
    """One tap as the report has it; `minimum_tolerance` is the relative L2 that would just pass,
    `suggested_tolerance` twice what was seen, for `torch.allclose` (rtol with its atol)."""
    smallest = max(x.relative_l2 for x in (j.free, j.injected, j.own) if x is not None)
    return {
        "name": j.stage.name,
        "kind": j.stage.kind,
        "file": j.file,
        "window": j.window,
        "free": metrics_of(j.free),
        "injected": metrics_of(j.injected),
        "own": metrics_of(j.own),
        "floor": {"relative_l2": j.floor},
        "own_floor": {"relative_l2": j.own_floor},
        "limit": j.limit,
        "injected_limit": j.injected_limit,
        "ratio": j.ratio,
        "passed": j.passed,
        "minimum_tolerance": smallest,
        "suggested_tolerance": {"rtol": 1e-5, "atol": 2 * j.free.max_abs},
    }


def circumstances(command: str, began: float) -> dict[str, Any]:
    """By what, on what and in how many seconds a report was made."""
    return {
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command,
        "commit": commit(),
        "seconds": time.monotonic() - began,
    }


def report(
    measured: Measured,
    *,
    model: Checkpoint,
    candidate: str,
    candidate_model: Checkpoint | None,
    bound: Checkpoint | None,
    observer: float | None,
    alive: dict[str, Any] | None,
    ran: dict[str, Any] | None,
    semantic: dict[str, Any] | None,
    command: str,
    began: float,
) -> dict[str, Any]:
    """The report, schema 1 (docs/parity.md). `bound`: whose weights the candidate ran with; None
    where it brought its own."""
    judged = [measured.taps[s.name] for s in stages(measured.dims) if s.name in measured.taps]
    first = measured.first
    passed = first is None and (semantic is None or semantic["tokens_identical"] is not False)
    final = next((j for j in judged if j.stage.name == "ln_post"), None)
    files = measured.file_lines()
    return {
        "schema": 1,
        "verdict": "pass" if passed else "fail",
        "first_diverging": first.stage.name if first else None,
        "cause": asdict(measured.cause) if measured.cause else None,
        "observer": observer,
        "model": Path(model.source.name).name,
        "candidate": candidate,
        "candidate_model": Path(candidate_model.source.name).name if candidate_model else None,
        "final": tap_of(final) if final else None,
        "taps": [tap_of(j) for j in judged],
        "files": files,
        "inputs": {
            "audio": joined_sha256([f["sha256"]["audio"] for f in files]),
            "mel": joined_sha256([f["sha256"]["mel"] for f in files]),
            "weights": model.source.sha256,
            "candidate_weights": bound.source.sha256 if bound else None,
            "tensors": tensor_table(
                model.encoder_tensors(), bound.encoder_tensors() if bound else {}
            ),
        },
        "alive": alive,
        "ran": ran,
        "semantic": semantic,
        "plots": measured.plots,
        **circumstances(command, began),
    }


def judge_window(
    candidate: Candidate,
    golden: Golden,
    tensors: Taps,
    dims: ModelDimensions,
    fail_fast: bool = False,
    measure: Measure = error,
) -> tuple[list[Judged], Taps]:
    """Run the candidate on one window and judge it: (verdicts, the candidate's taps)."""
    found = candidate.taps(golden.mel)
    injected = candidate.injected(golden.taps)
    judged = judge(found, injected, golden, tensors, dims, fail_fast, measure)
    if all(j.stage.kind == "mel" for j in judged):
        raise ParityError(f"{candidate.name} gives no tap but mel: there is nothing to compare")
    return [replace(j, file=golden.file, window=golden.window) for j in judged], found

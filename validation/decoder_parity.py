"""Is the candidate OpenAI's text decoder: `python -m validation parity --part decoder`.

Both sides are given the same features, the stock encoder's, and the same tokens, the stock text.
Four things are judged: every tap of all tokens at once, the logits of a prompt and then one token
at a time against those of all at once, and the tokens that each side finds by itself, greedily and
with beams. What only one of them can show, a cache or a beam gone wrong, cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import whisper
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH, N_FRAMES
from whisper.decoding import Inference, PyTorchInference

from decoder_bridge.decoding import MaxInference, one_torch_thread
from decoder_bridge.engine import Decoder, TappedDecoder
from decoder_bridge.model import fast_model, stock_model
from validation.candidates import PERTURBED, CandidateError
from validation.decoder_reference import DecoderReference, Forced, Taps, record
from validation.limits import OBSERVER_LIMIT, OWN_ABSOLUTE
from validation.metrics import error, max_abs, relative_l2
from validation.parity import (
    Judged,
    Measured,
    ParityError,
    circumstances,
    joined_sha256,
    sha256_of,
    tap_of,
    tensor_table,
)
from validation.reference import floor, rank
from validation.report import figure
from validation.semantic import (
    first_difference,
    kl_divergence,
    knows_timestamps,
    tokenizer_of,
    window_starts,
)
from weights import Checkpoint

if TYPE_CHECKING:
    from validation.command import Recording

CANDIDATES = ("max", "torch")
KERNELS = (
    "max_whisper.linear",
    "no_mask_flash_attention_cpu",
    "masked_flash_attention_cpu",
    "matmul",
    "layer_norm",
)

# One stage alone: times what float32 costs the reference there. More than the encoder's, since
# MAX's fused attention of a few tokens over a whole window rounds more than PyTorch's.
OWN_MULTIPLE = 20.0

# The logits at one position, from a cache against all tokens at once, relative L2: times what that
# is for the stock decoder at its worst position, and at the least.
STEP_MULTIPLE = 10.0
STEP_ABSOLUTE = 4e-6

SEARCHES: dict[str, dict[str, int]] = {"greedy": {}, "beam 5": {"beam_size": 5}}


class DecoderCandidate(Protocol):
    """One decoder with its weights, asked one window at a time."""

    name: str

    def taps(self, forced: Forced) -> Taps:
        """Every tap of all tokens at once, in the order of computation."""

    def logits(self, forced: Forced) -> Tensor:
        """The logits of all tokens at once, (1, T, n_vocab), as they are when nobody looks."""

    def inference(self, n_prompt: int) -> Inference:
        """What a search asks, with a cache: all rows of a prompt of so many tokens, then the last
        token's."""

    def model(self) -> whisper.Whisper | None:
        """The model whose transcripts answer for this decoder; None where that is the reference."""


class MaxDecoder:
    """This package's decoder: the graph with taps, the production graphs, the variant max-fast."""

    name = "max"

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.checkpoint)

    @cached_property
    def tapped(self) -> TappedDecoder:
        return TappedDecoder(self.checkpoint)

    def taps(self, forced: Forced) -> Taps:
        return self.tapped(forced.tokens, forced.features)

    def logits(self, forced: Forced) -> Tensor:
        return self.decoder(forced.tokens, forced.features)

    def inference(self, n_prompt: int) -> Inference:
        return MaxInference(self.decoder, 1, tuple(range(n_prompt)))

    def model(self) -> whisper.Whisper:
        return fast_model(self.checkpoint)


class TorchDecoder:
    """Stock openai-whisper in float32 as `whisper.transcribe` runs it, in PyTorch's fused
    attention, where the reference writes attention out."""

    name = "torch"

    def __init__(self, stock: whisper.Whisper):
        self.stock = stock

    def taps(self, forced: Forced) -> Taps:
        return record(self.stock.decoder, forced.tokens, forced.features)

    def logits(self, forced: Forced) -> Tensor:
        with torch.no_grad():
            return self.stock.decoder(forced.tokens, forced.features)

    def inference(self, n_prompt: int) -> Inference:
        return PyTorchInference(self.stock, n_prompt)

    def model(self) -> None:
        return None


def resolve(spec: str, checkpoint: Checkpoint) -> DecoderCandidate:
    """The candidate that `spec` names. Raises CandidateError on any other."""
    if spec == "max":
        return MaxDecoder(checkpoint)
    if spec == "torch":
        return TorchDecoder(stock_model(checkpoint))
    raise CandidateError(f"candidate is {spec!r}, a decoder is one of {', '.join(CANDIDATES)}")


@dataclass(frozen=True)
class DecoderJudged(Judged):
    """One tap of one window; free-running within the limits of the encoder."""

    @property
    def injected_limit(self) -> float:
        return max(OWN_MULTIPLE * self.own_floor, OWN_ABSOLUTE)


def judge(
    candidate: Taps,
    forced: Forced,
    reference: DecoderReference,
    taps: Taps,
    exact: Taps,
    fail_fast: bool = False,
) -> list[Judged]:
    """Every tap, in the order of computation, with `fail_fast` up to the first one that fails:
    free-running against the reference, and against the float64 formula of its stage on the
    candidate's own inputs."""
    floors, own_floors = floor(taps, exact), reference.own_floor(forced, taps)
    judged: list[Judged] = []
    for stage in reference.stages:
        name = stage.name
        own, due = None, reference.own_output(stage, forced, candidate)
        if bool(torch.isfinite(due).all()) and bool(due.any()):
            own = error(candidate[name][0], due[0])
        free = error(candidate[name][0], taps[name][0])
        judged.append(DecoderJudged(stage, free, None, own, floors[name], own_floors[name]))
        if fail_fast and not judged[-1].passed:
            break
    return judged


@dataclass(frozen=True)
class Steps:
    """The logits of a prompt and then one token at a time, against those of all tokens at once.

    relative_l2 : at the position where it is worst; NaN where a value is not finite
    position, n_prompt : which one that is, after a prompt of so many tokens
    """

    relative_l2: float
    position: int
    n_prompt: int


def stepwise(inference: Inference, forced: Forced, n_prompt: int) -> Tensor:
    """The logits of a prompt of `n_prompt` tokens and of each further one, (1, T, n_vocab)."""
    try:
        with torch.no_grad(), one_torch_thread():
            rows = [
                inference.logits(forced.tokens[:, :n], forced.features)
                for n in range(n_prompt, forced.tokens.shape[1] + 1)
            ]
    finally:
        inference.cleanup_caching()
    return torch.cat(rows, dim=1)


def steps_of(candidate: DecoderCandidate, forced: Forced, at_once: Tensor) -> Steps:
    """The worst position of two runs: the start sequence is the prompt, and half of all tokens."""
    found = []
    for n_prompt in sorted({forced.n_prompt, max(1, forced.tokens.shape[1] // 2)}):
        logits = stepwise(candidate.inference(n_prompt), forced, n_prompt)
        for i, (ours, due) in enumerate(zip(logits[0], at_once[0], strict=True)):
            found.append(Steps(relative_l2(ours, due), i, n_prompt))
    return max(found, key=lambda s: rank(s.relative_l2))


def step_limit(stock: float) -> float:
    """What the worst position may differ by where it differs by `stock` in the stock decoder."""
    return max(STEP_MULTIPLE * stock, STEP_ABSOLUTE)


def transcripts(
    reference: whisper.Whisper,
    candidate: whisper.Whisper,
    recording: Recording,
    windows: int | None,
) -> list[dict[str, Any]]:
    """`whisper.transcribe` at temperature 0 on both models, by each search: are the tokens the same
    and if not, from where on. A checkpoint that does not know timestamps is decoded without."""
    frames = len(recording.audio) // HOP_LENGTH
    clip: Any = "0"
    if windows is not None and frames > windows * N_FRAMES:
        frames = windows * N_FRAMES
        clip = [0.0, frames / FRAMES_PER_SECOND]
    found = []
    for search, options in SEARCHES.items():
        ours, theirs = (
            model.transcribe(
                recording.audio,
                temperature=0.0,
                fp16=False,
                without_timestamps=not knows_timestamps(reference),
                clip_timestamps=clip,
                **options,
            )
            for model in (reference, candidate)
        )
        segments = ours["segments"], theirs["segments"]
        tokenizer = tokenizer_of(reference, ours["language"])
        difference = first_difference(*segments, window_starts(segments[0], frames), tokenizer)
        found.append(
            {
                "file": recording.file,
                "search": search,
                "tokens": sum(len(s["tokens"]) for s in segments[0]),
                "tokens_identical": difference is None,
                "first_difference": asdict(difference) if difference else None,
                "text": {"reference": ours["text"], "candidate": theirs["text"]},
            }
        )
    return found


def ran(candidate: DecoderCandidate, forced: Forced, logits: Tensor) -> dict[str, Any]:
    """The proof that MAX ran: the kernels of the production graphs, and how far the logits move
    where one tensor bound to them is perturbed. Every value is None for another candidate.

    Raises ParityError where they do not move.
    """
    if not isinstance(candidate, MaxDecoder):
        return {"kernels": None, "perturbed": None, "output_changed_by": None}
    name = f"decoder.{PERTURBED}"
    tensors = dict(candidate.checkpoint.tensors)
    tensors[name] = tensors[name] + 0.5
    other = Decoder(replace(candidate.checkpoint, tensors=tensors))
    changed = relative_l2(other(forced.tokens, forced.features), logits)
    if changed == 0:
        raise ParityError(f"the logits do not change with {PERTURBED}: did MAX run?")
    kernels = candidate.decoder.kernels
    return {
        "kernels": {name: sum(name in kernel for kernel in kernels) for name in KERNELS},
        "perturbed": PERTURBED,
        "output_changed_by": changed,
    }


class Kept:
    """What is kept of all windows, beside `Measured`: logits, steps, and what was fed."""

    def __init__(self) -> None:
        self.windows: list[dict[str, Any]] = []
        self.observers: list[float] = []
        self.features: list[str] = []
        self.tokens: list[str] = []

    def add(self, where: dict[str, Any], forced: Forced, ours: Tensor, due: Tensor) -> None:
        """One window's logits as the candidate has them in production, and the reference's."""
        self.features.append(sha256_of(forced.features))
        self.tokens.append(sha256_of(forced.tokens))
        self.windows.append(
            {
                **where,
                "tokens": forced.tokens[0].tolist(),
                "n_prompt": forced.n_prompt,
                "relative_l2": relative_l2(ours, due),
                "max_abs": max_abs(ours, due),
                "same_top1": (ours[0].argmax(-1) == due[0].argmax(-1)).tolist(),
                "kl": kl_divergence(due[0], ours[0]).tolist(),
            }
        )

    def logits(self) -> dict[str, Any]:
        """Of all windows: the worst, and KL and first choice over all positions."""
        kl = sorted((x for window in self.windows for x in window["kl"]), key=rank)
        same = [x for window in self.windows for x in window["same_top1"]]
        worst = {k: max((w[k] for w in self.windows), key=rank) for k in ("relative_l2", "max_abs")}
        return {
            **worst,
            "positions": len(kl),
            "kl_mean": math.fsum(kl) / len(kl),
            "kl_p99": kl[math.ceil(0.99 * len(kl)) - 1],
            "kl_max": kl[-1],
            "same_top1": sum(same) / len(same),
        }

    def steps(self) -> dict[str, Any]:
        """Of all windows the one whose steps are nearest to their limit, or furthest past it."""
        found = [{k: w[k] for k in ("file", "window")} | w["steps"] for w in self.windows]
        return max(found, key=lambda s: rank(s["relative_l2"] / s["limit"]))


def compare(
    checkpoint: Checkpoint,
    other: Checkpoint | None,
    spec: str,
    recordings: Sequence[Recording],
    *,
    windows: int | None,
    transcript: bool | None,
    fail_fast: bool,
    command: str,
    began: float,
) -> dict[str, Any]:
    """The report, schema 1 of the part `decoder` (docs/parity.md).

    other : whose weights the candidate is given, of the same size; None: the reference's
    transcript : None is yes where the candidate has one of its own
    fail_fast : stop at the first tap outside a limit, and compare no transcripts then
    """
    reference = DecoderReference(checkpoint)
    stock = TorchDecoder(reference.model)
    candidate = resolve(spec, other or checkpoint)
    measured, kept = Measured(checkpoint.dims, reference.stages), Kept()
    alive = proof = None
    for recording in recordings:
        audio = sha256_of(recording.audio)
        for i, mel in enumerate(recording.mel):
            if fail_fast and measured.first is not None:
                break
            where: dict[str, Any] = {"file": recording.file, "window": i}
            forced = reference.forced(mel[None])
            taps, exact = reference.taps(forced), reference.exact(forced)
            for name, tap in taps.items():
                if not bool(tap.any()):
                    raise ParityError(
                        f"the reference's {name} is zero everywhere: nothing compares with it"
                    )
            found, logits = candidate.taps(forced), candidate.logits(forced)
            if alive is None:
                alive = asdict(reference.check(forced, taps, exact))
                proof = ran(candidate, forced, logits)
            observer = relative_l2(found["logits"], logits)
            if observer > OBSERVER_LIMIT:
                raise ParityError(
                    f"the logits with taps are {observer:.1e} from those without, at most "
                    f"{OBSERVER_LIMIT:.0e} is expected: the taps would say nothing about production"
                )
            kept.observers.append(observer)
            judged = judge(found, forced, reference, taps, exact, fail_fast)
            judged = [replace(j, **where) for j in judged]
            measured.see(judged, audio, sha256_of(mel))
            kept.add(where, forced, logits, taps["logits"])
            steps = steps_of(candidate, forced, logits)
            noise = steps_of(stock, forced, stock.logits(forced)).relative_l2
            limit = step_limit(noise)
            kept.windows[-1]["steps"] = {
                **asdict(steps),
                "floor": noise,
                "limit": limit,
                "passed": steps.relative_l2 <= limit,
            }
    said: list[dict[str, Any]] | None = None
    stopped = fail_fast and measured.first is not None
    if transcript is not False and not stopped and (model := candidate.model()) is not None:
        said = [x for r in recordings for x in transcripts(reference.model, model, r, windows)]
    return report(measured, kept, said, candidate.name, checkpoint, other) | {
        "alive": alive,
        "ran": proof,
        **circumstances(command, began),
    }


def decoder_tensors(checkpoint: Checkpoint) -> Taps:
    """By OpenAI's names without "decoder."."""
    part = "decoder."
    return {k.removeprefix(part): x for k, x in checkpoint.tensors.items() if k.startswith(part)}


def report(
    measured: Measured,
    kept: Kept,
    said: list[dict[str, Any]] | None,
    candidate: str,
    model: Checkpoint,
    other: Checkpoint | None,
) -> dict[str, Any]:
    """What was found, and the verdict."""
    judged = [measured.taps[name] for name in measured.order if name in measured.taps]
    final = measured.taps.get("logits")
    files, steps, first = measured.file_lines(), kept.steps(), measured.first
    problems = []
    if not steps["passed"]:
        problems.append(
            f"the logits of one token at a time are {figure(finite(steps['relative_l2']))} from "
            f"those of all at once at position {steps['position']} of window {steps['window']} of "
            f"{steps['file']} (limit {figure(steps['limit'])})"
        )
    for one in said or []:
        if not one["tokens_identical"]:
            problems.append(f"the tokens of {one['file']} by {one['search']} are not the same")
    return {
        "schema": 1,
        "part": "decoder",
        "verdict": "pass" if first is None and not problems else "fail",
        "first_diverging": first.stage.name if first else None,
        "problems": problems,
        "observer": max(kept.observers, key=rank),
        "model": Path(model.source.name).name,
        "candidate": candidate,
        "candidate_model": Path(other.source.name).name if other else None,
        "final": tap_of(final) if final else None,
        "taps": [tap_of(j) for j in judged],
        "logits": kept.logits(),
        "steps": steps,
        "transcripts": said,
        "semantic": None,
        "windows": kept.windows,
        "files": files,
        "inputs": {
            "audio": joined_sha256([f["sha256"]["audio"] for f in files]),
            "mel": joined_sha256([f["sha256"]["mel"] for f in files]),
            "features": joined_sha256(kept.features),
            "tokens": joined_sha256(kept.tokens),
            "weights": model.source.sha256,
            "candidate_weights": (other or model).source.sha256,
            "tensors": tensor_table(decoder_tensors(model), decoder_tensors(other or model)),
        },
    }


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def sentences(report: dict[str, Any]) -> list[str]:
    """What the terminal and the Markdown say of logits, steps and transcripts."""
    logits, steps = report["logits"], report["steps"]
    error, most = figure(finite(logits["relative_l2"])), figure(finite(logits["kl_max"]))
    lines = [
        f"logits of {logits['positions']} tokens: relative L2 {error}, same first choice "
        f"{100 * logits['same_top1']:.4g} %, KL max {most} nats",
        f"one token at a time against all at once: {figure(finite(steps['relative_l2']))} at the "
        f"worst position, the stock decoder {figure(steps['floor'])}, limit "
        f"{figure(steps['limit'])}",
    ]
    for one in report["transcripts"] or []:
        same = "the same tokens" if one["tokens_identical"] else "other tokens"
        if difference := one["first_difference"]:
            same += f" from {difference['time']:.1f} s on"
        lines.append(f"transcript of {one['file']}, {one['search']}: {same}, {one['tokens']}")
    return lines

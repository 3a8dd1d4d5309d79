"""One fault on all recordings: the first tap that differs, what it is called, what the features and
the text lose, and whether the compiled graph says the same. A row is one fault on one recording.

Nothing is measured by a bench that is not itself in order: without a fault the twin, and the MAX
encoder where it takes part, must pass at every tap of every recording.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whisper.model import ModelDimensions

from decoder_bridge.model import stock_model
from encoder.audio import windows
from encoder.engine import artifact_name, select_device
from validation import fingerprints, golden
from validation.candidates import MaxCandidate
from validation.faults import Fault, Twin, not_run
from validation.golden import Golden, GoldenError, goldens_of
from validation.limits import OBSERVER_LIMIT
from validation.metrics import error, relative_error, relative_l2
from validation.parity import first_diverging, golden_of, judge, sha256_of
from validation.recordings import Recording
from validation.reference import Reference
from validation.report import clean, dumps, write
from validation.semantic import CheckedEncoder, FeaturesError
from validation.stages import Stage, stages
from validation.transcripts import NO_TRANSCRIPT, Transcripts
from weights import Checkpoint

Taps = dict[str, Tensor]
Row = dict[str, Any]
Progress = Callable[[Sequence[Recording]], Any]  # what is iterated over while it is prepared

ON_MAX = ("input", "weights")  # what can be done to the compiled graph without another compile
PREPARED = re.compile(r"\d{2,}-(reference\.safetensors|twin\.safetensors|max\.json)")  # files


class BenchError(Exception):
    """Nothing can be measured; the message is one sentence."""


@dataclass(frozen=True)
class Prepared:
    """A recording with what it is judged by.

    golden  the reference's side
    twin    the taps of the twin without a fault
    on_max  SHA-256 of each tap of the MAX encoder without a fault; None where it takes no part
    """

    recording: Recording
    golden: Golden
    twin: Taps
    on_max: dict[str, str] | None


def prepare(
    checkpoint: Checkpoint,
    recordings: Sequence[Recording],
    folder: Path,
    on_max: bool = True,
    progress: Progress = list,
) -> list[Prepared]:
    """Everything that is the same for all faults, as files in `folder` that are computed once and
    mapped into memory, so that several processes share them: 370 MB a recording for tiny.

    Raises BenchError where a right encoder does not pass, GoldenError where a file cannot be
    written, EngineError, ParityError.
    """
    reference = Reference(checkpoint)
    right = MaxCandidate(checkpoint, "cpu") if on_max else None
    found = []
    for i, recording in enumerate(progress(recordings)):
        mel = windows(recording.audio, checkpoint.dims.n_mels)[:1]
        gold = golden_prepared(reference, checkpoint, recording, mel, folder / f"{i:02d}-reference")
        twin = twin_prepared(checkpoint, gold, folder / f"{i:02d}-twin")
        tapped = None
        if right is not None:
            tapped = max_prepared(right, checkpoint, gold, folder / f"{i:02d}-max.json")
        found.append(Prepared(recording, gold, twin, tapped))
    return found


def discard(folder: Path) -> None:
    """Remove what `prepare` has left in this folder, and nothing else."""
    for path in list(folder.iterdir()):
        if PREPARED.fullmatch(path.name):
            path.unlink()


def kept(path: Path, checkpoint: Checkpoint, mel: Tensor) -> Golden | None:
    """The window in this file, if it is of this encoder, this mel and these packages."""
    try:
        found = golden.load(path, checkpoint)
    except GoldenError:
        return None
    installed = {package: version(package) for package in golden.PACKAGES}
    window = found.windows[0]
    return window if found.versions == installed and torch.equal(window.mel, mel) else None


def keep(path: Path, checkpoint: Checkpoint, window: Golden) -> Golden:
    """The same window, from a file that it was written to."""
    golden.save(path, goldens_of(checkpoint, [window]))
    return golden.load(path, checkpoint).windows[0]


def golden_prepared(
    reference: Reference, checkpoint: Checkpoint, recording: Recording, mel: Tensor, path: Path
) -> Golden:
    path = path.with_suffix(".safetensors")
    found = kept(path, checkpoint, mel)
    if found is not None and found.file == recording.name:
        return found
    return keep(
        path,
        checkpoint,
        golden_of(reference, mel, file=recording.name, audio_sha256=recording.sha256),
    )


def twin_prepared(checkpoint: Checkpoint, gold: Golden, path: Path) -> Taps:
    """The taps of the twin; they are written only after it has passed."""
    path = path.with_suffix(".safetensors")
    found = kept(path, checkpoint, gold.mel)
    if found is None:
        twin = Twin(checkpoint)
        taps = twin.taps(gold.mel)
        require_pass(twin.name, taps, twin.injected(gold.taps), gold, checkpoint)
        found = keep(path, checkpoint, replace(gold, taps=taps, floor={}, own_floor={}))
    return found.taps


def max_prepared(
    right: MaxCandidate, checkpoint: Checkpoint, gold: Golden, path: Path
) -> dict[str, str]:
    """The hashes of the taps of the MAX encoder; written only after it has passed."""
    of = {
        "artifact": artifact_name(checkpoint.dims, select_device("cpu"), "encoder-taps"),
        "encoder_sha256": golden.encoder_sha256(checkpoint.encoder_tensors()),
        "mel_sha256": gold.mel_sha256,
    }
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if {key: known.get(key) for key in of} == of:
        return dict(known["taps"])
    taps = right.taps(gold.mel)
    require_pass("the MAX encoder", taps, None, gold, checkpoint)
    apart = relative_l2(taps["ln_post"], right.features(gold.mel))
    if apart > OBSERVER_LIMIT:
        raise BenchError(
            f"{gold.file}: the graph with taps is {apart:.1e} from the production graph, at most "
            f"{OBSERVER_LIMIT:.0e} is expected"
        )
    hashes = {name: sha256_of(tap) for name, tap in taps.items()}
    write(path, dumps({**of, "taps": hashes}))
    return hashes


def require_pass(
    name: str, taps: Taps, injected: Taps | None, gold: Golden, checkpoint: Checkpoint
) -> None:
    tensors = {n: t.float() for n, t in checkpoint.encoder_tensors().items()}
    judged = judge(taps, injected, gold, tensors, checkpoint.dims, measure=relative_error)
    first = first_diverging(judged)
    if first is not None:
        raise BenchError(
            f"{gold.file}: {name} without any fault differs from the reference at "
            f"{first.stage.name} ({first.ratio:.2g} times the limit): nothing can be measured"
        )


def same_tensors(tensors: Taps, right: Taps) -> bool:
    """Whether they are equal, bit for bit; both have the same names."""
    return all(torch.equal(x, right[name]) for name, x in tensors.items())


def taps_of(twin: Twin, mel: Tensor, right: Taps, tensors: Taps) -> tuple[Taps, set[str]]:
    """The taps of a twin with a fault, and the names of those that are, bit for bit, the taps of
    the one without: `right`, which has `tensors`. What such taps alone go into is not run again."""
    changed = {name for name, x in twin.tensors.items() if not torch.equal(x, tensors[name])}
    taps: Taps = {}
    same: set[str] = set()
    with torch.no_grad():
        for stage in stages(twin.dims):
            name = stage.name
            formula = twin.formulas.get(name)
            if formula is not_run:
                continue
            if stage.kind == "mel":
                taps[name] = twin.stage(stage, {"mel": mel})
            elif (
                formula or changed.intersection(stage.weights) or not same.issuperset(stage.inputs)
            ):
                taps[name] = twin.stage(stage, taps)
            else:
                taps[name] = right[name]
            if torch.equal(taps[name], right[name]):
                same.add(name)
    return taps, same


Injected = Callable[[Stage], Tensor]  # a stage's answer to the reference's inputs


def first_wrong(
    taps: Taps,
    same: Callable[[str], bool],
    injected: Injected | None,
    gold: Golden,
    tensors: Taps,
    dims: ModelDimensions,
) -> Stage | None:
    """The first stage at which parity's verdict is fail. Up to the first tap that is not the right
    encoder's, bit for bit, the verdict is that encoder's: pass."""
    reached = False
    for stage in stages(dims):
        name = stage.name
        reached = reached or (name in taps and not same(name))
        if name not in taps or not reached:
            continue
        if taps[name].shape != gold.taps[name].shape:
            return stage
        answer = {name: injected(stage)} if injected else None
        one = replace(gold, taps={name: gold.taps[name]})
        if first_diverging(judge(taps, answer, one, tensors, dims, measure=relative_error)):
            return stage
    return None


def at_tap(stage: Stage, taps: Taps, gold: Golden) -> dict[str, float] | None:
    """How far the tap is from the reference's; None where its shape is another."""
    name = stage.name
    if taps[name].shape != gold.taps[name].shape:
        return None
    found = asdict(error(taps[name][0], gold.taps[name][0], -1 if name == "mel" else -2))
    return {key: found[key] for key in ("relative_l2", "sqnr_db", "cosine")}


def at_end(features: Tensor, right: Tensor) -> dict[str, float]:
    """How far the features are from the reference's; the peak of PSNR is the largest of these."""
    found = error(features[0], right[0])
    mse = float((features.double() - right.double()).square().mean())
    peak = float(right.abs().max())
    return {
        "relative_l2": found.relative_l2,
        "sqnr_db": found.sqnr_db,
        "psnr_db": 20 * math.log10(peak) - 10 * math.log10(mse) if mse else math.inf,
        "cosine": found.cosine,
        "max_abs": found.max_abs,
    }


def features_of(
    taps: Taps, gold: Golden, dims: ModelDimensions
) -> tuple[Tensor | None, str | None]:
    """(the features, None), or (None, why there are none)."""
    if "ln_post" not in taps:
        return None, "the encoder has no ln_post"
    try:
        return CheckedEncoder(lambda mel: taps["ln_post"], dims)(gold.mel), None
    except FeaturesError as problem:
        return None, str(problem)


class Bench:
    """Measures faults on recordings; `prepare` says what lies in `folder`, and what it raises.

    A fault of the encoder runs on the twin, stage by stage; one of the input or of weights, with
    `on_max`, on the compiled graph too. Where the checkpoint has no decoder the transcript's part
    of the rows is None, and a fault of the bridge cannot be measured.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recordings: Sequence[Recording],
        folder: Path,
        on_max: bool = True,
        progress: Progress = list,
    ):
        self.checkpoint, self.dims = checkpoint, checkpoint.dims
        self.tensors = {n: t.float() for n, t in checkpoint.encoder_tensors().items()}
        self.prepared = prepare(checkpoint, recordings, folder, on_max, progress)
        self.on_max = on_max

    @cached_property
    def transcripts(self) -> Transcripts | None:
        if not self.checkpoint.has_decoder:
            return None
        features = [p.golden.taps["ln_post"] for p in self.prepared]
        model = stock_model(self.checkpoint)
        try:
            return Transcripts(model, [p.recording for p in self.prepared], features)
        except ValueError as problem:
            raise BenchError(str(problem)) from problem

    @cached_property
    def right_max(self) -> MaxCandidate:
        return MaxCandidate(self.checkpoint, "cpu")

    def trial(self, fault: Fault) -> list[Row]:
        """A row for each recording, in their order."""
        began = time.monotonic()
        rows = self._bridge(fault) if fault.how == "bridge" else self._encoder(fault)
        seconds = (time.monotonic() - began) / len(rows)
        about = {
            "fault": fault.key,
            "id": fault.id,
            "strength": fault.strength,
            "group": fault.group,
            "how": fault.how,
            "sentence": fault.sentence,
            "unseen": fault.unseen,
            "yardstick": fault.yardstick,
        }
        return [
            clean({**about, "recording": p.recording.name, **row, "seconds": round(seconds, 3)})
            for p, row in zip(self.prepared, rows, strict=True)
        ]

    def _bridge(self, fault: Fault) -> list[Row]:
        if self.transcripts is None:
            raise BenchError(f"{fault.key} is a fault of the transcript: it needs a decoder")
        nothing = dict.fromkeys(
            ("first_tap", "expected_first_tap", "cause", "explained", "at_tap", "final", "max")
        )
        same = {"detected": False, "expected_cause": fault.cause, **nothing}
        return [{**same, **row} for row in self.transcripts.across_windows(fault)]

    def _encoder(self, fault: Fault) -> list[Row]:
        twin = Twin(self.checkpoint, fault)
        mels = [fault.mel(p.recording.audio, p.golden.mel.clone()) for p in self.prepared]
        rows: list[Row] = []
        features: list[Tensor | None] = []
        for p, mel in zip(self.prepared, mels, strict=True):
            row, found = self._on_twin(fault, twin, p, mel)
            rows.append(row)
            features.append(found)
        self._on_max(fault, mels, rows)
        if self.transcripts is None:
            return [{**NO_TRANSCRIPT, **row} for row in rows]
        said = self.transcripts.of(features)
        return [
            {**of_text, **row, "failed": row["failed"] or of_text["failed"]}
            for row, of_text in zip(rows, said, strict=True)
        ]

    def _first_wrong(
        self, taps: Taps, same: Callable[[str], bool], injected: Injected | None, p: Prepared
    ) -> Stage | None:
        return first_wrong(taps, same, injected, p.golden, self.tensors, self.dims)

    def _explain(self, stage: Stage | None, taps: Taps, p: Prepared) -> fingerprints.Cause | None:
        """What the first difference is called, where there is one."""
        if stage is None:
            return None
        return fingerprints.explain(
            stage, taps, p.golden.taps, self.tensors, self.dims, p.recording.audio
        )

    def _on_twin(
        self, fault: Fault, twin: Twin, p: Prepared, mel: Tensor
    ) -> tuple[Row, Tensor | None]:
        """The encoder's part of the row, and the features if they are any."""
        taps, same = taps_of(twin, mel, p.twin, self.tensors)

        def injected(stage: Stage) -> Tensor:
            with torch.no_grad():
                return twin.stage(stage, p.golden.taps)

        stage = self._first_wrong(taps, same.__contains__, injected, p)
        cause = self._explain(stage, taps, p)
        features, failed = features_of(taps, p.golden, self.dims)
        row = {
            "detected": stage is not None,
            "first_tap": stage.name if stage else None,
            "expected_first_tap": fault.diverges_at(),
            "cause": cause.id if cause else None,
            "expected_cause": fault.cause,
            "explained": cause.sentence if cause else None,
            "injected": same != p.twin.keys() or not same_tensors(twin.tensors, self.tensors),
            "at_tap": at_tap(stage, taps, p.golden) if stage else None,
            "final": None if features is None else at_end(features, p.golden.taps["ln_post"]),
            "failed": failed,
            "max": None,
        }
        return row, features

    def _on_max(self, fault: Fault, mels: Sequence[Tensor], rows: list[Row]) -> None:
        """The same fault on the compiled graph, into the rows: the graph with taps for the verdict,
        the production graph for the features. Nothing is injected there: the limits hold for what
        each stage makes of its own inputs."""
        if not self.on_max or fault.how not in ON_MAX:
            return
        wrong = self.right_max
        if fault.how == "weights":
            wrong = MaxCandidate(fault.damage(self.checkpoint), "cpu")
        for p, mel, row in zip(self.prepared, mels, rows, strict=True):
            assert p.on_max is not None
            taps = wrong.taps(mel)
            right_hash = p.on_max.__getitem__

            def same(name: str, taps: Taps = taps, right_hash: Any = right_hash) -> bool:
                return bool(sha256_of(taps[name]) == right_hash(name))

            stage = self._first_wrong(taps, same, None, p)
            first = stage.name if stage else None
            if first == row["first_tap"] == "mel":  # the same mel on both sides
                cause = row["cause"]
            else:
                found = self._explain(stage, taps, p)
                cause = found.id if found else None
            features, _ = features_of({"ln_post": wrong.features(mel)}, p.golden, self.dims)
            right = p.golden.taps["ln_post"]
            ours = None if features is None else relative_l2(features, right)
            twins = row["final"]["relative_l2"] if row["final"] else None
            row["max"] = {
                "detected": stage is not None,
                "first_tap": first,
                "cause": cause,
                "final_relative_l2": ours,
                "twin_relative_l2": twins,
                "relative_difference": abs(ours - twins) / twins
                if ours is not None and twins
                else None,
                "same_first_tap": first == row["first_tap"],
            }

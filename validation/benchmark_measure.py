"""The interleaved run: every system in every round, in an order that each round shuffles anew.

A system that fails, or whose output is too far from the reference's, is a sentence from there on,
and the others go on without it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.truth import word_errors
from validation.benchmark_statistics import median, ratio_of_medians
from validation.benchmark_systems import LIMITS, REFERENCE, TEXT_LIMIT, Job, System
from validation.benchmark_worker import FEATURES, Answer, Worker, WorkerError
from validation.metrics import relative_l2

Row = dict[str, Any]
SHIFT = 500  # frames: a window that is there already comes again so much later
WINDOW_SECONDS = 30.0


class BenchmarkError(Exception):
    """It cannot be measured; the message is one sentence."""


@dataclass(frozen=True)
class Plan:
    """How often and in which order.

    starts : of each process, beside one that is not measured
    cold : measure a start without compiled graphs too
    """

    rounds: int
    starts: int
    seed: int
    cold: bool = False


@dataclass(frozen=True)
class Heard:
    """A recording: its file's name, its length in seconds, and what is said, if known."""

    file: str
    seconds: float
    truth: str | None


def say(sentence: str) -> None:
    """One line of progress."""
    print(f"benchmark: {sentence}", file=sys.stderr, flush=True)


def enough_windows(mel: np.ndarray, count: int) -> np.ndarray:
    """`count` different windows (count, n_mels, frames), the given ones first, then the same ones
    later in time: a batch of copies would hide rows that are mixed up."""
    rows = [np.roll(mel[i % len(mel)], SHIFT * (i // len(mel)), axis=-1) for i in range(count)]
    return np.ascontiguousarray(np.stack(rows))


@dataclass
class Part:
    """The processes of one part of the benchmark, and what is known against a system.

    first : the call whose answer ends a start
    problems : system -> why it is not measured; what is found out here is added
    """

    systems: dict[str, System]
    job: Callable[[str], Job]
    plan: Plan
    first: tuple[Any, ...]
    problems: dict[str, str]
    starts: dict[str, Row] = field(default_factory=dict)
    cold: dict[str, float] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.plan.seed)

    def shuffled(self) -> list[str]:
        """The systems that still run, in another order each time."""
        names = [name for name in self.systems if name in self.workers]
        self._random.shuffle(names)
        return names

    def drop(self, name: str, sentence: str) -> None:
        """Go on without a system; BenchmarkError where it is the one that ratios are to."""
        if name == REFERENCE:
            raise BenchmarkError(f"{name}, to which all ratios are, failed: {sentence}")
        self.problems[name] = sentence
        say(f"{name}: {sentence}")
        if worker := self.workers.pop(name, None):
            worker.close()

    def started(self, name: str, changes: Mapping[str, str]) -> tuple[Worker, float, Answer] | None:
        """A new process, the seconds to its first result, and that; None where it failed."""
        with ExitStack() as failed:
            try:
                worker = Worker(self.job(name), changes)
                failed.callback(worker.close)
                answer = worker.ask(*self.first)
            except WorkerError as error:
                self.drop(name, str(error))
                return None
            failed.pop_all()
        return worker, worker.start + answer.seconds, answer

    def start(self) -> None:
        """Start every system: once without measuring, so that its files have been read and its
        graphs are compiled, then as often as the plan says; the last process stays."""
        if self.plan.cold:
            self.cold_starts()
        for attempt in range(1 + self.plan.starts):
            names = [name for name in self.systems if name not in self.problems]
            self._random.shuffle(names)
            for name in names:
                if attempt == 0:
                    say(f"starting {name}")
                if (found := self.started(name, {})) is None:
                    continue
                worker, seconds, answer = found
                if attempt == self.plan.starts:
                    self.workers[name] = worker
                else:
                    worker.close()
                if attempt > 0:
                    row = self.starts.setdefault(name, {"warm": [], "cold": self.cold.get(name)})
                    row["warm"].append(seconds)
                    row["peak_bytes"] = answer.peak
                    row["flushes_denormals"] = worker.loaded.value["flushes_denormals"]

    def cold_starts(self) -> None:
        """A start of those that compile graphs, with empty folders for what is compiled."""
        for name, system in self.systems.items():
            if not system.compiles or name in self.problems:
                continue
            say(f"cold start of {name}: it compiles, for minutes")
            changes = {
                variable: str(self.job(name).folder / "cold" / self.first[0] / name / variable)
                for variable in ("MAX_WHISPER_CACHE", "MODULAR_CACHE_DIR")
            }
            if (found := self.started(name, changes)) is not None:
                found[0].close()
                self.cold[name] = found[1]

    def ask(self, name: str, *call: Any) -> Answer | None:
        """None where the system failed."""
        try:
            return self.workers[name].ask(*call)
        except WorkerError as error:
            self.drop(name, str(error))
            return None

    def close(self) -> None:
        while self.workers:
            self.workers.popitem()[1].close()


def timed(part: Part, calls: Sequence[tuple[Any, ...]]) -> dict[tuple[str, int], list[Answer]]:
    """(system, number of the call) -> its answer in every round; systems that failed are left
    out."""
    found: dict[tuple[str, int], list[Answer]] = {}
    for number in range(part.plan.rounds):
        say(f"round {number + 1} of {part.plan.rounds}")
        for i, call in enumerate(calls):
            for name in part.shuffled():
                if (answer := part.ask(name, *call)) is not None:
                    found.setdefault((name, i), []).append(answer)
    return {key: answers for key, answers in found.items() if key[0] in part.workers}


def features_error(folder: Path, name: str, reference: np.ndarray) -> float:
    """Relative L2 of what a system has just answered; infinite where the shapes differ."""
    features = np.load(folder / FEATURES.format(name))
    if features.shape != reference.shape:
        return float("inf")
    return relative_l2(torch.from_numpy(features), torch.from_numpy(reference))


def measure_encoders(
    part: Part, batches: Sequence[int], reference: np.ndarray, folder: Path
) -> list[Row]:
    """A row for each system and batch size: it has passed the check at every batch size.

    reference : (windows, n_audio_ctx, n_audio_state), float64
    """
    part.start()
    errors: dict[tuple[str, int], float] = {}
    peaks: dict[tuple[str, int], int] = {}
    for batch in sorted(batches):  # ascending: a process's peak is that of its largest batch yet
        for name in part.shuffled():
            if (answer := part.ask(name, "encoder", batch)) is None:
                continue
            limit = LIMITS[part.systems[name].precision]
            error = features_error(folder, name, reference[:batch])
            if not error <= limit:
                part.drop(
                    name,
                    f"wrong output, not timed: batch {batch} is {error:.1e} from the float64 "
                    f"reference (relative L2), {part.systems[name].precision} may be {limit:.0e}",
                )
                continue
            errors[name, batch], peaks[name, batch] = error, answer.peak
    answers = timed(part, [("encoder", batch) for batch in batches])
    rows = []
    for i, batch in enumerate(batches):
        for name in part.systems:
            if (name, i) not in answers:
                continue
            seconds = [answer.seconds for answer in answers[name, i]]
            rows.append(
                {
                    "system": name,
                    "batch": batch,
                    **timing(seconds, answers.get((REFERENCE, i)), part.plan.seed),
                    "times_real_time": WINDOW_SECONDS * batch / median(seconds),
                    "relative_l2": errors[name, batch],
                    "limit": LIMITS[part.systems[name].precision],
                    "peak_bytes": peaks[name, batch],
                }
            )
    return rows


def timing(seconds: list[float], base: list[Answer] | None, seed: int) -> Row:
    """The seconds of all rounds, their median, and the ratio to the reference's."""
    ratio = None
    if base is not None:
        ratio = asdict(ratio_of_medians(seconds, [answer.seconds for answer in base], seed))
    return {"seconds": seconds, "median": median(seconds), "ratio": ratio}


def wer(truth: str, heard: str, language: str) -> float | None:
    """None where the truth has no words."""
    errors = word_errors(truth, heard, language)
    return errors.rate if errors.words else None


def measure_transcripts(part: Part, heard: Sequence[Heard], language: str, eot: int) -> list[Row]:
    """A row for each system and recording.

    eot : the first token that is no text
    """
    part.start()
    texts: dict[tuple[str, int], Any] = {}
    peaks: dict[tuple[str, int], int] = {}
    order = sorted(range(len(heard)), key=lambda i: heard[i].seconds)
    for i in order:
        for name in part.shuffled():
            if (answer := part.ask(name, "transcribe", i, language)) is not None:
                texts[name, i], peaks[name, i] = answer.value, answer.peak
    for name in list(part.workers):
        if REFERENCE not in part.workers:
            continue
        for i in order:
            rate = wer(texts[REFERENCE, i].text, texts[name, i].text, language)
            if part.systems[name].peer and rate is not None and rate > TEXT_LIMIT:
                part.drop(
                    name,
                    f"wrong text, not timed: {100 * rate:.0f} % of the words of {heard[i].file} "
                    f"differ from {REFERENCE}'s",
                )
                break
    answers = timed(part, [("transcribe", i, language) for i in range(len(heard))])
    rows = []
    for i, recording in enumerate(heard):
        for name in part.systems:
            if (name, i) not in answers:
                continue
            found = texts[name, i]
            seconds = [answer.seconds for answer in answers[name, i]]
            row: Row = {
                "system": name,
                "file": recording.file,
                **timing(seconds, answers.get((REFERENCE, i)), part.plan.seed),
                "times_real_time": recording.seconds / median(seconds),
                "peak_bytes": peaks[name, i],
                "text": found.text,
                "tokens": found.tokens,
                "same_text_each_round": all(answer.value == found for answer in answers[name, i]),
                "wer_truth": None,
                "wer_reference": None,
                "tokens_identical": None,
                "text_tokens_identical": None,
            }
            if recording.truth is not None:
                row["wer_truth"] = wer(recording.truth, found.text, language)
            if (REFERENCE, i) in answers:
                stock = texts[REFERENCE, i]
                row["wer_reference"] = wer(stock.text, found.text, language)
                row["tokens_identical"] = found.tokens == stock.tokens
                row["text_tokens_identical"] = [t for t in found.tokens if t < eot] == [
                    t for t in stock.tokens if t < eot
                ]
            rows.append(row)
    return rows

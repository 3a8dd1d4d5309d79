"""Which metric goes with WER: rank correlations, the gates that others use, the best limits.

The headline is over mistakes, and gives each distinct fault one vote, which its strengths share.
"all" stands beside it: every fault and strength, the yardsticks with them, one vote each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from validation.findings_rows import (
    CLASSES,
    HARMFUL,
    METRICS,
    SCOPES,
    Row,
    Trials,
    at_end,
    in_encoder,
    middle,
)
from validation.findings_statistics import (
    FEWEST_IDS,
    LEVEL,
    RESAMPLES,
    auc,
    defined,
    interval,
    samples,
    spearman,
    votes,
)

Found = dict[str, Any]
Classes = dict[str, str | None]  # of each fault, by its key

FEWEST_POINTS = 3  # two always correlate
JUDGED = ("mistakes", "all")  # scopes of gates and limits


def of_scope(scope: str, trials: Trials) -> Trials:
    """The faults of a scope that parity can see."""
    return {
        fault: rows
        for fault, rows in trials.items()
        if SCOPES[scope](rows[0]) and in_encoder(rows[0])
    }


# Correlations


class Point(NamedTuple):
    id: str
    wer: float
    values: dict[str, float | None]  # the metrics


def pooled_wer(fault: Found, rows: Sequence[Row]) -> float:
    return float(fault["wer"]["wer"])


def capped_wer(fault: Found, rows: Sequence[Row]) -> float:
    """The mean over the recordings, none of which counts for more than 1: a text that loops is as
    lost as one that is not there, however long the loop."""
    known = [row["wer"]["wer"] for row in rows if row["wer"] and row["wer"]["wer"] is not None]
    return sum(min(1.0, value) for value in known) / len(known)


def of_faults(
    faults: Sequence[Found],
    trials: Trials,
    wer: Callable[[Found, Sequence[Row]], float] = pooled_wer,
) -> list[Point]:
    """A point for each fault of one strength: the medians of its recordings, and one WER."""
    return [
        Point(
            fault["id"],
            wer(fault, trials[fault["fault"]]),
            {name: middle(map(m.of, trials[fault["fault"]])) for name, m in METRICS.items()},
        )
        for fault in faults
        if fault["wer"] and fault["wer"]["wer"] is not None
    ]


def of_rows(rows: Sequence[Row]) -> list[Point]:
    return [
        Point(row["id"], row["wer"]["wer"], {name: m.of(row) for name, m in METRICS.items()})
        for row in rows
        if row["wer"] and row["wer"]["wer"] is not None
    ]


def correlations(trials: Trials, faults: Sequence[Found], seed: int) -> Found:
    """Spearman of each metric with WER against the unfaulted transcript.

    mistakes, encoder: a point for each fault and strength, a vote for each id; capped: the mistakes
    with `capped_wer`; rows: the mistakes, a point for each recording, a vote for each id; all: a
    point and a vote for each fault and strength.
    """
    scoped = {
        scope: of_faults([fault for fault in faults if SCOPES[scope](fault)], trials)
        for scope in ("mistakes", "encoder")
    }
    mistakes = [fault for fault in faults if SCOPES["mistakes"](fault)]
    scoped["capped"] = of_faults(mistakes, trials, capped_wer)
    scoped["rows"] = of_rows(
        [row for rows in trials.values() for row in rows if SCOPES["mistakes"](row)]
    )
    scoped["all"] = of_faults(faults, trials)
    found: Found = {"resamples": RESAMPLES, "seed": seed, "level": LEVEL}
    return found | {
        scope: {name: correlation(name, points, seed, scope != "all") for name in METRICS}
        for scope, points in scoped.items()
    }


def correlation(name: str, points: Sequence[Point], seed: int, by_id: bool = True) -> Found:
    """rho with its interval, and how much stronger it is than relative L2's on these points; a vote
    for each id, or for each point."""
    known = [
        (p.id, p.wer, p.values[name], p.values["relative_l2"])
        for p in points
        if p.values[name] is not None and p.values["relative_l2"] is not None
    ]
    ids = [fault_id for fault_id, *_ in known]
    found: Found = {"rho": None, "low": None, "high": None, "stronger": None}
    found |= {"n": len(known), "ids": len(set(ids))}
    if len(known) < FEWEST_POINTS:
        return found
    wer, x, base = np.array([numbers for _, *numbers in known], float).T
    once = votes(ids) if by_id else np.ones(len(known))
    rho, of_base = spearman(x, wer, once), spearman(base, wer, once)
    if not np.isfinite(rho):
        return found
    rhos, more = [], []
    for drawn in samples(ids, seed) if found["ids"] >= FEWEST_IDS else ():
        rhos.append(spearman(x, wer, once * drawn))
        more.append(np.abs(rhos[-1]) - np.abs(spearman(base, wer, once * drawn)))
    found |= {"rho": float(rho), **interval(rhos)}
    if name != "relative_l2" and np.isfinite(of_base):
        found["stronger"] = {"value": float(abs(rho) - abs(of_base)), **interval(more)}
    return found


# Gates


@dataclass(frozen=True)
class Gate:
    """A limit that others set on an encoder's output; what it measures, at most or at least."""

    name: str
    metric: str | None
    of: Callable[[Row], float | None]
    at_most: bool
    limit: float

    def passes(self, values: Sequence[float | None]) -> dict[str, bool]:
        """Whether the median recording passes, and the worst; what has no value is infinitely far
        away."""
        sign = 1 if self.at_most else -1
        away = [math.inf if v is None else sign * v for v in values]
        return {
            on: statistic <= sign * self.limit
            for on, statistic in (("median", median(away)), ("worst", max(away)))
        }


GATES = (
    Gate("PSNR >= 35 dB", "psnr_db", METRICS["psnr_db"].of, False, 35),
    Gate("cosine >= 0.999", "cosine", lambda row: at_end(row, "cosine"), False, 0.999),
    Gate("atol 1e-2", "max_abs", METRICS["max_abs"].of, True, 1e-2),
    Gate("relative L2 <= 1e-4", "relative_l2", METRICS["relative_l2"].of, True, 1e-4),
    Gate("relative L2 <= 1e-3", "relative_l2", METRICS["relative_l2"].of, True, 1e-3),
    Gate("relative L2 <= 1e-2", "relative_l2", METRICS["relative_l2"].of, True, 1e-2),
    Gate("SQNR >= 40 dB", "sqnr_db", METRICS["sqnr_db"].of, False, 40),
    Gate("this suite's verdict", None, lambda row: float(row["detected"]), True, 0),
)


def gated(gate: Gate, trials: Trials, classes: Classes) -> Found:
    """Which faults it lets through and which it stops, on the median recording and on the worst:
    by key; `counts` are of ids over mistakes, of faults and strengths over all. Of an id in a class
    some strengths may pass and others be stopped."""
    found: Found = {"name": gate.name, "metric": gate.metric}
    found |= {"at_most": gate.at_most, "limit": gate.limit}
    for scope in JUDGED:
        own = of_scope(scope, trials)
        passes = {fault: gate.passes([gate.of(row) for row in own[fault]]) for fault in own}

        def count(keys: Sequence[str], own: Trials = own, by_id: bool = scope != "all") -> int:
            return len({own[key][0]["id"] if by_id else key for key in keys})

        found[scope] = {}
        for on in ("median", "worst"):
            of = {each: [f for f in own if classes[f] == each] for each in CLASSES}
            through = {each: [f for f in of[each] if passes[f][on]] for each in CLASSES}
            stops = {each: [f for f in of[each] if not passes[f][on]] for each in CLASSES}
            found[scope][on] = {
                "lets_through": {each: through[each] for each in HARMFUL},
                "stops": stops["benign"],
                "counts": {
                    each: {
                        "n": count(of[each]),
                        "passes": count(through[each]),
                        "stopped": count(stops[each]),
                    }
                    for each in CLASSES
                },
            }
    return found


def gates(trials: Trials, classes: Classes) -> list[Found]:
    return [gated(gate, trials, classes) for gate in GATES]


# Limits


def thresholds(
    trials: Trials, classes: Classes, seed: int, without: Sequence[tuple[Trials, Classes]] = ()
) -> Found:
    """`threshold` of each metric, over mistakes and over all.

    without : trials and classes where one recording is left out, for each of them; `without_one` is
        the smallest and the largest limit of those
    """
    found: Found = {}
    for scope in JUDGED:
        own, by_id = of_scope(scope, trials), scope != "all"
        found[scope] = {}
        for name in METRICS:
            found[scope][name] = one = threshold(name, own, classes, seed, by_id)
            limits = [
                limit
                for rest, theirs in without
                if (limit := best_limit(name, of_scope(scope, rest), theirs, by_id)) is not None
            ]
            one["without_one"] = {
                "low": min(limits, default=None),
                "high": max(limits, default=None),
            }
    return found


def judged(
    name: str, trials: Trials, classes: Classes, by_id: bool
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Of the faults that have the metric and a class: ids, values (more is worse), whether they are
    harmful, and votes."""
    metric = METRICS[name]
    known = [
        (rows[0]["id"], metric.worse * value, classes[fault] in HARMFUL)
        for fault, rows in trials.items()
        if (value := middle(map(metric.of, rows))) is not None and classes[fault] is not None
    ]
    ids = [fault_id for fault_id, *_ in known]
    values = np.array([value for _, value, _ in known], float)
    bad = np.array([harmful for *_, harmful in known], bool)
    return ids, values, bad, votes(ids) if by_id else np.ones(len(known))


class Best(NamedTuple):
    """The limits (ascending), which of them is best, and the shares on its right sides."""

    limits: np.ndarray
    at: int
    stops: float
    passes: float


def best_of(values: np.ndarray, bad: np.ndarray, once: np.ndarray) -> Best:
    limits = np.unique(values)
    stopped = values > limits[:, None]
    sensitivity = np.average(stopped[:, bad], axis=-1, weights=once[bad])
    specificity = np.average(~stopped[:, ~bad], axis=-1, weights=once[~bad])
    at = int((sensitivity + specificity).round(9).argmax())  # equal but for rounding is equal
    return Best(limits, at, float(sensitivity[at]), float(specificity[at]))


def best_limit(name: str, trials: Trials, classes: Classes, by_id: bool) -> float | None:
    """The limit that `threshold` gives, alone."""
    _, values, bad, once = judged(name, trials, classes, by_id)
    if not bad.any() or bad.all():
        return None
    best = best_of(values, bad, once)
    return float(best.limits[best.at]) * METRICS[name].worse


def threshold(name: str, trials: Trials, classes: Classes, seed: int, by_id: bool = True) -> Found:
    """The limit on one metric that best tells damaging and ruinous faults from the others.

    It has the largest Youden's J (their share that it stops, less the share of the others), of
    equals the strictest; it is the last value that passes, `next` the first that does not. It is
    chosen on the faults that it is scored on. `auc` needs no limit. A vote for each id, or for each
    fault and strength.
    """
    metric = METRICS[name]
    ids, values, bad, once = judged(name, trials, classes, by_id)
    found: Found = dict.fromkeys(
        ("limit", "next", "youden", "stops", "passes", "auc", "low", "high")
    )
    found |= {"at_most": metric.worse > 0, "n": len(ids), "ids": len(set(ids))}
    found["harmful"] = int(bad.sum())
    if not bad.any() or bad.all():
        return found
    limits, at, stops, passes = best_of(values, bad, once)
    after = float(limits[at + 1]) * metric.worse if at + 1 < len(limits) else None
    enough = found["ids"] >= FEWEST_IDS
    spread = [auc(values, bad, once * drawn) for drawn in samples(ids, seed)] if enough else []
    return found | {
        "limit": float(limits[at]) * metric.worse,
        "next": after,
        "youden": stops + passes - 1,
        "stops": stops,
        "passes": passes,
        "auc": defined(auc(values, bad, once)),
        **interval(spread),
    }

"""What the rows of the fault bench show: faults summed up, targets, sweeps, correlations, gates.

A row is one fault on one recording. Nothing runs here and nothing is drawn: the terminal and the
tables are in `validation.findings_page`, the pictures in `validation.findings_plot`. A statistic
that the rows do not define is None.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from validation.findings_page import markdown, tables, terminal
from validation.findings_plot import svg_scatter
from validation.report import clean

__all__ = ["findings", "markdown", "missed", "svg_scatter", "tables", "terminal"]

Row = dict[str, Any]  # one line of trials.jsonl
Found = dict[str, Any]  # schema 1, as `findings` returns it
Trials = dict[str, list[Row]]  # the rows of each fault, by its key

GROUPS = ("input", "stem", "blocks", "weights", "bridge")
OUTSIDE = ("input", "bridge")  # not mistakes in the encoder itself
CLASSES = ("benign", "wording", "damaging", "ruinous")
WORDING, DAMAGING = 0.05, 0.30  # the largest WER of either class
CHANGED = 1e-4  # relative L2 at ln_post; what changes it more must be detected
AGREES = 0.01  # MAX's relative L2 at ln_post against the twin's
RESAMPLES = 2000
LEVEL = 0.95  # of an interval
FEWEST_POINTS = 3  # two always correlate
FEWEST_IDS = 5  # fewer give no interval
COVERAGE = ("faults_on_max", "distinct_faults")  # targets that only the whole catalogue can meet


def at_end(row: Row, name: str) -> float | None:
    """A measure at ln_post, infinite dB where that is exact; None without finite features."""
    final = row["final"]
    if final is None or final["relative_l2"] is None:
        return None
    value: float | None = final[name]
    if value is None and name.endswith("_db") and final["relative_l2"] == 0:
        return math.inf
    return value


def less_than_one(value: float | None) -> float | None:
    return None if value is None else 1 - value


@dataclass(frozen=True)
class Metric:
    """Something measured of a row that may predict its WER; `worse` -1: less of it is worse."""

    label: str
    of: Callable[[Row], float | None]
    worse: int = 1


METRICS = {
    "relative_l2": Metric("relative L2", lambda row: at_end(row, "relative_l2")),
    "sqnr_db": Metric("SQNR, dB", lambda row: at_end(row, "sqnr_db"), -1),
    "psnr_db": Metric("PSNR, dB", lambda row: at_end(row, "psnr_db"), -1),
    "max_abs": Metric("max abs", lambda row: at_end(row, "max_abs")),
    "cosine_distance": Metric("1 - cosine", lambda row: less_than_one(at_end(row, "cosine"))),
    "kl_mean": Metric("KL mean", lambda row: row["kl_mean"]),
    "top1_changed": Metric("1 - same top-1", lambda row: less_than_one(row["same_top1"])),
    "tap_relative_l2": Metric(
        "relative L2 at the first diverging tap",
        lambda row: row["at_tap"]["relative_l2"] if row["at_tap"] else None,
    ),
}


@dataclass(frozen=True)
class Gate:
    """A limit that others set on an encoder's output; what it measures, at most or at least."""

    name: str
    metric: str | None
    of: Callable[[Row], float | None]
    at_most: bool
    limit: float

    def passes(self, values: Sequence[float | None]) -> list[bool]:
        """(the median recording, all recordings); what has no value is infinitely far away."""
        sign = 1 if self.at_most else -1
        away = [math.inf if v is None else sign * v for v in values]
        return [statistic <= sign * self.limit for statistic in (median(away), max(away))]


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


def findings(rows: list[Row], about: dict[str, Any]) -> Found:
    """Everything that is said of the rows, as JSON holds it; the order of the rows changes nothing.

    `about` has the run's model, recordings, versions and so on, and the seed of the bootstrap.
    Raises ValueError where a fault has two rows for one recording.
    """
    rows = clean(rows)  # as they are once written: not finite is None
    trials = by_fault(rows)
    seed = int(about.get("seed") or 0)
    faults = [summary(fault, own) for fault, own in trials.items()]
    classes = {fault["fault"]: fault["class"] for fault in faults}
    return clean(
        {
            "schema": 1,
            "about": about,
            "faults": faults,
            "targets": targets(trials),
            "misses": misses(trials),
            "sweeps": sweeps(faults),
            "correlations": correlations(trials, faults, seed),
            "gates": [gate(each, trials, classes) for each in GATES],
            "beyond_gates": [
                fault
                for fault, own in trials.items()
                if not in_encoder(own[0]) and classes[fault] in CLASSES[2:]
            ],
            "thresholds": {name: threshold(name, trials, classes, seed) for name in METRICS},
            "rows": rows,
        }
    )


def missed(found: Found, whole: bool = True) -> list[str]:
    """The names of the targets that are not met; those of COVERAGE if the catalogue is `whole`."""
    return [
        name
        for name, target in found["targets"].items()
        if target["met"] is False and (whole or name not in COVERAGE)
    ]


def by_fault(rows: Iterable[Row]) -> Trials:
    """The rows of each fault by recording; faults by group, id and strength."""

    def place(row: Row) -> tuple[Any, ...]:
        word = isinstance(row["strength"], str)
        strength = (word, 0.0, row["strength"]) if word else (word, row["strength"] or 0.0, "")
        return GROUPS.index(row["group"]), row["id"], strength, row["recording"]

    trials: Trials = defaultdict(list)
    for row in sorted(rows, key=place):
        own = trials[row["fault"]]
        if own and own[-1]["recording"] == row["recording"]:
            raise ValueError(f"{row['fault']} has two rows for the recording {row['recording']}")
        own.append(row)
    return dict(trials)


def in_encoder(row: Row) -> bool:
    return bool(row["how"] != "bridge")


def changes(row: Row) -> bool:
    """Whether ln_post is another: more than CHANGED away, or not there at all."""
    relative = at_end(row, "relative_l2")
    return in_encoder(row) and (relative is None or relative > CHANGED)


def agrees(row: Row) -> bool:
    """Whether the compiled graph and the twin say the same of a fault that ran on both."""
    ran = row["max"]
    ours, twin, difference = (
        ran[key] for key in ("final_relative_l2", "twin_relative_l2", "relative_difference")
    )
    if difference is not None:
        close = difference <= AGREES
    elif twin == 0:  # nothing to divide by
        close = ours is not None and ours <= CHANGED
    else:
        close = ours is None and twin is None
    return bool(close and ran["same_first_tap"])


def share(held: Iterable[bool]) -> float | None:
    counted = list(held)
    return sum(counted) / len(counted) if counted else None


def middle(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def total(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def pooled(counts: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One WER of several texts: all errors over all words; None without a text."""
    known = [c for c in counts if c is not None]
    if not known:
        return None
    names = ("substitutions", "deletions", "insertions", "words")
    summed = {name: sum(c[name] for c in known) for name in names}
    errors = sum(summed[name] for name in names[:3])
    return {"wer": errors / summed["words"] if summed["words"] else None, **summed}


def pooled_truth(rows: list[Row]) -> dict[str, Any] | None:
    """`pooled` against what was really said; "reference": the same of the unfaulted transcript."""
    known = [row for row in rows if row["wer_truth"] is not None]
    found = pooled(row["wer_truth"] for row in known)
    if found is None:
        return None
    errors = total(
        None if row["wer_truth_reference"] is None else row["wer_truth_reference"] * n
        for row in known
        if (n := row["wer_truth"]["words"])
    )
    right = None if errors is None else errors / found["words"]
    return {**found, "reference": right}


def most_frequent(values: Iterable[str | None]) -> str | None:
    counted = Counter(v for v in values if v is not None)
    return min(counted, key=lambda v: (-counted[v], v), default=None)


def class_of(identical: float | None, wer: float | None, failed: int) -> str | None:
    """benign: the same tokens on all recordings; wording, damaging, ruinous: by WER; None: there
    is no transcript. Without features on some recording it is ruinous."""
    if failed:
        return "ruinous"
    if identical is None:
        return None
    if identical == 1:
        return "benign"
    if wer is None:
        return None
    return "wording" if wer <= WORDING else "damaging" if wer <= DAMAGING else "ruinous"


def summary(fault: str, rows: list[Row]) -> dict[str, Any]:
    """One fault over all of its recordings: shares, medians, sums, its class."""
    first = rows[0]
    detected = [row for row in rows if row["detected"]]
    on_max = [row for row in rows if row["max"] is not None]
    failed = sum(row["failed"] is not None for row in rows)
    identical = share(
        row["tokens_identical"] for row in rows if row["tokens_identical"] is not None
    )
    wer = pooled(row["wer"] for row in rows)
    relative, sqnr = (
        [v for row in rows if (v := METRICS[name].of(row)) is not None]
        for name in ("relative_l2", "sqnr_db")
    )
    differences = [row["max"]["relative_difference"] for row in on_max]
    named = ("fault", "id", "strength", "group", "how", "sentence")
    return {
        **{key: first[key] for key in named},
        "n": len(rows),
        "failed": failed,
        "detected": len(detected) / len(rows),
        "first_tap": most_frequent(row["first_tap"] for row in detected),
        "expected_first_tap": first["expected_first_tap"],
        "first_tap_right": share(row["first_tap"] == row["expected_first_tap"] for row in detected),
        "cause": most_frequent(row["cause"] for row in detected),
        "expected_cause": first["expected_cause"],
        "cause_right": share(row["cause"] == row["expected_cause"] for row in detected),
        "cause_unknown": share(unknown(row) for row in detected),
        "cause_wrong": share(wrong(row) for row in detected),
        "relative_l2": {"median": middle(relative), "max": max(relative, default=None)},
        "sqnr_db": {"median": middle(sqnr), "min": min(sqnr, default=None)},
        **{
            name: middle(metric.of(row) for row in rows)
            for name, metric in METRICS.items()
            if name not in ("relative_l2", "sqnr_db")
        },
        "tokens_identical": identical,
        "first_difference": middle(row["first_difference"] for row in rows),
        "wer": wer,
        "wer_truth": pooled_truth(rows),
        "lost": total(row["lost"] for row in rows),
        "invented": total(row["invented"] for row in rows),
        "class": class_of(identical, wer["wer"] if wer else None, failed),
        "max": {
            "n": len(on_max),
            "relative_difference": max((d for d in differences if d is not None), default=None),
            "same_first_tap": share(row["max"]["same_first_tap"] for row in on_max),
            "agrees": share(map(agrees, on_max)),
        }
        if on_max
        else None,
    }


def wrong(row: Row) -> bool:
    """A name is given and it is not the right one; where none is right, any is wrong."""
    return row["cause"] is not None and row["cause"] != row["expected_cause"]


def unknown(row: Row) -> bool:
    return row["cause"] is None and row["expected_cause"] is not None


# Targets


def targets(trials: Trials) -> dict[str, dict[str, Any]]:
    """What the bench promises of itself: the value, the target, whether it is met, of how many.

    `met` is None where nothing was measured, or nothing is promised.
    """
    rows = [row for own in trials.values() for row in own]
    changed = [row for row in rows if changes(row)]
    detected = [row for row in rows if in_encoder(row) and row["detected"]]
    placed = [row for row in detected if row["expected_first_tap"] is not None]
    named = [row for row in detected if row["expected_cause"] is not None]
    on_max = [row for row in rows if row["max"] is not None]

    def target(label: str, value: float | None, n: int, aim: float | None) -> dict[str, Any]:
        met = None if value is None or aim is None else value >= aim
        found = {"label": label, "value": value, "target": aim, "at_most": False}
        return {**found, "met": met, "n": n, "unit": "share"}

    def of(label: str, held: list[bool], aim: float | None) -> dict[str, Any]:
        return target(label, share(held), len(held), aim)

    def count(label: str, ids: set[str], aim: int) -> dict[str, Any]:
        return {**target(label, len(ids), len(rows), aim), "unit": "faults"}

    def no_more(label: str, held: list[bool], aim: float) -> dict[str, Any]:
        found = of(label, held, aim)
        met = None if found["value"] is None else found["value"] <= aim
        return {**found, "at_most": True, "met": met}

    border = f"{CHANGED:g}"
    return {
        "detected": of(
            f"detected, of what changes ln_post by more than {border}",
            [row["detected"] for row in changed],
            1.0,
        ),
        "first_tap": of(
            "first tap right, of what is detected",
            [row["first_tap"] == row["expected_first_tap"] for row in placed],
            0.95,
        ),
        "cause_right": of(
            "cause named right, of what is detected and has a name",
            [row["cause"] == row["expected_cause"] for row in named],
            0.80,
        ),
        "cause_wrong": no_more(
            "cause named wrong, of what is detected", [wrong(row) for row in detected], 0.02
        ),
        "max_agreement": of(
            f"MAX agrees with the twin, of what changes ln_post by more than {border}",
            [agrees(row) for row in on_max if changes(row)],
            1.0,
        ),
        "max_agreement_all": of(
            "MAX agrees with the twin, of all", list(map(agrees, on_max)), None
        ),
        "faults_on_max": count("faults run on MAX", {row["id"] for row in on_max}, 20),
        "distinct_faults": count("distinct faults", {row["id"] for row in rows}, 50),
    }


def misses(trials: Trials) -> list[dict[str, Any]]:
    """Every row that a target counts against the suite: kind, fault, recording, what was named."""
    found = []

    def miss(kind: str, row: Row, expected: str | None, named: str | None, error: Any) -> None:
        where = {"kind": kind, "fault": row["fault"], "recording": row["recording"]}
        found.append({**where, "expected": expected, "named": named, "error": error})

    for row in (row for own in trials.values() for row in own if in_encoder(row)):
        tap, relative = row["expected_first_tap"], at_end(row, "relative_l2")
        if changes(row) and not row["detected"]:
            miss("not detected", row, tap, None, relative)
        if row["detected"]:
            if tap is not None and row["first_tap"] != tap:
                miss("first tap", row, tap, row["first_tap"], relative)
            if unknown(row):
                miss("cause unknown", row, row["expected_cause"], None, relative)
            if wrong(row):
                miss("cause wrong", row, row["expected_cause"], row["cause"], relative)
        if row["max"] is not None and not agrees(row):
            kind = "MAX" if changes(row) else f"MAX, within {CHANGED:g}"
            difference = row["max"]["relative_difference"]
            miss(kind, row, row["first_tap"], row["max"]["first_tap"], difference)
    return found


# Sweeps


def sweeps(faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faults that have strengths, with the strength at which the first token changes.

    Numbers are in their order; words, which have none, in that of the relative L2 they cause.
    """
    swept = defaultdict(list)
    for fault in faults:
        if fault["strength"] is not None:
            swept[fault["id"]].append(fault)
    found = []
    for own in swept.values():
        numeric = not any(isinstance(fault["strength"], str) for fault in own)

        def place(fault: dict[str, Any], numeric: bool = numeric) -> float:
            if numeric:
                return float(fault["strength"])
            relative = fault["relative_l2"]["median"]
            return math.inf if relative is None else float(relative)

        points = [
            {
                "fault": fault["fault"],
                "strength": fault["strength"],
                "relative_l2": fault["relative_l2"]["median"],
                "kl_mean": fault["kl_mean"],
                "wer": fault["wer"]["wer"] if fault["wer"] else None,
                "tokens_identical": fault["tokens_identical"],
            }
            for fault in sorted(own, key=place)
        ]
        shares = [(p["strength"], p["tokens_identical"]) for p in points]
        shares = [(strength, held) for strength, held in shares if held is not None]
        same = [strength for strength, held in shares if held == 1]
        other = [strength for strength, held in shares if held < 1]
        found.append(
            {
                "id": own[0]["id"],
                "group": own[0]["group"],
                "ordered_by": "strength" if numeric else "relative_l2",
                "points": points,
                "same_tokens_up_to": same[-1] if same else None,
                "other_tokens_from": other[0] if other else None,
            }
        )
    return found


# Statistics. `weights` (..., n) count how often each of n points is taken, one row for a sample.


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks (..., n) among the points as often as they are taken; the lowest is at 0.5."""
    distinct, which = np.unique(values, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(distinct)))
    taken = np.add.reduceat(weights[..., order], starts, axis=-1)
    at: np.ndarray = np.cumsum(taken, axis=-1) - taken / 2
    return at[..., which]


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each sample; NaN where one side is all alike."""
    n = weights.sum(-1, keepdims=True)
    a, b = ranks(x, weights), ranks(y, weights)
    a -= (weights * a).sum(-1, keepdims=True) / n
    b -= (weights * b).sum(-1, keepdims=True) / n
    both, own_a, own_b = ((weights * p * q).sum(-1) for p, q in ((a, b), (a, a), (b, b)))
    norm = np.sqrt(own_a * own_b)
    return np.divide(both, norm, out=np.full_like(norm, np.nan), where=norm > 0)


def auc(values: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often a positive point has the larger value of two, ties half; NaN without either."""
    yes, no = (weights * positive).sum(-1), (weights * ~positive).sum(-1)
    above = (weights * positive * ranks(values, weights)).sum(-1) - yes * yes / 2
    return np.divide(above, yes * no, out=np.full_like(above, np.nan), where=yes * no > 0)


def samples(ids: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    """Weights of RESAMPLES bootstrap samples, some at a time. What is drawn is whole ids: the
    strengths of one sweep and the recordings of one fault are not independent."""
    distinct, which = np.unique(ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // len(ids))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start), len(distinct)
        drawn = rng.integers(len(distinct), size=size)
        counts = np.zeros(size)
        np.add.at(counts, (np.arange(size[0])[:, None], drawn), 1)
        yield counts[:, which]


def interval(values: list[np.ndarray]) -> dict[str, float | None]:
    """The percentile interval of the samples that define the statistic, at least half of them."""
    known = np.concatenate(values) if values else np.empty(0)
    known = known[np.isfinite(known)]
    if 2 * len(known) < RESAMPLES:
        return {"low": None, "high": None}
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def defined(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


# Correlations

Point = tuple[str, str, float, dict[str, float | None]]  # id, group, WER, the metrics


def points_of(trials: Trials, faults: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """What correlates with WER: one point for each fault, and one for each of its rows."""
    over_faults: list[Point] = []
    over_rows: list[Point] = []
    for fault in faults:
        rows, place = trials[fault["fault"]], (fault["id"], fault["group"])
        if fault["wer"] and fault["wer"]["wer"] is not None:
            values = {name: middle(map(m.of, rows)) for name, m in METRICS.items()}
            over_faults.append((*place, fault["wer"]["wer"], values))
        for row in rows:
            if row["wer"] and row["wer"]["wer"] is not None:
                values = {name: m.of(row) for name, m in METRICS.items()}
                over_rows.append((*place, row["wer"]["wer"], values))
    return {"faults": over_faults, "rows": over_rows}


def correlations(trials: Trials, faults: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Spearman of each metric with WER against the unfaulted transcript: over faults, over rows;
    of all that have the metric, and without the groups OUTSIDE."""
    found: dict[str, Any] = {"resamples": RESAMPLES, "seed": seed, "level": LEVEL}
    for over, points in points_of(trials, faults).items():
        inside = [point for point in points if point[1] not in OUTSIDE]
        found[over] = {
            scope: {name: correlation(name, some, seed) for name in METRICS}
            for scope, some in (("all", points), ("inside", inside))
        }
    return found


def correlation(name: str, points: list[Point], seed: int) -> dict[str, Any]:
    """rho with its interval, and how much stronger it is than relative L2's on these points."""
    known = [
        (fault, wer, values[name], values["relative_l2"])
        for fault, _, wer, values in points
        if values[name] is not None and values["relative_l2"] is not None
    ]
    ids = [fault for fault, *_ in known]
    found: dict[str, Any] = {"rho": None, "low": None, "high": None, "stronger": None}
    found |= {"n": len(known), "ids": len(set(ids))}
    if len(known) < FEWEST_POINTS:
        return found
    wer, x, base = np.array([numbers for _, *numbers in known], float).T
    once = np.ones(len(known))
    rho, of_base = spearman(x, wer, once), spearman(base, wer, once)
    if not np.isfinite(rho):
        return found
    rhos, more = [], []
    for weights in samples(ids, seed) if found["ids"] >= FEWEST_IDS else ():
        rhos.append(spearman(x, wer, weights))
        more.append(np.abs(rhos[-1]) - np.abs(spearman(base, wer, weights)))
    found |= {"rho": float(rho), **interval(rhos)}
    if name != "relative_l2" and np.isfinite(of_base):
        found["stronger"] = {"value": float(abs(rho) - abs(of_base)), **interval(more)}
    return found


# Gates


def gate(gate: Gate, trials: Trials, classes: dict[str, str | None]) -> dict[str, Any]:
    """Which faults of the encoder it lets through and which it stops: on the median recording, and
    where all recordings must pass."""
    passes = {
        fault: gate.passes([gate.of(row) for row in rows])
        for fault, rows in trials.items()
        if in_encoder(rows[0])
    }
    found: dict[str, Any] = {"name": gate.name, "metric": gate.metric}
    found |= {"at_most": gate.at_most, "limit": gate.limit}
    for i, on in enumerate(("median", "all")):
        of = {each: [f for f in passes if classes[f] == each] for each in CLASSES}
        through = {each: [f for f in of[each] if passes[f][i]] for each in CLASSES}
        found[on] = {
            "lets_through": {each: through[each] for each in CLASSES[:1:-1]},
            "stops": [f for f in of["benign"] if not passes[f][i]],
            "counts": {e: {"n": len(of[e]), "passes": len(through[e])} for e in CLASSES},
        }
    return found


def threshold(
    name: str, trials: Trials, classes: dict[str, str | None], seed: int
) -> dict[str, Any]:
    """The limit on one metric that best tells damaging and ruinous faults from the others.

    It has the largest Youden's J (their share that it stops, less the share of the others), of
    equals the strictest; it is the last value that passes, `next` the first that does not. It is
    chosen on the faults that it is scored on. `auc` needs no limit.
    """
    metric = METRICS[name]
    known = [
        (rows[0]["id"], metric.worse * value, classes[fault] in CLASSES[2:])
        for fault, rows in trials.items()
        if (value := middle(map(metric.of, rows))) is not None and classes[fault] is not None
    ]
    values = np.array([value for _, value, _ in known], float)
    bad = np.array([harmful for *_, harmful in known], bool)
    found: dict[str, Any] = dict.fromkeys(
        ("limit", "next", "youden", "stops", "passes", "auc", "low", "high")
    )
    found |= {"at_most": metric.worse > 0, "n": len(known), "harmful": int(bad.sum())}
    if not bad.any() or bad.all():
        return found
    limits = np.unique(values)
    stopped = values > limits[:, None]
    sensitivity, specificity = stopped[:, bad].mean(-1), (~stopped[:, ~bad]).mean(-1)
    best = int((sensitivity + specificity).argmax())
    after = float(limits[best + 1]) * metric.worse if best + 1 < len(limits) else None
    ids = [fault for fault, *_ in known]
    enough = len(set(ids)) >= FEWEST_IDS
    spread = [auc(values, bad, weights) for weights in samples(ids, seed)] if enough else []
    return found | {
        "limit": float(limits[best]) * metric.worse,
        "next": after,
        "youden": float(sensitivity[best] + specificity[best] - 1),
        "stops": float(sensitivity[best]),
        "passes": float(specificity[best]),
        "auc": defined(auc(values, bad, np.ones(len(known)))),
        **interval(spread),
    }

"""What the rows of the fault bench show: each fault summed up, its class, its sweep; and all that
is said of them together.

A row is one fault on one recording. Nothing runs here and nothing is drawn: targets are in
`validation.findings_targets`, correlations, gates and limits in `validation.findings_metrics`, what
is shown in `validation.findings_terminal`, `findings_page` (Markdown) and `findings_plot`. A
statistic that the rows do not define is None.

Where a fault changes nothing ("injected" is false) its row is no trial of it: it counts neither for
its class nor in any figure, only as a chance of a false alarm.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from validation.findings_metrics import correlations, gates, thresholds
from validation.findings_page import markdown, tables
from validation.findings_plot import svg_scatter
from validation.findings_rows import (
    GROUPS,
    HARMFUL,
    METRICS,
    Row,
    Trials,
    agrees,
    cause_right,
    cause_unknown,
    cause_wrong,
    first_tap_right,
    in_encoder,
    middle,
    share,
)
from validation.findings_targets import missed, misses, targets
from validation.findings_terminal import terminal
from validation.report import clean

__all__ = ["findings", "markdown", "missed", "svg_scatter", "tables", "targets", "terminal"]

Found = dict[str, Any]  # schema 1, as `findings` returns it

WORDING, DAMAGING = 0.05, 0.30  # the largest WER of either class


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
    acting = {fault: some for fault, own in trials.items() if (some := injected(own))}
    return clean(
        {
            "schema": 1,
            "about": about,
            "faults": faults,
            "targets": targets(trials),
            "misses": misses(trials),
            "recordings": heard(rows),
            "sweeps": sweeps(faults),
            "correlations": correlations(acting, faults, seed),
            "gates": gates(acting, classes),
            "beyond_gates": [
                fault
                for fault, own in acting.items()
                if not in_encoder(own[0]) and classes[fault] in HARMFUL
            ],
            "thresholds": thresholds(acting, classes, seed, without_each(trials)),
            "rows": rows,
        }
    )


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


def without_each(trials: Trials) -> list[tuple[Trials, dict[str, str | None]]]:
    """The trials of the encoder's faults that change something, and the faults' classes, without
    one recording: for each recording."""
    own = {fault: rows for fault, rows in trials.items() if in_encoder(rows[0])}
    names = sorted({row["recording"] for rows in own.values() for row in rows})
    found = []
    for name in names if len(names) > 1 else ():
        rest = {f: [row for row in rows if row["recording"] != name] for f, rows in own.items()}
        acting = {fault: some for fault, rows in rest.items() if (some := injected(rows))}
        classes = {fault: summary(fault, rows)["class"] for fault, rows in acting.items()}
        found.append((acting, classes))
    return found


def heard(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the reference says in each recording, one window: text, its tokens, whether they came to
    an end, and WER against the truth. Faults behind the encoder hear other recordings."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if in_encoder(row) and row["reference_text"] is not None:
            found.setdefault(
                row["recording"],
                {
                    "recording": row["recording"],
                    "text": row["reference_text"],
                    "tokens": row["reference_tokens"],
                    "cut_off": row["reference_cut_off"],
                    "wer_truth": row["wer_truth_reference"],
                },
            )
    return [found[name] for name in sorted(found)]


def injected(rows: list[Row]) -> list[Row]:
    """Those in which the fault changed something."""
    return [row for row in rows if row["injected"]]


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
    is no transcript, or nothing was changed. Without features on some recording it is ruinous."""
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
    """One fault over the recordings on which it changes something, of all `n`: shares, medians,
    sums, its class. `cut_off`: on so many the decoding did not come to an end."""
    first, n = rows[0], len(rows)
    rows = injected(rows)
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
    named = ("fault", "id", "strength", "group", "how", "sentence", "unseen", "yardstick")
    return {
        **{key: first[key] for key in named},
        "n": n,
        "injected": len(rows),
        "failed": failed,
        "cut_off": sum(row["cut_off"] for row in rows),
        "detected": share(row["detected"] for row in rows),
        "first_tap": most_frequent(row["first_tap"] for row in detected),
        "expected_first_tap": first["expected_first_tap"],
        "first_tap_right": share(map(first_tap_right, detected)),
        "cause": most_frequent(row["cause"] for row in detected),
        "expected_cause": first["expected_cause"],
        "cause_right": share(map(cause_right, detected)),
        "cause_unknown": share(map(cause_unknown, detected)),
        "cause_wrong": share(map(cause_wrong, detected)),
        "relative_l2": {"median": middle(relative), "max": max(relative, default=None)},
        "sqnr_db": {"median": middle(sqnr), "min": min(sqnr, default=None)},
        **{
            name: middle(metric.of(row) for row in rows)
            for name, metric in METRICS.items()
            if name not in ("relative_l2", "sqnr_db")
        },
        "tap_sqnr_db": middle(row["at_tap"]["sqnr_db"] for row in rows if row["at_tap"]),
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


def sweeps(faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faults that have strengths, with the strength at which the first token changes.

    They are in the order of the relative L2 that they cause, which is that of their distance from
    the right value, whether it lies below them, above or between them, and whether they are numbers
    or words. `same_tokens_up_to` is the last strength before the first that changes a token;
    `same_again` are those beyond with no token changed.
    """
    swept = defaultdict(list)
    for fault in faults:
        if fault["strength"] is not None and fault["injected"]:
            swept[fault["id"]].append(fault)

    def place(fault: dict[str, Any]) -> float:
        relative = fault["relative_l2"]["median"]
        return math.inf if relative is None else float(relative)

    found = []
    for own in swept.values():
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
        heard = [point for point in points if point["tokens_identical"] is not None]
        other = [i for i, point in enumerate(heard) if point["tokens_identical"] < 1]
        first = other[0] if other else len(heard)
        beyond = [p["strength"] for p in heard[first:] if p["tokens_identical"] == 1]
        found.append(
            {
                "id": own[0]["id"],
                "group": own[0]["group"],
                "points": points,
                "same_tokens_up_to": heard[first - 1]["strength"] if first else None,
                "other_tokens_from": heard[first]["strength"] if other else None,
                "same_again": beyond,
                "monotone": not beyond,
            }
        )
    return found

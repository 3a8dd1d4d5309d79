"""What the fault bench promises of itself: each target with every figure that bears on it, the most
honest one first, and the rows that count against it.

A figure over ids gives every distinct fault one vote, the mean over its strengths and recordings:
the many strengths of one sweep are not many faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from validation.findings_rows import (
    CHANGED,
    SCOPES,
    Row,
    Trials,
    agrees,
    at_end,
    cause_right,
    cause_unknown,
    cause_wrong,
    changes,
    false_alarm,
    first_tap_right,
    in_encoder,
)

Found = dict[str, Any]

ROWS = "rows"  # over all of them, one vote each; the other figures are over the ids of a scope
COVERAGE = ("faults_on_max", "distinct_faults")  # targets that only the whole catalogue can meet


def missed(found: Found, whole: bool = True) -> list[str]:
    """The names of the targets that are not met; those of COVERAGE if the catalogue is `whole`."""
    return [
        name
        for name, target in found["targets"].items()
        if target["met"] is False and (whole or name not in COVERAGE)
    ]


def figure(over: str, rows: Sequence[Row], held: Callable[[Row], bool] | None) -> Found:
    """The share of the votes in which something `held`, or without it the number of ids."""
    own = [row for row in rows if over == ROWS or SCOPES[over](row)]
    ids = {row["id"] for row in own}
    value: float | None = len(ids)
    if held is not None:
        votes = defaultdict(list)
        for row in own:
            voter = (row["fault"], row["recording"]) if over == ROWS else row["id"]
            votes[voter].append(held(row))
        value = fmean(map(fmean, votes.values())) if votes else None
    unseen = {row["id"] for row in own if SCOPES["unseen"](row)}
    return {
        "over": over,
        "value": value,
        "ids": len(ids),
        "unseen": len(unseen),
        "rows": len(own),
    }


def target(
    label: str,
    rows: Sequence[Row],
    held: Callable[[Row], bool] | None,
    overs: Sequence[str],
    judged: Sequence[str] = (),
    aim: float = 0.0,
    at_most: bool = False,
) -> Found:
    """`figures` over each of `overs`; those `judged` are held to the aim, where they are measured.

    `value` is the first that is judged, or the first; `met` is None where none is judged.
    """
    figures = [figure(over, rows, held) for over in overs]
    for each in figures:
        value = each["value"]
        within = None if value is None else value <= aim if at_most else value >= aim
        each["judged"] = each["over"] in judged
        each["met"] = within if each["judged"] else None
    verdicts = [each["met"] for each in figures if each["met"] is not None]
    first = next((each for each in figures if each["judged"]), figures[0])
    return {
        "label": label,
        "unit": "share" if held else "ids",
        "target": aim if judged else None,
        "at_most": at_most,
        "value": first["value"],
        "met": all(verdicts) if verdicts else None,
        "figures": figures,
    }


def targets(trials: Trials) -> dict[str, Found]:
    """Every target by its name. Rows in which nothing was changed count as clean, and only so."""
    rows = [row for own in trials.values() for row in own]
    acting = [row for row in rows if row["injected"]]
    changed = [row for row in acting if changes(row)]
    detected = [row for row in acting if in_encoder(row) and row["detected"]]
    placed = [row for row in detected if row["expected_first_tap"] is not None]
    named = [row for row in detected if row["expected_cause"] is not None]
    on_max = [row for row in acting if row["max"] is not None]
    tap = ("encoder", "input", "yardsticks", ROWS)
    cause = ("unseen", "mistakes", ROWS)
    border = f"what changes ln_post by more than {CHANGED:g}"
    return {
        "detected": target(
            f"detected, of {border}",
            changed,
            lambda row: bool(row["detected"]),
            tap,
            ("encoder", "input", "yardsticks"),
            1.0,
        ),
        "first_tap": target(
            "first tap right, of what is detected",
            placed,
            first_tap_right,
            tap,
            ("encoder", "input"),
            0.95,
        ),
        "cause_right": target(
            "cause named right, of what is detected and has a name",
            named,
            cause_right,
            cause,
            ("mistakes",),
            0.80,
        ),
        "cause_unknown": target(
            "cause unknown, of what is detected and has a name", named, cause_unknown, cause
        ),
        "cause_wrong": target(
            "cause named wrong, of what is detected",
            detected,
            cause_wrong,
            ("unseen", "mistakes", "yardsticks", ROWS),
            ("mistakes", "yardsticks"),
            0.02,
            at_most=True,
        ),
        "false_alarms": target(
            "something detected, of what changes nothing here",
            [row for row in rows if not row["injected"] and in_encoder(row)],
            false_alarm,
            (ROWS,),
            (ROWS,),
            0.0,
            at_most=True,
        ),
        "max_agreement": target(
            f"MAX agrees with the twin, of {border}",
            [row for row in on_max if changes(row)],
            agrees,
            ("all", ROWS),
            ("all",),
            1.0,
        ),
        "max_agreement_all": target(
            "MAX agrees with the twin, however little changes", on_max, agrees, ("all", ROWS)
        ),
        "faults_on_max": target(
            "distinct faults run on MAX",
            on_max,
            None,
            ("mistakes", "unseen", "yardsticks"),
            ("mistakes",),
            20,
        ),
        "distinct_faults": target(
            "distinct faults",
            acting,
            None,
            ("mistakes", "unseen", "yardsticks"),
            ("mistakes",),
            50,
        ),
    }


def misses(trials: Trials) -> list[Found]:
    """Every row that a target counts against the suite: kind, fault, recording, what was named."""
    found = []

    def miss(kind: str, row: Row, expected: str | None, named: str | None, error: Any) -> None:
        where = {"kind": kind, "fault": row["fault"], "recording": row["recording"]}
        found.append({**where, "expected": expected, "named": named, "error": error})

    for row in (row for own in trials.values() for row in own if in_encoder(row)):
        tap, relative = row["expected_first_tap"], at_end(row, "relative_l2")
        if not row["injected"]:
            if false_alarm(row):
                miss("false alarm", row, None, row["first_tap"], relative)
            continue
        if changes(row) and not row["detected"]:
            miss("not detected", row, tap, None, relative)
        if row["detected"]:
            if tap is not None and not first_tap_right(row):
                miss("first tap", row, tap, row["first_tap"], relative)
            if cause_unknown(row):
                miss("cause unknown", row, row["expected_cause"], None, relative)
            if cause_wrong(row):
                miss("cause wrong", row, row["expected_cause"], row["cause"], relative)
        if row["max"] is not None and not agrees(row):
            kind = "MAX" if changes(row) else f"MAX, within {CHANGED:g}"
            difference = row["max"]["relative_difference"]
            miss(kind, row, row["first_tap"], row["max"]["first_tap"], difference)
    return found

"""What is read off a row of the fault bench: its metrics, the scopes it belongs to, and what was
right about it. A row is one fault on one recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = dict[str, Any]  # one line of trials.jsonl
Trials = dict[str, list[Row]]  # the rows of each fault, by its key

GROUPS = ("input", "stem", "blocks", "weights", "bridge")
OUTSIDE = ("input", "bridge")  # not mistakes in the encoder itself
CLASSES = ("benign", "wording", "damaging", "ruinous")
HARMFUL = ("ruinous", "damaging")
CHANGED = 1e-4  # relative L2 at ln_post; what changes it more must be detected
AGREES = 0.01  # MAX's relative L2 at ln_post against the twin's


def mistake(row: Row) -> bool:
    """Somebody could make it; a yardstick only draws the curve."""
    return not row["yardstick"]


# Which rows, or summed up faults, a figure is over.
SCOPES: dict[str, Callable[[Row], bool]] = {
    "unseen": lambda row: mistake(row) and bool(row["unseen"]),
    "mistakes": mistake,
    "encoder": lambda row: mistake(row) and row["group"] not in OUTSIDE,
    "input": lambda row: mistake(row) and row["group"] == "input",
    "yardsticks": lambda row: bool(row["yardstick"]),
    "all": lambda row: True,
}


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
    unit: str = ""


METRICS = {
    "relative_l2": Metric("relative L2 at ln_post", lambda row: at_end(row, "relative_l2")),
    "sqnr_db": Metric("SQNR at ln_post", lambda row: at_end(row, "sqnr_db"), -1, " dB"),
    "psnr_db": Metric("PSNR at ln_post", lambda row: at_end(row, "psnr_db"), -1, " dB"),
    "max_abs": Metric("max abs at ln_post", lambda row: at_end(row, "max_abs")),
    "cosine_distance": Metric(
        "1 - cosine at ln_post", lambda row: less_than_one(at_end(row, "cosine"))
    ),
    "kl_mean": Metric("KL of the next token, mean", lambda row: row["kl_mean"]),
    "top1_changed": Metric("1 - same top-1", lambda row: less_than_one(row["same_top1"])),
    "tap_relative_l2": Metric(
        "relative L2 at the first diverging tap",
        lambda row: row["at_tap"]["relative_l2"] if row["at_tap"] else None,
    ),
}


def in_encoder(row: Row) -> bool:
    """In it or before it: what parity can see."""
    return bool(row["how"] != "bridge")


def changes(row: Row) -> bool:
    """Whether ln_post is another: more than CHANGED away, or not there at all."""
    relative = at_end(row, "relative_l2")
    return in_encoder(row) and (relative is None or relative > CHANGED)


def first_tap_right(row: Row) -> bool:
    return bool(row["first_tap"] == row["expected_first_tap"])


def cause_right(row: Row) -> bool:
    return bool(row["cause"] == row["expected_cause"])


VAGUE = "unknown-weights"  # true wherever the weights are wrong: it names no mistake


def cause_unknown(row: Row) -> bool:
    """There is a right name, and what is said is none, or VAGUE of what has wrong weights."""
    said_nothing = row["cause"] is None or (row["cause"] == VAGUE and row["how"] == "weights")
    return row["expected_cause"] is not None and not cause_right(row) and said_nothing


def cause_wrong(row: Row) -> bool:
    """A name is given and it is not the right one; where none is right, any is wrong."""
    return row["cause"] is not None and not cause_right(row) and not cause_unknown(row)


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


def false_alarm(row: Row) -> bool:
    """Of a row in which nothing was changed: something was detected, on the twin or on MAX."""
    return bool(row["detected"] or (row["max"] is not None and row["max"]["detected"]))


def share(held: Iterable[bool]) -> float | None:
    counted = list(held)
    return sum(counted) / len(counted) if counted else None


def middle(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None

"""The words and figures of what the fault bench found, the same in the terminal, in Markdown and in
the plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from validation.findings_rows import HARMFUL, METRICS
from validation.report import figure, text_of

Found = dict[str, Any]  # schema 1, as `validation.findings.findings` returns it, or a part of it

NOTHING = "no change here"
OVER = {  # what a figure of a target is over
    "unseen": "unseen mistakes",
    "mistakes": "mistakes",
    "encoder": "mistakes in the encoder",
    "input": "mistakes of the input",
    "yardsticks": "yardsticks",
    "all": "all faults",
    "rows": "all rows",
}
VERDICTS = {True: "met", False: "missed", None: "not measured"}


def percent(x: float | None) -> str:
    """0.0123 -> "1.2 %"; a whole number of percent, and only that, has no decimals."""
    if x is None:
        return "-"
    value = 100 * x
    if 0 < value < 0.05:
        return f"{figure(value)} %"
    whole = math.isclose(value, round(value), abs_tol=1e-9)
    return f"{value:.0f} %" if whole or value >= 1000 else f"{value:.1f} %"


def decibel(x: float | None, exact: bool) -> str:
    if x is None:
        return "inf" if exact else "-"
    return f"{x:.1f}" if abs(x) >= 0.05 else "0.0"


def strength(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:g}"


def several(names: list[str], most: int = 6) -> str:
    """ "S18, E09 and 4 more"."""
    left = len(names) - most
    return ", ".join(names) if left <= 0 else f"{', '.join(names[:most])} and {left} more"


def tap_said(fault: Found) -> str:
    """ "conv1 ok", or what was expected and how often it was found."""
    if not fault["injected"]:
        return NOTHING
    if fault["how"] == "bridge":
        return "-"
    if fault["first_tap_right"] is None:
        return "not detected"
    if fault["first_tap_right"] == 1:
        return f"{fault['first_tap']} ok"
    found = fault["first_tap"] or "none"
    return f"{found}, expected {fault['expected_first_tap']}: {percent(fault['first_tap_right'])}"


def cause_said(fault: Found) -> str:
    """ok, unknown or wrong, with the share of the recordings where it is not all of them."""
    if fault["cause_right"] is None:
        return "-"
    if fault["cause_right"] == 1:
        return "ok" if fault["cause"] else "ok (no name)"
    if fault["cause_wrong"]:
        return f"wrong ({fault['cause']}): {percent(fault['cause_wrong'])}"
    share = fault["cause_unknown"]
    return "unknown" if share == 1 else f"unknown: {percent(share)}"


def wer_said(wer: Found | None) -> str:
    return percent(wer["wer"]) if wer else "-"


def error_said(fault: Found) -> str:
    """Relative L2 at ln_post; "none" where there are no features."""
    relative = fault["relative_l2"]["median"]
    return "none" if relative is None and fault["failed"] else figure(relative, "-")


def figure_said(target: Found, one: Found) -> tuple[str, str, str]:
    """(its value, what it is held to, whether it holds); "-" where it is held to nothing."""
    said: Callable[[Any], str] = percent if target["unit"] == "share" else text_of
    value = said(one["value"])
    if not one["judged"]:
        return value, "-", "-"
    most = "at most" if target["at_most"] else "at least"
    return value, f"{most} {said(target['target'])}", VERDICTS[one["met"]]


def target_said(target: Found) -> str:
    """ "first tap right: mistakes 98 % (40 ids; at least 95 %: met); all rows 99 % (1,200)"; what
    was not measured is left out."""
    parts = []
    for one in target["figures"]:
        value, aim, verdict = figure_said(target, one)
        of = [f"{aim}: {verdict}"] if one["judged"] else []
        if target["unit"] == "share":
            by_id = f"{one['ids']:,} id{'s' * (one['ids'] != 1)}"
            of.insert(0, f"{one['rows']:,}" if one["over"] == "rows" else by_id)
        if one["value"] is not None:
            parts.append(f"{OVER[one['over']]} {value}" + (f" ({'; '.join(of)})" if of else ""))
    return f"{target['label']}: {'; '.join(parts) or 'not measured'}"


def gate_said(gate: Found) -> str:
    """Which harmful mistakes a gate lets through and which benign ones it stops, in a sentence."""
    found = gate["mistakes"]["median"]
    counts = found["counts"]
    parts = []
    for each in HARMFUL:
        names = found["lets_through"][each]
        named = f" ({several(names)})" if names else ""
        parts.append(f"{counts[each]['passes']} of {counts[each]['n']} {each}{named}")
    benign, stopped = counts["benign"], found["stops"]
    named = f" ({several(stopped)})" if stopped else ""
    through = " and ".join(parts)
    name = gate["name"][0].upper() + gate["name"][1:]
    stops = f"it stops {benign['stopped']} of {benign['n']} benign{named}"
    return f"{name} lets through {through}; {stops}."


def left_out(faults: list[Found]) -> str | None:
    """Where a fault changes nothing, which is no trial of it."""
    where = [(f["fault"], f["n"] - f["injected"], f["n"]) for f in faults]
    named = [f"{fault} ({none} of {n})" for fault, none, n in where if none]
    said = f"Left out are recordings on which nothing changes: {', '.join(named)}"
    return said if named else None


def cut_off(faults: list[Found]) -> str | None:
    """Where the decoding did not come to an end; what was said until then is counted."""
    named = [f"{f['fault']} ({f['cut_off']} of {f['injected']})" for f in faults if f["cut_off"]]
    said = f"Decoding went on without end, and was stopped: {', '.join(named)}"
    return said if named else None


def sweep_said(sweep: Found) -> str:
    same, other = sweep["same_tokens_up_to"], sweep["other_tokens_from"]
    if same is None and other is None:
        return "There is no transcript"
    if other is None:
        return f"All tokens are the same up to {strength(same)}, at no strength does one differ"
    said = f"Some tokens differ from {strength(other)} on"
    if same is not None:
        said = f"All tokens are the same up to {strength(same)}, some differ from {strength(other)}"
    if not sweep["monotone"]:
        again = ", ".join(map(strength, sweep["same_again"]))
        said += f"; not monotone: all are the same again at {again}"
    return said


def spread(value: float | None, low: float | None, high: float | None) -> str:
    """ "0.91 [0.85, 0.95]"; the interval only where there is one."""
    if value is None:
        return "-"
    said = f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", said)


def limit_said(name: str, limit: float | None) -> str:
    unit = METRICS[name].unit
    if limit is None:
        return "-"
    return f"{limit:.1f}{unit}" if unit else figure(limit)

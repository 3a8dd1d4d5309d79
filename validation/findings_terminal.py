"""What `validation.findings` found, in the terminal. It computes no statistic."""

from __future__ import annotations

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from validation.findings_words import (
    Found,
    cause_said,
    cut_off,
    error_said,
    gate_said,
    left_out,
    percent,
    strength,
    tap_said,
    target_said,
    wer_said,
)
from validation.report import figure, printable

Cells = dict[str, str]  # a line of the table, by column

NARROW = ("group", "tokens", "KL")  # left out in this order where the line is short
STYLES = {"benign": "green", "wording": "cyan", "damaging": "yellow", "ruinous": "red"}


def fault_row(fault: Found) -> Cells:
    return {
        "fault": fault["id"],
        "strength": strength(fault["strength"]),
        "group": fault["group"],
        "first tap": tap_said(fault),
        "cause": cause_said(fault),
        "rel. L2": error_said(fault),
        "KL": figure(fault["kl_mean"], "-"),
        "tokens": percent(fault["tokens_identical"]),
        "WER": wer_said(fault["wer"]),
        "class": fault["class"] or "-",
    }


def terminal(found: Found, console: Console) -> None:
    """A line for each fault, one for each target, a sentence for each gate."""

    def plain(text: str, style: str = "") -> Text:
        """No markup, and nothing that the terminal's encoding lacks."""
        encoding = console.encoding
        return Text(printable(text).encode(encoding, "backslashreplace").decode(encoding), style)

    def table(dropped: list[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        shown = [label for label in rows[0] if label not in dropped]
        for label in shown:
            left = label in ("fault", "strength", "group", "first tap", "cause", "class")
            justify: JustifyMethod = "left" if left else "right"
            made.add_column(label, justify=justify, overflow="fold")
        for row in rows:
            bad = any(word in row["first tap"] for word in ("expected", "not detected"))
            wrong = row["cause"].startswith("wrong")
            styles = {"class": STYLES.get(row["class"], ""), "cause": "red" if wrong else ""}
            styles["first tap"] = "yellow" if bad else ""
            made.add_row(*(plain(row[label], styles.get(label, "")) for label in shown))
        return made

    rows = [fault_row(fault) for fault in found["faults"]]
    endless, dropped = console.options.update(max_width=10_000), list[str]()
    while rows and len(dropped) < len(NARROW):
        if Measurement.get(console, endless, table(dropped)).maximum <= console.width:
            break
        dropped.append(NARROW[len(dropped)])
    if rows:
        console.print(table(dropped))
        said = "Medians over the recordings; WER pooled, against the unfaulted transcript"
        left = f"; no room for {', '.join(dropped)}" if dropped else ""
        notes = [said + left, left_out(found["faults"]), cut_off(found["faults"])]
        for note in filter(None, notes):
            console.print(plain(note, "dim"), soft_wrap=True)
    else:
        console.print(plain("No fault has run."))
    console.print()
    for target in found["targets"].values():
        style = {True: "green", False: "bold red", None: "dim"}[target["met"]]
        console.print(plain(target_said(target), style), soft_wrap=True)
    console.print()
    console.print(plain("Gates, over distinct mistakes:", "dim"))
    for gate in found["gates"]:
        console.print(plain(gate_said(gate)), soft_wrap=True)

"""What `validation.findings` found, as a terminal table and as Markdown tables.

It computes no statistic: every figure is in what was found, and the same comes out of its JSON.
"""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from validation.faults import FAULTS
from validation.report import figure, printable, text_of

Found = dict[str, Any]  # schema 1, as `validation.findings.findings` returns it
Cells = dict[str, str]  # a line of a table, by column

GROUPS = ("input", "stem", "blocks", "weights", "bridge")
HARMFUL = ("ruinous", "damaging")
NARROW = ("group", "tokens", "KL")  # left out in this order where the line is short
STYLES = {"benign": "green", "wording": "cyan", "damaging": "yellow", "ruinous": "red"}
METRICS = {  # name in the findings: (label, unit)
    "relative_l2": ("relative L2 at ln_post", ""),
    "sqnr_db": ("SQNR at ln_post", " dB"),
    "psnr_db": ("PSNR at ln_post", " dB"),
    "max_abs": ("max abs at ln_post", ""),
    "cosine_distance": ("1 - cosine at ln_post", ""),
    "kl_mean": ("KL of the next token, mean", ""),
    "top1_changed": ("1 - same top-1", ""),
    "tap_relative_l2": ("relative L2 at the first diverging tap", ""),
}


# Words for figures


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
    return "inf" if x is None and exact else "-" if x is None else f"{x:.1f}"


def strength(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:g}"


def several(names: list[str], most: int = 6) -> str:
    """ "S18, E09 and 4 more"."""
    left = len(names) - most
    return ", ".join(names) if left <= 0 else f"{', '.join(names[:most])} and {left} more"


def tap_said(fault: Found) -> str:
    """ "conv1 ok", or what was expected and how often it was found."""
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


def target_cells(target: Found) -> Cells:
    """Its value, the aim ("-" where nothing is promised), of how many, and whether it is met."""
    said: Callable[[Any], str] = percent if target["unit"] == "share" else text_of
    most = "at most" if target["at_most"] else "at least"
    aim = "-" if target["target"] is None else f"{most} {said(target['target'])}"
    verdict = {True: "met", False: "missed", None: "no target"}[target["met"]]
    if target["value"] is None:
        verdict = "not measured"
    return {
        "target": target["label"],
        "value": said(target["value"]),
        "aim": aim,
        "rows": f"{target['n']:,}",
        "verdict": verdict,
    }


def target_said(target: Found) -> str:
    of = target_cells(target)
    aim = "" if of["aim"] == "-" else f"{of['aim']}, "
    return f"{of['target']}: {of['value']} ({aim}{of['rows']} rows): {of['verdict']}"


def gate_said(gate: Found) -> str:
    """Which harmful faults a gate lets through and which benign ones it stops, in one sentence."""
    found = gate["median"]
    counts = found["counts"]
    parts = []
    for each in HARMFUL:
        names = found["lets_through"][each]
        named = f" ({several(names)})" if names else ""
        parts.append(f"{len(names)} of {counts[each]['n']} {each}{named}")
    stopped, n = found["stops"], counts["benign"]["n"]
    named = f" ({several(stopped)})" if stopped else ""
    through = " and ".join(parts)
    name = gate["name"][0].upper() + gate["name"][1:]
    return f"{name} lets through {through}; it stops {len(stopped)} of {n} benign{named}."


# The terminal


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
    """A line for each fault, the targets, a sentence for each gate."""

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
        console.print(plain(said + left, "dim"), soft_wrap=True)
    else:
        console.print(plain("No fault has run."))
    console.print()
    for target in found["targets"].values():
        style = {True: "green", False: "bold red", None: "dim"}[target["met"]]
        console.print(plain(target_said(target), style), soft_wrap=True)
    console.print()
    for gate in found["gates"]:
        console.print(plain(gate_said(gate)), soft_wrap=True)


# Markdown


def cell(text: str) -> str:
    flat = html.escape(printable(text), quote=False)
    return re.sub(r"([\\|*\[\]~`]|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def linked(text: str) -> str:
    """`cell`, with "owner/repository#123" as a link (GitHub leads on to a pull request)."""
    issue = re.compile(r"(?<![\w/])([\w.-]+/[\w.-]+)#(\d+)")
    return issue.sub(r"[\1#\2](https://github.com/\1/issues/\2)", cell(text))


def table(rows: list[Cells], left: Iterable[str] = ()) -> str:
    """A GitHub table; the first column and those `left` are aligned to the left, others right.

    Cells are Markdown already. Without a row it is a sentence.
    """
    if not rows:
        return "None.\n"
    aligned = [":--" if i == 0 or k in set(left) else "--:" for i, k in enumerate(rows[0])]
    lines = [list(rows[0]), aligned, *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def seen(fault: Found) -> str:
    """Where the mistake was made, as the catalogue has it; "-" for one it no longer has."""
    known = FAULTS.get(fault["fault"])
    return linked(known.seen) if known else "-"


def errors_said(wer: Found | None) -> str:
    """ "3.1 % (4/1/0)": substitutions, deletions, insertions."""
    if wer is None:
        return "-"
    kinds = "/".join(str(wer[k]) for k in ("substitutions", "deletions", "insertions"))
    return f"{percent(wer['wer'])} ({kinds})"


def seconds_said(lost: float | None, invented: float | None) -> str:
    return "-" if lost is None or invented is None else f"{lost:.1f} / {invented:.1f}"


def keys(faults: list[Found]) -> str:
    return ", ".join(fault["fault"] for fault in faults)


def fault_lines(faults: list[Found]) -> str:
    """What was done and where it was seen, once for all strengths of an id where that says the
    same of them; then the figures of each."""
    alike: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for fault in faults:
        alike[fault["id"], fault["sentence"], seen(fault)].append(fault)
    ids = [fault_id for fault_id, *_ in alike]
    what = [
        {
            "fault": cell(fault_id if ids.count(fault_id) == 1 else keys(own)),
            "what was done": cell(sentence),
            "made by": own[0]["how"],
            "seen": where,
        }
        for (fault_id, sentence, where), own in alike.items()
    ]
    rows = []
    for fault in faults:
        exact = fault["relative_l2"]["median"] == 0
        first = fault["first_difference"]
        rows.append(
            {
                "fault": cell(fault["fault"]),
                "detected": percent(fault["detected"]) if fault["how"] != "bridge" else "-",
                "first tap": cell(tap_said(fault)),
                "cause": cell(cause_said(fault)),
                "relative L2": error_said(fault),
                "largest": figure(fault["relative_l2"]["max"], "-"),
                "SQNR dB": decibel(fault["sqnr_db"]["median"], exact),
                "KL": figure(fault["kl_mean"], "-"),
                "top-1 changed": percent(fault["top1_changed"]),
                "same tokens": percent(fault["tokens_identical"]),
                "first other token": "-" if first is None else f"{first:g}",
                "WER (S/D/I)": errors_said(fault["wer"]),
                "WER, truth": wer_said(fault["wer_truth"]),
                "lost / invented s": seconds_said(fault["lost"], fault["invented"]),
                "class": fault["class"] or "-",
            }
        )
    left = ("what was done", "made by", "seen", "first tap", "cause", "class")
    return f"{table(what, left)}\n{table(rows, left)}"


def faults_table(found: Found) -> str:
    said = (
        "Medians over the recordings, the WER pooled over them. first tap and cause: ok, or the "
        "share of the recordings. WER is against the unfaulted transcript (substitutions / "
        "deletions / insertions), then against what was said"
    )
    single = [f for f in found["faults"] if f["how"] != "bridge" and f["wer_truth"]]
    if single and (right := single[0]["wer_truth"]["reference"]) is not None:
        said += f", where the unfaulted transcript has {percent(right)}"
    parts = [f"## Every fault\n\n{said}.\n"]
    for group in GROUPS:
        if own := [fault for fault in found["faults"] if fault["group"] == group]:
            parts.append(f"### {group.capitalize()}\n\n{fault_lines(own)}")
    return "\n".join(parts)


def targets_table(found: Found) -> str:
    rows = [
        {name: cell(said) for name, said in target_cells(target).items()}
        for target in found["targets"].values()
    ]
    return f"## Targets\n\n{table(rows, ('verdict',))}"


def misses_table(found: Found) -> str:
    """What the targets count against the suite; one line for all recordings of a fault alike."""
    alike: dict[tuple[str, ...], list[Found]] = defaultdict(list)
    for miss in found["misses"]:
        expected, named = (text_of(miss[key]) for key in ("expected", "named"))
        alike[miss["kind"], miss["fault"], expected, named].append(miss)
    of = {fault["fault"]: fault["n"] for fault in found["faults"]}
    rows = []
    for (kind, fault, expected, named), own in alike.items():
        errors = [miss["error"] for miss in own if miss["error"] is not None]
        row = {"kind": kind, "fault": fault, "expected": expected, "found": named}
        rows.append({key: cell(value) for key, value in row.items()})
        rows[-1] |= {
            "recordings": f"{len(own)} of {of[fault]}",
            "largest error": figure(max(errors, default=None), "-"),
        }
    said = (
        "The largest error is the relative L2 at ln_post; of a disagreement with MAX it is the "
        "relative difference between the two."
    )
    return f"## Misses\n\n{said}\n\n{table(rows, ('fault', 'expected', 'found'))}"


def max_table(found: Found) -> str:
    """The faults that ran on the compiled graph, against the same on the PyTorch twin."""
    rows = [
        {
            "fault": cell(fault["fault"]),
            "recordings": str(ran["n"]),
            "relative L2, twin": error_said(fault),
            "largest difference of MAX": percent(ran["relative_difference"]),
            "same first tap": percent(ran["same_first_tap"]),
            "agrees": percent(ran["agrees"]),
        }
        for fault in found["faults"]
        if (ran := fault["max"]) is not None
    ]
    return f"## On the compiled graph\n\n{table(rows)}"


def sweeps_table(found: Found) -> str:
    parts = ["## Sweeps\n"]
    for sweep in found["sweeps"]:
        rows = [
            {
                "strength": cell(strength(point["strength"])),
                "relative L2": figure(point["relative_l2"], "-"),
                "KL": figure(point["kl_mean"], "-"),
                "WER": percent(point["wer"]),
                "same tokens": percent(point["tokens_identical"]),
            }
            for point in sweep["points"]
        ]
        same, other = (strength(sweep[k]) for k in ("same_tokens_up_to", "other_tokens_from"))
        said = f"All tokens are the same up to {same}, some differ from {other} on"
        if sweep["same_tokens_up_to"] is None:
            said = f"Some tokens differ from {other} on, at no strength are all the same"
        if sweep["other_tokens_from"] is None:
            said = f"All tokens are the same up to {same}, at no strength does one differ"
        if sweep["same_tokens_up_to"] is None and sweep["other_tokens_from"] is None:
            said = "There is no transcript"
        if sweep["ordered_by"] == "relative_l2":
            said += ", in the order of relative L2"
        parts.append(f"### {cell(sweep['id'])}\n\n{cell(said)}.\n\n{table(rows)}")
    return "\n".join(parts if found["sweeps"] else [*parts, "None.\n"])


def spread(value: float | None, low: float | None, high: float | None) -> str:
    """ "0.91 [0.85, 0.95]"; the interval only where there is one."""
    if value is None:
        return "-"
    said = f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", said)


def correlations_table(found: Found) -> str:
    of = found["correlations"]
    said = (
        f"Spearman's rank correlation with WER against the unfaulted transcript, and its "
        f"{percent(of['level'])} interval from {of['resamples']:,} bootstrap samples that draw "
        f"whole fault ids (seed {of['seed']}). Faults: one point for each fault and strength; "
        "rows: one for each of its recordings; encoder alone: without the groups input and "
        "bridge. A fault after the encoder has no metric and is in none. SQNR is relative L2 in "
        "dB, so both rank alike. stronger: by how much the correlation exceeds that of relative "
        "L2 on the same points, whatever its sign."
    )
    parts = [f"## Which metric goes with WER\n\n{said}\n"]
    for over in ("faults", "rows"):
        for scope, name in (("all", "all groups"), ("inside", "encoder alone")):
            rows = []
            for metric, record in of[over][scope].items():
                more = record["stronger"]
                rows.append(
                    {
                        "metric": METRICS[metric][0],
                        "rho": spread(record["rho"], record["low"], record["high"]),
                        "stronger": spread(*more.values()) if more else "-",
                        "points": f"{record['n']:,}",
                        "ids": str(record["ids"]),
                    }
                )
            parts.append(f"### Over {over}, {name}\n\n{table(rows)}")
    return "\n".join(parts)


def gates_table(found: Found) -> str:
    parts = ["## Gates\n"]
    for on, said in (
        ("median", "A fault passes with the median of its recordings"),
        ("all", "A fault passes if all of its recordings do"),
    ):
        rows = []
        for gate in found["gates"]:
            of = gate[on]
            row = {"gate": cell(gate["name"])}
            for each in HARMFUL:
                names, n = of["lets_through"][each], of["counts"][each]["n"]
                row[f"{each} that pass"] = f"{len(names)} of {n}"
                row[f"these {each}"] = cell(", ".join(names) or "-")
            wording = of["counts"]["wording"]
            row["wording that pass"] = f"{wording['passes']} of {wording['n']}"
            row["benign that it stops"] = f"{len(of['stops'])} of {of['counts']['benign']['n']}"
            row["these benign"] = cell(", ".join(of["stops"]) or "-")
            rows.append(row)
        left = ("these ruinous", "these damaging", "these benign")
        parts.append(f"{said}.\n\n{table(rows, left)}")
    beyond = cell(", ".join(found["beyond_gates"]) or "none")
    parts.append(
        f"Damaging or ruinous behind a right encoder, where no gate at ln_post can see: {beyond}.\n"
    )
    return "\n".join(parts)


def limit_said(name: str, limit: float | None) -> str:
    unit = METRICS[name][1]
    if limit is None:
        return "-"
    return f"{limit:.1f}{unit}" if unit else figure(limit)


def thresholds_table(found: Found) -> str:
    said = (
        "For each metric the limit that best tells damaging and ruinous faults of the encoder from "
        "benign ones and those of wording: the largest Youden's J, chosen on these same faults; "
        "next: the first value that does not pass. AUC, with its interval, needs no limit. Faults "
        "without the metric are left out."
    )
    rows = []
    for name, best in found["thresholds"].items():
        sign = "<=" if best["at_most"] else ">="
        limit = limit_said(name, best["limit"])
        rows.append(
            {
                "metric": METRICS[name][0],
                "passes": limit if limit == "-" else cell(f"{sign} {limit}"),
                "next": limit_said(name, best["next"]),
                "J": spread(best["youden"], None, None),
                "harmful stopped": percent(best["stops"]),
                "others passed": percent(best["passes"]),
                "AUC": spread(best["auc"], best["low"], best["high"]),
                "faults": str(best["n"]),
                "harmful": str(best["harmful"]),
            }
        )
    return f"## The best limit on each metric\n\n{said}\n\n{table(rows)}"


def about_table(found: Found) -> str:
    """What was run, on what: everything that the run says of itself."""
    rows = []
    for key, value in found["about"].items():
        if key == "recordings" and isinstance(value, list):
            seconds = sum(one.get("seconds") or 0 for one in value)
            value = f"{len(value)}, {seconds:.0f} s"
        rows.append({"": cell(key), "value": cell(text_of(value))})
    return f"## The run\n\n{table(rows, ('value',))}"


def tables(found: Found) -> dict[str, str]:
    """Each table with its heading, by name."""
    return {
        "run": about_table(found),
        "targets": targets_table(found),
        "faults": faults_table(found),
        "sweeps": sweeps_table(found),
        "correlations": correlations_table(found),
        "gates": gates_table(found),
        "thresholds": thresholds_table(found),
        "max": max_table(found),
        "misses": misses_table(found),
    }


def markdown(found: Found) -> str:
    """All tables as one GitHub Markdown file."""
    return "\n".join(["# The fault bench\n", *tables(found).values()])

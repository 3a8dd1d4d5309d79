"""What `validation.findings` found, as Markdown tables.

It computes no statistic: every figure is in what was found, and the same comes out of its JSON.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterable

from validation.faults import FAULTS
from validation.findings_rows import CLASSES, GROUPS, HARMFUL, METRICS
from validation.findings_words import (
    OVER,
    Found,
    cause_said,
    decibel,
    error_said,
    figure_said,
    limit_said,
    percent,
    spread,
    strength,
    sweep_said,
    tap_said,
    wer_said,
)
from validation.report import figure, printable, text_of

Cells = dict[str, str]  # a line of a table, by column


def cell(text: str) -> str:
    flat = html.escape(printable(text), quote=False)
    return re.sub(r"([\\|*\[\]~`]|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def linked(text: str) -> str:
    """`cell`, with addresses as links, and "owner/repository#123" (GitHub leads on to a pull
    request)."""
    links = re.compile(r"(https?://[^\s|<>()\[\]`\\]*[\w/])|(?<![\w/])([\w.-]+/[\w.-]+)#(\d+)")
    found, end = "", 0
    for match in links.finditer(text):
        address, repository, number = match.groups()
        if address:
            said = re.sub(r"^https?://(github\.com/)?", "", address)
            said = re.sub(r"/(?:issues|pull)/(\d+)$", r"#\1", said)
        else:
            said = f"{repository}#{number}"
            address = f"https://github.com/{repository}/issues/{number}"
        found += f"{cell(text[end : match.start()])}[{cell(said)}]({html.escape(address)})"
        end = match.end()
    return found + cell(text[end:])


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


def ran_on(faults: list[Found]) -> str:
    """What computed the faulty encoder, or stood behind a right one."""
    if faults[0]["how"] == "bridge":
        return "stock decoder"
    return "twin, MAX" if any(fault["max"] for fault in faults) else "twin"


def recordings_said(fault: Found) -> str:
    """On how many recordings it changes something."""
    n, some = fault["n"], fault["injected"]
    return str(n) if n == some else f"{some} of {n}"


def marks(fault: Found) -> str:
    """ " U", " Y" after the name of an unseen fault, of a yardstick."""
    return " U" * fault["unseen"] + " Y" * fault["yardstick"]


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
            "ran on": ran_on(own),
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
                "fault": cell(fault["fault"]) + marks(fault),
                "on": recordings_said(fault),
                "detected": percent(fault["detected"]) if fault["how"] != "bridge" else "-",
                "first tap": cell(tap_said(fault)),
                "cause": cell(cause_said(fault)),
                "relative L2": error_said(fault),
                "largest": figure(fault["relative_l2"]["max"], "-"),
                "SQNR dB": decibel(fault["sqnr_db"]["median"], exact),
                "at the first tap": figure(fault["tap_relative_l2"], "-"),
                "dB there": decibel(fault["tap_sqnr_db"], fault["tap_relative_l2"] == 0),
                "KL": figure(fault["kl_mean"], "-"),
                "top-1 changed": percent(fault["top1_changed"]),
                "same tokens": percent(fault["tokens_identical"]),
                "first other token": "-" if first is None else f"{first:g}",
                "WER (S/D/I)": errors_said(fault["wer"]),
                "cut off": str(fault["cut_off"] or "-"),
                "WER, truth": wer_said(fault["wer_truth"]),
                "lost / invented s": seconds_said(fault["lost"], fault["invented"]),
                "class": fault["class"] or "-",
            }
        )
    left = ("what was done", "made by", "ran on", "seen", "first tap", "cause", "class")
    return f"{table(what, left)}\n{table(rows, left)}"


def faults_table(found: Found) -> str:
    said = (
        "made by: another input, other weights, other formulas (code), or another way from right "
        "features to text (bridge). ran on: the twin is PyTorch's encoder stage by stage; formulas "
        "run on it alone, since they would need another compiled graph. "
        "U: unseen, a fault that the table of causes was not written for. Y: a yardstick, which is "
        "nobody's mistake but draws the curve. on: the recordings on which the fault changes "
        "something; all figures are of these, medians, the WER pooled. first tap and cause: ok, or "
        "the share of the recordings. relative L2, largest, SQNR: at ln_post; then relative L2 and "
        "SQNR at the first tap that diverges. cut off: recordings on which the decoding went on "
        "without end; the words until it was stopped count. WER is against the unfaulted "
        "transcript (substitutions / deletions / insertions), then against what was said"
    )
    whole = (f for f in found["faults"] if f["how"] != "bridge" and f["injected"] == f["n"])
    truth = next((f["wer_truth"] for f in whole if f["wer_truth"]), None)
    if truth is not None and (right := truth["reference"]) is not None:
        said += f", where the unfaulted transcript has {percent(right)}"
    parts = [f"## Every fault\n\n{said}.\n"]
    for group in GROUPS:
        if own := [fault for fault in found["faults"] if fault["group"] == group]:
            parts.append(f"### {group.capitalize()}\n\n{fault_lines(own)}")
    return "\n".join(parts)


def targets_table(found: Found) -> str:
    said = (
        "Each distinct fault, an id, has one vote, the mean over its strengths and recordings; of "
        "all rows, each has one. The causes were written with the "
        "catalogue at hand: what they name right of it is what they were fitted to. Unseen are the "
        "faults that nobody looked at then, so that their figure is the one to expect of a new "
        "mistake. A yardstick (noise, factors, precisions that no port has) is nobody's mistake. "
        "The mel is compared bit for bit, because both sides must get the same input: any other "
        "front end is detected there, a right one too, which must be given no cause. Faults of the "
        "input therefore stand apart."
    )
    rows = []
    for target in found["targets"].values():
        for i, one in enumerate(target["figures"]):
            value, aim, verdict = figure_said(target, one)
            rows.append(
                {
                    "target": "" if i else cell(target["label"]),
                    "over": OVER[one["over"]],
                    "value": value,
                    "aim": aim,
                    "verdict": verdict,
                    "ids": f"{one['ids']:,}",
                    "of these unseen": f"{one['unseen']:,}",
                    "rows": f"{one['rows']:,}",
                }
            )
    return f"## Targets\n\n{said}\n\n{table(rows, ('over', 'verdict'))}"


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
    parts = ["## Sweeps\n\nStrengths are in the order of the error that they cause.\n"]
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
        parts.append(f"### {cell(sweep['id'])}\n\n{cell(sweep_said(sweep))}.\n\n{table(rows)}")
    return "\n".join(parts if found["sweeps"] else [*parts, "None.\n"])


CORRELATED = {
    "mistakes": "Over mistakes",
    "encoder": "Over mistakes in the encoder",
    "capped": "Over mistakes, the mean WER of the recordings, none above 100 %",
    "rows": "Over mistakes, recording by recording",
    "all": "Over all, the yardsticks too",
}


def correlations_table(found: Found) -> str:
    of = found["correlations"]
    said = (
        f"Spearman's rank correlation with WER against the unfaulted transcript, and its "
        f"{percent(of['level'])} interval from {of['resamples']:,} bootstrap samples that draw "
        f"whole fault ids (seed {of['seed']}). Points: each fault and strength, or each of its "
        "recordings. Over mistakes each id has one vote, which its points share; over all each "
        "point has one, so that the noise, which has the most strengths, weighs the most. A fault "
        "after the encoder has no metric and is in none. SQNR is relative L2 in dB, so both rank "
        "alike. stronger: by how much the correlation exceeds that of relative L2 on the same "
        "points, whatever its sign."
    )
    parts = [f"## Which metric goes with WER\n\n{said}\n"]
    for scope, title in CORRELATED.items():
        rows = []
        for metric, record in of[scope].items():
            more = record["stronger"]
            rows.append(
                {
                    "metric": METRICS[metric].label,
                    "rho": spread(record["rho"], record["low"], record["high"]),
                    "stronger": spread(*more.values()) if more else "-",
                    "points": f"{record['n']:,}",
                    "ids": str(record["ids"]),
                }
            )
        parts.append(f"### {title}\n\n{table(rows)}")
    return "\n".join(parts)


GATED = (
    ("mistakes", "median", "Mistakes, each id once; one passes with the median of its recordings"),
    ("mistakes", "worst", "Mistakes, each id once; one passes if all of its recordings do"),
    ("all", "median", "All faults and strengths, the yardsticks too; on the median recording"),
)


def gates_table(found: Found) -> str:
    said = (
        "An id may have strengths in several classes, and of one class some that pass and some "
        "that do not."
    )
    parts = [f"## Gates\n\n{said}\n"]
    for scope, on, title in GATED:
        rows = []
        for gate in found["gates"]:
            of = gate[scope][on]
            counts = of["counts"]
            row = {"gate": cell(gate["name"])}
            for each in HARMFUL:
                row[f"{each} that pass"] = f"{counts[each]['passes']} of {counts[each]['n']}"
                row[f"these {each}"] = cell(", ".join(of["lets_through"][each]) or "-")
            row["wording that pass"] = f"{counts['wording']['passes']} of {counts['wording']['n']}"
            row["benign that it stops"] = (
                f"{counts['benign']['stopped']} of {counts['benign']['n']}"
            )
            row["these benign"] = cell(", ".join(of["stops"]) or "-")
            rows.append(row)
        left = ("these ruinous", "these damaging", "these benign")
        parts.append(f"{title}.\n\n{table(rows, left)}")
    beyond = cell(", ".join(found["beyond_gates"]) or "none")
    parts.append(
        f"Damaging or ruinous behind a right encoder, where no gate at ln_post can see: {beyond}.\n"
    )
    return "\n".join(parts)


def thresholds_table(found: Found) -> str:
    said = (
        "For each metric the limit that best tells damaging and ruinous faults of the encoder from "
        "benign ones and those of wording: the largest Youden's J, chosen on these same faults; "
        "next: the first value that does not pass; without one: the smallest and the largest best "
        "limit where one recording is left out. AUC, with its interval, needs no limit. Faults "
        "without the metric are left out."
    )
    parts = [f"## The best limit on each metric\n\n{said}\n"]
    for scope, title in (
        ("mistakes", "Over mistakes, one vote for each id"),
        ("all", "Over all faults and strengths, the yardsticks too"),
    ):
        rows = []
        for name, best in found["thresholds"][scope].items():
            sign = "<=" if best["at_most"] else ">="
            limit = limit_said(name, best["limit"])
            rows.append(
                {
                    "metric": METRICS[name].label,
                    "passes": limit if limit == "-" else cell(f"{sign} {limit}"),
                    "next": limit_said(name, best["next"]),
                    "without one": " to ".join(
                        limit_said(name, best["without_one"][end]) for end in ("low", "high")
                    ),
                    "J": spread(best["youden"], None, None),
                    "harmful stopped": percent(best["stops"]),
                    "others passed": percent(best["passes"]),
                    "AUC": spread(best["auc"], best["low"], best["high"]),
                    "ids": str(best["ids"]),
                    "points": str(best["n"]),
                    "harmful": str(best["harmful"]),
                }
            )
        parts.append(f"### {title}\n\n{table(rows)}")
    return "\n".join(parts)


def about_table(found: Found) -> str:
    """What was run, on what: everything that the run says of itself."""
    rows = []
    for key, value in found["about"].items():
        if key == "recordings" and isinstance(value, list):
            seconds = sum(one.get("seconds") or 0 for one in value)
            value = f"{len(value)}, {seconds:.0f} s"
        rows.append({"": cell(key), "value": cell(text_of(value))})
    return f"## The run\n\n{table(rows, ('value',))}"


def recordings_table(found: Found) -> str:
    said = (
        "What the decoder says of the reference's features, one window each; the unfaulted "
        "transcript. A text without end stops at the most tokens that a window may have."
    )
    rows = [
        {
            "recording": cell(one["recording"]),
            "tokens": "-" if one["tokens"] is None else str(one["tokens"]),
            "ended": {True: "no", False: "yes", None: "-"}[one["cut_off"]],
            "WER, truth": percent(one["wer_truth"]),
            "text": cell(one["text"].strip()),
        }
        for one in found["recordings"]
    ]
    return f"## The recordings\n\n{said}\n\n{table(rows, ('text',))}"


def tables(found: Found) -> dict[str, str]:
    """Each table with its heading, by name."""
    return {
        "run": about_table(found),
        "targets": targets_table(found),
        "recordings": recordings_table(found),
        "faults": faults_table(found),
        "sweeps": sweeps_table(found),
        "correlations": correlations_table(found),
        "gates": gates_table(found),
        "thresholds": thresholds_table(found),
        "max": max_table(found),
        "misses": misses_table(found),
    }


def beside_table(found: Found, other: Found) -> str:
    """Two runs, of two checkpoints, fault by fault."""
    theirs = {fault["fault"]: fault for fault in other["faults"]}
    names = found["about"]["model"], other["about"]["model"]
    both = [
        (fault, theirs[fault["fault"]])
        for fault in found["faults"]
        if fault["fault"] in theirs and fault["class"] and theirs[fault["fault"]]["class"]
    ]
    apart = [abs(CLASSES.index(a["class"]) - CLASSES.index(b["class"])) for a, b in both]
    counts = [sum(n == steps for n in apart) for steps in range(len(CLASSES))]
    said = (
        f"The same faults on {names[0]} and on {names[1]}: of {len(both)} with a class on both "
        f"{counts[0]} have the same, {counts[1]} the next, {sum(counts[2:])} one further away."
    )
    rows = []
    for a, b in both:
        row = {"fault": cell(a["fault"]) + marks(a)}
        for name, one in zip(names, (a, b), strict=True):
            row |= {
                f"{name}: relative L2": error_said(one),
                f"{name}: KL": figure(one["kl_mean"], "-"),
                f"{name}: WER": percent(one["wer"]["wer"]) if one["wer"] else "-",
                f"{name}: class": one["class"],
            }
        rows.append(row)
    left = [f"{name}: class" for name in names]
    return f"## Side by side\n\n{cell(said)}\n\n{table(rows, left)}"


def markdown(found: Found, other: Found | None = None) -> str:
    """All tables as one GitHub Markdown file; with another run's findings, both side by side."""
    parts = list(tables(found).values())
    if other is not None:
        parts.insert(2, beside_table(found, other))
    return "\n".join(["# The fault bench\n", *parts])

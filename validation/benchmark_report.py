"""What a benchmark found (schema 1) as tables in the terminal and in Markdown, with its targets.

No row has a time without the error beside it; what was not measured stands there with its reason.
"""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from validation.benchmark_statistics import median, ratio_of_medians
from validation.benchmark_systems import BATCHED, BATCHED_NAME, REFERENCE, TEXT_LIMIT
from validation.report import figure, printable

Found = dict[str, Any]  # schema 1, as `validation.benchmark` builds it
Row = dict[str, Any]
Cells = dict[str, str]

WIDTH = 130  # of the tables where the output is no terminal
MIB = 2**20
SPEED_TARGETS = (  # system, limit of its ratio to cpu, what it is
    ("max-fast", 0.6, "window after window"),
    (BATCHED_NAME, 0.4, f"{BATCHED} independent windows at a time"),
)
ENCODER_LIMIT, PEER_LIMIT = 0.9, 1.0
WORSE = 0.005  # WER that a batch of independent windows may have more than cpu, to meet its target


def rows_of(found: Found, part: str, key: str, value: Any) -> dict[str, Row]:
    """The rows of one table by system."""
    return {row["system"]: row for row in found[part] if row[key] == value}


def batches_of(found: Found) -> list[int]:
    return sorted({row["batch"] for row in found["encoder"]})


def files_of(found: Found) -> list[str]:
    return list(dict.fromkeys(row["file"] for row in found["transcripts"]))


def longest(found: Found) -> Row | None:
    return max(found["recordings"], key=lambda r: r["seconds"], default=None)


def between(row: Row, other: Row, seed: int) -> Row:
    """The ratio of two rows of the same rounds."""
    ratio = ratio_of_medians(row["seconds"], other["seconds"], seed)
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def target(name: str, limit: float, ratio: Row | None, wrong: str | None = None) -> Row:
    """met: by the ratio itself, and not with a `wrong` result; None where it was not measured."""
    met = None if ratio is None else ratio["value"] <= limit and wrong is None
    return {"name": name, "limit": limit, "ratio": ratio, "met": met, "wrong": wrong}


def wrong_text(row: Row, stock: Row | None, batched: bool) -> str | None:
    """What of the text forbids that a target is met by its time: tokens other than cpu's, or, of
    independent windows, whose text may differ, more errors than cpu's."""
    if not batched:
        return None if row["text_tokens_identical"] else "its text is not that of cpu"
    if stock is None or row["wer_truth"] is None or stock["wer_truth"] is None:
        return "without the truth its text cannot be judged"
    if row["wer_truth"] <= stock["wer_truth"] + WORSE:
        return None
    return f"WER {percent(row['wer_truth'])}, cpu {percent(stock['wer_truth'])}"


def targets(found: Found) -> list[Row]:
    """The targets of this project, met or missed in this run."""
    made = []
    if (recording := longest(found)) is not None:
        rows = rows_of(found, "transcripts", "file", recording["file"])
        for name, limit, how in SPEED_TARGETS:
            said = f"{name}, {recording['file']} ({recording['seconds']:.1f} s), {how}: of cpu"
            ratio = rows[name]["ratio"] if name in rows else None
            wrong = None
            if name in rows:
                wrong = wrong_text(rows[name], rows.get(REFERENCE), name != "max-fast")
            made.append(target(said, limit, ratio, wrong))
    rows = rows_of(found, "encoder", "batch", 1)
    ours = rows.get("max")
    made.append(
        target("encoder of max, one window: of cpu", ENCODER_LIMIT, ours["ratio"] if ours else None)
    )
    peers = {s["name"] for s in found["systems"] if s["peer"] and s["precision"] == "float32"}
    fastest = min((rows[p] for p in peers if p in rows), key=lambda r: r["median"], default=None)
    name, ratio = "encoder of max, one window: of the fastest float32 peer", None
    if fastest is not None:
        name += f" ({fastest['system']})"
        ratio = between(ours, fastest, found["seed"]) if ours else None
    made.append(target(name, PEER_LIMIT, ratio))
    return made


def peers_better(found: Found) -> list[str]:
    """What each peer does better than ours in this run, a sentence for each thing: faster (the
    whole interval below 1, where there is one), less memory, an earlier first result."""
    said = []
    for one in found["systems"]:
        if one["peer"]:
            said += faster(found, one, "encoder", "max") + faster(
                found, one, "transcripts", "max-fast"
            )
            said += lighter(found, one["name"], "encoder_starts", "max", "features of one window")
            said += lighter(
                found, one["name"], "transcript_starts", "max-fast", "transcript of one recording"
            )
    return said


def faster(found: Found, peer: Row, part: str, ours: str) -> list[str]:
    """At which batch sizes, or on which recordings, `peer` takes less time than `ours`."""
    key = "batch" if part == "encoder" else "file"
    values = batches_of(found) if part == "encoder" else files_of(found)
    better = []
    for value in values:
        rows = rows_of(found, part, key, value)
        if ours not in rows or peer["name"] not in rows:
            continue
        ratio = between(rows[peer["name"]], rows[ours], found["seed"])
        if ratio["value"] < 1 and (ratio["high"] is None or ratio["high"] < 1):
            place = f"at batch {value}" if part == "encoder" else f"on {value}"
            better.append(f"{times_said(ratio)} {place}")
    if not better:
        return []
    what = "encoder" if part == "encoder" else "transcript"
    return [f"{peer['name']} ({peer['precision']}), {what}: {', '.join(better)} of {ours}'s time."]


def lighter(found: Found, peer: str, part: str, ours: str, what: str) -> list[str]:
    """Peak memory and the time to the first result, of a process that does only that."""
    mine, theirs = found[part].get(ours), found[part].get(peer)
    if not mine or not theirs or not mine["warm"] or not theirs["warm"]:
        return []
    said = []
    if theirs["peak_bytes"] < mine["peak_bytes"]:
        said.append(
            f"{peer}, {what}: {theirs['peak_bytes'] / MIB:.0f} MiB at most, {ours} "
            f"{mine['peak_bytes'] / MIB:.0f} MiB."
        )
    if median(theirs["warm"]) < median(mine["warm"]):
        said.append(
            f"{peer}, {what}: {median(theirs['warm']):.1f} s after an empty process, {ours} "
            f"{median(mine['warm']):.1f} s."
        )
    return said


def times_said(ratio: Row | None) -> str:
    """A ratio with its interval: "0.57 (0.55 to 0.60)"."""
    if ratio is None:
        return "-"
    if ratio["low"] is None:
        return f"{ratio['value']:.2f}"
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def seconds_said(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def tokens_said(row: Row) -> str:
    if row["tokens_identical"] is None:
        return "-"
    if row["tokens_identical"]:
        return "identical"
    return "text identical" if row["text_tokens_identical"] else "differ"


def encoder_cells(found: Found, batch: int) -> list[Cells]:
    precision = {s["name"]: s["precision"] for s in found["systems"]}
    return [
        {
            "system": name,
            "precision": precision[name],
            "seconds": seconds_said(row["median"]),
            "of cpu": times_said(row["ratio"]),
            "x real time": f"{row['times_real_time']:.0f}",
            "relative L2": figure(row["relative_l2"]),
            "peak MiB": f"{row['peak_bytes'] / MIB:.0f}",
        }
        for name, row in rows_of(found, "encoder", "batch", batch).items()
    ]


def transcript_cells(found: Found, file: str) -> list[Cells]:
    precision = {s["name"]: s["precision"] for s in found["systems"]}
    return [
        {
            "system": name,
            "precision": precision[name],
            "seconds": seconds_said(row["median"]),
            "of cpu": times_said(row["ratio"]),
            "x real time": f"{row['times_real_time']:.0f}",
            "WER": percent(row["wer_truth"]),
            "WER to cpu": percent(row["wer_reference"]),
            "tokens": tokens_said(row),
            "n": str(len(row["tokens"])),
            "peak MiB": f"{row['peak_bytes'] / MIB:.0f}",
        }
        for name, row in rows_of(found, "transcripts", "file", file).items()
    ]


def start_cells(starts: dict[str, Row]) -> list[Cells]:
    return [
        {
            "system": name,
            "first result, s": seconds_said(median(row["warm"])),
            "compiling, s": seconds_said(row["cold"]),
            "peak MiB": f"{row['peak_bytes'] / MIB:.0f}",
        }
        for name, row in starts.items()
        if row["warm"]
    ]


def target_cells(found: Found) -> list[Cells]:
    said = {True: "met", False: "missed", None: "not measured"}
    return [
        {
            "target": one["name"],
            "at most": f"{one['limit']:.1f}",
            "measured": times_said(one["ratio"]),
            "": said[one["met"]] + (f": {one['wrong']}" if one["wrong"] else ""),
        }
        for one in found["targets"]
    ]


def unmeasured_cells(found: Found) -> list[Cells]:
    return [
        {"system": one["name"], "not measured, because": one["problem"]}
        for one in found["systems"]
        if one["problem"]
    ]


def tables(found: Found) -> list[tuple[str, list[Cells]]]:
    """(title, rows) of every table that has rows."""
    shortest = min((r for r in found["recordings"]), key=lambda r: r["seconds"], default=None)
    made = [("Targets", target_cells(found))]
    made += [
        (f"The encoder alone, {b} window{'s' * (b > 1)} of 30 s", encoder_cells(found, b))
        for b in batches_of(found)
    ]
    for recording in found["recordings"]:
        title = f"Transcript of {recording['file']}, {recording['seconds']:.1f} s"
        made.append((title, transcript_cells(found, recording["file"])))
    made.append(("Start, the features of one window", start_cells(found["encoder_starts"])))
    if shortest is not None:
        title = f"Start, the transcript of {shortest['file']}"
        made.append((title, start_cells(found["transcript_starts"])))
    made.append(("Not measured", unmeasured_cells(found)))
    return [(title, rows) for title, rows in made if rows]


def notes(found: Found) -> list[str]:
    """How it was measured, a sentence each."""
    said = [
        f"{found['rounds']} rounds; in each every system took its turn, in an order shuffled anew; "
        f"seconds are medians, ratios those of medians, with the interval of 95 % of the bootstrap "
        "over rounds (none below 5 rounds).",
        f"{found['threads']} threads for every system, each in a process of its own that is "
        "stopped while another one is measured; an encoder computes one window, which is not "
        "timed, each time that it goes on.",
        "relative L2: of the features, from stock openai-whisper in float64; what is beyond its "
        "precision's limit is not timed, nor is a peer's transcript where more than "
        f"{100 * TEXT_LIMIT:.0f} % of the words differ from {REFERENCE}'s.",
        f"tokens: of all segments against {REFERENCE}'s; text identical: but for the times; n: so "
        "many, with those of times.",
        "peak MiB: resident at most in the process, up to this batch or recording; each "
        "system keeps its own handling of denormal numbers.",
        "first result: from an empty process, with compiled graphs and files in the page cache.",
    ]
    changing = {r["system"] for r in found["transcripts"] if not r["same_text_each_round"]}
    if changing:
        said.append(f"the text was not the same in every round: {', '.join(sorted(changing))}.")
    return [*said, *found["remarks"]]


def provenance(found: Found) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        ("weights", f"{found['model']} (SHA-256 {found['weights_sha256']})"),
        ("processor", f"{found['cpu']}, {found['cpus']} logical processors"),
        ("of its instructions", ", ".join(found["instructions"]) or "-"),
        ("load when it began", "-" if found["load"] is None else f"{found['load']:.2f}"),
        ("versions", packages),
        ("commit", found["commit"] or "-"),
        ("seed", str(found["seed"])),
        ("took", f"{found['seconds'] / 60:.0f} min"),
    ]


def cell(text: str) -> str:
    """Text as a cell of a table in GitHub Markdown."""
    return re.sub(r"([\\|*\[\]~`<>]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))


def markdown_table(rows: list[Cells]) -> list[str]:
    named = ("system", "precision", "tokens", "target", "", "not measured, because", "value")
    head = list(rows[0])
    lines = [head, [":--" if label in named else "--:" for label in head]]
    lines += [list(row.values()) for row in rows]
    shown = [lines[0], *lines[2:]]
    escaped = [[cell(value) for value in line] for line in shown]
    return [f"| {' | '.join(line)} |" for line in (escaped[0], lines[1], *escaped[1:])] + [""]


def markdown(found: Found) -> str:
    """All tables, what peers do better, how it was measured, and where."""
    lines = ["# Benchmark", ""]
    for title, rows in tables(found):
        lines += [f"## {cell(title)}", "", *markdown_table(rows)]
    if any(one["peer"] and not one["problem"] for one in found["systems"]):
        lines += ["## What a peer does better", ""]
        better = found["peers_better"] or ["Nothing that was measured in this run."]
        lines += [*(f"- {cell(sentence)}" for sentence in better), ""]
    lines += ["## The systems", ""]
    lines += markdown_table(
        [
            {"system": s["name"], "precision": s["precision"], "value": s["what"]}
            for s in found["systems"]
        ]
    )
    lines += ["## How it was measured", "", *(f"- {cell(note)}" for note in notes(found)), ""]
    lines += markdown_table([{"": label, "value": value} for label, value in provenance(found)])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", found["command"])), default=0))
    return "\n".join([*lines, fence, found["command"], fence, ""])


def terminal(found: Found, console: Console) -> None:
    """The tables, and what peers do better."""
    for title, rows in tables(found):
        table = Table(title=Text(printable(title)), title_justify="left")
        for label in rows[0]:
            table.add_column(Text(label), justify="left" if label in ("system", "") else "right")
        for row in rows:
            table.add_row(*(Text(printable(value)) for value in row.values()))
        console.print(table)
    for sentence in found["peers_better"]:
        console.print(Text(printable(sentence)), soft_wrap=True)

"""A parity report (schema 1) as a terminal table, as Markdown and as JSON; it judges nothing.

What cannot be written (OSError) or is no JSON value (TypeError) raises.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Report = dict[str, Any]  # schema 1, as `validation.parity` builds it
Tap = dict[str, Any]  # one of its taps
NARROW = ("edge", "SQNR dB", "max abs", "x floor")  # left out in this order where the line is short


def clean(value: Any) -> Any:
    """`value` as JSON can hold it: not finite is None, tuples are lists, strings valid UTF-8."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def printable(text: str) -> str:
    """Control characters as escapes: a file name must not steer a terminal or break a page."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def figure(x: float | None, absent: str = "NaN") -> str:
    """Two digits: 0.0000024 -> "2.4e-6"."""
    if x is None:
        return absent
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if x else "0"


def times(x: float | None) -> str:
    """A ratio: "1.9", "2,583", "4.1e7"; None is infinite."""
    if x is None:
        return "inf"
    return f"{x:.1f}" if x < 100 else f"{x:,.0f}" if x < 1e6 else figure(x)


def measure(metrics: Report | None, key: str) -> str:
    """One measure of a tap; "-" where there is none, "NaN" where the candidate is not finite."""
    if metrics is None:
        return "-"
    if key == "sqnr_db":
        exact = metrics["relative_l2"] == 0  # an infinite ratio, which JSON cannot hold
        return f"{metrics[key]:.1f}" if metrics[key] is not None else "inf" if exact else "NaN"
    return figure(metrics[key], "NaN" if metrics["nonfinite"] else "-")


def over_floor(tap: Tap) -> str:
    """The free-running error in units of the noise floor; "-" where both are zero."""
    error, floor = tap["free"]["relative_l2"], tap["floor"]["relative_l2"]
    if error is None or floor is None:
        return "NaN"
    return times(error / floor if floor else None) if floor or error else "-"


def judged(tap: Tap) -> list[tuple[str, Report, float]]:
    """What the verdict rests on: (kind of error, its measures, its limit)."""
    kinds = (("free", "limit"), ("injected", "injected_limit"), ("own", "injected_limit"))
    return [(kind, tap[kind], tap[limit]) for kind, limit in kinds if tap[kind] is not None]


def excess(error: float | None, limit: float) -> float:
    """An error in units of its limit: above 1 is past it; not finite is infinite."""
    if error is None:
        return math.inf
    return error / limit if limit else (math.inf if error else 0.0)


def past(tap: Tap) -> set[str]:
    """The kinds of error that are past their limit."""
    return {k for k, metrics, limit in judged(tap) if excess(metrics["relative_l2"], limit) > 1}


def tap_excess(tap: Tap) -> float:
    return max(excess(metrics["relative_l2"], limit) for _, metrics, limit in judged(tap))


def worst(report: Report) -> Tap | None:
    """The tap that is furthest past its limit, or nearest to it; the first of equals."""
    return max(report["taps"], key=tap_excess, default=None)


def local_kind(report: Report) -> str:
    """The error of one stage alone that this report has: "injected" where anything was injected."""
    return "injected" if any(tap["injected"] for tap in report["taps"]) else "own"


def sentence(report: Report) -> str:
    """The verdict in one sentence, from a `clean` report."""
    taps = {tap["name"]: tap for tap in report["taps"]}
    if report["verdict"] == "pass":
        final = report["final"] or report["taps"][-1]
        error, name = final["free"]["relative_l2"], final["name"]
        if error == 0:
            return f"pass: the same values as OpenAI's at {name}"
        said = f"pass: the same function as OpenAI's to {figure(error)} at {name}"
        if report["final"] is None:
            given = len(report["taps"])
            said = (
                f"pass, as far as {given} taps without ln_post can tell: {figure(error)} at {name}"
            )
        if not final["floor"]["relative_l2"]:
            return said
        return f"{said} ({over_floor(final)} times PyTorch's own float32 noise)"
    first = report["first_diverging"]
    if first is None:
        problems = report.get("problems") or ["the transcript is not the same"]
        return f"fail: every tap is within its limits, but {' and '.join(problems)}"
    said = f"fail: first differs at {first}"
    found = [x for x in judged(taps[first]) if x[0] in past(taps[first])]
    if found:
        kind, metrics, limit = found[0]
        error = figure(metrics["relative_l2"])
        if metrics["nonfinite"]:
            error = f"{metrics['nonfinite']:,} values are not finite"
        said += f" ({'' if kind == 'free' else kind + ' '}{error}, limit {figure(limit)})"
    if "cause" not in report:  # nobody looked for one
        return said
    if cause := report["cause"]:
        return f"{said}: {cause['sentence'].removeprefix(f'{first}: ')}"
    return f"{said}: no cause in the table of fingerprints explains it"


def semantic_sentence(report: Report) -> str | None:
    """What became of the transcript, in one sentence; None where it was not compared."""
    found = report["semantic"]
    if found is None:
        return None
    for one in of_files(found):
        if failed := one.get("candidate_failed"):
            return f"transcript: the candidate has none: {failed}"
    said = (
        "transcript: the same tokens" if found["tokens_identical"] else "transcript: other tokens"
    )
    if difference := found.get("first_difference"):
        said += f" from {difference['time']:.1f} s on"
    for key, label in (("wer", "WER"), ("same_top1", "same first choice")):
        if found.get(key) is not None:
            said += f", {label} {100 * found[key]:.4g} %"
    if found.get("kl_mean") is not None:
        mean, p99, most = (figure(found[f"kl_{key}"]) for key in ("mean", "p99", "max"))
        said += f", KL mean {mean}, p99 {p99}, max {most} nats"
    return said


def tolerance_sentence(report: Report) -> str | None:
    """What would pass at the end, in one sentence; None without a finite error there."""
    final = report["final"]
    smallest = final["minimum_tolerance"] if final else None
    if final is None or not smallest:
        return None
    unit = 10.0 ** (math.floor(math.log10(smallest)) - 1)
    said = f"{final['name']} passes from relative L2 {figure(math.ceil(smallest / unit) * unit)}"
    if not final["passed"]:
        return said
    suggested = final["suggested_tolerance"]
    rtol, atol = figure(suggested["rtol"]), figure(suggested["atol"])
    return f"{said}; suggested for element-wise tests: rtol {rtol}, atol {atol}"


def legend(local: str) -> str:
    alone = "fed the reference's inputs" if local == "injected" else "on its own inputs"
    return (
        f"Relative L2 of each tap: free-running; {local}, one stage alone {alone}; "
        "floor, PyTorch's float32 against its float64"
    )


def scalars(found: Report) -> list[tuple[str, str]]:
    """The plain values of an object of the report; its lists are for the JSON."""
    plain = (bool, int, float, str)
    return [(k, text_of(v)) for k, v in found.items() if isinstance(v, plain)]


def of_files(found: Report) -> list[Report]:
    """The semantic stage file by file: with several files it holds the worst of them, and them."""
    return found.get("files") or [found]


def texts(found: Report) -> list[tuple[str, str]]:
    """The transcript of either side, of each file."""
    sides = []
    for one in of_files(found):
        file = f", {one['file']}" if len(of_files(found)) > 1 else ""
        for side, text in one.get("text", {}).items():
            sides.append((f"{side}{file}", text.strip() if text else "(no text)"))
    return sides


def tap_row(tap: Tap, local: str) -> dict[str, str]:
    """A line of the table, by column; `local` is the kind of one stage's own error."""
    return {
        "tap": tap["name"],
        "free": measure(tap["free"], "relative_l2"),
        local: measure(tap[local], "relative_l2"),
        "floor": figure(tap["floor"]["relative_l2"]),
        "x floor": over_floor(tap),
        "limit": figure(tap["limit"]),
        "max abs": measure(tap["free"], "max_abs"),
        "SQNR dB": measure(tap["free"], "sqnr_db"),
        "edge": measure(tap["free"], "edge_relative_l2"),
        "verdict": "pass" if tap["passed"] else "fail",
    }


def file_row(file: Report) -> dict[str, str]:
    return {
        "file": file["file"],
        "windows": str(file["windows"]),
        "verdict": file["verdict"],
        "first diverging": file["first_diverging"] or "-",
        "final": figure(file["final_relative_l2"], "-"),
        "worst tap": file["worst_tap"] or "-",
        "x limit": times(file["worst_ratio"]) if file["worst_tap"] else "-",
    }


def text_of(value: Any) -> str:
    """A value of the report for people, figures short."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return figure(value) if value and not 0.01 <= abs(value) < 1e5 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(text_of(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items())
    return str(value)


def provenance(report: Report) -> list[tuple[str, str]]:
    """What was compared, on what, from which bytes: (label, value)."""
    inputs, tensors = report["inputs"], report["inputs"]["tensors"]
    known = [t for t in tensors if t["candidate_sha256"] is not None]
    other = [t["name"] for t in known if t["candidate_sha256"] != t["sha256"]]
    compared = f"; of {len(known)} of the candidate's, other values: {', '.join(other) or 'none'}"
    rows = {
        "reference": f"openai-whisper with {report['model']}",
        "candidate": " with ".join(filter(None, (report["candidate"], report["candidate_model"]))),
        "audio (SHA-256)": inputs["audio"],
        "mel (SHA-256)": inputs["mel"],
        **{f"{x} (SHA-256)": inputs[x] for x in ("features", "tokens") if x in inputs},
        "weights (SHA-256)": inputs["weights"],
        "candidate's weights (SHA-256)": inputs["candidate_weights"],
        "tensors": f"{len(tensors)}{compared if known else ''}",
        "with taps against without": report["observer"],
        "the reference is alive": report["alive"],
        "the candidate ran": report["ran"],
        "versions": report["versions"],
        "CPU": f"{report['cpu']}, {report['threads']} threads",
        "commit": report["commit"],
        "seconds": report["seconds"],
    }
    return [(label, text_of(value)) for label, value in rows.items()]


def terminal(report: Report, console: Console, also: Sequence[str] = ()) -> None:
    """A line per tap, the worst one coloured, a line per file if several, what is `also` said, and
    the verdict."""
    report = clean(report)

    def plain(text: str, style: str = "") -> Text:
        """No markup, and nothing that the terminal's encoding lacks."""
        encoding = console.encoding
        return Text(printable(text).encode(encoding, "backslashreplace").decode(encoding), style)

    def table(rows: list[tuple[dict[str, str], str]]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for i, label in enumerate(rows[0][0]):
            named = i == 0 or label in ("worst tap", "first diverging", "verdict")
            justify: JustifyMethod = "left" if named else "right"
            made.add_column(label, justify=justify, no_wrap=i > 0, overflow="fold")
        for row, style in rows:
            bad = "red" if row["verdict"] == "fail" else "green"
            cells = (plain(v, bad if k == "verdict" else "") for k, v in row.items())
            made.add_row(*cells, style=style)
        return made

    local, rows = local_kind(report), []
    for tap in report["taps"]:
        colour = "bold yellow" if tap["passed"] else "bold red"
        rows.append((tap_row(tap, local), colour if tap is worst(report) else ""))
    endless, dropped = console.options.update(max_width=10_000), list[str]()
    while rows and len(dropped) < len(NARROW):
        if Measurement.get(console, endless, table(rows)).maximum <= console.width:
            break
        dropped.append(NARROW[len(dropped)])
        rows = [({k: v for k, v in row.items() if k not in dropped}, style) for row, style in rows]
    if rows:
        console.print(table(rows))
        left = f"; no room for {', '.join(dropped)}" if dropped else ""
        console.print(plain(legend(local) + left, "dim"), soft_wrap=True)
    if len(report["files"]) > 1:
        console.print()
        console.print(table([(file_row(file), "") for file in report["files"]]))
    console.print()
    for said in (*also, semantic_sentence(report), tolerance_sentence(report)):
        if said is not None:
            console.print(plain(said), soft_wrap=True)
    style = "bold green" if report["verdict"] == "pass" else "bold red"
    console.print(plain(sentence(report), style), soft_wrap=True)


def markdown(report: Report, also: Sequence[str] = ()) -> str:
    """The report as GitHub Markdown, with what is `also` said."""
    report = clean(report)

    def cell(text: str) -> str:
        flat = html.escape(printable(text), quote=False)
        return re.sub(r"([\\|*\[\]~`]|(?<!\w)_|_(?!\w))", r"\\\1", flat)

    def prose(text: str) -> str:
        """What stands between back-quotes, a tensor's name, stays as it is."""
        parts = re.split(r"(`[^`|<&]*`)", text)
        return "".join(x if i % 2 else cell(x) for i, x in enumerate(parts))

    def names(label: str) -> bool:
        return label in ("tap", "file", "worst tap", "first diverging", "verdict", "", "value")

    def table(rows: list[dict[str, str]]) -> list[str]:
        head = [cell(label) for label in rows[0]]
        rule = [":--" if names(label) else "--:" for label in rows[0]]
        lines = [head, rule, *([cell(v) for v in row.values()] for row in rows)]
        return [f"| {' | '.join(line)} |" for line in lines] + [""]

    def pairs(rows: list[tuple[str, str]]) -> list[str]:
        return table([{"": label, "value": value} for label, value in rows])

    local = local_kind(report)
    said = (*also, semantic_sentence(report), tolerance_sentence(report))
    lines = [f"# Parity: {report['verdict']}", "", prose(sentence(report)) + ".", ""]
    lines += [line for x in said if x is not None for line in (cell(x) + ".", "")]
    lines += ["## Taps", "", cell(legend(local)) + ".", ""]
    lines += table([tap_row(tap, local) for tap in report["taps"]]) if report["taps"] else []
    if len(report["files"]) > 1:
        lines += ["## Files", "", *table([file_row(file) for file in report["files"]])]
    if report["semantic"] is not None:
        lines += ["## Transcript", "", *pairs(scalars(report["semantic"]))]
        lines += pairs(texts(report["semantic"]))
    lines += ["## Provenance", "", *pairs(provenance(report))]
    runs = re.findall("`+", report["command"])
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return "\n".join([*lines, fence, report["command"], fence, ""])


def dumps(report: Report) -> str:
    """Strict JSON: what is not finite is null; rows of numbers are on one line."""
    text = json.dumps(clean(report), allow_nan=False, ensure_ascii=False, indent=1)
    # No string holds a raw line break, so that this finds arrays alone.
    rows = re.compile(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]")
    return rows.sub(lambda row: "[" + " ".join(row[1].split()) + "]", text) + "\n"


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing: a temporary file beside it, renamed. OSError goes up.

    What is no plain file (a pipe, /dev/stdout, a link) cannot be renamed upon and is written to.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""What a benchmark found (schema 1), as a picture: the ratio to `cpu`, one panel a table.

SVG without a library, light or dark as its viewer is. A system that was not measured has no dot.
"""

from __future__ import annotations

from validation.benchmark_report import Found, Row, batches_of, rows_of, times_said
from validation.page import PLOT_CSS, Axis, esc, line, rect, svg, words

WIDTH, LEFT, RIGHT = 900.0, 170.0, 710.0
ROW, HEAD, GAP = 20.0, 26.0, 34.0  # heights: of a system, of a panel's title, under a panel
TOP = 44.0
CSS = """
svg .peer{fill:var(--own);stroke:var(--own)} svg .ours{fill:var(--free);stroke:var(--free)}
svg .reduced{fill:var(--bg);stroke-width:1.6} svg .one{stroke:var(--fg);stroke-dasharray:4 3}
svg .span{fill:none;stroke-width:2}
"""


def panels(found: Found) -> list[tuple[str, list[Row]]]:
    """(title, rows with a ratio), the fastest first."""
    made = [
        (f"encoder, batch {batch}", rows_of(found, "encoder", "batch", batch))
        for batch in batches_of(found)
    ]
    made += [
        (
            f"transcript of {recording['file']}, {recording['seconds']:.1f} s",
            rows_of(found, "transcripts", "file", recording["file"]),
        )
        for recording in found["recordings"]
    ]
    ordered = [
        (title, sorted((r for r in rows.values() if r["ratio"]), key=lambda r: r["median"]))
        for title, rows in made
    ]
    return [(title, rows) for title, rows in ordered if rows]


def dot(row: Row, kind: str, axis: Axis, y: float) -> str:
    """A system: its ratio, and the interval where there is one."""
    ratio = row["ratio"]
    said = f"{row['system']}: {times_said(ratio)} of cpu, {row['median']:.3f} s"
    span = ""
    if ratio["low"] is not None:
        span = line(f"span {kind.split()[0]}", axis(ratio["low"]), y, axis(ratio["high"]), y)
    x = axis(ratio["value"])
    mark = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return f"<g><title>{esc(said)}</title>{span}{mark}</g>"


def svg_ratios(found: Found) -> str:
    """Medians over cpu's, less is faster; hollow: computes in less than float32."""
    kinds = {
        s["name"]: f"{'peer' if s['peer'] else 'ours'}"
        f"{'' if s['precision'] == 'float32' else ' reduced'}"
        for s in found["systems"]
    }
    shown = panels(found)
    ratios = [row["ratio"] for _, rows in shown for row in rows]
    most = max([r["high"] or r["value"] for r in ratios], default=1.0)
    axis = Axis(0.0, max(1.1, 1.05 * most), LEFT, RIGHT)
    drawn, y = "", TOP
    for title, rows in shown:
        base = y + HEAD + ROW * len(rows)
        drawn += words(LEFT, y + 14, title, "start", "strong")
        for at, said in axis.ticks():
            drawn += line("grid", at, y + HEAD - 4, at, base)
            drawn += words(at, base + 14, said, "middle")
        drawn += line("one", axis(1.0), y + HEAD - 4, axis(1.0), base)
        for i, row in enumerate(rows):
            middle = y + HEAD + ROW * (i + 0.5) - 2
            drawn += words(LEFT - 10, middle + 4, row["system"], "end")
            drawn += dot(row, kinds[row["system"]], axis, middle)
            drawn += words(RIGHT + 12, middle + 4, times_said(row["ratio"]))
        y = base + GAP
    legend, at = "", LEFT
    for kind, said in (("ours", "ours"), ("peer", "peer"), ("ours reduced", "below float32")):
        legend += f'<circle class="{kind}" cx="{at:.1f}" cy="18" r="4"/>' + words(at + 9, 22, said)
        at += 90
    legend += words(at + 40, 22, "median seconds over those of cpu; less is faster")
    if not shown:
        drawn = words(WIDTH / 2, TOP + 20, "nothing has a ratio", "middle", "strong")
        y = TOP + 60
    style = f"<style>{PLOT_CSS}{CSS}</style>{rect('ground', 0, 0, WIDTH, y)}"
    made = svg(WIDTH, y, "time of each system over cpu's", style + legend + drawn)
    return made.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"

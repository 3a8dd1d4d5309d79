"""What `validation.findings` found, as pictures: a metric at ln_post against WER, one dot a fault.

SVG without a library, light or dark as its viewer is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from validation.findings_rows import GROUPS, METRICS
from validation.findings_words import (
    Found,
    decibel,
    error_said,
    limit_said,
    percent,
    strength,
    wer_said,
)
from validation.page import PLOT_CSS, Axis, esc, line, log_axis, rect, svg, words
from validation.report import figure

GROUP_COLOURS = (
    ("input", "#1b5e9b", "#74b2ee"),
    ("stem", "#9a4d08", "#eda35c"),
    ("blocks", "#6f3fa8", "#c4a2f5"),
    ("weights", "#1d6b3a", "#7fce9b"),
    ("bridge", "#b3261e", "#ff8d83"),
)
LIGHT, DARK = (";".join(f"--{c[0]}:{c[i]}" for c in GROUP_COLOURS) for i in (1, 2))
SCATTER_CSS = f"""
:root{{{LIGHT}}} @media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
@media print{{:root{{{LIGHT}}}}}
{" ".join(f"svg .{group}{{--hue:var(--{group})}}" for group in GROUPS)}
svg .any{{--hue:var(--soft)}}
svg .mark{{fill:var(--hue);stroke:var(--bg);stroke-width:.8;fill-opacity:.85}}
svg .yardstick{{fill:var(--bg);stroke:var(--hue);stroke-width:1.1}}
svg .sweep{{fill:none;stroke:var(--hue);stroke-width:1.2;stroke-opacity:.55}}
svg text.name{{fill:var(--hue);font-size:10px}}
svg .leader{{stroke:var(--hue);fill:none;stroke-width:.6;stroke-opacity:.7}}
svg .gate{{stroke:var(--soft);fill:none;stroke-dasharray:5 4}}
svg .best{{stroke:var(--fg);fill:none;stroke-dasharray:1.5 3.5;stroke-width:1.4}}
svg .border{{stroke:var(--soft);fill:none;stroke-opacity:.5}}
"""
MARKS = {  # a shape beside the colour, around the middle of the dot
    "input": "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0Z",
    "stem": "m-3.3 -3.3h6.6v6.6h-6.6Z",
    "blocks": "m0 -4.4l4.2 7.4h-8.4Z",
    "weights": "m0 -4.7l4.3 4.7l-4.3 4.7l-4.3 -4.7Z",
    "bridge": "m-4.2 -1.4h2.8v-2.8h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8Z",
}
X_AXES = {  # metric asked for: (name in the findings, axis title)
    "relative_l2": ("relative_l2", "relative L2 at ln_post, median over the recordings"),
    "kl": ("kl_mean", "KL of the next token in nats, median over the recordings"),
    "sqnr": ("sqnr_db", "SQNR at ln_post in dB, median over the recordings; better to the left"),
}
TOPS = (1.0, 1.5, 2.0)  # where the axis of WER may end: at the first that holds all, or the last
WER_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2)
DECADES = 12  # the most that an axis shows, counted from its largest value


@dataclass(frozen=True)
class Dot:
    """A fault in the picture, in pixels."""

    fault: Found
    x: float
    y: float

    @property
    def group(self) -> str:
        return str(self.fault["group"])

    @property
    def kind(self) -> str:
        """The classes of its mark: a yardstick is hollow."""
        return f"mark {self.group}{' yardstick' * self.fault['yardstick']}"


def wer_height(wer: float, base: float, top: float, most: float) -> float:
    """WER by its square root, so that small ones can be told from none."""
    return base - (base - top) * math.sqrt(min(wer, most) / most)


def x_value(fault: Found, name: str) -> float | None:
    """A fault's place on the axis; an exact result is 0, or infinitely many dB."""
    value = fault[name]["median"] if isinstance(fault[name], dict) else fault[name]
    if name == "sqnr_db" and fault["relative_l2"]["median"] == 0:
        return math.inf
    return None if value is None else float(value)


def x_axis(values: list[float], metric: str, left: float, right: float) -> Axis:
    """Decades, or dB from the best on the left to the worst."""
    finite = [v for v in values if math.isfinite(v)]
    if metric == "sqnr":
        low, high = min([*finite, 0.0]), max([*finite, 60.0])
        return Axis(math.floor(low / 10) * 10 - 5, math.ceil(high / 10) * 10 + 5, right, left)
    axis = log_axis(finite, left, right)
    return Axis(max(axis.low, axis.high - DECADES) - 0.3, axis.high + 0.1, left, right, log=True)


def x_ticks(axis: Axis) -> list[tuple[float, str]]:
    if not axis.log:
        tens = range(math.ceil(axis.low / 20), math.floor(axis.high / 20) + 1)
        return [(axis(20 * k), str(20 * k)) for k in tens]
    low, high = math.ceil(axis.low), math.floor(axis.high)
    every = 1 + (high - low) // 12
    return [(axis(10.0**k), f"1e{k}") for k in range(low, high + 1, every)]


def box(x: float, y: float, said: str, at: str) -> tuple[float, float, float, float]:
    """What a label of 10 px covers: left, top, right, bottom."""
    width = 5.7 * len(said) + 1
    left = {"start": x, "middle": x - width / 2, "end": x - width}[at]
    return left, y - 8, left + width, y + 2


def meets(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


PLACES = (  # of a label beside its dot
    (6.0, 3.5, "start"),
    (-6.0, 3.5, "end"),
    (0.0, -7.0, "middle"),
    (0.0, 14.0, "middle"),
    (4.5, -4.5, "start"),
    (4.5, 12.0, "start"),
    (-4.5, -4.5, "end"),
    (-4.5, 12.0, "end"),
)


RINGS = (18.0, 30.0, 44.0, 60.0, 80.0, 104.0, 132.0, 164.0, 200.0)  # px from a dot to its label
TURNS = 24  # places on a ring


def further_away() -> list[tuple[float, float, str]]:
    """Places for a label that has no room beside its dot: rings, upwards and downwards first."""
    found = []
    for ring in RINGS:
        for i in range(TURNS):
            turn = math.pi / 2 + (-1) ** i * ((i + 1) // 2) * 2 * math.pi / TURNS
            dx, dy = ring * math.cos(turn), -ring * math.sin(turn)
            at = "middle" if abs(dx) < ring / 4 else "start" if dx > 0 else "end"
            found.append((dx, dy + 3.5, at))
    return found


def names_of(dots: list[Dot], area: tuple[float, float, float, float]) -> str:
    """Labels: single faults and the worst of each sweep by id, beside the dot or, on a leader,
    further away; then the others of a sweep by strength, a number only where the WER is not 0 and
    where there is room; of each mistakes before yardsticks, and the largest WER first."""
    taken = [(dot.x - 3, dot.y - 3, dot.x + 3, dot.y + 3) for dot in dots]
    worst: dict[str, Dot] = {}
    for dot in sorted(dots, key=lambda dot: (-dot.y, dot.x)):
        worst[dot.fault["id"]] = dot

    def within(dot: Dot) -> bool:
        return dot.fault["strength"] is not None and dot is not worst[dot.fault["id"]]

    def said_of(dot: Dot) -> str:
        value = dot.fault["strength"]
        if not within(dot):
            return str(dot.fault["id"])
        return strength(value) if isinstance(value, str) or dot.fault["wer"]["wer"] else ""

    drawn = ""
    for dot in sorted(dots, key=lambda dot: (within(dot), dot.fault["yardstick"], dot.y)):
        said = said_of(dot)
        places = [*PLACES, *([] if within(dot) else further_away())]
        for i, (dx, dy, at) in enumerate(places if said else ()):
            covered = box(dot.x + dx, dot.y + dy, said, at)
            inside = (
                area[0] <= covered[0]
                and area[1] <= covered[1]
                and covered[2] <= area[2]
                and covered[3] <= area[3]
            )
            if inside and not any(meets(covered, other) for other in taken):
                taken.append(covered)
                if i >= len(PLACES):
                    drawn += line(f"leader {dot.group}", dot.x, dot.y, dot.x + dx, dot.y + dy - 3.5)
                drawn += words(dot.x + dx, dot.y + dy, said, at, f"name {dot.group}")
                break
    return drawn


def dot_said(fault: Found) -> str:
    """What a dot says of itself to a mouse or a reader of the source."""
    exact = fault["relative_l2"]["median"] == 0
    return (
        f"{fault['fault']}: {fault['sentence']} Relative L2 {error_said(fault)}, SQNR "
        f"{decibel(fault['sqnr_db']['median'], exact)} dB, KL {figure(fault['kl_mean'], '-')}, "
        f"WER {wer_said(fault['wer'])}, {fault['class'] or 'no class'}"
    )


def uprights(found: Found, name: str, axis: Axis, top: float, base: float) -> str:
    """The gates on this metric, and its best limit, as vertical lines with a name above."""
    limits = [
        ("gate", gate["limit"], gate["name"].rpartition("= ")[2])
        for gate in found["gates"]
        if gate["metric"] == name
    ]
    best = found["thresholds"]["mistakes"][name]["limit"]
    if best is not None:
        limits.append(("best", best, f"best {limit_said(name, best)}"))
    drawn, taken = "", list[tuple[float, float, float, float]]()
    for kind, limit, said in limits:
        x = axis(limit)
        drawn += line(kind, x, base, x, top)
        for row in range(3):
            covered = box(x, top - 6 - 12 * row, said, "middle")
            if not any(meets(covered, other) for other in taken):
                break
        taken.append(covered)
        drawn += words(x, covered[3] - 2, said, "middle", "strong" if kind == "best" else "")
    return drawn


def svg_scatter(found: Found, metric: str) -> str:
    """A metric at ln_post (relative_l2, kl, sqnr) against WER, as an SVG file of its own.

    A dot is a fault of one strength; a line joins a sweep. Faults without the metric (behind a
    right encoder, or without features) stand in a strip of their own; without a WER they are not
    drawn. Raises ValueError for another metric.
    """
    if metric not in X_AXES:
        raise ValueError(f"metric is {metric!r}, of {', '.join(X_AXES)}")
    name, title = X_AXES[metric]
    faults = [f for f in found["faults"] if f["wer"] and f["wer"]["wer"] is not None]
    placed = [(f, x) for f in faults if (x := x_value(f, name)) is not None]
    apart = [f for f in faults if x_value(f, name) is None]
    width, height, left, top, base = 1280.0, 860.0, 64.0, 84.0, 798.0
    zero = base - 110  # the line of WER 0, under which there is room for names
    right = width - 20 if not apart else width - 128
    axis = x_axis([x for _, x in placed], metric, left, right)
    largest = max((f["wer"]["wer"] for f in faults), default=0.0)
    most = next((end for end in TOPS if largest <= end), TOPS[-1])

    def height_of(fault: Found) -> float:
        return wer_height(fault["wer"]["wer"], zero, top + 10, most)

    dots = [Dot(f, axis(x), height_of(f)) for f, x in placed]
    step = (width - 30 - right) / max(1, len(apart))
    aside = [Dot(f, right + 20 + step * (i + 0.5), height_of(f)) for i, f in enumerate(apart)]

    if metric == "sqnr" and any(x == math.inf for _, x in placed):
        title += "; on the left edge: exact"
    if axis.log and any(x < 10**axis.low for _, x in placed):
        title += "; on the left edge: less, or none"

    drawn = rect("panel", left, top, right - left, base - top)
    for value in WER_TICKS:
        if value <= most:
            y = wer_height(value, zero, top + 10, most)
            kind = "border" if value in (0.05, 0.3) else "grid"
            drawn += line(kind, left, y, right, y) + words(left - 7, y + 4, percent(value), "end")
    for border, down, said in ((0.05, 12, "wording"), (0.05, -5, "damaging"), (0.3, -5, "ruinous")):
        drawn += words(left + 6, wer_height(border, zero, top + 10, most) + down, said)
    for x, said in x_ticks(axis):
        drawn += line("axis", x, base, x, base + 4) + words(x, base + 18, said, "middle")
    drawn += line("axis", left, base, right, base)
    drawn += words((left + right) / 2, base + 38, title, "middle", "strong")
    middle = (top + base) / 2
    drawn += words(14, middle, "WER against the unfaulted transcript", "middle", "strong", True)
    drawn += uprights(found, name, axis, top, base)
    if apart:
        drawn += rect("panel", right + 12, top, width - 22 - right, base - top)
        drawn += words((right + width) / 2, base + 18, "no such value:", "middle")
        drawn += words((right + width) / 2, base + 32, "bridge, or no features", "middle")
    by_key = {dot.fault["fault"]: dot for dot in dots}
    for sweep in found["sweeps"]:
        own = [by_key[p["fault"]] for p in sweep["points"] if p["fault"] in by_key]
        if len(own) > 1:
            path = "L".join(f"{dot.x:.1f} {dot.y:.1f}" for dot in own)
            drawn += f'<path class="sweep {sweep["group"]}" d="M{path}"/>'
    for dot in [*dots, *aside]:
        above = dot.fault["wer"]["wer"] > most
        shape = MARKS[dot.group]
        stem = f'<path class="sweep {dot.group}" d="M{dot.x:.1f} {dot.y:.1f}v-10m-3 4l3 -4l3 4"/>'
        drawn += (
            f'<g data-fault="{esc(dot.fault["fault"])}"><title>{esc(dot_said(dot.fault))}</title>'
            f"{stem if above else ''}"
            f'<path class="{dot.kind}" d="M{dot.x:.1f} {dot.y:.1f}{shape}"/></g>'
        )
    drawn += names_of(dots, (left + 1, top + 1, right - 1, base - 1))
    drawn += names_of(aside, (right + 13, top + 1, width - 11, base - 1))
    at = left
    for group in GROUPS:
        if any(dot.group == group for dot in [*dots, *aside]):
            drawn += f'<path class="mark {group}" d="M{at + 5:.1f} 18{MARKS[group]}"/>'
            drawn += words(at + 15, 22, group)
            at += 80
    drawn += line("gate", at, 18, at + 24, 18) + words(at + 30, 22, "gate")
    drawn += line("best", at + 80, 18, at + 104, 18)
    drawn += words(at + 110, 22, "best limit (Youden)")
    drawn += line("sweep any", at + 240, 18, at + 264, 18) + words(at + 270, 22, "one sweep")
    if any(dot.fault["yardstick"] for dot in [*dots, *aside]):
        drawn += f'<path class="mark any yardstick" d="M{at + 350:.1f} 18{MARKS["weights"]}"/>'
        drawn += words(at + 360, 22, "hollow: yardstick")
    undrawn = len(found["faults"]) - len(faults)
    if undrawn:
        said = f"{undrawn} without a WER, or that change nothing, are not drawn"
        drawn += words(width - 20, height - 6, said, "end")
    if not faults:
        drawn += words((left + right) / 2, middle, "no fault has a WER", "middle", "strong")
    style = f"<style>{PLOT_CSS}{SCATTER_CSS}</style>{rect('ground', 0, 0, width, height)}"
    label = f"{METRICS[name].label} against WER, {len(faults)} faults"
    made = svg(width, height, label, style + drawn)
    return made.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"

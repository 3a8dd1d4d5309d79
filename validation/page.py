"""A parity report (schema 1) as one HTML file that needs nothing else, and its first plot as SVG.

The plots are drawn here, so that they are there without a script; the script only sorts, filters
and links. Nothing is loaded from anywhere: the page's own policy forbids it.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from validation import report as reports
from validation.report import Report, Tap, figure, measure, text_of

LIGHT = (
    "--bg:#fcfbf9;--fg:#1d1c1a;--soft:#5f5c56;--line:#dfdbd3;--panel:#f4f2ed;--mark:#fbeeb8;"
    "--free:#1b5e9b;--own:#9a4d08;--floor:#dad5ca;--bad:#b3261e;--good:#1d6b3a"
)
DARK = (
    "--bg:#141517;--fg:#e9e7e3;--soft:#a8a49c;--line:#36383c;--panel:#1d1f22;--mark:#4a3f12;"
    "--free:#74b2ee;--own:#eda35c;--floor:#34373c;--bad:#ff8d83;--good:#7fce9b"
)
PLOT_CSS = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
@media print{{:root{{color-scheme:light;{LIGHT}}}}}
svg{{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}}
svg text{{fill:var(--soft)}} svg .strong{{fill:var(--fg);font-weight:600}}
svg .ground{{fill:var(--bg)}} svg .panel{{fill:var(--panel)}} svg .floor{{fill:var(--floor)}}
svg .hit{{fill:none;pointer-events:all}} svg .free{{fill:var(--free)}}
svg .grid{{stroke:var(--line);fill:none}}
svg .axis,svg .edge{{stroke:var(--soft);fill:none}}
svg .limit{{stroke:var(--bad);fill:none;stroke-width:1.5;stroke-dasharray:6 3}}
svg .own{{fill:var(--bg);stroke:var(--own);stroke-width:1.5}}
svg .curve{{stroke:var(--free);fill:none;stroke-linejoin:round;stroke-width:1.2}}
svg .dots{{stroke:var(--free);fill:none;stroke-linecap:round;stroke-width:3.4;stroke-opacity:.75}}
svg .free.bad,svg text.bad{{fill:var(--bad)}} svg .own.bad{{stroke:var(--bad)}}
"""
PAGE_CSS = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--bg);color:var(--fg);font-variant-numeric:tabular-nums;
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:72rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:4rem} footer{padding-bottom:5rem}
h1{font-size:2.5rem;line-height:1.15;letter-spacing:-.02em;font-weight:650;margin:.2rem 0 1rem}
h2{font-size:1.35rem;letter-spacing:-.01em;font-weight:620;margin:4rem 0 .4rem}
p,figcaption{max-width:46rem} .lead{font-size:1.2rem;line-height:1.5;margin:0 0 .6rem}
.soft,.kicker,figcaption,dt{color:var(--soft)} .good{color:var(--good)} .bad{color:var(--bad)}
.kicker,.lead{overflow-wrap:anywhere} .figure{white-space:nowrap} .kicker{margin:0}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.2em}
:focus-visible{outline:2px solid var(--free);outline-offset:2px}
code,pre{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow-x:auto;background:var(--panel);padding:1rem;border-radius:6px}
.skip{position:absolute;left:-999rem;background:var(--bg);padding:.4rem .8rem;z-index:3}
.skip:focus{left:1rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1.5rem;
margin:2.5rem 0 0;padding:1.5rem 0;border:solid var(--line);border-width:1px 0}
.facts dd{margin:0;font-size:1.5rem;line-height:1.3;overflow-wrap:anywhere}
.facts dd.name{font-size:1.05rem;line-height:1.85} .facts dt{font-size:.85rem}
figure{margin:1.2rem 0 0} figcaption{font-size:.9rem;margin-top:.6rem}
svg{display:block;height:auto} .scroll{overflow-x:auto;max-width:100%}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:2rem}
.three svg{width:100%;max-width:26rem}
svg a:focus-visible{outline:none} svg a:focus-visible .hit{stroke:var(--free);stroke-width:2}
.point:target .hit,.point.on .hit{fill:var(--mark);fill-opacity:.5}
td a,tbody th a{text-decoration-color:var(--line)}
table{border-collapse:collapse;font-size:.8rem;white-space:nowrap;min-width:100%}
th,td{padding:.28rem .4rem;border-bottom:1px solid var(--line);text-align:left;font-weight:400}
thead th{vertical-align:bottom;border-bottom-color:var(--soft);padding:.2rem .1rem}
.n{text-align:right} tbody th{position:sticky;left:0;background:var(--bg);z-index:1}
thead button{all:unset;cursor:pointer;padding:.25rem .3rem;border-radius:4px;font-weight:600}
thead button:disabled{cursor:default} thead button:enabled:hover{background:var(--panel)}
thead button:focus-visible{outline:2px solid var(--free)}
[aria-sort=ascending] button::after{content:" \\2191"}
[aria-sort=descending] button::after{content:" \\2193"}
tbody tr:hover>*,tr.worst>*{background:var(--panel)} tr.worst>*{font-weight:650}
tbody tr:target>*,tbody tr.on>*{background:var(--mark)} tr{scroll-margin-top:3rem}
.filter{display:flex;flex-wrap:wrap;gap:.4rem 1rem;align-items:center;margin:1.2rem 0 .6rem}
input{font:inherit;color:inherit;background:var(--bg);border:1px solid var(--soft);
border-radius:6px;padding:.35rem .7rem;width:18rem;max-width:100%}
[hidden]{display:none!important}
.text{white-space:normal;min-width:16rem;vertical-align:top} h3{font-size:1rem;margin:1.2rem 0 0}
blockquote{margin:.2rem 0 1rem;padding-left:1rem;border-left:3px solid var(--line);max-width:46rem}
details{margin-top:1.2rem} summary{cursor:pointer;padding:.2rem 0}
.pairs{display:grid;grid-template-columns:minmax(8rem,15rem) 1fr;gap:.45rem 1.5rem;font-size:.92rem}
.pairs dd{margin:0;overflow-wrap:anywhere;min-width:0}
@media (max-width:34rem){header,main,footer{padding-left:1rem;padding-right:1rem}
header{padding-top:2rem} h1{font-size:2rem} .pairs{grid-template-columns:1fr;gap:0}
.pairs dd{margin-bottom:.7rem}}
@media print{@page{size:A4 landscape;margin:12mm} body{font-size:9pt} header{padding-top:0}
.skip,.filter{display:none} .scroll{overflow:visible} .three{grid-template-columns:repeat(3,1fr)}
pre{white-space:pre-wrap;overflow-wrap:anywhere} svg{max-width:100%} table{font-size:6.5pt}
figure,tr{break-inside:avoid} h2{break-after:avoid;margin-top:2rem} tbody th{position:static}}
"""
SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("thead button")) {
  button.disabled = false;
  button.addEventListener("click", () => {
    const head = button.closest("th"), column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const number = head.classList.contains("n"), was = head.getAttribute("aria-sort");
    const down = was ? was === "ascending" : number && column > 0;  // largest errors first
    const value = row => number ? row.cells[column].dataset.v : row.cells[column].textContent;
    const compare = (a, b) => number ? a - b : a.localeCompare(b, "en", {numeric: true});
    const sorted = [...body.rows].sort((first, second) => {
      const a = value(first), b = value(second);
      if (a === b) return 0;
      if (a === "" || b === "") return a === "" ? 1 : -1;
      return down ? compare(b, a) : compare(a, b);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...sorted);
  });
}
const input = document.getElementById("filter");
const rows = [...document.querySelectorAll("#taps tbody tr")];
const filter = () => {
  const asked = input.value.toLowerCase().split(/\\s+/);
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !asked.every(word => text.includes(word));
  }
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${rows.length} taps`;
};
input.addEventListener("input", filter);
input.closest("[hidden]").hidden = false;
filter();
for (const [name, on] of [["mouseover", true], ["focusin", true], ["mouseout", false],
                          ["focusout", false]]) {
  document.addEventListener(name, event => {
    const tap = event.target.closest("[data-tap]")?.dataset.tap;
    for (const found of document.querySelectorAll(`[data-tap="${tap}"]`)) {
      found.classList.toggle("on", on);
    }
  });
}
document.addEventListener("click", event => {
  const tap = event.target.closest(".point")?.dataset.tap;
  if (tap && document.getElementById(`tap-${tap}`).hidden) {  // the line asked for is filtered out
    input.value = "";
    filter();
  }
});
"""


def esc(text: object) -> str:
    """Any value as text of HTML or XML, in or out of an attribute."""
    return markup.escape(reports.printable(str(text)))


def prose(text: str) -> str:
    """A sentence as HTML: back-quotes are code, a figure such as 1.0e-6 stays on one line."""
    coded = re.sub(r"`([^`]*)`", r"<code>\1</code>", esc(text))
    return re.sub(r"\d\.\de-\d+", r'<span class="figure">\g<0></span>', coded)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`; by their logarithm if `log`.

    On a logarithmic axis zero lies at the start and what is not finite (None) at the end.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, x: float | None) -> float:
        if x is None:
            return self.end
        if self.log:
            x = math.log10(max(x, 10**self.low))
        at = min(1.0, max(0.0, (x - self.low) / (self.high - self.low)))
        return self.start + at * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, label): decades, every other one where there are many, or steps of 1, 2 or 5."""
        if self.log:
            low, high = int(self.low), int(self.high)
            every = 1 + (high - low) // 8
            return [(self(10.0**k), f"1e{k}") for k in range(low, high + 1, every)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(self(k * step), f"{k * step:.4g}") for k in range(first, last + 1)]


def log_axis(values: Iterable[float | None], start: float, end: float) -> Axis:
    """Whole decades around all values that have a logarithm; 1e-8 to 1e-4 where none has."""
    logs = [math.log10(v) for v in values if v is not None and v > 0] or [-8.0, -4.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return Axis(low, max(high, low + 1), start, end, log=True)


def svg(width: float, height: float, label: str, body: str, role: str = "img") -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="{role}" aria-label="{esc(label)}">{body}</svg>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>'


def words(
    x: float, y: float, said: str, at: str = "start", kind: str = "", up: bool = False
) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if up else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{at}"{turned}'
    return f'<text class="{kind}" {place}>{esc(said)}</text>'


def diamond(kind: str, x: float, y: float) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4Z"/>'


def rules(x: Axis, y: Axis) -> str:
    """The grid and the values of the vertical axis, the line of the horizontal one."""
    drawn = "".join(
        line("grid", x.start, at, x.end, at) + words(x.start - 7, at + 4, said, "end")
        for at, said in y.ticks()
    )
    return drawn + line("axis", x.start, y.start, x.end, y.start)


def frame(x: Axis, y: Axis, x_name: str, y_name: str) -> str:
    """Both axes of a small plot, with grid, ticks and names."""
    ticks = "".join(
        line("axis", at, y.start, at, y.start + 4) + words(at, y.start + 17, said, "middle")
        for at, said in x.ticks()
    )
    named = words((x.start + x.end) / 2, y.start + 35, x_name, "middle")
    return rules(x, y) + ticks + named + words(12, (y.start + y.end) / 2, y_name, "middle", up=True)


def tap_said(tap: Tap) -> str:
    """What a point of the first plot says of itself."""
    said = [f"{kind} {measure(m, 'relative_l2')}" for kind, m, _ in reports.judged(tap)]
    said += [f"floor {figure(tap['floor']['relative_l2'])}", f"limit {figure(tap['limit'])}"]
    return f"{tap['name']}: {', '.join(said)}, {'pass' if tap['passed'] else 'fail'}"


def legend(left: float, local: str | None) -> str:
    """What the marks of the first plot mean; `local` None: it has no errors of one stage alone."""
    drawn, at = f'<circle class="free" cx="{left + 5}" cy="14" r="3.6"/>', left + 105
    drawn += words(left + 14, 18, "free-running")
    if local:
        drawn += diamond("own", at + 5, 14) + words(at + 14, 18, f"one stage alone ({local})")
        at += 175
    drawn += line("limit", at, 14, at + 28, 14) + words(at + 34, 18, "limit")
    drawn += rect("floor", at + 85, 8, 28, 12) + line("edge", at + 85, 8, at + 113, 8)
    return drawn + words(at + 119, 18, "noise floor: PyTorch float32")


def depth(report: Report) -> tuple[float, float, str]:
    """Error against depth: free-running and one stage's own, the noise floor, the limit.

    (width, height, elements). Each tap is a link to its line of the table.
    """
    taps, local = report["taps"], reports.local_kind(report)
    step = max(18.0 if len(taps) <= 120 else 8.0, 620 / max(1, len(taps)))
    left, top, base = 62.0, 58.0, 360.0
    right = left + step * len(taps)
    errors = [m["relative_l2"] for tap in taps for _, m, _ in reports.judged(tap)]
    bounds = [x for tap in taps for x in (tap["floor"]["relative_l2"], tap["limit"])]
    if None in errors:  # room above for what is not finite
        bounds.append(10 * max((x for x in errors if x), default=1e-4))
    x_axis, y = Axis(0, 1, left, right), log_axis([*errors, *bounds], base, top)
    panels = floor = edge = limit = curve = points = labels = block = ""
    for i, tap in enumerate(taps):
        x, middle = left + step * i, left + step * (i + 0.5)
        found = re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", tap["name"])
        if found and found[1] != block:
            block = found[1]
            inside = [t for t in taps if t["name"].split(".")[:2] == ["blocks", block]]
            width = step * len(inside)
            if int(block) % 2 == 0:
                panels += rect("panel", x, top, width, base - top)
            panels += words(x + width / 2, top - 9, f"blocks.{block}", "middle")
        noise = y(tap["floor"]["relative_l2"] or 0.0)
        floor += f"M{x:.1f} {base}V{noise:.1f}h{step:.1f}V{base}Z"
        edge += f"{'L' if edge else 'M'}{x:.1f} {noise:.1f}h{step:.1f}"
        if tap["limit"]:
            limit += f"{'L' if limit else 'M'}{x:.1f} {y(tap['limit']):.1f}h{step:.1f}"
        free = tap["free"]["relative_l2"]
        if free:
            joined = i and taps[i - 1]["free"]["relative_l2"]
            curve += f"{'L' if joined else 'M'}{middle:.1f} {y(free):.1f}"
        past = reports.past(tap)
        marks = rect("hit", x + 1, top, step - 2, base - top)
        if tap[local] is not None:
            kind = "own bad" if local in past else "own"
            marks += diamond(kind, middle, y(tap[local]["relative_l2"]))
        kind = "free bad" if "free" in past else "free"
        marks += f'<circle class="{kind}" cx="{middle:.1f}" cy="{y(free):.1f}" r="3.2"/>'
        if free is None and not (i and taps[i - 1]["free"]["relative_l2"] is None):
            points += words(middle - 2, top + 17, "not finite", "start", "bad")
        said = esc(tap_said(tap))
        link = f'class="point" id="point-{i}" data-tap="{i}" href="#tap-{i}" aria-label="{said}"'
        points += f"<a {link}><title>{said}</title>{marks}</a>"
        outer = not (found and found[2])  # a block's output, or outside of the blocks
        if step >= 18 or (found and outer):
            kind = "strong " * bool(found and outer) + "bad" * (not tap["passed"])
            name = tap["name"] if outer or not found else found[2]
            labels += words(middle + 4, base + 10, name, "end", kind, up=True)
    shown = local if any(tap[local] for tap in taps) else None
    paths = (("edge", edge), ("limit", limit), ("curve", curve))
    body = f'{panels}<path class="floor" d="{floor}"/>{rules(x_axis, y)}{legend(left, shown)}'
    body += "".join(f'<path class="{kind}" d="{d}"/>' for kind, d in paths)
    body += words(14, (top + base) / 2, "relative L2", "middle", up=True)
    return right + 14, base + 160, body + points + labels


def svg_depth(report: Report) -> str:
    """Error against depth as an SVG file of its own, light or dark as its viewer is."""
    report = reports.clean(report)
    width, height, body = depth(report)
    body = re.sub(r'<a class="point"[^>]*>', "<g>", body).replace("</a>", "</g>")
    style = f"<style>{PLOT_CSS}</style>{rect('ground', 0, 0, width, height)}"
    drawn = svg(width, height, about(report), style + body)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def about(report: Report) -> str:
    return f"Error against depth, {report['candidate']} against stock {report['model']}"


def small(kind: str, said: str, axes: str, mark: str, count: int, d: str, more: str = "") -> str:
    """One of the plots of a single tap: its `count` values are the path `d`."""
    body = f'{axes}{more}<path class="{mark}" data-count="{count}" d="{d}"/>'
    drawn = svg(352, 272, said, body)
    return f'<figure id="{kind}">{drawn}<figcaption>{esc(said)}</figcaption></figure>'


def trace(found: Report, per: str) -> str:
    """Relative L2 over the frames (a line) or the channels (dots) of one tap."""
    values, count = found["relative_l2"], len(found["relative_l2"])
    x, y = Axis(0, max(1, count - 1), 58, 344), log_axis(values, 230, 12)
    finite = [(v, i) for i, v in enumerate(values) if v is not None]
    d = ""
    for v, i in finite:
        joined = per == "frame" and i > 0 and values[i - 1] is not None
        d += f"{'L' if joined else 'M'}{x(i):.1f} {y(v):.1f}{'' if per == 'frame' else 'h0'}"
    most = (
        f"largest {figure(max(finite)[0])} at {per} {max(finite)[1]}" if finite else "none finite"
    )
    lost = f", {count - len(finite):,} not finite" if finite and len(finite) < count else ""
    said = f"Relative L2 of each {per} of {found['tap']}: {most}, of {count:,}{lost}."
    mark = "curve" if per == "frame" else "dots"
    return small(f"{per}s", said, frame(x, y, per, "relative L2"), mark, len(finite), d)


def scatter(found: Report) -> str:
    """The candidate's values against the reference's, with the line where they are equal."""
    both = list(zip(found["reference"], found["candidate"], strict=True))
    finite = [(a, b) for a, b in both if a is not None and b is not None]
    low, high = min(map(min, finite), default=0.0), max(map(max, finite), default=1.0)
    room = (high - low) * 0.04 or 1.0
    x, y = Axis(low - room, high + room, 58, 344), Axis(low - room, high + room, 230, 12)
    said = f"{len(finite):,} values of {found['tap']}, candidate against reference"
    if lost := len(both) - len(finite):
        said += f", {lost:,} more are not finite"
    said += "; on the line both are equal."
    d = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in finite)
    equal = line("axis identity", x.start, y.start, x.end, y.end)
    axes = frame(x, y, "reference", "candidate")
    return small("scatter", said, axes, "dots", len(finite), d, equal)


Cell = tuple[str, float | str, str]  # text, what it sorts by ("" is always last), class


def plain(value: object, kind: str = "") -> Cell:
    return esc(value), "", kind


def number(text: str, x: float | None, kind: str = "") -> Cell:
    """What is not finite sorts as the largest, what is absent as the last."""
    return text, "" if text == "-" else math.inf if x is None else x, kind


def metric(found: Report | None, key: str, bad: bool = False) -> Cell:
    return number(measure(found, key), found[key] if found else None, "bad" if bad else "")


def table(name: str, caption: str, columns: str, rows: list[tuple[str, list[Cell]]]) -> str:
    """A table that the script sorts. `columns`: headings with "|" between them, "=" before those
    of numbers, "*" before the one that names the row. `rows`: (attributes, cells)."""
    titles = columns.split("|")
    heads = body = ""
    for title in titles:
        sort = ' aria-sort="ascending"' if title == "=#" else ""
        kind = ' class="n"' if title[0] == "=" else ""
        button = f'<button type="button" disabled>{esc(title.lstrip("=*"))}</button>'
        heads += f'<th scope="col"{kind}{sort}>{button}</th>'
    for attributes, cells in rows:
        body += f"<tr{attributes}>"
        for title, (text, value, kind) in zip(titles, cells, strict=True):
            tag, scope = ("th", ' scope="row"') if title[0] == "*" else ("td", "")
            by = (
                f' data-v="{"Infinity" if value == math.inf else value}"' if title[0] == "=" else ""
            )
            kinds = " ".join(k for k in ("n" if by else "", kind) if k)
            body += f'<{tag}{scope} class="{kinds}"{by}>{text}</{tag}>'
        body += "</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f'<table id="{name}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def taps_table(report: Report) -> str:
    """One line per tap: the errors, what they are judged by, the verdict."""
    worst = reports.worst(report)
    stage = [kind for kind in ("injected", "own") if any(tap[kind] for tap in report["taps"])]
    columns = ["=#", "*tap", "kind", "=free", *(f"={kind}" for kind in stage), "=floor", "=x floor"]
    columns += ["=limit", "=stage limit", "=max abs", "=SQNR dB", "=edge", "verdict"]
    rows = []
    for i, tap in enumerate(report["taps"]):
        past = reports.past(tap)
        said = "pass" if tap["passed"] else "fail"
        said += ", first" * (tap["name"] == report["first_diverging"])
        error, floor = tap["free"]["relative_l2"], tap["floor"]["relative_l2"]
        name = f'<a href="#point-{i}">{esc(tap["name"])}</a>'
        cells = [number(str(i), i), (name, "", ""), plain(tap["kind"])]
        cells += [metric(tap[k], "relative_l2", k in past) for k in ("free", *stage)]
        cells.append(number(figure(floor), floor))
        ratio = error / floor if error is not None and floor else None
        cells.append(number(reports.over_floor(tap), ratio))
        cells += [number(figure(tap[k]), tap[k]) for k in ("limit", "injected_limit")]
        cells += [metric(tap["free"], k) for k in ("max_abs", "sqnr_db", "edge_relative_l2")]
        cells.append(plain(said, "good" if tap["passed"] else "bad"))
        kind = ' class="worst"' if tap is worst else ""
        rows.append((f' id="tap-{i}" data-tap="{i}"{kind}', cells))
    return table("taps", "Every tap in the order of computation", "|".join(columns), rows)


def measures_table(report: Report, kind: str) -> str:
    """The rest of what is known of each tap's error of this kind."""
    columns = (
        "=#|*tap|=mean abs|=p99.9 abs|=1 - cosine|worst at|=candidate there|=reference there"
        "|=not finite|=candidate mean|=candidate std|=reference mean|=reference std"
    )
    if kind == "free":
        columns += "|=passes from|=suggested rtol|=suggested atol|file|=window"
    rows = []
    for i, tap in enumerate(report["taps"]):
        if (m := tap[kind]) is None:
            continue
        away = None if m["cosine"] is None else max(0.0, 1 - m["cosine"])
        cells = [number(str(i), i), plain(tap["name"])]
        cells += [metric(m, key) for key in ("mean_abs", "p999_abs")]
        cells += [number(figure(away), away), plain(text_of(m["worst_index"]))]
        for key, digits in (("worst_candidate", 8), ("worst_reference", 8), ("nonfinite", 9)):
            cells.append(number("NaN" if m[key] is None else f"{m[key]:.{digits}g}", m[key]))
        for key in ("candidate_mean", "candidate_std", "reference_mean", "reference_std"):
            cells.append(number("NaN" if m[key] is None else f"{m[key]:.5g}", m[key]))
        if kind == "free":
            suggested = tap["suggested_tolerance"]
            for x in (tap["minimum_tolerance"], suggested["rtol"], suggested["atol"]):
                cells.append(number(figure(x), x))
            cells += [plain(tap.get("file", "-")), number(str(tap.get("window", "-")), 0)]
        rows.append(("", cells))
    return table(f"measures-{kind}", f"All measures, {kind}", columns, rows)


def files_table(report: Report) -> str:
    rows = []
    for file in report["files"]:
        numbers = {"windows": "windows", "final": "final_relative_l2", "x limit": "worst_ratio"}
        cells = [
            number(said, file[numbers[title]]) if title in numbers else plain(said)
            for title, said in reports.file_row(file).items()
        ]
        rows.append(("", cells))
    columns = "*file|=windows|verdict|first diverging|=final|worst tap|=x limit"
    return table("files", "Every file", columns, rows)


def tensors_table(report: Report) -> str:
    rows = []
    for tensor in report["inputs"]["tensors"]:
        theirs = tensor["candidate_sha256"]
        kind = "" if theirs in (None, tensor["sha256"]) else "bad"
        cells = [plain(tensor["name"]), plain(text_of(tensor["shape"])), plain(tensor["dtype"])]
        rows.append(("", [*cells, plain(tensor["sha256"]), plain(theirs or "-", kind)]))
    columns = "*tensor|shape|dtype|SHA-256 as float32|the candidate's"
    return table("tensors", "Every tensor of the encoder", columns, rows)


def details(title: str, body: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def pairs(rows: list[tuple[str, str]]) -> str:
    shown = "".join(f"<dt>{esc(k)}</dt><dd>{prose(v)}</dd>" for k, v in rows)
    return f'<dl class="pairs">{shown}</dl>'


def transcript(found: Report) -> str:
    """Both texts and what was measured on them; the windows side by side."""
    said = "".join(
        f"<h3>{esc(side)}</h3><blockquote>{esc(text)}</blockquote>"
        for side, text in reports.texts(found)
    )
    rows = []
    for w in [w for one in reports.of_files(found) for w in one.get("windows", [])]:
        wer = "-" if w["wer"] is None else f"{100 * w['wer']:.3g}"
        cells = [number(f"{w['start']:.1f}", w["start"]), plain(text_of(w["identical"]))]
        cells += [number(wer, w["wer"]), *(plain(w[k], "text") for k in ("reference", "candidate"))]
        rows.append(("", cells))
    columns = "=from s|same tokens|=WER %|reference|candidate"
    windows = table("windows", "Every window's text", columns, rows)
    more = details(f"Every window ({len(rows)})", windows) if rows else ""
    return said + pairs(reports.scalars(found)) + more


def facts(report: Report) -> str:
    """The few figures that one looks for first."""
    rows, worst = [], reports.worst(report)
    if final := report["final"]:
        said = measure(final["free"], "relative_l2")
        rows += [(f"relative L2 at {final['name']}", said, "")]
        rows += [("times PyTorch's float32 noise", reports.over_floor(final), "")]
    if worst:
        where = "nearest to its limit" if worst["passed"] else "furthest past its limit"
        rows += [(where, worst["name"], "name")]
    if report["semantic"] and report["semantic"].get("wer") is not None:
        rows += [
            ("word errors against the reference", f"{100 * report['semantic']['wer']:.3g} %", "")
        ]
    shown = (f'<div><dt>{esc(k)}</dt><dd class="{c}">{esc(v)}</dd></div>' for k, v, c in rows)
    return f'<dl class="facts">{"".join(shown)}</dl>'


def html(report: Report) -> str:
    """The report as one HTML file: verdict, plots, tables, provenance, and its own JSON."""
    report = reports.clean(report)
    text, plots = reports.dumps(report), report["plots"] or {}
    verdict, kind = report["verdict"], "good" if report["verdict"] == "pass" else "bad"
    width, height, drawn = depth(report)
    said = reports.sentence(report).partition(": ")[2]
    local = reports.local_kind(report)
    drawing = svg(width, height, about(report), drawn, "group")
    parts = [
        '<h2>Error against depth</h2><p class="soft">Running freely, a tap inherits the errors '
        "before it; one stage alone shows its own. What is zero lies on the axis. A point leads to "
        "its line in the table.</p>"
        '<figure id="depth"><div class="scroll" '
        f'tabindex="0" role="region" aria-label="Error against depth">{drawing}</div></figure>'
    ]
    shown = [trace(plots[f"{per}s"], per) for per in ("frame", "channel") if f"{per}s" in plots]
    shown += [scatter(plots["scatter"])] if "scatter" in plots else []
    if shown:
        where = "first diverging" if report["first_diverging"] else "worst"
        parts.append(f'<h2>The {where} tap</h2><div class="three">{"".join(shown)}</div>')
    parts.append(
        f'<h2 id="all">Taps</h2><p class="soft">{esc(reports.legend(local))}; edge, the first and '
        'last frames alone.</p><p class="filter" hidden><label for="filter">Filter</label>'
        '<input id="filter" type="search" autocomplete="off" spellcheck="false">'
        f'<output id="shown" for="filter"></output></p>{taps_table(report)}'
    )
    for each in ("free", "injected", "own"):
        if any(tap[each] for tap in report["taps"]):
            parts.append(details(f"All measures, {each}", measures_table(report, each)))
    if len(report["files"]) > 1:
        parts.append(f"<h2>Files</h2>{files_table(report)}")
    heard = reports.semantic_sentence(report) or "The transcript was not compared."
    if report["semantic"] is not None:
        parts.append(f"<h2>Transcript</h2>{transcript(report['semantic'])}")
    parts.append(f"<h2>Inputs and versions</h2>{pairs(reports.provenance(report))}")
    parts.append(details("Every tensor", tensors_table(report)))
    style, data = PLOT_CSS + PAGE_CSS, base64.b64encode(text.encode()).decode()
    policy = (
        f"default-src 'none'; style-src {hash_of(style)}; script-src {hash_of(SCRIPT)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    title = f"{report['candidate']} against {report['model']}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Parity: {verdict}, {esc(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#all">Skip to the table of taps</a>
<header>
<p class="kicker">{esc(title)}</p>
<h1>Parity: <span class="{kind}">{verdict}</span></h1>
<p class="lead">{prose(said[0].upper() + said[1:])}</p>
<p class="soft">{prose(heard[0].upper() + heard[1:])}</p>
{facts(report)}
</header>
<main>
{"".join(parts)}
</main>
<footer>
<h2>Command</h2>
<pre tabindex="0"><code>{esc(report["command"])}</code></pre>
<p><a download="parity.json" href="data:application/json;base64,{data}">This report as JSON</a></p>
</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def hash_of(text: str) -> str:
    """What the page's policy allows to be applied: an inline text by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

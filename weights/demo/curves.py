"""The losses of a training run as a picture for the model card, SVG without a library.

    python -m weights.demo.curves --losses build/demo/run/losses.jsonl --out weights/demo/curves.svg

The losses of `weights.demo.train`, and of `weights.demo.decoder` after it, over their steps,
logarithmic: each row thin, a running mean bold. A step that a resumed run wrote again counts as it
was written last; where the decoder did not learn there is CTC alone, and none where it alone did.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 400  # the whole picture
LEFT, TOP, RIGHT, BOTTOM = 52, 34, 700, 352  # the axes
CURVES = (  # key in a row, name, colour
    ("cross_entropy", "cross-entropy of a token", "#1f5fa8"),
    ("ctc", "CTC of a character", "#b5540a"),
    ("words", "CTC of a word", "#8a3f9e"),
    ("alignment", "alignment of a token", "#3a7d34"),
)
SMOOTH = 9  # rows on either side in the running mean
TICKS = 1, 2, 5

Row = dict[str, Any]  # step, seconds, and the losses, some of them None


def read_losses(path: Path) -> list[Row]:
    """The rows of losses.jsonl in order of their steps, one for each; half a line is no row."""
    rows = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over SMOOTH values on either side; towards the ends over as many as both have."""
    reach = [min(SMOOTH, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def step_ticks(last: int) -> list[int]:
    """Up to eight round numbers from 0 to `last`."""
    size = next(t * 10**power for power in range(12) for t in TICKS if last / (t * 10**power) <= 8)
    return list(range(0, last + 1, size))


def loss_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, from the last at or under `low` to the first from `high` on."""
    all_ticks = [t * 10.0**power for power in range(-9, 9) for t in TICKS]
    first = max(t for t in all_ticks if t <= low)
    last = min(t for t in all_ticks if t >= high and t > first)
    return [t for t in all_ticks if first <= t <= last]


def svg(rows: Sequence[Row]) -> str:
    """The picture. ValueError without rows, or with a loss that is not above zero."""
    values = [v for row in rows for key, *_ in CURVES if (v := row.get(key)) is not None]
    if not values or not all(0 < v < math.inf for v in values):
        raise ValueError("every row needs losses above zero, and there must be one")
    last_step = int(rows[-1]["step"])
    y_ticks = loss_ticks(min(values), max(values))
    low, high = math.log(y_ticks[0]), math.log(y_ticks[-1])

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last_step

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log(loss) - low) / (high - low)

    def line(steps: Sequence[float], values: Sequence[float], colour: str, style: str) -> str:
        points = " ".join(
            f"{x(step):.1f},{y(v):.1f}" for step, v in zip(steps, values, strict=True)
        )
        return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Losses over the steps of the training of demo</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}" stroke="#e2e2e2"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in step_ticks(last_step):
        parts.append(f'<path d="M{x(tick):.1f} {BOTTOM}v5" stroke="#555555"/>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{BOTTOM + 19}" text-anchor="middle">{tick:,}</text>'
        )
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#555555"/>')
    parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 10}" text-anchor="end">step</text>')
    for n, (key, name, colour) in enumerate(CURVES):
        known = [(row["step"], v) for row in rows if (v := row.get(key)) is not None]
        steps, own = [s for s, _ in known], [v for _, v in known]
        parts.append(line(steps, own, colour, 'stroke-width="0.8" stroke-opacity="0.35"'))
        parts.append(line(steps, running_mean(own), colour, 'stroke-width="2"'))
        at = LEFT + 168 * n
        parts.append(f'<path d="M{at} 18h22" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 28}" y="22">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.curves", description=__doc__)
    parser.add_argument("--losses", type=Path, default=Path("build/demo/run/losses.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("weights/demo/curves.svg"))
    args = parser.parse_args(argv)
    try:
        rows = read_losses(args.losses)
        picture = svg(rows)
    except (OSError, ValueError) as error:
        print(f"curves: {args.losses}: {error}", file=sys.stderr)
        return 1
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(picture)
    temporary.replace(args.out)
    print(f"curves: {len(rows)} rows, up to step {rows[-1]['step']}, {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

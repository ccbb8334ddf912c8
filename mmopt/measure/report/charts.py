"""The drawings of a report: HTML with inline SVG, for a page with the style of `markup`.

As in `mmopt.measure.plot`, horizontal positions are percentages, heights are pixels, and every text
that matters is text of the page.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mmopt.measure.plot import BACKEND_COLOURS, breakable, ticks
from mmopt.measure.report.wording import bytes_text, margin_text, share
from mmopt.measure.results import format_seconds
from mmopt.measure.statistics import Interval

# Dash patterns that tell lines of one colour apart.
_DASHES = ("", "7 4", "2 3", "9 3 2 3")

_STRIP = 22  # pixels of a row of `shares`


@dataclass(frozen=True)
class Share:
    """One row of `shares`: a relative change with its interval, 0.03 for 3%.

    Attributes:
        name: plain text.
        word: what became of it; empty where nothing is judged.
        kind: which colour: `bad`, `warn`, `good` or `info`.
        value, interval: None where it was not measured.
        limit: the change that must not pass; None where there is none.
        remarks: plain text below the drawing.
    """

    name: str
    word: str
    kind: str
    value: float | None
    interval: Interval | None
    limit: float | None
    remarks: str


def shares(rows: Sequence[Share], *, faster: str, slower: str) -> str:
    """Rows of relative changes on one scale around zero, with their intervals and limits.

    Args:
        rows: in the order in which they should appear.
        faster, slower: what the left and the right side of the scale mean.
    """
    low, high = _share_scale(rows)
    drawn = "".join(f"<li>{_share_row(row, low, high)}</li>" for row in rows)
    if all(row.value is None for row in rows):
        return f'<ul class="rows">{drawn}</ul>'
    return f'<ul class="rows">{drawn}</ul>{_share_axis(low, high, faster, slower)}'


def _share_scale(rows: Sequence[Share]) -> tuple[float, float]:
    """Both ends of the scale: around zero and the limits, and not far beyond them."""
    limits = [row.limit for row in rows if row.limit is not None]
    ends = [0.0]
    for row in rows:
        ends += [] if row.interval is None else [row.interval.low, row.interval.high]
    if limits:
        # One benchmark that takes twice the time must not hide a slowdown of the others by 3%.
        low = max(min(*ends, -max(limits) / 2), -4 * max(limits))
        high = min(max(*ends, 2 * max(limits)), 6 * max(limits))
    else:
        # At least 5% to each side: else scatter would look like news.
        low, high = min(*ends, -0.05), min(max(*ends, 0.05), 9.0)
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _share_row(row: Share, low: float, high: float) -> str:
    word = f' <span class="verdict">{escape(row.word)}</span>' if row.word else ""
    said = "" if row.value is None else share(row.value)
    head = (
        f'<div class="head"><span class="name">{breakable(row.name)}</span>'
        f'<span class="number">{said}{word}</span></div>'
    )
    remarks = f'<div class="soft small">{escape(row.remarks)}</div>' if row.remarks else ""
    if row.value is None or row.interval is None:
        return f'<div class="v-{row.kind}">{head}{remarks}</div>'

    def at(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    middle = _STRIP / 2
    parts = []
    if row.limit is not None:
        edge = at(row.limit)
        parts += [
            f'<rect class="beyond" x="{edge:.2f}%" y="0" width="{100 - edge:.2f}%" '
            f'height="{_STRIP}"/>',
            f'<line class="limit" x1="{edge:.2f}%" x2="{edge:.2f}%" y1="0" y2="{_STRIP}"/>',
        ]
    zero, left, right = at(0), at(row.interval.low), at(row.interval.high)
    parts += [
        f'<line class="zero" x1="{zero:.2f}%" x2="{zero:.2f}%" y1="0" y2="{_STRIP}"/>',
        f'<rect class="ci" x="{left:.2f}%" y="{middle - 5}" width="{right - left:.2f}%" '
        f'height="10" rx="2"/>',
    ]
    if low <= row.value <= high:
        parts.append(f'<circle class="dot" cx="{at(row.value):.2f}%" cy="{middle}" r="5"/>')
    else:
        side = ("100%", "end", "beyond →") if row.value > high else ("0", "start", "← beyond")
        parts.append(
            f'<text x="{side[0]}" y="{middle + 4}" text-anchor="{side[1]}">{side[2]}</text>'
        )
    spoken = f"{share(row.value)}, 95% interval {share(row.interval.low)} to "
    spoken += share(row.interval.high)
    if row.limit is not None:
        spoken += f", margin {margin_text(row.limit)}"
    return (
        f'<div class="v-{row.kind}">{head}<svg class="plot" height="{_STRIP}" role="img" '
        f'aria-label="{escape(spoken)}">{"".join(parts)}</svg>{remarks}</div>'
    )


def _share_axis(low: float, high: float, faster: str, slower: str) -> str:
    span = high - low
    step = _round_step(span / 8)
    first = math.ceil(low / step)
    marks = []
    for index in range(first, math.floor(high / step) + 1):
        value = index * step
        at = 100 * (value - low) / span
        if 6 < at < 94:
            said = "0" if index == 0 else f"{value * 100:+.3g}%"
            marks.append(f'<text x="{at:.2f}%" y="12" text-anchor="middle">{said}</text>')
    return (
        f'<svg class="plot" height="16" aria-hidden="true">{"".join(marks)}</svg>'
        f'<div class="ends"><span>← {escape(faster)}</span><span>{escape(slower)} →</span></div>'
    )


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is `least` or more."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * part for part in (1.0, 2.0, 5.0, 10.0) if power * part >= least * 0.999)


@dataclass(frozen=True)
class Line:
    """One line of `throughput`: sequences per second, with a 95% interval, by batch."""

    label: str
    backend: str | None
    points: Mapping[int, tuple[float, Interval]]


def throughput(lines: Sequence[Line]) -> str:
    """Sequences per second against the batch, which is drawn to a logarithmic scale."""
    batches = sorted({batch for line in lines for batch in line.points})
    top = max(high.high for line in lines for _, high in line.points.values()) * 1.04
    height = 220

    def across(batch: int) -> float:
        first, last = math.log(batches[0]), math.log(batches[-1])
        return 1 + 98 * (math.log(batch) - first) / (last - first)

    def down(value: float) -> float:
        return height - (height - 8) * value / top

    parts = []
    scale = []
    for tick in ticks(top):
        y = down(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        scale.append(f'<span style="top:{y:.1f}px">{tick:,.6g}</span>')
    for batch in batches:
        parts.append(
            f'<text x="{across(batch):.2f}%" y="{height + 16}" text-anchor="middle">{batch}</text>'
        )
    keys = []
    for line, (colour, dash) in zip(lines, _line_styles(lines), strict=True):
        parts.append(f'<g class="c{colour}">')
        points = [(across(b), *line.points[b]) for b in sorted(line.points)]
        for (x1, y1, _), (x2, y2, _) in itertools.pairwise(points):
            parts.append(
                f'<line class="line" x1="{x1:.2f}%" y1="{down(y1):.1f}" x2="{x2:.2f}%" '
                f'y2="{down(y2):.1f}"{dash}/>'
            )
        for x, y, ends in points:
            parts.append(
                f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{down(ends.low):.1f}" '
                f'y2="{down(ends.high):.1f}"/><circle class="point" cx="{x:.2f}%" '
                f'cy="{down(y):.1f}" r="4"/>'
            )
        parts.append("</g>")
        keys.append(
            f'<li class="c{colour}"><svg class="plot" style="display:inline;width:30px" '
            f'height="10" aria-hidden="true"><line class="line" x1="0" x2="30" y1="5" y2="5"{dash}'
            f"/></svg>{escape(line.label)}</li>"
        )
    spoken = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{line.points[b][0]:,.0f} at batch {b}" for b in sorted(line.points))
        for line in lines
    )
    return (
        f'<ul class="key">{"".join(keys)}</ul><div class="chart">{"".join(scale)}'
        f'<svg class="plot" height="{height + 22}" role="img" '
        f'aria-label="Sequences per second. {escape(spoken)}">{"".join(parts)}</svg></div>'
    )


def _line_styles(lines: Sequence[Line]) -> list[tuple[int, str]]:
    """A colour and a dash pattern for each line: the backend's colour, dashes where it repeats."""
    styles: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        # Lines without a backend go round the colours.
        colour = BACKEND_COLOURS.get(line.backend or "", index % 4)
        before = sum(colour == other for other, _ in styles)
        dash = _DASHES[before % len(_DASHES)]
        styles.append((colour, f' stroke-dasharray="{dash}"' if dash else ""))
    return styles


def bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """Bytes as bars on one scale from zero: rows of label, colour (0 to 3) and bytes."""
    top = max(size for _, _, size in rows) or 1
    return "".join(
        f'<div class="c{colour}"><div class="head"><span class="name">{breakable(label)}</span>'
        f'<span class="number small">{bytes_text(size)}</span></div><div class="track">'
        f'<div style="width:{100 * size / top:.2f}%"></div></div></div>'
        for label, colour, size in rows
    )


def history(name: str, points: Sequence[tuple[str, float, Interval]]) -> str:
    """Medians in order of time, evenly spaced, with their intervals; the scale is their own.

    Args:
        name: plain text.
        points: two or more of date, median and interval in seconds, the oldest first.
    """
    height, edge = 64, 8
    low = min(ends.low for _, _, ends in points)
    high = max(ends.high for _, _, ends in points)
    # At least a tenth from bottom to top: else scatter would look like news.
    spare = max(0.0, 0.1 * (low + high) / 2 - (high - low)) / 2
    low, high = low - spare, high + spare

    def across(index: int) -> float:
        return 3 + 94 * index / (len(points) - 1)

    def down(value: float) -> float:
        return height - edge - (height - 2 * edge) * (value - low) / (high - low)

    parts = []
    places = [(across(i), *point) for i, point in enumerate(points)]
    for (x1, _, y1, _), (x2, _, y2, _) in itertools.pairwise(places):
        parts.append(
            f'<line class="line" x1="{x1:.2f}%" y1="{down(y1):.1f}" x2="{x2:.2f}%" '
            f'y2="{down(y2):.1f}"/>'
        )
    for x, date, y, ends in places:
        said = f"{date}: {format_seconds(y)}, {format_seconds(ends.low)} to "
        said += format_seconds(ends.high)
        parts.append(
            f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{down(ends.low):.1f}" '
            f'y2="{down(ends.high):.1f}"/><circle class="point" cx="{x:.2f}%" '
            f'cy="{down(y):.1f}" r="3.5"><title>{escape(said)}</title></circle>'
        )
    first, last = points[0], points[-1]
    change = share(last[1] / first[1] - 1)
    spoken = ", ".join(f"{date} {format_seconds(y)}" for date, y, _ in points)
    return (
        f'<figure class="c1"><div class="name">{breakable(name)}</div>'
        f'<svg class="plot" height="{height}" role="img" aria-label="{escape(spoken)}">'
        f'<line class="grid" x1="0" x2="100%" y1="{height - 1}" y2="{height - 1}"/>'
        f"{''.join(parts)}</svg>"
        f'<div class="ends"><span>{format_seconds(first[1])} → {format_seconds(last[1])}</span>'
        f"<span>{change}</span></div>"
        f'<div class="ends"><span>{escape(first[0])}</span><span>{escape(last[0])}</span></div>'
        "</figure>"
    )

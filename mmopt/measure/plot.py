"""Latency as one self-contained piece of HTML: inline SVG, no script, nothing fetched.

Horizontal positions are percentages and text is the page's own, so that one drawing fits a phone
and a desk; colours follow the reader's light or dark preference.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from mmopt.measure.results import Measurement, format_seconds, source_labels, unit_of
from mmopt.measure.statistics import Interval, percentile
from mmopt_kernels.errors import InputError

# Pixels: the strip of a row, and how far its median line reaches beyond it.
_STRIP = 18
_REACH = 2
_AXIS = 18

# More dots than this hide one another; those drawn are spread evenly over the sorted samples.
_MOST_DOTS = 150

# Dots are scattered over the strip's height by the golden ratio, which fills any span evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2

BACKEND_COLOURS = {"eager": 0, "compile": 1, "mmopt": 2, "ort": 3}
"""Which of the colours c0 to c3 a backend has in every drawing; any other name has c0."""

# Text of --ink, --soft and --c0 to --c3 on --bg has a contrast of 4.5 or more (WCAG 2.2, 1.4.3).
LIGHT = (
    "--bg:#fff;--ink:#1c2024;--soft:#60646c;--line:#dfe1e6;"
    "--c0:#60646c;--c1:#0b68cb;--c2:#b4450b;--c3:#1a7f4b"
)
DARK = (
    "--bg:#17191c;--ink:#eceef0;--soft:#a3a8b0;--line:#363b41;"
    "--c0:#a3a8b0;--c1:#6cb2ff;--c2:#ff9a5c;--c3:#5cd098"
)

STYLE = f"""
.mmopt-latency{{{LIGHT};background:var(--bg);color:var(--ink);margin:0;padding:16px;
border:1px solid var(--line);border-radius:8px;font:14px/1.4 system-ui,sans-serif}}
@media (prefers-color-scheme:dark){{.mmopt-latency{{{DARK}}}}}
.mmopt-latency h3{{font-size:14px;margin:20px 0 4px;overflow-wrap:anywhere}}
.mmopt-latency h3:first-of-type{{margin-top:0}}
.mmopt-latency .text{{display:flex;justify-content:space-between;align-items:baseline;gap:12px;
font-size:13px;margin-top:6px}}
.mmopt-latency .name{{overflow-wrap:anywhere}}
.mmopt-latency .number{{white-space:nowrap;font-variant-numeric:tabular-nums}}
.mmopt-latency svg{{display:block;width:100%;overflow:visible}}
.mmopt-latency svg text{{fill:var(--soft);font:12px system-ui,sans-serif}}
.mmopt-latency .soft{{color:var(--soft);font-size:12px;margin-right:6px}}
.mmopt-latency .wide{{margin-left:10px}}
.mmopt-latency .wide{{display:none}}
@media (min-width:600px){{.mmopt-latency .wide{{display:inline}}}}
.mmopt-latency .grid{{stroke:var(--line)}}
.mmopt-latency .c0{{--c:var(--c0)}}.mmopt-latency .c1{{--c:var(--c1)}}
.mmopt-latency .c2{{--c:var(--c2)}}.mmopt-latency .c3{{--c:var(--c3)}}
.mmopt-latency .bar{{fill:var(--c);opacity:.2}}
.mmopt-latency .dot{{fill:var(--c);opacity:.5}}
.mmopt-latency .ci{{fill:var(--c)}}
.mmopt-latency .median{{stroke:var(--ink);stroke-width:2}}
.mmopt-latency figcaption{{color:var(--soft);font-size:12px;margin-top:12px}}
"""
"""What `distributions` needs in the page's style sheet."""

HOW_TO_READ = (
    "Line: median. Band: its 95% bootstrap interval. Lower is better. +1, to 9 ms: one sample lies "
    "beyond the scale, at 9 ms."
)


class Timed(Protocol):
    """Samples in seconds, and what follows from them."""

    @property
    def samples(self) -> tuple[float, ...]:
        """Seconds per call."""

    @property
    def median(self) -> float:
        """Of the samples, in seconds."""

    @property
    def interval(self) -> Interval:
        """95% confidence interval of the median, in seconds."""


@dataclass(frozen=True)
class Strip:
    """One row of a panel: a label, what was timed, and a colour (0 to 3)."""

    label: str
    timed: Timed
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """Rows on one scale, below a title."""

    title: str
    strips: Sequence[Strip]


def latency_plot(results: Sequence[Measurement]) -> str:
    """Draw one panel per grid point, one row per source and backend, on a scale from zero.

    A row shows the samples as dots, their median as a line at the end of a bar and as a number,
    and its 95% confidence interval as a band (as numbers too where there is room).

    Args:
        results: in the order in which rows should appear.

    Returns:
        A `<figure>` with its own `<style>`, to be put anywhere in an HTML page.

    Raises:
        InputError: there is nothing to draw.
    """
    if not results:
        raise InputError("latency_plot: there are no measurements, expected at least one.")
    labels = source_labels(results)
    panels: dict[tuple[int, int], list[Strip]] = {}
    for result in results:
        label = result.backend
        if len(labels) > 1:
            label += f" · {labels[result.source]}"
        strip = Strip(label, result, BACKEND_COLOURS.get(result.backend, 0))
        panels.setdefault((result.batch, result.length), []).append(strip)
    caption = (
        "Each dot is one sample: seconds per call, warmed up, variants taking turns in random "
        f"order. {HOW_TO_READ}"
    )
    drawn = distributions(
        [Panel(f"batch {b}, {length} tokens", strips) for (b, length), strips in panels.items()],
        caption,
    )
    return drawn.replace(">", f"><style>{STYLE}</style>", 1)


def distributions(panels: Iterable[Panel], caption: str) -> str:
    """Draw panels of strips below one another, each on a scale of its own that begins at zero.

    Returns:
        A `<figure>` for a page whose style sheet has `STYLE`.
    """
    drawn = "".join(map(_panel, panels))
    return (
        f'<figure class="mmopt-latency">{drawn}<figcaption>{escape(caption)}</figcaption></figure>'
    )


def ticks(end: float) -> list[float]:
    """Three to six round values from zero on, the last at `end` (above 0) or below it."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0, 5.0) if end / (power * part) < 6)
    return [step * index for index in range(math.floor(end / step) + 1)]


def breakable(name: str) -> str:
    """A name as HTML that may be broken where its parts meet, rather than anywhere."""
    return re.sub(r"(?<=[/_.:-])(?=\w)|(?<=\w)(?=\[)", "<wbr/>", escape(name))


def _panel(panel: Panel) -> str:
    end = _scale_end(panel.strips)
    marks = [(tick, _percent(tick, end)) for tick in ticks(end)]
    grid = "".join(
        f'<line class="grid" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{_STRIP + 2 * _REACH}"/>'
        for _, at in marks
    )
    rows = "".join(_row(strip, end, grid) for strip in panel.strips)
    return f"<h3>{escape(panel.title)}</h3>{rows}{_axis(marks, end)}"


def _row(strip: Strip, end: float, grid: str) -> str:
    timed = strip.timed
    ends = f"{format_seconds(timed.interval.low)} to {format_seconds(timed.interval.high)}"
    spoken = f"{strip.label} median {format_seconds(timed.median)}, 95% interval {ends}"
    low, high = (_percent(value, end) for value in (timed.interval.low, timed.interval.high))
    median = _percent(timed.median, end)
    bottom = _STRIP + 2 * _REACH
    middle = bottom / 2
    within = sorted(sample for sample in timed.samples if sample <= end)
    step = max(1, math.ceil(len(within) / _MOST_DOTS))
    beyond = len(timed.samples) - len(within)
    more = f"+{beyond}, to {format_seconds(max(timed.samples))} → " if beyond else ""
    parts = [
        f'<div class="text"><span class="name">{breakable(strip.label)}</span><span class="number">'
        f'<span class="soft">{more}<span class="wide">{ends} </span></span>'
        f"{format_seconds(timed.median)}</span></div>"
        f'<svg class="c{strip.colour}" height="{bottom}" role="img" aria-label="{escape(spoken)}">',
        grid,
        f'<rect class="bar" x="0" y="{_REACH}" width="{median:.2f}%" height="{_STRIP}"/>',
        f'<rect class="ci" x="{low:.2f}%" y="{middle - 3}" width="{high - low:.2f}%" height="6">'
        f"<title>95% interval {ends}</title></rect>",
    ]
    for index, sample in enumerate(within[::step]):
        height = _REACH + 3 + (index * _GOLDEN % 1) * (_STRIP - 6)
        at = _percent(sample, end)
        parts.append(f'<circle class="dot" cx="{at:.2f}%" cy="{height:.1f}" r="2"/>')
    parts.append(
        f'<line class="median" x1="{median:.2f}%" x2="{median:.2f}%" y1="0" y2="{bottom}"/>'
    )
    return "".join([*parts, "</svg>"])


def _axis(marks: Sequence[tuple[float, float]], end: float) -> str:
    unit, scale = unit_of(end)
    parts = []
    for tick, at in marks:
        # The outer labels stay inside the drawing.
        anchor = "start" if at < 8 else "end" if at > 92 else "middle"
        parts.append(
            f'<text x="{at:.2f}%" y="13" text-anchor="{anchor}">'
            f"{tick / scale:g}{f' {unit}' if tick else ''}</text>"
        )
    return f'<svg height="{_AXIS}" aria-hidden="true">{"".join(parts)}</svg>'


def _scale_end(strips: Sequence[Strip]) -> float:
    """Seconds at the right edge: every median and interval, and 95% of each row's samples.

    Of a row whose samples scatter far, those up to twice its median: where the machine was busy, a
    few long ones would leave no room for the difference between rows.
    """
    ends = []
    for timed in (strip.timed for strip in strips):
        usual = min(percentile(timed.samples, 95), 2 * timed.median)
        ends.append(max(timed.interval.high, usual))
    return max(ends) * 1.04


def _percent(seconds: float, end: float) -> float:
    return 100 * seconds / end

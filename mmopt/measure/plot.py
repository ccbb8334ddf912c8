"""Latency as one self-contained piece of HTML: inline SVG, no script, nothing fetched.

Horizontal positions are percentages and text keeps its size, so that one drawing fits a phone
and a desk; colours follow the reader's light or dark preference.
"""

import math
from collections.abc import Sequence
from html import escape

from mmopt.measure.results import (
    Measurement,
    format_interval,
    format_seconds,
    source_labels,
    unit_of,
)
from mmopt.measure.statistics import percentile
from mmopt_kernels.errors import InputError

# Pixels: a row is its text line above its strip; the axis line closes a panel.
_TEXT_LINE = 20
_STRIP = 20
_GAP = 10
_AXIS = 22

# More dots than this hide one another; those drawn are spread evenly over the sorted samples.
_MOST_DOTS = 150

# Characters of a label that fit beside the median on a phone 360 pixels wide.
_LONGEST_LABEL = 34

# Dots are scattered over the strip's height by the golden ratio, which fills any span evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2

_COLOURS = {"eager": 0, "compile": 1, "mmopt": 2, "ort": 3}

_STYLE = """<style>
.mmopt-latency{--bg:#fff;--ink:#1c2024;--soft:#60646c;--line:#d9dbe0;
--c0:#60646c;--c1:#0b68cb;--c2:#b4450b;--c3:#1a7f4b;
background:var(--bg);color:var(--ink);margin:0;padding:16px;border:1px solid var(--line);
border-radius:8px;font:14px/1.4 system-ui,sans-serif}
@media (prefers-color-scheme:dark){.mmopt-latency{--bg:#17191c;--ink:#eceef0;--soft:#a3a8b0;
--line:#3a3f45;--c0:#a3a8b0;--c1:#6cb2ff;--c2:#ff9a5c;--c3:#5cd098}}
.mmopt-latency h3{font-size:14px;margin:16px 0 4px}
.mmopt-latency h3:first-of-type{margin-top:0}
.mmopt-latency svg{display:block;width:100%;overflow:visible}
.mmopt-latency text{fill:var(--ink);font:13px system-ui,sans-serif}
.mmopt-latency .soft{fill:var(--soft);font-size:12px}
.mmopt-latency .wide{display:none}
@media (min-width:600px){.mmopt-latency .wide{display:inline}}
.mmopt-latency .grid{stroke:var(--line)}
.mmopt-latency .c0{--c:var(--c0)}.mmopt-latency .c1{--c:var(--c1)}
.mmopt-latency .c2{--c:var(--c2)}.mmopt-latency .c3{--c:var(--c3)}
.mmopt-latency .bar{fill:var(--c);opacity:.22}
.mmopt-latency .dot{fill:var(--c);opacity:.55}
.mmopt-latency .ci{fill:var(--c)}
.mmopt-latency .median{stroke:var(--ink);stroke-width:2}
.mmopt-latency figcaption{color:var(--soft);font-size:12px;margin-top:12px}
</style>"""


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
    panels: dict[tuple[int, int], list[Measurement]] = {}
    for result in results:
        panels.setdefault((result.batch, result.length), []).append(result)
    drawn = [_panel(batch, length, rows, labels) for (batch, length), rows in panels.items()]
    caption = (
        "Each dot is one sample: seconds per call, warmed up, variants taking turns in random "
        "order. Line: median. Band: its 95% bootstrap interval. Lower is better. +1, to 9 ms: one "
        "sample lies beyond the scale, at 9 ms."
    )
    return (
        f'<figure class="mmopt-latency">{_STYLE}{"".join(drawn)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _panel(batch: int, length: int, rows: Sequence[Measurement], labels: dict[str, str]) -> str:
    end = _scale_end(rows)
    row_height = _TEXT_LINE + _STRIP + _GAP
    bottom = len(rows) * row_height
    spoken = "; ".join(
        f"{_label(row, labels)} median {format_seconds(row.median)}, 95% interval "
        f"{format_interval(row)}"
        for row in rows
    )
    strips = "".join(
        _row(row, _label(row, labels), index * row_height, end) for index, row in enumerate(rows)
    )
    return (
        f"<h3>batch {batch}, {length} tokens</h3>"
        f'<svg height="{bottom + _AXIS}" role="img" aria-label="{escape(spoken)}">'
        f"{_axis(end, bottom)}{strips}</svg>"
    )


def _row(row: Measurement, label: str, top: int, end: float) -> str:
    strip = top + _TEXT_LINE
    middle = strip + _STRIP / 2
    low, high = (_percent(value, end) for value in (row.interval.low, row.interval.high))
    median = _percent(row.median, end)
    parts = [
        f'<g class="c{_COLOURS.get(row.backend, 0)}">',
        f'<text x="0" y="{top + 14}"><title>{escape(label)}</title>',
        f"{escape(_shorten(label))}</text>",
        f'<text x="100%" y="{top + 14}" text-anchor="end"><tspan class="soft wide">'
        f"{format_interval(row)} </tspan>{format_seconds(row.median)}</text>",
        f'<rect class="bar" x="0" y="{strip}" width="{median:.2f}%" height="{_STRIP}"/>',
        f'<rect class="ci" x="{low:.2f}%" y="{middle - 3}" width="{high - low:.2f}%" height="6">'
        f"<title>95% interval {format_interval(row)}</title></rect>",
    ]
    within = sorted(sample for sample in row.samples if sample <= end)
    step = max(1, math.ceil(len(within) / _MOST_DOTS))
    for index, sample in enumerate(within[::step]):
        height = strip + 3 + (index * _GOLDEN % 1) * (_STRIP - 6)
        at = _percent(sample, end)
        parts.append(f'<circle class="dot" cx="{at:.2f}%" cy="{height:.1f}" r="2"/>')
    parts.append(
        f'<line class="median" x1="{median:.2f}%" x2="{median:.2f}%" y1="{strip - 2}" '
        f'y2="{strip + _STRIP + 2}"/>'
    )
    if beyond := len(row.samples) - len(within):
        # Inside the bar, where no dots are: a row that reaches beyond the scale has a long one.
        parts.append(
            f'<text class="soft" x="6" y="{middle + 4}">+{beyond}, to '
            f"{format_seconds(max(row.samples))}</text>"
        )
    return "".join([*parts, "</g>"])


def _axis(end: float, bottom: int) -> str:
    unit, scale = unit_of(end)
    parts = []
    for tick in _ticks(end):
        at = _percent(tick, end)
        # The outer labels stay inside the drawing.
        anchor = "start" if at < 8 else "end" if at > 92 else "middle"
        parts.append(
            f'<line class="grid" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{bottom}"/>'
            f'<text class="soft" x="{at:.2f}%" y="{bottom + 15}" text-anchor="{anchor}">'
            f"{tick / scale:g}{f' {unit}' if tick else ''}</text>"
        )
    return "".join(parts)


def _scale_end(rows: Sequence[Measurement]) -> float:
    """Seconds at the right edge: every median and interval, and 95% of each row's samples."""
    return max(max(row.interval.high, percentile(row.samples, 95)) for row in rows) * 1.04


def _ticks(end: float) -> list[float]:
    """Three to six round values from zero on."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0, 5.0) if end / (power * part) < 6)
    return [step * index for index in range(math.floor(end / step) + 1)]


def _percent(seconds: float, end: float) -> float:
    return 100 * seconds / end


def _label(row: Measurement, labels: dict[str, str]) -> str:
    return f"{row.backend} · {labels[row.source]}" if len(labels) > 1 else row.backend


def _shorten(label: str) -> str:
    """Keep the end, where paths and versions differ."""
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"

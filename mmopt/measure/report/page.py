"""The report as one HTML page."""

import itertools
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from mmopt.measure.fingerprint import differing_fields
from mmopt.measure.plot import BACKEND_COLOURS, HOW_TO_READ, Panel, Strip, distributions
from mmopt.measure.report.charts import Line, Share, bars, history, shares, throughput
from mmopt.measure.report.markup import (
    contents,
    definitions,
    details,
    page,
    paragraph,
    prose,
    section,
    table,
)
from mmopt.measure.report.wording import (
    HOW_NAMED,
    MEMORY,
    NO_FINGERPRINT,
    Machine,
    by_machine,
    change_text,
    compact_names,
    contest_facts,
    counts_text,
    fields_of,
    figure_text,
    label_of,
    machine_line,
    margin_text,
    plural,
    revision_text,
    self_test_lines,
    short_names,
    worst_first,
)
from mmopt.measure.results import format_seconds
from mmopt.measure.statistics import Interval
from mmopt.measure.stored import Series, StoredResult

KINDS = {
    "REGRESSED": "bad",
    "MISSING": "bad",
    "FAILED": "bad",
    "INCONCLUSIVE": "warn",
    "IMPROVED": "good",
    "PASSED": "good",
    "NEW": "info",
}
"""The colour of each verdict; its word always stands beside it."""

# Passed benchmarks are folded away beyond this many.
_SHOWN_AT_ONCE = 12


def html_report(results: Sequence[StoredResult]) -> str:
    """The page: what gates decided, what was measured, how it changed, and on what machine."""
    gates = [result for result in results if result.gate is not None]
    machines = by_machine(results)
    timed = [machine for machine in machines if machine.timed]
    sections: list[tuple[str, str, str]] = []
    for index, result in enumerate(gates):
        title = "Gate" if len(gates) == 1 else f"Gate: {result.path.name}"
        sections.append((f"gate{index or ''}", title, _gate(result.gate or {})))
    for index, machine in enumerate(timed):
        prefix = f"Machine {machines.index(machine) + 1}: " if len(machines) > 1 else ""
        for name, title, body in _measured(machine):
            sections.append((f"{name}{index or ''}", f"{prefix}{title}", body))
    title = "Machine and conditions" if len(machines) == 1 else "Machines and conditions"
    sections.append(("machines", title, _machines(machines)))
    parts = [
        f"<header><h1>{'Benchmark gate' if gates and not timed else 'Benchmarks'}</h1>",
        paragraph(_subtitle(results, machines), "soft"),
        contents([(name, title) for name, title, _ in sections]),
        _warned(results),
        "</header>\n",
        *itertools.starmap(section, sections),
    ]
    verdicts = ", ".join((result.gate or {})["verdict"] for result in gates)
    return page(f"{verdicts}: benchmark gate" if gates else "Benchmarks", "".join(parts))


def _warned(results: Sequence[StoredResult]) -> str:
    """Above all numbers, that there is reason to doubt some."""
    warned = sum(bool(result.warnings) for result in results)
    if not warned:
        return ""
    said = (
        "The machine" if len(results) == 1 else f"In {warned} of {len(results)} files the machine"
    )
    return (
        f'<p class="note">{said} gave cause to doubt the times: see <a href="#machines">its '
        "conditions</a>.</p>"
    )


def _subtitle(results: Sequence[StoredResult], machines: Sequence[Machine]) -> str:
    days = sorted({result.when.date().isoformat() for result in results})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    said = f"{span} · {plural(len(results), 'file')} · "
    if len(machines) == 1:
        return said + machine_line(machines[0].fingerprint)
    return said + f"{len(machines)} machines or sets of versions, between which nothing is compared"


def _gate(gate: dict[str, Any] | Any) -> str:
    kind = KINDS[gate["verdict"]]
    shown = f"{revision_text(gate['base'])} → {revision_text(gate['head'])}"
    how = f"Margin {margin_text(gate['margin'])}; at most {margin_text(gate['alpha'])} of suites "
    how += f"without a slowdown may be called REGRESSED; took {gate['seconds']:.0f} s."
    parts = [
        f'<div class="lead v-{kind}">{paragraph(gate["verdict"], "word")}',
        paragraph(f"{shown} · {counts_text(gate)}"),
        paragraph(how, "soft small"),
        "</div>",
        *(prose(note, "note") for note in gate["notes"]),
    ]
    if gate["benchmarks"]:
        parts += ["<h3>Time per call, head against base</h3>", _contests(gate)]
    if gate["figures"]:
        parts += ["<h3>Exact figures</h3>", _figures(gate)]
    parts.append("<h3>How far to believe it</h3>")
    parts += [prose(line) for line in self_test_lines(gate)]
    return "".join(parts)


def _contests(gate: dict[str, Any]) -> str:
    entries = worst_first(gate["benchmarks"])
    told = [_share(entry) for entry in entries if entry["verdict"] != "PASSED"]
    passed = [_share(entry) for entry in entries if entry["verdict"] == "PASSED"]
    words = {"faster": "faster", "slower": "slower"}
    parts = []
    if len(entries) <= _SHOWN_AT_ONCE:
        parts.append(shares(told + passed, **words))
    else:
        parts += [shares(told, **words)] if told else []
        parts.append(details(f"{len(passed)} passed", shares(passed, **words), opened=not told))
    parts.append(
        paragraph(
            "Dot: how much longer head takes than base, the trimmed mean over pairs of fresh "
            "processes. Band: its 95% interval, as if the gate had looked once. Dashed line: the "
            "margin.",
            "soft small",
        )
    )
    return "".join(parts)


def _share(entry: dict[str, Any] | Any) -> Share:
    ends = entry.get("interval")
    measured = entry.get("slowdown") is not None
    return Share(
        name=entry["name"],
        word=entry["verdict"],
        kind=KINDS[entry["verdict"]],
        value=entry.get("slowdown"),
        interval=None if ends is None else Interval(*ends),
        limit=entry["margin"],
        # The first fact is the number above them.
        remarks=" · ".join(contest_facts(entry)[measured:]),
    )


def _figures(gate: dict[str, Any]) -> str:
    header = ("figure", "verdict", "change", "base", "head")
    rows = []
    for entry in worst_first(gate["figures"]):
        base, head, unit = entry.get("base"), entry.get("head"), entry["unit"]
        row = (entry["name"], entry["verdict"], change_text(base, head))
        rows.append((*row, figure_text(base, unit), figure_text(head, unit)))
    told = [row for row in rows if row[1] != "PASSED"]
    same = [row for row in rows if row[1] == "PASSED"]
    parts = [table("Exact figures that changed", header, told)] if told else []
    if same:
        held = table("Exact figures that hold", header, same)
        parts.append(details(f"{len(same)} as before", held, opened=not told and len(same) <= 12))
    return "".join(parts)


def _measured(machine: Machine) -> list[tuple[str, str, str]]:
    """The sections (name, title, HTML) of one machine's benchmarks."""
    drawn = [
        ("latency", "Latency", _per_file(machine.newest(), _latency)),
        (
            "throughput",
            "Throughput against batch",
            _per_file(machine.newest(lambda one: one.batch is not None), _throughput),
        ),
        ("memory", "Memory", _per_file(machine.newest(lambda one: bool(one.memory)), _memory)),
        ("figures", "Exact figures", _recorded(machine)),
        ("history", "History", _history(machine)),
    ]
    return [one for one in drawn if one[2]]


def _per_file(
    newest: Sequence[tuple[StoredResult, tuple[Series, ...]]],
    draw: Callable[[Sequence[Series]], str],
) -> str:
    parts = [(result, draw(series)) for result, series in newest]
    return "".join(
        (paragraph(_file(result), "soft small") if len(newest) > 1 else "") + drawn
        for result, drawn in parts
        if drawn
    )


def _latency(series: Sequence[Series]) -> str:
    several = len({one.source for one in series}) > 1
    panels: dict[str, list[Strip]] = {}
    for one in series:
        title = one.group or one.name.partition("[")[0]
        colour = BACKEND_COLOURS.get(one.backend or "", 1 if one.backend is None else 0)
        panels.setdefault(title, []).append(Strip(label_of(one, several), one, colour))
    titles = short_names(panels)
    caption = f"Each dot is one sample, in seconds per call. {HOW_TO_READ}"
    if not all(one.steady for one in series):
        caption += " Some warm-ups had not settled: see the numbers."
    drawn = distributions(
        [Panel(titles[title], strips) for title, strips in panels.items()], caption
    )
    explained = paragraph(HOW_NAMED, "soft small") if any(one.backend for one in series) else ""
    return drawn + details("All numbers", _numbers(series) + explained)


def _numbers(series: Sequence[Series]) -> str:
    """A table of what is known of each benchmark; columns that no benchmark fills are left out."""
    names = compact_names(series)
    columns = {
        "benchmark": [
            name + ("" if one.steady else " (not settled)")
            for one, name in zip(series, names, strict=True)
        ],
        "median": [format_seconds(one.median) for one in series],
        "95% interval": [
            f"{format_seconds(one.interval.low)} to {format_seconds(one.interval.high)}"
            for one in series
        ],
        "p95": [format_seconds(one.percentile(95)) for one in series],
        "p99": [format_seconds(one.percentile(99)) for one in series],
        "seq/s": [_plain(one.throughput) for one in series],
        "first call": [format_seconds(one.first_call) for one in series],
        "instructions": [_plain(one.instructions) for one in series],
        "samples": [
            f"{len(one.samples):,}" + (f" of {one.calls:,} calls" if one.calls > 1 else "")
            for one in series
        ],
    }
    filled = {title: cells for title, cells in columns.items() if set(cells) != {"-"}}
    return table("All numbers", list(filled), list(zip(*filled.values(), strict=True)))


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _throughput(series: Sequence[Series]) -> str:
    """One drawing per length: a line for each variant that was measured at several batches."""
    several = len({one.source for one in series}) > 1
    charts: dict[int | None, dict[str, dict[int, Series]]] = {}
    for one in series:
        if one.batch is not None:
            by_variant = charts.setdefault(one.length, {})
            by_variant.setdefault(one.variant, {})[one.batch] = one
    parts = []
    for length, by_variant in charts.items():
        lines = []
        for variant, points in by_variant.items():
            if len(points) < 2:
                continue
            one = next(iter(points.values()))
            label = variant.partition("::")[2] or variant
            if one.backend is not None:
                label = label_of(one, several)
            # The interval of the median, turned into throughput: its ends change places.
            ends = {
                batch: (
                    batch / point.median,
                    Interval(batch / point.interval.high, batch / point.interval.low),
                )
                for batch, point in points.items()
            }
            lines.append(Line(label, one.backend, ends))
        if lines:
            parts.append(f"<h3>{'' if length is None else f'{length} tokens'}</h3>")
            parts.append(throughput(lines))
    if parts:
        parts.append(
            paragraph(
                "Sequences per second at the median, against sequences per call (logarithmic). "
                "Higher is better.",
                "soft small",
            )
        )
    return "".join(parts).replace("<h3></h3>", "")


def _memory(series: Sequence[Series]) -> str:
    kinds: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    several = len({one.source for one in series}) > 1
    for one in series:
        colour = BACKEND_COLOURS.get(one.backend or "", 1 if one.backend is None else 0)
        for kind, size in one.memory.items():
            where = "" if one.backend is None else f" · {one.group}"
            rows = kinds.setdefault((MEMORY.get(kind, kind), where), [])
            rows.append((label_of(one, several), colour, size))
    return "".join(
        f"<h3>{escape(kind + where)}</h3>{bars(rows)}" for (kind, where), rows in kinds.items()
    )


def _recorded(machine: Machine) -> str:
    """The exact figures of the newest file that has some."""
    result = next((one for one in reversed(machine.timed) if one.figures), None)
    if result is None:
        return ""
    names = short_names(result.figures)
    rows = [
        (names[name], figure_text(figure["value"], figure["unit"]))
        for name, figure in result.figures.items()
    ]
    where = paragraph(_file(result), "soft small") if len(machine.timed) > 1 else ""
    return where + table("Exact figures", ("figure", "value"), rows)


def _history(machine: Machine) -> str:
    tracks: dict[str, list[tuple[str, float, Interval]]] = {}
    for result in machine.timed:
        for one in result.series:
            point = (_moment(result), one.median, one.interval)
            tracks.setdefault(one.name, []).append(point)
    tracks = {name: points for name, points in tracks.items() if len(points) > 1}
    if not tracks:
        return ""
    newest = {one.name: one for result in machine.timed for one in result.series}
    names = compact_names([newest[name] for name in tracks])
    drawn = "".join(
        history(name, points) for name, points in zip(names, tracks.values(), strict=True)
    )
    return f'<div class="many">{drawn}</div>' + paragraph(
        "Median seconds per call of each file on this machine with these versions, in order "
        "of time and evenly spaced. Whiskers: 95% interval within one run; between runs a "
        "process has a speed of its own, and a few percent may be nothing. The scales do not "
        "begin at zero.",
        "soft small",
    )


def _file(result: StoredResult) -> str:
    return f"{result.path.name} · {_moment(result)}"


def _moment(result: StoredResult) -> str:
    return result.when.strftime("%Y-%m-%d %H:%M")


def _machines(machines: Sequence[Machine]) -> str:
    parts = []
    for index, machine in enumerate(machines, start=1):
        title = machine_line(machine.fingerprint)
        parts.append(paragraph(title) if len(machines) == 1 else f"<h3>Machine {index}</h3>")
        if len(machines) > 1:
            parts.append(paragraph(title))
            if differs := _against_first(machines, machine):
                parts.append(paragraph(differs, "soft small"))
        for result in machine.results:
            for warning in result.warnings:
                parts.append(paragraph(f"Warning, {result.path.name}: {warning}", "note"))
        if machine.fingerprint is None:
            parts.append(prose(NO_FINGERPRINT, "soft"))
        else:
            parts.append(
                details("All of the fingerprint", definitions(fields_of(machine.fingerprint)))
            )
        for result in machine.results:
            what = f"{result.path.name} · {result.kind} · {_moment(result)}"
            if result.conditions is not None:
                shown = definitions(fields_of(result.conditions))
                parts.append(details(f"Conditions of {what}", shown))
            else:
                parts.append(paragraph(f"{what} · conditions were not recorded", "soft small"))
    return "".join(parts)


def _against_first(machines: Sequence[Machine], machine: Machine) -> str:
    first = machines[0].fingerprint
    if machine is machines[0] or first is None or machine.fingerprint is None:
        return ""
    fields = differing_fields(first, machine.fingerprint)
    return f"Differs from machine 1 in {', '.join(fields)}.".replace("_", " ")

"""The report as Markdown for a pull request: the verdict first, what did not pass, the rest folded.

A comment on GitHub holds 65,536 characters; what does not fit is counted, not cut in the middle.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.measure.report.wording import (
    NO_FINGERPRINT,
    by_machine,
    bytes_text,
    change_text,
    counts_text,
    figure_text,
    interval_text,
    machine_line,
    margin_text,
    plural,
    revision_text,
    seconds_text,
    self_test_lines,
    share,
    worst_first,
)
from mmopt.measure.results import format_seconds
from mmopt.measure.stored import StoredResult

MOST_BYTES = 60_000
"""Of the whole summary in UTF-8: below GitHub's limit, however it is counted."""

# Of one name or note: a name of a page's length would leave no room for others.
_MOST_CHARACTERS = 300

# Of all bytes: what the machines may take at the end, and what tables leave to notes before that.
_RESERVED = 8_000

_ROWS = {
    "benchmarks": ("benchmark", "verdict", "slower by", "95% interval", "margin", "time", "note"),
    "figures": ("exact figure", "verdict", "base", "head", "change"),
}


def markdown_report(results: Sequence[StoredResult]) -> str:
    """The summary, at most `MOST_BYTES` long."""
    gates = [result for result in results if result.gate is not None]
    timed = [result for result in results if result.gate is None]
    writer = _Writer(MOST_BYTES - _RESERVED)
    # Every verdict comes before the first table, which may leave no room.
    for result in gates:
        _head(writer, result.gate or {}, result.path.name if len(gates) > 1 else "")
    for result in gates:
        _gate(writer, result.gate or {}, result.path.name if len(gates) > 1 else "")
    if timed and not gates:
        writer.add("## Benchmarks\n\n")
    for result in timed:
        _measured(writer, result)
    foot = _Writer(_RESERVED)
    _machines(foot, results)
    return writer.text + foot.text


class _Writer:
    """Text that stays below a number of bytes."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str, leave: int = 0) -> bool:
        """Add all of `text` if `leave` bytes are free after it, else nothing; says which."""
        size = len(text.encode())
        if size > self._left - leave:
            return False
        self._left -= size
        self._parts.append(text)
        return True

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        summary: str,
        leave: int = 0,
    ) -> None:
        """Add a table with as many rows as fit, folded below `summary` where there is one."""
        opening = f"<details><summary>{summary}</summary>\n\n" if summary else ""
        closing = "\n</details>\n\n" if summary else "\n"
        # What stands below the last row must fit as well.
        leave += len(closing) + 100
        columns = "|" + "|".join(header) + "|\n" + "|" + " --- |" * len(header) + "\n"
        if not self.add(opening + columns, leave):
            return
        written = 0
        for row in rows:
            if not self.add("|" + "|".join(row) + "|\n", leave):
                break
            written += 1
        if written < len(rows):
            self.add(f"\n{len(rows) - written} more did not fit here; the JSON file has them.\n")
        self.add(closing)


def _head(writer: _Writer, gate: Mapping[str, Any], name: str) -> None:
    base, head = _code(revision_text(gate["base"])), _code(revision_text(gate["head"]))
    writer.add(f"## {gate['verdict']}{f' in {_code(name)}' if name else ''}\n\n")
    writer.add(
        f"{_plain(counts_text(gate))}\n\n"
        f"{base} → {head} · margin {margin_text(gate['margin'])} · {gate['seconds']:.0f} s\n\n"
    )


def _gate(writer: _Writer, gate: Mapping[str, Any], name: str) -> None:
    if name:
        writer.add(f"### {_code(name)}\n\n")
    rows = {
        "benchmarks": list(map(_contest, worst_first(gate["benchmarks"]))),
        "figures": list(map(_figure, worst_first(gate["figures"]))),
    }
    for key, entries in rows.items():
        if told := [row for row in entries if row[1] != "PASSED"]:
            writer.table(*_filled(_ROWS[key], told), "", leave=_RESERVED)
    for note in gate["notes"]:
        writer.add(f"> {_plain(note)}\n\n", leave=_RESERVED // 2)
    for line in self_test_lines(gate):
        writer.add(f"{_plain(line)}\n\n")
    for key, entries in rows.items():
        if same := [row for row in entries if row[1] == "PASSED"]:
            what = plural(len(same), "benchmark" if key == "benchmarks" else "exact figure")
            writer.table(*_filled(_ROWS[key], same), f"{what} passed")


def _contest(entry: Mapping[str, Any]) -> list[str]:
    return [
        _code(entry["name"]),
        entry["verdict"],
        share(entry.get("slowdown")),
        interval_text(entry.get("interval")),
        margin_text(entry["margin"]),
        seconds_text(entry),
        _plain(entry.get("note") or "-"),
    ]


def _figure(entry: Mapping[str, Any]) -> list[str]:
    base, head, unit = entry.get("base"), entry.get("head"), entry["unit"]
    return [
        _code(entry["name"]),
        entry["verdict"],
        _plain(figure_text(base, unit)),
        _plain(figure_text(head, unit)),
        change_text(base, head),
    ]


def _measured(writer: _Writer, result: StoredResult) -> None:
    header = ("benchmark", "median", "95% interval", "p95", "seq/s", "peak memory")
    rows = [
        [
            _code(one.name),
            format_seconds(one.median),
            f"{format_seconds(one.interval.low)} to {format_seconds(one.interval.high)}",
            format_seconds(one.percentile(95)),
            "-" if one.throughput is None else f"{one.throughput:,.0f}",
            "-" if one.peak_bytes is None else bytes_text(one.peak_bytes),
        ]
        for one in result.series
    ]
    day = result.when.date().isoformat()
    what = f"{_html(result.path.name)}: {plural(len(rows), 'benchmark')} of {result.kind}, {day}"
    writer.table(*_filled(header, rows), what)
    if result.figures:
        figures = [
            [_code(name), _plain(figure_text(figure["value"], figure["unit"]))]
            for name, figure in result.figures.items()
        ]
        what = f"{_html(result.path.name)}: {plural(len(figures), 'exact figure')}"
        writer.table(("exact figure", "value"), figures, what)


def _machines(writer: _Writer, results: Sequence[StoredResult]) -> None:
    machines = by_machine(results)
    for index, machine in enumerate(machines, start=1):
        name = f"Machine {index}" if len(machines) > 1 else "Machine"
        said = _plain(machine_line(machine.fingerprint))
        if machine.fingerprint is None:
            said += f". {_plain(NO_FINGERPRINT)}"
        writer.add(f"{name}: {said}\n\n")
        for result in machine.results:
            for warning in result.warnings:
                writer.add(f"> Warning, {_code(result.path.name)}: {_plain(warning)}\n\n")
    if len(machines) > 1:
        writer.add("Nothing is compared between machines or versions.\n\n")


def _filled(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The columns in which a row has something."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _code(text: str) -> str:
    """Text from outside as code, within a table's cell as well.

    Nothing is markup in a code span but the backtick that ends it, and the pipe that ends a cell; a
    backslash before a pipe cannot be written there at all. Text with one of these is HTML instead,
    with every mark of punctuation as an entity.
    """
    text = _one_line(text)
    if not re.search(r"[`|\\]", text):
        return f"`{text}`"
    return f"<code>{_entities(text)}</code>"


def _plain(text: str) -> str:
    """Text from outside as text: no markup, no mention of a person or an issue."""
    parts = _one_line(text).split("`")
    if len(parts) % 2 == 0:  # a backtick without its pair is a character
        parts = ["`".join(parts)]
    return "".join(
        _code(part) if index % 2 and part.strip() else _text(part)
        for index, part in enumerate(parts)
    )


def _text(text: str) -> str:
    """Characters that can be markup as entities; the rest stays readable in the source.

    GitHub finds mentions after it has read the entities: a space of no width keeps it from that.
    """
    quiet = re.sub(r"[@#]", "\\g<0>\u200b", text)
    return re.sub(r"[`*_\[\]<>&|\\~$!]", _entity, quiet)


def _entities(text: str) -> str:
    return re.sub(r"[^\w\s./:=-]|_", _entity, text, flags=re.ASCII)


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def _html(text: str) -> str:
    return _entities(_one_line(text))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _MOST_CHARACTERS:
        return line
    half = _MOST_CHARACTERS // 2
    return f"{line[:half]}…{line[-half:]}"

"""What every form of the report says, in one place: numbers, names, verdicts and machines."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmopt.measure.fingerprint import differing_fields
from mmopt.measure.gate.decision import Verdict
from mmopt.measure.results import format_seconds
from mmopt.measure.stored import GATE, Series, StoredResult
from mmopt.measure.timers import TIMERS

WORST_FIRST = (
    Verdict.REGRESSED,
    Verdict.MISSING,
    Verdict.FAILED,
    Verdict.INCONCLUSIVE,
    Verdict.IMPROVED,
    Verdict.NEW,
    Verdict.PASSED,
)

MEMORY = {
    "process_bytes": "Peak of a fresh process (VmHWM)",
    "torch_allocated_bytes": "torch: peak allocated on the GPU",
    "torch_reserved_bytes": "torch: peak reserved on the GPU",
    "device_bytes": "GPU memory taken on the device (NVML)",
    "ort_arena_bytes": "ONNX Runtime: arena held",
    "ort_in_use_bytes": "ONNX Runtime: arena in use at its peak",
    "tensor_bytes": "torch: most bytes of tensors at once on the CPU",
    "peak_bytes": "Peak that the suite recorded",
}
"""What each kind of peak is, by its name in a result; another kind is shown by that name."""

NO_FINGERPRINT = (
    "A file that pytest-benchmark wrote without mmopt does not say what it ran on. Make it with "
    "`mmopt bench run SUITE -o FILE`."
)


HOW_NAMED = "8x128 is a batch of 8 sequences with 128 tokens each."


@dataclass(frozen=True)
class Machine:
    """Results with one fingerprint, the oldest first; only these compare with each other.

    Attributes:
        fingerprint: None for a file without one, which shares its machine with no other file.
        results: one or more.
    """

    fingerprint: Mapping[str, Any] | None
    results: tuple[StoredResult, ...]

    @property
    def timed(self) -> tuple[StoredResult, ...]:
        """The results with samples, the oldest first."""
        return tuple(result for result in self.results if result.kind != GATE)

    def newest(
        self, has: Callable[[Series], bool] = lambda _: True
    ) -> list[tuple[StoredResult, tuple[Series, ...]]]:
        """For each file, from the newest on, the benchmarks that no newer file has.

        Args:
            has: only benchmarks for which this holds count.
        """
        seen: set[str] = set()
        found = []
        for result in reversed(self.timed):
            own = tuple(one for one in result.series if one.name not in seen and has(one))
            seen.update(series.name for series in own)
            if own:
                found.append((result, own))
        return found


def by_machine(results: Sequence[StoredResult]) -> list[Machine]:
    """Results grouped by fingerprint, in the order given; within a group by time."""
    groups: list[list[StoredResult]] = []
    for result in results:
        mine = result.fingerprint
        for group in groups:
            theirs = group[0].fingerprint
            if mine is not None and theirs is not None and not differing_fields(theirs, mine):
                group.append(result)
                break
        else:
            groups.append([result])
    return [
        Machine(group[0].fingerprint, tuple(sorted(group, key=lambda result: result.when)))
        for group in groups
    ]


def machine_line(fingerprint: Mapping[str, Any] | None) -> str:
    """The machine and the most important versions in one line."""
    if fingerprint is None:
        return "unknown machine"
    parts = [str(fingerprint.get("cpu") or "unknown CPU")]
    parts += [str(gpu) for gpu in fingerprint.get("gpus") or ()]
    for key, word in (("cores", "core"), ("torch_threads", "thread")):
        if type(fingerprint.get(key)) is int:
            parts.append(plural(fingerprint[key], word))
    for key in ("torch", "onnxruntime"):
        if fingerprint.get(key):
            parts.append(f"{key} {fingerprint[key]}")
    return ", ".join(parts)


def plural(count: int, noun: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def fields_of(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A fingerprint's or a record's fields as text; a dash where one could not be read."""
    return [
        (key.replace("_", " "), value_text(value))
        for key, value in mapping.items()
        if key != "warnings"
    ]


def value_text(value: Any) -> str:
    """A JSON value as a reader would write it; a dash for none."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(entry)}" for key, entry in value.items())
    return str(value)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Node ids without their files, where that tells them apart."""
    names = list(dict.fromkeys(names))
    short = {name: name.partition("::")[2] or name for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def label_of(series: Series, several_sources: bool) -> str:
    """What a row of a drawing is called within its panel."""
    if series.backend is None:
        return series.name.partition("::")[2] or series.name
    return f"{series.backend} · {source_label(series)}" if several_sources else series.backend


def compact_names(series: Sequence[Series]) -> list[str]:
    """One short name for each: `eager 8x128` of a model, a test without its file of a suite."""
    short = short_names(one.name for one in series)
    several = len({one.source for one in series}) > 1
    names = [
        short[one.name]
        if one.backend is None
        else f"{label_of(one, several)} {one.batch}x{one.length}"
        + ("" if one.timer in (None, TIMERS["cpu"][0]) else f" {one.timer}")
        for one in series
    ]
    return names if len(set(names)) == len(names) else [one.name for one in series]


def source_label(series: Series) -> str:
    """The last part of a model's path."""
    return (series.source or "").rstrip("/").rpartition("/")[2] or str(series.source)


def share(value: float | None) -> str:
    """A signed share in percent: `+3.1%`, `-0.42%`; a dash for None."""
    if value is None:
        return "-"
    return f"{value:+.1%}" if abs(value) >= 0.00995 else f"{value:+.2%}"


def margin_text(margin: float) -> str:
    """A margin in percent, without digits that say nothing: `3%`, `0.05%`."""
    return f"{margin * 100:.3g}%"


def interval_text(ends: Sequence[float] | None) -> str:
    """Both ends of an interval of shares; a dash for None."""
    return "-" if ends is None else f"{share(ends[0])} to {share(ends[1])}"


def bytes_text(size: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    unit, scale = next(
        (pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= pair[1]), ("B", 1.0)
    )
    digits = 0 if scale == 1 or size / scale >= 99.5 else 1
    return f"{size / scale:.{digits}f} {unit}"


def figure_text(value: int | None, unit: str) -> str:
    """An exact figure with its unit; a dash for None."""
    return "-" if value is None else f"{value:,} {unit}".rstrip()


def change_text(base: int | None, head: int | None) -> str:
    """How an exact figure changed: `+1`, `-2,048 (-3.1%)`; a dash where one side lacks it."""
    if base is None or head is None:
        return "-"
    relative = f" ({share((head - base) / abs(base))})" if base and head != base else ""
    return f"{head - base:+,}{relative}" if head != base else "same"


def contest_facts(entry: Mapping[str, Any]) -> list[str]:
    """What a gate measured of a benchmark, beside its verdict; only what there is."""
    facts = []
    if (slowdown := entry.get("slowdown")) is not None:
        facts.append(f"{share(abs(slowdown))[1:]} {'faster' if slowdown < 0 else 'slower'}")
    if (ends := entry.get("interval")) is not None:
        facts.append(f"95% interval {interval_text(ends)}")
    facts.append(f"margin {margin_text(entry['margin'])}")
    if entry["pairs"]:
        facts.append(plural(entry["pairs"], "pair"))
    if (times := seconds_text(entry)) != "-":
        facts.append(times)
    return [*facts, entry["note"]] if entry.get("note") else facts


def seconds_text(entry: Mapping[str, Any]) -> str:
    """What a gate's benchmark took on each side."""
    base, head = entry.get("base_seconds"), entry.get("head_seconds")
    if base is None and head is None:
        return "-"
    return f"{format_seconds(base)} → {format_seconds(head)}"


def worst_first(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A gate's benchmarks or figures: by verdict, then as the suite has them."""
    return sorted(entries, key=lambda entry: WORST_FIRST.index(entry["verdict"]))


def counts_text(gate: Mapping[str, Any]) -> str:
    """How many benchmarks and figures have which verdict: `3 benchmarks: 1 regressed, ...`."""
    parts = []
    for key, word in (("benchmarks", "benchmark"), ("figures", "exact figure")):
        counts = Counter(entry["verdict"] for entry in gate[key])
        if total := counts.total():
            said = [f"{counts[v]} {v.lower()}" for v in WORST_FIRST if counts[v]]
            parts.append(f"{plural(total, word)}: {', '.join(said)}")
    return "; ".join(parts)


def revision_text(side: Mapping[str, Any]) -> str:
    """A revision as it was named, and its commit where that says more."""
    ref, commit = str(side["ref"]), str(side["commit"])
    return commit[:12] if commit.startswith(ref) else f"{ref} ({commit[:12]})"


def self_test_lines(gate: Mapping[str, Any]) -> list[str]:
    """How far the gate can be believed on its machine, measured; or that nobody measured it."""
    found = gate.get("self_test")
    if found is None:
        return [
            "How often the gate errs was not measured on this machine. "
            "`mmopt bench gate --self-test` measures it."
        ]
    lines = [
        f"Self-test on this machine, {found['created'][:10]}: {_rates(found, found['slowdown'])}."
    ]
    if seconds := found.get("seconds_per_suite"):
        lines[0] += f" A suite took {seconds:.0f} s."
    if peer := found.get("peer"):
        lines.append(f"{peer['name']} on the same trials: {_rates(peer, found['slowdown'])}.")
    return lines


def _rates(counts: Mapping[str, Any], slowdown: float) -> str:
    alarms, trials = counts["false_alarms"], counts["trials"]
    found, slow = counts["found"], counts["slow_trials"]
    said = f"{plural(alarms, 'false alarm')} in {trials} suites of equal revisions"
    said += f" ({alarms / trials:.1%})" if trials else ""
    said += f"; {found} of {slow} slowdowns by {margin_text(slowdown)} found"
    return said + (f" ({found / slow:.1%})" if slow else "")

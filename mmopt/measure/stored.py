"""Results read back from disk: what `mmopt bench compare` and `mmopt bench report` start from.

Three kinds of file: what `mmopt bench run -o` wrote of models, pytest-benchmark's JSON with or
without our key in it, and a gate's report. All that others rely on is checked here, and every text
is made printable. Importing this imports no torch.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mmopt.measure.gate.decision import Verdict, of_suite
from mmopt.measure.statistics import (
    Interval,
    bootstrap_median,
    median,
    percentile,
    samples_for_percentile,
)
from mmopt.measure.suites.figures import Figure, parse_figures
from mmopt.measure.timers import TIMERS
from mmopt_kernels.errors import InputError

BENCH_RUN = "mmopt bench run"
PYTEST_BENCHMARK = "pytest-benchmark"
GATE = "gate"

# The versions that are read. A test holds them against those that are written; importing them
# from there would import what writes.
BENCH_RUN_SCHEMA = 1
SUITE_SCHEMA = 1
GATE_SCHEMA = 1

# Left away in names: older files, which do not name a timer, hold it.
_USUAL_TIMER = TIMERS["cpu"][0]

# Seconds of one call: what no clock resolves and what nobody waited for is a fault in the file.
_SHORTEST, _LONGEST = 1e-12, 1e9
_SECONDS = f"seconds above 0 ({_SHORTEST:g} to {_LONGEST:g})"

# The base of PeakMemory.process_bytes, not a peak of its own.
_NO_PEAKS = ("process_before_bytes",)

# Terminals, XML and readers stumble over these: control characters, surrogates that no UTF-8 has,
# and marks that turn the direction of what follows them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Series:
    """The samples of one benchmark.

    Attributes:
        name: tells it apart within its file, and finds it again in another.
        group: what it is shown beside; None without a group.
        variant: what it is apart from its batch: benchmarks of one variant make one line over
            batches.
        samples: seconds per call, one or more, all above 0, in the order taken.
        calls: calls averaged in one sample.
        source, backend: of `mmopt bench run`; None in suites.
        batch, length: sequences per call and tokens per sequence; None where not said.
        timer: what was timed, `wall` say; None where not said.
        peak_bytes: peak memory: of the process, or what a suite recorded; None when not measured.
        memory: every peak that was measured, in bytes, by the name of what it is.
        first_call: seconds of the first call, compilation included; None when not measured.
        instructions: CPU instructions per call; None when not counted.
        steady: whether warm-up had settled.
    """

    name: str
    group: str | None
    variant: str
    samples: tuple[float, ...]
    calls: int
    source: str | None = None
    backend: str | None = None
    batch: int | None = None
    length: int | None = None
    timer: str | None = None
    peak_bytes: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    first_call: float | None = None
    instructions: int | None = None
    steady: bool = True

    @cached_property
    def median(self) -> float:
        """Median seconds per call."""
        return median(self.samples)

    @cached_property
    def interval(self) -> Interval:
        """95% confidence interval of the median, in seconds."""
        return bootstrap_median(self.samples)

    def percentile(self, percent: float) -> float | None:
        """In seconds; None unless single calls were timed, and enough of them."""
        if self.calls > 1 or len(self.samples) < samples_for_percentile(percent):
            return None
        return percentile(self.samples, percent)

    @property
    def throughput(self) -> float | None:
        """Sequences per second at the median; None where the batch is not known."""
        return None if self.batch is None else self.batch / self.median


@dataclass(frozen=True)
class StoredResult:
    """One file.

    Attributes:
        path: where it was read from.
        kind: `BENCH_RUN`, `PYTEST_BENCHMARK` or `GATE`.
        created: when, as the file says it.
        fingerprint: what it ran on; None in a file that pytest-benchmark wrote without mmopt.
        series: its benchmarks; of a gate none.
        figures: exact figures by id, with their `value`, `unit` and `better`; of a gate none.
        gate: the gate's whole report; None in other kinds.
        conditions: what the machine did meanwhile; None when not recorded.
        commit: what was measured, as far as the file says it; of a gate its head.
    """

    path: Path
    kind: str
    created: str
    fingerprint: Mapping[str, Any] | None
    series: tuple[Series, ...]
    figures: Mapping[str, Mapping[str, Any]]
    gate: Mapping[str, Any] | None
    conditions: Mapping[str, Any] | None
    commit: str | None = None

    @property
    def when(self) -> datetime:
        """`created`; taken as UTC where it names no zone."""
        moment = datetime.fromisoformat(self.created)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What went wrong with the machine meanwhile, in plain words."""
        return tuple((self.conditions or {}).get("warnings", ()))


class _FaultError(Exception):
    """What is wrong with a document, without the file's name."""


def read_result(path: Path) -> StoredResult:
    """Read one file, whichever of the three kinds it is.

    Raises:
        InputError: the file is missing, unreadable, empty, truncated, no result of a kind and
            schema that are known, holds no benchmark, a time that is not finite and above 0, or a
            gate's verdict that its own benchmarks contradict.
    """
    document = _read_document(path)
    try:
        kind = _kind(document)
        return _READERS[kind](path, document)
    except _FaultError as fault:
        raise InputError(f"{path}: {fault}") from None


def read_results(paths: list[Path]) -> list[StoredResult]:
    """Read several files, each once.

    Raises:
        InputError: no file, one that was given twice, or what `read_result` raises.
    """
    if not paths:
        raise InputError("No result was given. Pass files that `mmopt bench run -o` wrote.")
    seen: dict[Path, Path] = {}
    for path in paths:
        if (whole := path.resolve()) in seen:
            raise InputError(
                f"{path} was given twice{'' if seen[whole] == path else f', as {seen[whole]} too'}"
                ", expected each file once. Leave one out."
            )
        seen[whole] = path
    return [read_result(path) for path in paths]


def _read_document(path: Path) -> dict[str, Any]:
    expected = "expected a result that `mmopt bench run -o`, `gate -o` or pytest-benchmark wrote"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist, {expected}.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, {expected}. Pass the files in it.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}), {expected}.") from error
    if not text.strip():
        raise InputError(f"{path} is empty, {expected}. Measure anew.")
    try:
        # NaN and Infinity are no JSON, but pytest-benchmark writes them among its statistics.
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no whole JSON document ({error}), {expected}. It may have been cut short: "
            "measure anew."
        ) from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a JSON {type(document).__name__}, {expected}.")
    cleaned: dict[str, Any] = _printable(document)
    return cleaned


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_printable(key): _printable(entry) for key, entry in value.items()}
    return [_printable(entry) for entry in value] if isinstance(value, list) else value


def _kind(document: Mapping[str, Any]) -> str:
    if document.get("kind") == "gate":
        return GATE
    if "kind" not in document and "measurements" in document:
        return BENCH_RUN
    if "kind" not in document and "benchmarks" in document and "machine_info" in document:
        return PYTEST_BENCHMARK
    what = f"of the kind {document['kind']!r}" if "kind" in document else "of no known kind"
    keys = ", ".join(sorted(document)[:6]) or "none"
    raise _FaultError(
        f"a document {what} (its keys: {keys}), expected a result of `mmopt bench run -o`, of "
        "`mmopt bench gate -o`, or of pytest-benchmark."
    )


def _read_bench_run(path: Path, document: Mapping[str, Any]) -> StoredResult:
    _require_schema(document, BENCH_RUN_SCHEMA, "schema")
    adapter = _optional(document, "adapter", str, "adapter")
    entries = _list(document, "measurements")
    series = tuple(_measurement(e, f"measurements[{i}]", adapter) for i, e in enumerate(entries))
    return StoredResult(
        path=path,
        kind=BENCH_RUN,
        created=_created(document, "created"),
        fingerprint=_mapping(document, "fingerprint"),
        series=_distinct(series),
        figures={},
        gate=None,
        conditions=_conditions(document),
    )


def _measurement(entry: Any, where: str, adapter: str | None) -> Series:
    _require(isinstance(entry, dict), where, entry, "an object")
    source, backend = (_line(entry, key, where) for key in ("source", "backend"))
    batch, length = (_count(entry, key, where) for key in ("batch", "length"))
    timer = _optional(entry, "timer", str, where)
    # An artifact carries its adapters in itself.
    if adapter is not None and backend != "ort":
        source = f"{source} with {adapter}"
    suffix = "" if timer in (None, _USUAL_TIMER) else f", {timer}"
    memory = _peaks(entry.get("memory"), f"{where}.memory")
    return Series(
        name=f"{backend} of {source}, batch {batch}, {length} tokens{suffix}",
        group=f"batch {batch}, {length} tokens{suffix}",
        variant=f"{backend} of {source}{suffix}",
        samples=_samples(entry.get("samples_seconds"), f"{where}.samples_seconds"),
        calls=_count(entry, "calls_per_sample", where),
        source=source,
        backend=backend,
        batch=batch,
        length=length,
        timer=timer,
        peak_bytes=memory.get("process_bytes"),
        memory=memory,
        first_call=_optional_seconds(entry.get("first_call_seconds"), where),
        instructions=_optional(entry, "instructions_per_call", int, where),
        steady=entry.get("steady") is not False,
    )


def _peaks(memory: Any, where: str) -> dict[str, int]:
    if memory is None:
        return {}
    _require(isinstance(memory, dict), where, memory, "an object")
    peaks = {
        name: _whole(size, f"{where}.{name}")
        for name, size in memory.items()
        if size is not None and name not in _NO_PEAKS
    }
    for name, size in peaks.items():
        _require(size >= 0, f"{where}.{name}", size, "bytes")
    return peaks


def _read_suite(path: Path, document: Mapping[str, Any]) -> StoredResult:
    ours = document.get("mmopt")
    figures: dict[str, Figure] = {}
    if ours is not None:
        _require(isinstance(ours, dict), "mmopt", ours, "an object")
        _require_schema(ours, SUITE_SCHEMA, "mmopt.schema")
        _require(isinstance(ours.get("figures"), dict), "mmopt.figures", None, "an object")
        try:
            figures = parse_figures(ours, "mmopt.figures")
        except InputError as error:
            raise _FaultError(str(error)) from None
    entries = _list(document, "benchmarks")
    commit = document.get("commit_info")
    series = tuple(_benchmark(entry, f"benchmarks[{i}]") for i, entry in enumerate(entries))
    return StoredResult(
        path=path,
        kind=PYTEST_BENCHMARK,
        created=_created(document, "datetime"),
        fingerprint=None if ours is None else _mapping(ours, "fingerprint"),
        series=_distinct(series),
        figures={name: figure.to_dict() for name, figure in figures.items()},
        gate=None,
        conditions=None if ours is None else _conditions(ours),
        commit=_optional(commit, "id", str, "commit_info") if isinstance(commit, dict) else None,
    )


def _benchmark(entry: Any, where: str) -> Series:
    _require(isinstance(entry, dict), where, entry, "an object")
    stats = _mapping(entry, "stats", where)
    if "data" not in stats:
        raise _FaultError(
            f"{where}.stats has no `data`, expected the samples. Write the file with "
            "--benchmark-json, or save it with --benchmark-save-data."
        )
    name = _line(entry, "fullname", where)
    extra = _optional(entry, "extra_info", dict, where) or {}
    params = _optional(entry, "params", dict, where) or {}
    batch, length, peak = (extra.get(key) for key in ("batch", "length", "peak_bytes"))
    for key, value in (("batch", batch), ("length", length), ("peak_bytes", peak)):
        if value is not None:
            at = f"{where}.extra_info.{key}"
            _require(_whole(value, at) > 0, at, value, "a whole number above 0")
    rest = [f"{key} {value}" for key, value in params.items() if key != "batch"]
    return Series(
        name=name,
        group=_optional(entry, "group", str, where),
        variant=", ".join([name.partition("[")[0], *rest]),
        samples=_samples(stats["data"], f"{where}.stats.data"),
        calls=_count(stats, "iterations", f"{where}.stats"),
        batch=batch,
        length=length,
        peak_bytes=peak,
        memory={} if peak is None else {"peak_bytes": peak},
    )


def _read_gate(path: Path, document: Mapping[str, Any]) -> StoredResult:
    _require_schema(document, GATE_SCHEMA, "schema")
    for side in ("base", "head"):
        for key in ("ref", "commit"):
            _line(_mapping(document, side), key, side)
    for key in ("margin", "alpha", "seconds"):
        _finite(document.get(key), key)
    _require(isinstance(document.get("exit_code"), int), "exit_code", None, "a whole number")
    benchmarks, figures = _list(document, "benchmarks"), _list(document, "figures")
    if not benchmarks and not figures:
        raise _FaultError("the gate compared nothing: no benchmark and no exact figure is in it.")
    verdicts = [_gate_benchmark(e, f"benchmarks[{i}]") for i, e in enumerate(benchmarks)]
    verdicts += [_gate_figure(e, f"figures[{i}]") for i, e in enumerate(figures)]
    verdict = _verdict(document, "the gate")
    if verdict != of_suite(verdicts):
        raise _FaultError(
            f"the verdict is {verdict}, but its benchmarks and figures make it "
            f"{of_suite(verdicts)}. The file was changed, or cut: run the gate anew."
        )
    self_test = _optional(document, "self_test", dict, "self_test")
    if self_test is not None:
        _check_self_test(self_test)
    for i, note in enumerate(_list(document, "notes")):
        _require(isinstance(note, str), f"notes[{i}]", note, "a text")
    return StoredResult(
        path=path,
        kind=GATE,
        created=_created(document, "created"),
        fingerprint=_mapping(document, "fingerprint"),
        series=(),
        figures={},
        gate=document,
        conditions=_conditions(document),
        commit=document["head"]["commit"],
    )


def _gate_benchmark(entry: Any, where: str) -> Verdict:
    _require(isinstance(entry, dict), where, entry, "an object")
    _line(entry, "name", where)
    _require(_finite(entry.get("margin"), f"{where}.margin") > 0, where, entry, "a margin above 0")
    for key in ("slowdown", "base_seconds", "head_seconds"):
        if entry.get(key) is not None:
            _finite(entry[key], f"{where}.{key}")
    _require(_whole(entry.get("pairs"), f"{where}.pairs") >= 0, where, entry, "0 pairs or more")
    ends = entry.get("interval")
    if ends is not None:
        pair = isinstance(ends, list) and len(ends) == 2
        _require(pair, f"{where}.interval", ends, "two numbers")
        low, high = (_finite(end, f"{where}.interval") for end in ends)
        _require(low <= high, f"{where}.interval", ends, "the lower end first")
    _optional(entry, "note", str, where)
    return _verdict(entry, where)


def _gate_figure(entry: Any, where: str) -> Verdict:
    _require(isinstance(entry, dict), where, entry, "an object")
    _line(entry, "name", where)
    _require(isinstance(entry.get("unit"), str), f"{where}.unit", entry.get("unit"), "a text")
    for side in ("base", "head"):
        if entry.get(side) is not None:
            _whole(entry[side], f"{where}.{side}")
    return _verdict(entry, where)


def _check_self_test(self_test: Mapping[str, Any]) -> None:
    numbers = ("trials", "false_alarms", "slow_trials", "found")
    for key in numbers:
        _require(
            _whole(self_test.get(key), f"self_test.{key}") >= 0, "self_test", self_test, "counts"
        )
    _finite(self_test.get("slowdown"), "self_test.slowdown")
    _created(self_test, "created")
    peer = _optional(self_test, "peer", dict, "self_test")
    if peer is not None:
        _line(peer, "name", "self_test.peer")
        for key in numbers:
            _whole(peer.get(key), f"self_test.peer.{key}")


def _verdict(entry: Mapping[str, Any], where: str) -> Verdict:
    said = entry.get("verdict")
    known = [verdict.value for verdict in Verdict]
    _require(said in known, f"{where}.verdict", said, f"one of {', '.join(known)}")
    return Verdict(str(said))


_READERS = {BENCH_RUN: _read_bench_run, PYTEST_BENCHMARK: _read_suite, GATE: _read_gate}


def _distinct(series: tuple[Series, ...]) -> tuple[Series, ...]:
    if not series:
        raise _FaultError("it holds no benchmark, expected one or more.")
    name, times = Counter(one.name for one in series).most_common(1)[0]
    if times > 1:
        raise _FaultError(f"{name} is in it {times} times, expected each benchmark once.")
    return series


def _conditions(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    conditions: dict[str, Any] | None = _optional(document, "conditions", dict, "conditions")
    if conditions is not None:
        warnings = conditions.get("warnings", [])
        texts = isinstance(warnings, list) and all(isinstance(w, str) for w in warnings)
        _require(texts, "conditions.warnings", warnings, "a list of texts")
    return conditions


def _created(document: Mapping[str, Any], key: str) -> str:
    moment = document.get(key)
    try:
        datetime.fromisoformat(moment)  # type: ignore[arg-type]  # TypeError is caught
    except (TypeError, ValueError):
        _require(False, key, moment, "a date in ISO 8601")
    return str(moment)


def _samples(values: Any, where: str) -> tuple[float, ...]:
    _require(isinstance(values, list) and bool(values), where, values, "a list of samples")
    samples = []
    for index, value in enumerate(values):
        sample = _finite(value, f"{where}[{index}]")
        _require(_SHORTEST <= sample <= _LONGEST, f"{where}[{index}]", value, _SECONDS)
        samples.append(sample)
    return tuple(samples)


def _finite(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = number and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        number = False
    _require(number, where, value, "a finite number")
    return float(value)


def _optional_seconds(value: Any, where: str) -> float | None:
    return None if value is None else _finite(value, f"{where}.first_call_seconds")


def _whole(value: Any, where: str) -> int:
    _require(type(value) is int, where, value, "a whole number")
    return int(value)


def _count(entry: Mapping[str, Any], key: str, where: str) -> int:
    count = _whole(entry.get(key), f"{where}.{key}")
    _require(count > 0, f"{where}.{key}", count, "a whole number above 0")
    return count


def _line(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    _require(isinstance(value, str) and bool(value.strip()), f"{where}.{key}", value, "a text")
    return " ".join(str(value).split())


def _list(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    _require(isinstance(value, list), key, value, "a list")
    return list(value or [])


def _mapping(document: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = document.get(key)
    _require(isinstance(value, dict), f"{where}.{key}".lstrip("."), value, "an object")
    return dict(value or {})


def _optional(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if value is not None:
        _require(isinstance(value, kind), f"{where}.{key}", value, f"a {kind.__name__} or null")
    return value


def _require_schema(document: Mapping[str, Any], known: int, where: str) -> None:
    found = document.get("schema")
    if found != known or type(found) is not int:
        raise _FaultError(
            f"{where} is {found!r}, expected {known}. Read it with the version of mmopt that wrote "
            "it, or measure anew."
        )


def _require(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise _FaultError(f"{where} is {shown}, expected {expected}.")

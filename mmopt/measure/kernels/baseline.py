"""The recorded figures of every kernel, and how a run is held against them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmopt.measure.kernels.rules import Problem, shown_matrix
from mmopt.measure.suites.files import write_text
from mmopt_kernels.errors import InputError, one_line
from mmopt_kernels.inspection import Inspection, KernelFigures

SCHEMA_VERSION = 1

# Registers may grow by a tenth: less is the compiler's luck with another order of instructions.
REGISTERS_PERCENT = 10

_NUMBERS = ("registers", "spilled_bytes", "shared_bytes", "code_bytes")


@dataclass(frozen=True)
class Recorded:
    """What the baseline says of one kernel; the fields are those of `KernelFigures`."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    code_bytes: int
    matrix_instructions: Mapping[str, int]
    config: Mapping[str, int]

    @classmethod
    def of(cls, kernel: KernelFigures) -> "Recorded":
        """What is recorded of a compiled kernel."""
        return cls(
            registers=kernel.registers,
            spilled_bytes=kernel.spilled_bytes,
            shared_bytes=kernel.shared_bytes,
            code_bytes=kernel.code_bytes,
            matrix_instructions=dict(kernel.matrix_instructions),
            config=dict(kernel.config),
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {
            **numbers,
            "matrix_instructions": dict(self.matrix_instructions),
            "config": dict(self.config),
        }


@dataclass(frozen=True)
class Baseline:
    """What `bench/baselines/kernels.json` holds.

    Attributes:
        triton: the version that compiled the kernels.
        kernels: by target and name.
    """

    triton: str
    kernels: Mapping[str, Mapping[str, Recorded]]


@dataclass(frozen=True)
class Comparison:
    """A run held against a baseline.

    Attributes:
        problems: what is worse, gone, or not recorded.
        undecided: why figures could not be compared; None where they were.
        stale: kernels whose record differs from what was built without being worse.
    """

    problems: tuple[Problem, ...]
    undecided: str | None
    stale: tuple[str, ...]


def compare(baseline: Baseline, inspection: Inspection, where: Path) -> Comparison:
    """Hold a run against a baseline, for the targets of the run.

    Another version of Triton is another compiler: it allocates registers and picks instructions
    anew, so that a difference says nothing of the change under test, in either direction. Then only
    what no compiler decides is compared, which kernels there are; the rest is undecided. (A wider
    tolerance would not do: between Triton 3.6 and 3.9 the same kernel can spill in one and not in
    the other.)
    """
    same = baseline.triton == inspection.triton
    failed = {(one.target, one.name) for one in inspection.failures}
    built = {(one.target, one.name): one for one in inspection.kernels}
    problems: list[Problem] = []
    stale: list[str] = []
    for target in inspection.targets:
        recorded = baseline.kernels.get(target, {})
        for name in recorded:
            # A case that failed as a whole is named without a kernel.
            case = (target, name.rsplit("/", 1)[0])
            if (target, name) not in built and not failed & {(target, name), case}:
                problems.append(_missing(target, name, where))
    for (target, name), kernel in built.items():
        known = baseline.kernels.get(target, {}).get(name)
        if known is None:
            problems.append(_new(target, name, where))
        elif same:
            worse = list(_worse(known, kernel))
            problems += worse
            # Code size is for reading: it was seen to differ by some hundred bytes from build to
            # build of the same kernel.
            found = replace(Recorded.of(kernel), code_bytes=known.code_bytes)
            if not worse and known != found:
                stale.append(f"{target} {name}")
    undecided = None
    if not same:
        undecided = (
            f"{where} was recorded with Triton {baseline.triton}, here is {inspection.triton}: "
            "registers, spills and instructions of two compilers cannot be compared. Install "
            f"triton=={baseline.triton}, or record the kernels anew with --update {where}."
        )
    return Comparison(tuple(problems), undecided, tuple(stale))


def read_baseline(path: Path) -> Baseline:
    """The baseline that `write_baseline` wrote.

    Raises:
        InputError: the file is missing, corrupt, or of another schema; says which entry.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist, expected the recorded kernels. Record them with "
            f"`mmopt kernels --update {path}`."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({one_line(error)}), expected the "
            "recorded kernels. Restore it from version control, or record it anew."
        ) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA_VERSION:
        found = document.get("schema") if isinstance(document, dict) else None
        raise InputError(
            f"{path} has schema {found!r}, expected {SCHEMA_VERSION}. Record it anew with "
            f"`mmopt kernels --update {path}`."
        )
    triton, targets = document.get("triton"), document.get("targets")
    if not isinstance(triton, str) or not isinstance(targets, dict):
        raise InputError(f"{path} has no Triton version or no targets, expected both.")
    kernels: dict[str, dict[str, Recorded]] = {}
    for target, entries in targets.items():
        if not isinstance(entries, dict):
            raise InputError(f"{path}: {target} is {entries!r}, expected an object of kernels.")
        kernels[target] = {
            name: _parse(entry, f"{path}: {target} {name}") for name, entry in entries.items()
        }
    return Baseline(triton, kernels)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline, one line a kernel: the whole file appears, or nothing changes.

    Raises:
        MmoptError: the file system refused (exit 3).
    """
    lines = [f'{{\n"schema": {SCHEMA_VERSION},\n"triton": {json.dumps(baseline.triton)},']
    lines.append('"targets": {')
    for i, target in enumerate(sorted(baseline.kernels)):
        entries = baseline.kernels[target]
        lines.append(f"{json.dumps(target)}: {{")
        for j, name in enumerate(sorted(entries)):
            comma = "," if j < len(entries) - 1 else ""
            lines.append(f"  {json.dumps(name)}: {json.dumps(entries[name].to_dict())}{comma}")
        lines.append("}," if i < len(baseline.kernels) - 1 else "}")
    lines.append("}\n}\n")
    write_text(path, "\n".join(lines))


def _worse(known: Recorded, kernel: KernelFigures) -> Iterator[Problem]:
    where = (kernel.target, kernel.name)
    before, now = known.spilled_bytes, kernel.spilled_bytes
    if now > before:
        yield Problem(
            *where, "spill", now, before, before, f"spills {now} bytes, {before} were recorded."
        )
    for name, count in known.matrix_instructions.items():
        if count and not kernel.matrix_instructions.get(name):
            found = shown_matrix(kernel.matrix_instructions)
            message = f"has {found}, {name} {count} was recorded."
            yield Problem(*where, "matrix", 0, count, 1, message)
    before, now = known.registers, kernel.registers
    limit = before * (100 + REGISTERS_PERCENT) // 100
    if now > limit:
        yield Problem(
            *where,
            "registers",
            now,
            before,
            limit,
            f"takes {now} registers, {before} were recorded: more than {REGISTERS_PERCENT}% up, "
            f"at most {limit}.",
        )


def _missing(target: str, name: str, where: Path) -> Problem:
    message = f"is recorded in {where} and no longer built. If that is meant, use --update {where}."
    return Problem(target, name, "missing", None, None, None, message)


def _new(target: str, name: str, where: Path) -> Problem:
    message = f"is not recorded in {where}. Record it with --update {where}."
    return Problem(target, name, "new", None, None, None, message)


def _parse(entry: object, where: str) -> Recorded:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}, expected an object.")
    for name in _NUMBERS:
        if type(entry.get(name)) is not int:
            raise InputError(f"{where} has {name} {entry.get(name)!r}, expected a whole number.")
    for name in ("matrix_instructions", "config"):
        counts = entry.get(name)
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise InputError(f"{where} has {name} {counts!r}, expected whole numbers by name.")
    return Recorded(
        **{name: entry[name] for name in _NUMBERS},
        matrix_instructions=entry["matrix_instructions"],
        config=entry["config"],
    )

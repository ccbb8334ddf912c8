"""Exact figures: whole numbers that a change moves or does not, with no noise in them.

Bytes of an artifact, graph breaks, recompiles, peak bytes of tensors. They are compared for
equality of the number, on any machine, without a timer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mmopt.measure.suites.files import write_json
from mmopt_kernels.errors import InputError, one_line

SCHEMA_VERSION = 1

Better = Literal["lower", "higher"]
Outcome = Literal["REGRESSED", "PASSED", "IMPROVED", "MISSING", "NEW"]


@dataclass(frozen=True)
class Figure:
    """One exact figure.

    Attributes:
        value: a whole number.
        unit: what it counts, `bytes`; empty where the figure's name says it.
        better: which way is better, `lower` or `higher`.
    """

    value: int
    unit: str = ""
    better: Better = "lower"

    def to_dict(self) -> dict[str, Any]:
        """The figure as JSON values."""
        return {"value": self.value, "unit": self.unit, "better": self.better}


@dataclass(frozen=True)
class FigureVerdict:
    """What became of one figure between two measurements.

    Attributes:
        name: the figure's id, `nodeid::name`.
        unit, better: as in `Figure`.
        base: the number that the head is held against; None where only the head has the figure.
        head: the number now; None where only the base has the figure.
        verdict: `REGRESSED` (worse), `PASSED` (equal), `IMPROVED` (better), `MISSING` (the head
            lost it) or `NEW` (the base does not know it).
    """

    name: str
    unit: str
    better: Better
    base: int | None
    head: int | None
    verdict: Outcome

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "base": self.base,
            "head": self.head,
            "verdict": self.verdict,
        }


def compare_figures(base: Mapping[str, Figure], head: Mapping[str, Figure]) -> list[FigureVerdict]:
    """One verdict per figure that either side has, by name.

    A figure whose unit or direction changed is another figure: the old one is `MISSING` and the
    new one `NEW`, because turning `better` around would turn a regression into an improvement.
    """
    verdicts: list[FigureVerdict] = []
    for name in sorted({*base, *head}):
        old, new = base.get(name), head.get(name)
        if old is not None and new is not None and (old.unit, old.better) == (new.unit, new.better):
            outcome = _outcome(old.value, new.value, new.better)
            verdicts.append(
                FigureVerdict(name, new.unit, new.better, old.value, new.value, outcome)
            )
            continue
        if old is not None:
            verdicts.append(FigureVerdict(name, old.unit, old.better, old.value, None, "MISSING"))
        if new is not None:
            verdicts.append(FigureVerdict(name, new.unit, new.better, None, new.value, "NEW"))
    return verdicts


def read_figures(path: Path) -> dict[str, Figure]:
    """The figures of a file that `--mmopt-figures` or `write_figures` wrote, by id.

    Raises:
        InputError: the file is missing, corrupt, or of another kind or schema.
    """
    return parse_figures(read_document(path), str(path))


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file of figures, its schema checked, its figures not.

    Raises:
        InputError: the file is missing, no JSON object, or of another kind or schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist, expected a file of exact figures.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({one_line(error)}), expected a file of "
            "exact figures. Restore it from version control, or record it anew."
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("figures"), dict):
        raise InputError(
            f"{path} has no object of figures at its top, expected what --mmopt-figures writes."
        )
    if document.get("schema") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema {document.get('schema')!r}, expected {SCHEMA_VERSION}. "
            "Record it anew with this version of mmopt."
        )
    return document


def parse_figures(document: Mapping[str, Any], where: str) -> dict[str, Figure]:
    """The figures of a document, each checked.

    Raises:
        InputError: a figure is malformed; names it and `where`, the place it came from.
    """
    figures = {}
    for name, entry in document["figures"].items():
        if not isinstance(entry, dict):
            raise InputError(f"{where}: figure {name!r} is {entry!r}, expected an object.")
        value, unit, better = entry.get("value"), entry.get("unit"), entry.get("better")
        if type(value) is not int:
            raise InputError(
                f"{where}: figure {name!r} has the value {value!r}, expected a whole number."
            )
        if not isinstance(unit, str) or better not in get_args(Better):
            raise InputError(
                f"{where}: figure {name!r} has the unit {unit!r} and better {better!r}, expected a "
                f"text and one of {', '.join(get_args(Better))}."
            )
        figures[name] = Figure(value, unit, "lower" if better == "lower" else "higher")
    return figures


def write_figures(
    path: Path, figures: Mapping[str, Figure], *, versions: Mapping[str, str | None] | None = None
) -> None:
    """Write figures to `path`, sorted by id: the whole file appears, or nothing changes.

    Args:
        versions: of the libraries that the figures depend on; the file carries them as a note.

    Raises:
        MmoptError: the file system refused (exit 3).
    """
    document: dict[str, Any] = {"schema": SCHEMA_VERSION}
    if versions is not None:
        document["versions"] = dict(versions)
    document["figures"] = {name: figures[name].to_dict() for name in sorted(figures)}
    write_json(path, document)


def _outcome(base: int, head: int, better: Better) -> Outcome:
    if head == base:
        return "PASSED"
    return "IMPROVED" if (head < base) == (better == "lower") else "REGRESSED"

"""The report as JUnit XML, as CI systems read it.

A test suite for each file, a test case for each benchmark and each exact figure. REGRESSED, MISSING
and FAILED are failures; INCONCLUSIVE is an error, because it is no pass and a skipped test counts
as one.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

from mmopt.measure.report.wording import (
    change_text,
    contest_facts,
    counts_text,
    fields_of,
    figure_text,
    self_test_lines,
)
from mmopt.measure.results import format_seconds
from mmopt.measure.stored import StoredResult

# The element that a verdict puts into its test case; none for a verdict that is not here.
_OUTCOMES = {
    "REGRESSED": "failure",
    "MISSING": "failure",
    "FAILED": "failure",
    "INCONCLUSIVE": "error",
}


def junit_report(results: Sequence[StoredResult]) -> str:
    """The XML document; times are in seconds, of a benchmark its median per call."""
    root = ElementTree.Element("testsuites", name="mmopt bench")
    suites = [_suite(result) for result in results]
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in suites)))
    root.set("time", _seconds(sum(float(suite.get("time", 0)) for suite in suites)))
    root.extend(suites)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, "unicode")}\n'


def _suite(result: StoredResult) -> ElementTree.Element:
    gate = result.gate
    cases = _gate_cases(gate) if gate is not None else _timed_cases(result)
    time = sum(float(case.get("time", 0)) for case in cases)
    suite = ElementTree.Element(
        "testsuite",
        name=str(result.path),
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors=str(sum(case.find("error") is not None for case in cases)),
        skipped="0",
        time=_seconds(time if gate is None else float(gate["seconds"])),
        # The schema has no room for a zone.
        timestamp=result.when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in fields_of(result.fingerprint or {}):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    suite.extend(cases)
    said = list(result.warnings)
    if gate is not None:
        said = [f"{gate['verdict']}: {counts_text(gate)}", *gate["notes"], *said]
        said += self_test_lines(gate)
    if said:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(said)
    return suite


def _gate_cases(gate: Mapping[str, Any]) -> list[ElementTree.Element]:
    cases = []
    for entry in gate["benchmarks"]:
        told = contest_facts(entry)
        cases.append(_case(entry["name"], entry.get("head_seconds"), entry["verdict"], told))
    for entry in gate["figures"]:
        base, head, unit = entry.get("base"), entry.get("head"), entry["unit"]
        told = [f"{figure_text(base, unit)} → {figure_text(head, unit)}"]
        told += [f"change {change_text(base, head)}"]
        cases.append(_case(entry["name"], None, entry["verdict"], told))
    carried = any(case.find(tag) is not None for case in cases for tag in _OUTCOMES.values())
    if gate["exit_code"] and not carried:
        # Nothing but new benchmarks, say: no case may carry it, and CI must not take it as a pass.
        told = [counts_text(gate)]
        cases.append(_case("gate::verdict of the suite", None, gate["verdict"], told))
    return cases


def _timed_cases(result: StoredResult) -> list[ElementTree.Element]:
    cases = []
    for one in result.series:
        told = f"median {format_seconds(one.median)}, {len(one.samples)} samples"
        cases.append(_case(one.name, one.median, "", [told]))
    for name, figure in result.figures.items():
        cases.append(_case(name, None, "", [figure_text(figure["value"], figure["unit"])]))
    return cases


def _case(
    name: str, seconds: float | None, verdict: str, told: Sequence[str]
) -> ElementTree.Element:
    # CI systems sort by class; of a node id that is the file.
    place, _, own = name.partition("::")
    case = ElementTree.Element(
        "testcase",
        classname=place.removesuffix(".py").replace("/", ".") if own else "mmopt.bench",
        name=own or name,
        time=_seconds(seconds or 0.0),
    )
    said = "; ".join(told)
    if outcome := _OUTCOMES.get(verdict):
        message = f"{verdict}: {said}"
        element = ElementTree.SubElement(case, outcome, message=message, type=verdict)
        element.text = message
    else:
        text = f"{verdict}: {said}" if verdict else said
        ElementTree.SubElement(case, "system-out").text = text
    return case


def _seconds(seconds: float) -> str:
    return f"{seconds:.9f}"

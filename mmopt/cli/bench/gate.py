"""`mmopt bench gate`: compare two revisions, and measure the gate itself."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar
from mmopt_kernels.errors import InputError


def gate(
    suite: Annotated[
        Path | None,
        typer.Argument(help="Folder or file of the suite. \\[default: the configuration's, bench]"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="The revision to compare with.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="REF", help="The revision in question. \\[default: HEAD]")
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The slowdown that must not pass. \\[default: 3%]"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time to measure. \\[default: 480]")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file in place of [tool.mmopt.gate] in pyproject.toml."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare the exact figures only; time nothing.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Measure the gate's false alarms and power here."),
    ] = False,
    trials: Annotated[
        int,
        typer.Option(help="With --self-test: suites of equal revisions; half as many slowed ones."),
    ] = 200,
    peer_every: Annotated[
        int,
        typer.Option(
            metavar="N", help="With --self-test: pytest-benchmark on every Nth trial too; 0 never."
        ),
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the report to this JSON file.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Compare two revisions of a benchmark suite: REGRESSED, PASSED, IMPROVED or INCONCLUSIVE.

    Exit codes: 0 passed or improved, 1 regressed or a benchmark is missing, 2 bad input, 3 not
    decided or could not run.
    """
    from mmopt.measure.gate.config import read_config
    from mmopt.measure.gate.revisions import from_root, repository_root
    from mmopt.measure.gate.run import gate
    from mmopt.measure.gate.selftest import self_test as run_self_test
    from mmopt.measure.results import require_output_file
    from mmopt.measure.suites.files import write_json

    if output is not None:
        require_output_file(output)
    # Ends like Ctrl-C does: the checkouts are removed and the workers ended.
    signal.signal(signal.SIGTERM, _terminate)
    report: Report
    if self_test:
        if any((suite, base, head, margin, budget, config, exact)):
            raise InputError(
                "bench gate: --self-test compares a suite of its own, with the gate's defaults. "
                "Leave SUITE, --base, --head, --margin, --budget, --config and --exact away."
            )
        report = run_self_test(trials=trials, peer_every=peer_every, progress=progress_bar)
    else:
        if base is None:
            raise InputError("bench gate: --base is missing. Pass --base HEAD~1, say.")
        here = Path.cwd()
        root = repository_root(here)
        settings = read_config(
            root,
            config,
            suite=None if suite is None else from_root(root, suite),
            margin=margin,
            budget=budget,
        )
        report = gate(
            base, head=head, config=settings, folder=here, timed=not exact, progress=progress_bar
        )
    if output is not None:
        write_json(output, report.to_dict())
    return report


def _terminate(number: int, _frame: object) -> None:
    sys.exit(128 + number)

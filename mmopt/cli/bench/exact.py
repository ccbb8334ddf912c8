"""`mmopt bench exact`: hold exact figures against a committed file."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def exact(
    suites: Annotated[
        list[str], typer.Argument(metavar="SUITE...", help="Folders or files of the suite.")
    ],
    baseline: Annotated[
        Path, typer.Option(metavar="FILE", help="The committed figures; --update writes it.")
    ],
    update: Annotated[
        bool, typer.Option("--update", help="Record the figures in FILE in place of comparing.")
    ] = False,
    json: JsonOption = False,
) -> Report:
    """Count the exact figures of a suite and compare them with FILE: no timer, no noise.

    A figure that is worse, missing, or not recorded fails by name.

    Exit codes: 0 all as recorded or better, 1 a figure does not hold, 2 bad input, 3 could not run.
    """
    from mmopt.measure.suites.exact import exact_gate, update_baseline

    measure = update_baseline if update else exact_gate
    return measure(suites, baseline, progress=progress_bar)

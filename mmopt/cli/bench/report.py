"""`mmopt bench report`: results as an HTML page, a Markdown summary and JUnit XML."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Results of bench run, of pytest-benchmark, of bench gate -o."
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one page that needs nothing else.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a summary for a pull request.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML for a CI system.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Show stored results: what a gate decided, latency, throughput, memory, history.

    Files with one fingerprint make a history; others are shown beside each other.

    Exit codes: 0 reported, whatever a gate decided; 2 bad input, 3 could not write.
    """
    from mmopt.measure.report.build import report

    return report(files, html=html, markdown=markdown, junit=junit)

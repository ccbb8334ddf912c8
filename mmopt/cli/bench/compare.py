"""`mmopt bench compare`: two stored results side by side."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report
from mmopt_kernels.errors import InputError


def compare(
    a: Annotated[Path, typer.Argument(help="A result of bench run or of pytest-benchmark.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same benchmarks.")],
    allow_different: Annotated[
        bool,
        typer.Option("--allow-different", help="Look even where machine or versions differ."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PAGE.html", help="Also write an HTML page."),
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Print and plot two stored results: medians, their ratio, and exact figures.

    This looks at what was measured in two processes, and cannot tell whether a program became
    slower: `mmopt bench gate` does.

    Exit codes: 0 compared, 2 bad input or different machines, 3 could not write.
    """
    from mmopt.measure.compare import compare
    from mmopt.measure.report.compare_page import compare_page
    from mmopt.measure.results import require_output_file
    from mmopt.measure.suites.files import write_text

    if output is not None:
        require_output_file(output, name="compare.html")
        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(
                f"-o {output}: the page is HTML, expected a name that ends in .html. For JSON "
                "pass --json and redirect stdout."
            )
        if output.resolve() in (a.resolve(), b.resolve()):
            raise InputError(
                f"-o {output} is one of the results, which it would replace. Choose another file."
            )
    report = compare(a, b, allow_different=allow_different)
    if output is not None:
        write_text(output, compare_page(report))
    return report

"""`mmopt bench run`: measure models, artifacts and benchmark suites."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_ARTIFACT",
            help="Checkpoints (folders or hub ids) and artifacts that `mmopt export` wrote.",
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter that the checkpoints carry, not merged.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(help="Of eager,compile,mmopt,ort; by default all that fit each model."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=N,N...",
            help="batch=1,8 or length=16,128; repeat for both. [default: both of these]",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Samples per backend and grid point; a p95 needs 130.")
    ] = 30,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also measure peak memory, each in a fresh process.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the report to this JSON file.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Time backends of models and artifacts against each other, in turns and random order.

    Exit codes: 0 measured, 2 bad input, 3 could not run.
    """
    from mmopt.measure.bench import bench_run, parse_grid
    from mmopt.measure.results import require_output_file, write_report

    if output is not None:
        require_output_file(output)
    report = bench_run(
        models,
        backends=None if backends is None else [part.strip() for part in backends.split(",")],
        grid=parse_grid(grid or ()),
        rounds=rounds,
        memory=memory,
        adapter=adapter,
        progress=progress_bar,
    )
    if output is not None:
        write_report(report, output)
    return report

"""`mmopt bench run`: measure models, artifacts and benchmark suites."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar
from mmopt_kernels.errors import InputError


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_SUITE",
            help="Checkpoints (folders or hub ids) and artifacts that `mmopt export` wrote; or "
            "pytest-benchmark suites (folders or files); behind -- options of pytest may follow.",
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
            help="batch=1,8 or length=16,128; repeat for both. \\[default: both of these]",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Samples per backend and grid point; a p95 needs 130. \\[default: 30]"),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also measure peak memory, each in a fresh process.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the models run.")] = "cpu",
    timer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="On cpu: wall, wall-cold-cache. On cuda: host-inclusive, cuda-graph-cold-l2, "
            "kernel-only. \\[default: the first]",
        ),
    ] = None,
    keyword: Annotated[
        str | None,
        typer.Option("-k", metavar="EXPR", help="Of a suite, the tests that pytest's -k picks."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the report to this JSON file.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Time backends of models and artifacts against each other, in turns and random order.

    Suites are run by pytest; what -o writes is then pytest-benchmark's JSON, with the machine, its
    conditions and exact figures added.

    Exit codes: 0 measured, 2 bad input, 3 could not run.
    """
    from mmopt.measure.suites.collection import is_suite

    suites = [model for model in models if is_suite(model)]
    if suites:
        given = {
            "--adapter": adapter,
            "--backends": backends,
            "--grid": grid,
            "--rounds": rounds,
            "--memory": memory or None,
            "--device": None if device == "cpu" else device,
            "--timer": timer,
        }
        return _run_suites(models, suites, given, keyword, output)

    from mmopt.measure.bench import bench_run, parse_grid
    from mmopt.measure.results import require_output_file, write_report

    if keyword is not None or any(model.startswith("-") for model in models):
        raise InputError(
            "bench run: -k and options behind -- belong to suites, and only models were given. "
            "Leave them out, or pass a folder with benchmarks."
        )
    if output is not None:
        require_output_file(output)
    report = bench_run(
        models,
        backends=None if backends is None else [part.strip() for part in backends.split(",")],
        grid=parse_grid(grid or ()),
        rounds=30 if rounds is None else rounds,
        memory=memory,
        adapter=adapter,
        device=device,
        timer=timer,
        progress=progress_bar,
    )
    if output is not None:
        write_report(report, output)
    return report


def _run_suites(
    arguments: list[str],
    suites: list[str],
    given: dict[str, Any],
    keyword: str | None,
    output: Path | None,
) -> Report:
    from mmopt.measure.results import require_output_file
    from mmopt.measure.suites.run import run_suites, write_suite_report

    # From the first option on everything is pytest's: an option's value may stand on its own.
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    sources, options = arguments[:first], arguments[first:]
    if models := [source for source in sources if source not in suites]:
        raise InputError(
            f"bench run: {suites[0]} is a benchmark suite and {models[0]} is none, expected one "
            "kind: pytest runs suites, and models are timed in turns. Call `mmopt bench run` once "
            "for each."
        )
    if unfitting := [name for name, value in given.items() if value is not None]:
        raise InputError(
            f"bench run: {', '.join(unfitting)} cannot be had with {sources[0]}, a benchmark "
            "suite, which says itself what it measures. Leave it out, or pass a model."
        )
    if output is not None:
        require_output_file(output)
    report = run_suites(sources, keyword=keyword, options=options, progress=progress_bar)
    if output is not None:
        write_suite_report(report, output)
    return report

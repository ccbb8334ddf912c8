"""`mmopt kernels`."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90, sm_100, sm_120, gfx942; all of them by default."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="BASELINE", help="Hold the kernels against this file.")
    ] = None,
    update: Annotated[
        Path | None, typer.Option(metavar="BASELINE", help="Record the kernels in this file.")
    ] = None,
    emit: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write binaries, assembly and launch metadata here."),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep figures here; unchanged kernels are not recompiled."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="More dtypes, head dimensions and features.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes at once; at most 2 by default.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Compile every kernel for GPUs that need not be here, and report what each takes.

    Registers, spilled bytes, shared memory, theoretical occupancy, matrix instructions, code size
    and seconds to compile.

    Exit codes: 0 compiles and holds, 1 a kernel does not compile, does not fit its GPU, breaks a
    promise or is worse than in BASELINE, 2 bad usage or bad input, 3 could not run or could not
    decide: BASELINE is of another Triton.
    """
    from mmopt.measure.kernels.gate import check_kernels, inspect_kernels, record_kernels
    from mmopt_kernels.errors import InputError

    if check is not None and update is not None:
        raise InputError(f"--check {check} and --update {update}: expected one of them.")
    if every and (check or update):
        raise InputError(
            "--all with --check or --update: a baseline has the default grid. Leave --all out."
        )
    targets = target or ()
    if check is not None:
        return check_kernels(check, targets, jobs=jobs, emit=emit, kept=kept, progress=progress_bar)
    if update is not None:
        return record_kernels(
            update, targets, jobs=jobs, emit=emit, kept=kept, progress=progress_bar
        )
    return inspect_kernels(
        targets, every_case=every, jobs=jobs, emit=emit, kept=kept, progress=progress_bar
    )

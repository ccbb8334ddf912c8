"""`mmopt deploy`: hands an artifact to an existing serving engine."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, command

deploy_app = typer.Typer(
    help="Hand an artifact to an existing serving engine.", no_args_is_help=True
)


@deploy_app.callback()
def _group() -> None:
    """Hand an artifact to an existing serving engine."""


def triton(
    artifact: Annotated[Path, typer.Argument(help="A folder that `mmopt export` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model repository; it may hold others.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Of the Triton model. Default: the artifact's.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=0, help="Rows that Triton puts together; 0 for no batching.")
    ] = 32,
    queue_delay: Annotated[
        int, typer.Option(min=0, help="Microseconds that a batch may wait to be filled.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace models of these names that mmopt wrote.")
    ] = False,
    json: JsonOption = False,
) -> Report:
    """Write a Triton Inference Server model repository with a copy of ARTIFACT.

    Exit codes: 0 written, 1 the artifact is not what was exported, 2 bad input, 3 could not run.
    """
    from mmopt_export.deploy.triton import deploy_triton

    return deploy_triton(
        artifact,
        output,
        name=name,
        max_batch=max_batch,
        queue_delay=queue_delay,
        force=force,
    )


deploy_app.command("triton", epilog="Example: mmopt deploy triton out -o models")(command(triton))

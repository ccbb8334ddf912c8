"""`mmopt export` and `mmopt verify`."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def export(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or an empty folder.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="A PEFT LoRA folder or hub id, merged in.")
    ] = None,
    target: Annotated[str, typer.Option(help="Where it will run: cpu.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "fp32",
    calibration: Annotated[
        Path | None, typer.Option(help='JSON Lines with a "text", to measure parity on.')
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Merge the adapter into MODEL, export to ONNX, prove parity, write the artifact.

    Exit codes: 0 parity holds, 1 it does not, 2 bad input, 3 could not run.
    """
    from mmopt_export.pipeline import export as run

    return run(
        model,
        output,
        adapters=adapter or (),
        target=target,
        precision=precision,
        calibration=calibration,
        progress=progress_bar,
    )


def verify(
    artifact: Annotated[Path, typer.Argument(help="A folder that `mmopt export` wrote.")],
    data: Annotated[
        Path | None,
        typer.Option(help='JSON Lines with "text" and "label", to measure accuracy on.'),
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Check ARTIFACT against its manifest: hashes, placement, parity on its stored samples.

    Exit codes: 0 holds, 1 does not hold, 2 bad input, 3 could not run.
    """
    from mmopt_export.verification import verify as run

    return run(artifact, data=data, progress=progress_bar)

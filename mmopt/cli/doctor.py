"""`mmopt doctor`."""

from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def doctor(
    target: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda where there is an NVIDIA GPU.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Try what this machine can really run: GPU, driver, ONNX Runtime, Triton, torch.compile.

    Exit codes: 0 the target works here, 1 it does not and each failed line says what to do.
    """
    from mmopt.doctor import diagnose

    return diagnose(target, progress=progress_bar)

"""`mmopt compile`."""

from enum import StrEnum
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


class Mode(StrEnum):
    """What is compiled."""

    train = "train"
    infer = "infer"


def compile_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="PEFT adapter folder or hub id.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Forward only, or forward and backward.")] = Mode.infer,
    batch: Annotated[int, typer.Option(min=2, help="Sequences or images per batch.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed samples of each variant.")] = 20,
    json: JsonOption = False,
) -> Report:
    """Attach mmopt's ops to MODEL, compile it, hold it against eager PyTorch and time it.

    Exit codes: 0 one graph and equal results, 1 a graph break or unequal results, 2 bad usage or
    bad input, 3 could not run.
    """
    from mmopt.compilation import compile_checkpoint

    return compile_checkpoint(
        model,
        adapters=adapter or (),
        mode=mode.value,
        batch=batch,
        length=length,
        rounds=rounds,
        progress=progress_bar,
    )

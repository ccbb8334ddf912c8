"""`mmopt compile`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


class Mode(StrEnum):
    """What is compiled."""

    train = "train"
    infer = "infer"


class Dtype(StrEnum):
    """Of weights and floating inputs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where it runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def compile_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="PEFT adapter folder or hub id.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines of your own examples instead of made-up inputs: rows of text, image, "
            "audio (wav; paths relative to the file), label."
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Forward only, or forward and backward.")] = Mode.infer,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights, those of the adapter too.")
    ] = Dtype.float32,
    device: Annotated[
        Device, typer.Option(help="auto: a CUDA GPU where one can be used.")
    ] = Device.auto,
    batch: Annotated[int, typer.Option(min=2, help="Sequences or images per batch.")] = 8,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens per sequence; longer texts of --data are cut.")
    ] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed samples of each variant.")] = 20,
    explain: Annotated[
        bool, typer.Option(help="Show the line of each graph break and recompile, and the remedy.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="New folder for a warm start: mmopt.load_compiled runs it."
        ),
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Attach mmopt's ops to MODEL, compile it, hold it against eager PyTorch and time it.

    In half precision the reference is eager float32 with the same weights, and the compiled result
    may be off by twice what eager in that precision is.

    With -o the compiled graph is stored once everything holds. A store is code: it is signed for
    this user, and others load it with the sha256 that is printed.

    Exit codes: 0 one graph and equal results, 1 a graph break, a recompile at another length or
    unequal results, 2 bad usage or bad input, 3 could not run.
    """
    from mmopt.compilation import compile_checkpoint

    return compile_checkpoint(
        model,
        adapters=adapter or (),
        data=data,
        mode=mode.value,
        dtype=dtype.value,
        device=device.value,
        batch=batch,
        length=length,
        rounds=rounds,
        explain=explain,
        output=output,
        progress=progress_bar,
    )

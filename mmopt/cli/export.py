"""`mmopt export` and `mmopt verify`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


class Adapters(StrEnum):
    """What becomes of the adapters."""

    merge = "merge"
    swap = "swap"


def export(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or an empty folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A PEFT adapter, a folder or a hub id; PATH=0.5 takes half of it."),
    ] = None,
    adapters: Annotated[
        Adapters, typer.Option(help="merge: into the weights. swap: beside them, chosen per run.")
    ] = Adapters.merge,
    task: Annotated[
        str | None, typer.Option(help="What it is for, where the architecture does several.")
    ] = None,
    target: Annotated[str, typer.Option(help="Where it will run: cpu, cuda or portable.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, int8, int4 or auto, as the target has.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help='JSON Lines with a "text", "image" or "audio", to measure parity on.'),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="For auto: what outputs may be off, or accuracy may drop."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of int8 or int4, such as algorithm=gptq."),
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Accept an artifact whose parity does not hold.")
    ] = False,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Write it without the target's provider here.")
    ] = False,
    sign: Annotated[Path | None, typer.Option(help="A private key, PEM, to sign it with.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the artifact in OUTPUT, if the new one holds.")
    ] = False,
    json: JsonOption = False,
) -> Report:
    """Merge the adapters into MODEL, export to ONNX, prove parity, write the artifact.

    Exit codes: 0 parity holds, 1 it does not, 2 bad input, 3 could not run.
    """
    from mmopt_export.pipeline import export as run
    from mmopt_export.quantization import read_options

    return run(
        model,
        output,
        adapters=adapter or (),
        swap=adapters is Adapters.swap,
        task=task,
        target=target,
        precision=precision,
        calibration=calibration,
        max_drop=max_drop,
        options=read_options(set_ or ()),
        allow_drift=allow_drift,
        unproven=unproven,
        sign_key=sign,
        force=force,
        progress=progress_bar,
    )


def verify(
    artifact: Annotated[Path, typer.Argument(help="A folder that `mmopt export` wrote.")],
    data: Annotated[
        Path | None,
        typer.Option(help='JSON Lines with "text" and "label", to measure accuracy on.'),
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="An Ed25519 key, PEM, that must have signed ARTIFACT.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Mark an unproven artifact verified if it holds here.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(help="With --record: the private key to sign it again with.")
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Check ARTIFACT: signature, every file, placement, and parity on its stored samples.

    Exit codes: 0 holds, 1 does not hold, 2 bad input, 3 could not run.
    """
    from mmopt_export.verification import verify as run

    return run(
        artifact,
        data=data,
        public_key=public_key,
        record=record,
        sign_key=sign,
        progress=progress_bar,
    )

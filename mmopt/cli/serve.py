"""`mmopt serve`."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report
from mmopt_kernels.errors import MmoptError

_SERVE_EXTRA = ("starlette", "uvicorn")


def serve(
    artifact: Annotated[Path, typer.Argument(help="A folder that `mmopt export` wrote.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free port.")] = 8000,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait while one runs; more get 503.")
    ] = 64,
    threads: Annotated[
        int | None, typer.Option(help="ONNX Runtime's threads. Default: every core.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key that every request must carry."),
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Serve ARTIFACT over HTTP with the Open Inference Protocol (V2) until SIGTERM or Ctrl-C.

    One line on stderr says when it is ready. The report comes at the end.

    Exit codes: 0 stopped and drained, 1 a file of the artifact was changed, 2 bad input, 3 could
    not run.
    """
    try:
        from mmopt.serve.server import serve as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _SERVE_EXTRA:
            raise
        raise MmoptError(
            f"{missing} is not installed, expected it for `mmopt serve`. "
            "Run `pip install 'mmopt[serve]'`."
        ) from error
    return run(
        artifact,
        host=host,
        port=port,
        queue=queue,
        threads=threads,
        api_key_env=api_key_env,
    )

"""The contract that every command keeps.

Results go to stdout: a rich rendering, or with `--json` exactly one JSON document. Progress and
errors go to stderr. Exit codes: 0 done and holds, 1 ran and does not hold, 2 bad usage or bad
input, 3 could not run or could not decide.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec, Protocol

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from mmopt_kernels.errors import MmoptError

P = ParamSpec("P")

stdout = Console()
stderr = Console(stderr=True)

JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")
]


class Report(Protocol):
    """What a library function returns to its command."""

    @property
    def exit_code(self) -> int:
        """0 when what was asked holds, 1 when it ran and does not hold."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; a metric that was not measured is None."""

    def render(self) -> RenderableType:
        """The report for a terminal."""


def command(function: Callable[P, Report]) -> Callable[P, None]:
    """Turn a function that returns a `Report` into a command that keeps the contract above.

    The function must have a `json` parameter (`JsonOption`).
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs["json"])
        try:
            report = function(*args, **kwargs)
        except MmoptError as error:
            show_error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            stderr.print("interrupted")
            raise typer.Exit(130) from None
        if as_json:
            print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        else:
            stdout.print(report.render())
        raise typer.Exit(report.exit_code)

    # Typer reads the return annotation too; the wrapper returns nothing.
    run.__annotations__ = {**function.__annotations__, "return": None}
    return run


def show_error(error: MmoptError, as_json: bool) -> None:
    """Print one message on stderr and, with `--json`, the same as a document on stdout."""
    stderr.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        document = {
            "error": {"type": type(error).__name__, "message": str(error)},
            "exit_code": error.exit_code,
        }
        print(json.dumps(document, indent=2))


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show one bar on stderr while the block runs; the block calls what it gets to advance it.

    It is the command line's `mmopt_export.progress.Progress`. Where stderr is not a terminal, one
    line says what began.
    """
    if not stderr.is_terminal:
        print(description, file=sys.stderr, flush=True)
        yield lambda _steps: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=stderr) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)

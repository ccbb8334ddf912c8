"""The contract that every command keeps.

Results go to stdout: a rich rendering, or with `--json` exactly one JSON document. Progress and
errors go to stderr. Exit codes: 0 done and holds, 1 ran and does not hold, 2 bad usage or bad
input, 3 could not run or could not decide.
"""

import errno
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

from mmopt_kernels.errors import InputError, MmoptError

P = ParamSpec("P")

stdout = Console()
stderr = Console(stderr=True)

_MOST_OF_PATH = 80  # characters that a message about it shows

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
        except (MmoptError, OSError) as error:
            said = error if isinstance(error, MmoptError) else _of_path(error)
            if said is None:
                raise
            show_error(said, as_json)
            raise typer.Exit(said.exit_code) from None
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


def _of_path(error: OSError) -> MmoptError | None:
    """What an error says of a path that a user gave; None where it is about something else.

    Here for all commands: `Path.exists` and its like, which each of them asks first, raise these.
    """
    if error.filename is None:
        return None
    name = str(error.filename)
    shown = name if len(name) <= _MOST_OF_PATH else f"{name[:_MOST_OF_PATH]}..."
    if error.errno == errno.ENAMETOOLONG:
        return InputError(
            f"{shown} is longer than a path or a name in it can be, expected one that exists. "
            "Check what was passed."
        )
    if error.errno == errno.EACCES:
        return MmoptError(
            f"{shown} may not be looked at (permission denied), expected a path that you may use. "
            "Change its permissions, or pass another."
        )
    return None


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

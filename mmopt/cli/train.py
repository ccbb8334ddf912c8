"""`mmopt train`."""

from pathlib import Path
from typing import Annotated

import typer

from mmopt.cli.output import JsonOption, Report, progress_bar


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value over the recipe, such as training.epochs=1."),
    ] = None,
    json: JsonOption = False,
) -> Report:
    """Fine-tune the model of RECIPE and save its adapter.

    Exit codes: 0 done, 1 an adapter has no gradient, the step has a graph break or the weights
    diverged, 2 bad input, 3 could not run.
    """
    from mmopt.train import read_recipe, run_recipe

    return run_recipe(read_recipe(recipe, set_ or ()), progress=progress_bar)

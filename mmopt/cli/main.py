"""The entry point: one Typer application, one module per command beside this one.

Command modules import torch and transformers inside the function, so that `mmopt --help` and
`mmopt doctor` answer at once and work in a broken installation.
"""

import warnings

import typer

from mmopt.cli.bench import bench_app
from mmopt.cli.compile import compile_command
from mmopt.cli.deploy import deploy_app
from mmopt.cli.doctor import doctor
from mmopt.cli.export import export, verify
from mmopt.cli.kernels import kernels
from mmopt.cli.output import command
from mmopt.cli.serve import serve
from mmopt.cli.train import train
from mmopt_kernels._version import __version__

app = typer.Typer(
    name="mmopt",
    help="Fine-tune multimodal Hugging Face models and deploy them on ONNX Runtime.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


# In the order of the work; each with an example below its help.
for _name, _function, _example in (
    ("doctor", doctor, "mmopt doctor --target cuda"),
    ("train", train, "mmopt train recipe.yaml --set training.epochs=1"),
    ("compile", compile_command, "mmopt compile MODEL --adapter A --mode train"),
    ("kernels", kernels, "mmopt kernels --target sm_90 --check bench/baselines/kernels.json"),
    ("export", export, "mmopt export MODEL --adapter A -o out --precision int8"),
    ("verify", verify, "mmopt verify out --data test.jsonl"),
    ("serve", serve, "mmopt serve out --port 8000"),
):
    app.command(_name, epilog=f"Example: {_example}")(command(_function))
app.add_typer(deploy_app, name="deploy")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line."""
    # Their deprecations are ours to act on, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    app()

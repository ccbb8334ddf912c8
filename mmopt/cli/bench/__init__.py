"""`mmopt bench`: one module per subcommand beside this one."""

import typer

from mmopt.cli.bench.compare import compare
from mmopt.cli.bench.exact import exact
from mmopt.cli.bench.gate import gate
from mmopt.cli.bench.report import report
from mmopt.cli.bench.run import run
from mmopt.cli.output import command

bench_app = typer.Typer(
    help="Latency, throughput and memory of models and artifacts.", no_args_is_help=True
)


@bench_app.callback()
def _group() -> None:
    """Latency, throughput and memory of models and artifacts."""


# In the order of the work; each with an example below its help.
for _name, _function, _example in (
    ("run", run, "mmopt bench run model/ artifact/ --grid batch=1,8 --grid length=128 -o b.json"),
    ("compare", compare, "mmopt bench compare before.json after.json -o page.html"),
    ("gate", gate, "mmopt bench gate --base origin/main bench/ --margin 3%"),
    ("exact", exact, "mmopt bench exact bench/ --baseline bench/baselines/exact.json"),
    ("report", report, "mmopt bench report gate.json b.json --html r.html --markdown r.md"),
):
    bench_app.command(_name, epilog=f"Example: {_example}")(command(_function))

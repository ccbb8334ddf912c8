"""What the compiler makes of other tiles than those in `mmopt_kernels/tables`; needs no GPU.

Compile candidates for cases of `mmopt_kernels.inspection` (those of ``mmopt kernels --all``), the
largest tile first. Each line is one candidate in one case; of a candidate that spills or does not
compile the other cases are left out:

    python scripts/sweep_tiles.py sweep sm_90 attention_backward_dq \\
        bf16-d128-causal bf16-d80-causal --rows 64,128 --columns 64,128 --warps 8 --stages 2,3

Write into the ``why`` of every static entry of a table what the compiler reports for it, the worst
of all cases that choose it. It fails where an entry is chosen in no case: then nothing is known of
it, and the cases lack one:

    python scripts/sweep_tiles.py record sm_90 sm_100
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from mmopt_kernels import _triton, tuning
from mmopt_kernels.inspection import CASES, TARGETS, worker
from mmopt_kernels.inspection.capture import recording

TABLES = Path(tuning.__file__).with_name("tables")

# Entries of tables whose kernel is another's with other arguments.
LAUNCHED = {"attention_backward_one_pass": "attention_backward_dkdv"}

# Of one candidate, where a message takes the place of figures that there are none of.
Figures = Mapping[str, Any] | str


def measure(target: str, kernel: str, case: str, config: tuning.Config) -> Figures:
    """The most of each figure over a case's launches of the kernel, with this configuration."""
    # A process of its own: the compiler may end it, and the worker remembers what a case launched.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        try:
            return process.submit(_measure, target, kernel, case, dict(config)).result()
        except BrokenProcessPool:
            return "the compiler ended"


def _measure(target: str, kernel: str, case: str, config: tuning.Config) -> Figures:
    with tempfile.TemporaryDirectory() as cache, tuning.forcing({kernel: config}):
        # From the cache comes no log, which has the registers.
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        try:
            planned = enumerate(worker.plan(target, case))
            # Of launches that compile to the same code one: the others would come from the cache.
            name = LAUNCHED.get(kernel, kernel)
            found = {one["key"]: index for index, one in planned if one["kernel"] == name}
            indices = list(found.values())
            built = [worker.build(target, case, index, None) for index in indices]
        except Exception as error:  # noqa: BLE001 - one candidate's failure is one line
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    worst = {name: max(one[name] for one in built) for name in ("registers", "spilled_bytes")}
    shared = max(one["shared_bytes"] for one in built)
    # What only one of two launches has would be no such figure.
    names = set.intersection(*(set(one["matrix_instructions"]) for one in built))
    return worst | {"shared_bytes": shared, "matrix": sorted(names)}


def show(target: str, figures: Figures) -> str:
    if isinstance(figures, str):
        return figures
    spilled, shared = figures["spilled_bytes"], figures["shared_bytes"]
    spills = f"spills {spilled} bytes" if spilled else "no spill"
    # The fastest, where several stand in the code.
    matrix = [name for name in TARGETS[target].matrix if name in figures["matrix"]][:1]
    too_much = " (too much)" if shared > TARGETS[target].shared_per_block else ""
    return (
        f"{figures['registers']} registers, {spills}, {-(-shared // 1024)} KiB shared{too_much}, "
        f"{''.join(matrix) or 'no matrix instructions'}"
    )


def candidates(kernel: str, chosen: argparse.Namespace) -> list[dict[str, int]]:
    """All combinations, the largest tile first, then the most stages."""
    axes = {
        "BLOCK_M": chosen.rows,
        "BLOCK_N": chosen.columns,
        "BLOCK_K": chosen.depths,
        "GROUP_M": [8],
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "TMA": chosen.tma,
        "SPLIT": chosen.split,
        "BULK": chosen.bulk,
    }
    axes = {name: axes[name] for name in tuning.FIELDS[kernel]}
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return sorted(found, key=lambda one: (-math.prod(_blocks(one)), -one["num_stages"]))


def _blocks(config: tuning.Config) -> list[int]:
    return [size for name, size in config.items() if name.startswith("BLOCK_")]


def sweep(chosen: argparse.Namespace) -> None:
    for config in candidates(chosen.kernel, chosen):
        for case in chosen.cases:
            name = case if "/" in case else f"attention/{case}"
            figures = measure(chosen.target, chosen.kernel, name, config)
            print(f"{_short(config):28} {case:28} {show(chosen.target, figures)}", flush=True)
            if isinstance(figures, str) or figures["spilled_bytes"]:
                break


def _short(config: tuning.Config) -> str:
    flags = [name for name in ("TMA", "SPLIT", "BULK") if config.get(name)]
    tile = "x".join(map(str, _blocks(config)))
    return " ".join([tile, f"w{config['num_warps']} s{config['num_stages']}", *flags])


def chosen_in(target: str) -> dict[int, list[str]]:
    """The cases that launch a kernel with each entry of the shipped table, by its place in it."""
    entries = tuning.entries(target)
    found: dict[int, list[str]] = {}
    for case in CASES:
        # Nothing is forced, only heard what the kernels ask.
        with _triton.assuming(target), recording(), tuning.forcing({}) as asked:
            case.launch()
        for key in asked.values():
            entry = tuning.nearest(key)
            # The other dtype of 16 bits compiles to the same code.
            if entry is not None and entry.dtype == key.dtype:
                found.setdefault(entries.index(entry), []).append(case.name)
    return found


def record(chosen: argparse.Namespace) -> None:
    if os.environ.get(tuning.TABLES):
        raise SystemExit(f"{tuning.TABLES} is set, expected the shipped tables alone. Unset it.")
    for target in chosen.targets:
        path = TABLES / f"{target}.json"
        rows = json.loads(path.read_text())["entries"]
        cases = chosen_in(target)
        unknown = [row for index, row in enumerate(rows) if index not in cases]
        if unknown:
            raise SystemExit(
                f"{target}: no case chooses {unknown}, so that nothing is known of it."
            )
        for index, row in enumerate(rows):
            if row["source"] == "static":
                row["why"] = why(target, row, cases[index])
                config = _short(row["config"])
                print(f"{target} {row['kernel']} {row['width']} {config}: {row['why']}", flush=True)
        path.write_text(table_text(target, rows))


def table_text(target: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each field of an entry, as the tables are written."""
    fields = [
        ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in row.items())
        for row in rows
    ]
    entries = ",\n".join(f"  {{\n{row}\n  }}" for row in fields)
    return f'{{"target": {json.dumps(target)}, "entries": [\n{entries}\n]}}\n'


def why(target: str, row: Mapping[str, Any], cases: Sequence[str]) -> str:
    """The figures of the case that is worst off."""
    found: list[tuple[list[int], str, Figures]] = []
    for case in cases:
        figures = measure(target, row["kernel"], case, row["config"])
        if isinstance(figures, str):
            raise SystemExit(f"{target}: {row} in {case}: {figures}")
        order = [figures[name] for name in ("spilled_bytes", "registers", "shared_bytes")]
        found.append((order, case, figures))
    _, case, figures = max(found, key=lambda one: one[0])
    about = show(target, figures)
    return f"triton {triton.__version__}: {about} ({case.removeprefix('attention/')})"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def flags(text: str) -> list[bool]:
    return [{"on": True, "off": False}[part] for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("sweep", help="compile candidates")
    one.add_argument("target", choices=TARGETS)
    one.add_argument("kernel", choices=tuning.FIELDS)
    one.add_argument(
        "cases", nargs="+", metavar="CASE", help="bf16-d128-causal of attention, or op/case"
    )
    one.add_argument("--rows", type=numbers, default=[64, 128], help="BLOCK_M: 64,128")
    one.add_argument("--columns", type=numbers, default=[32, 64, 128], help="BLOCK_N: 32,64,128")
    one.add_argument("--depths", type=numbers, default=[64], help="BLOCK_K, of LoRA: 32,64")
    one.add_argument("--warps", type=numbers, default=[8])
    one.add_argument("--stages", type=numbers, default=[2, 3])
    one.add_argument("--tma", type=flags, default=[False], help="on, off or on,off")
    one.add_argument("--split", type=flags, default=[False])
    one.add_argument("--bulk", type=flags, default=[False])
    one.set_defaults(do=sweep)
    all_of_it = commands.add_parser("record", help="write figures into the tables")
    all_of_it.add_argument("targets", nargs="+", choices=TARGETS)
    all_of_it.set_defaults(do=record)
    chosen = parser.parse_args()
    chosen.do(chosen)


if __name__ == "__main__":
    main()

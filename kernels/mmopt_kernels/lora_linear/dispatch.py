"""Which steps of the LoRA linear layer the vendor's library runs, and which our kernels.

The steps are the functions of `library` and the launchers of `kernel` and `kernel_backward`, which
do the same. ``impl="auto"`` takes our kernel where a rule of ``dispatch.json`` says so for the
target, and the library elsewhere. A rule carries the measurement or the arithmetic that it is from,
in bytes for each element of an activation, of e bytes itself:

- *down*, *down_backward*: one read of x either way, e. With dropout the library reads x, writes
  dropout(x) and reads that, 3 e; we draw the mask on the way.
- *add*: the adapter's share of dx. Without dropout the library writes it and the layer's GEMM,
  which adds to it, reads it, 2 e; we read and write what that GEMM wrote, as much. With dropout the
  library also masks it: 4 e.
- *up_backward*: the library reads dy twice, 2 e. We read it once and write and read partial sums:
  e + 8 R / T + 8 S R / N, where T is the rows of a tile, S over how many programs N is split. It
  pays for R < e T / 8, less what the split takes.
- *up*, *dx*: the layer's own GEMM with the adapter inside saves one read and one write of the
  result, 2 e for each element of it, and loses whatever Triton's GEMM is slower by: a part f of
  2 L FLOP for each element, where L is the length of the sum, K for up and N for dx. It pays for
  f < e P / (B L), P and B being the FLOP and the bytes that the GPU does in a second: below a tenth
  from a length of a few thousand on. On an H200 only dx from 1024 outputs or fewer pays.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast, get_args

import torch

Choice = Literal["library", "triton"]
Step = Literal["down", "up", "up_backward", "down_backward", "dx", "add"]
STEPS: tuple[Step, ...] = get_args(Step)


@dataclass(frozen=True)
class Plan:
    """Who runs each step: ``"library"`` or ``"triton"``.

    Attributes:
        dx: ``"triton"`` is `input_backward`, which is for one projection alone.
        add: the adapter's share of dx, where dx is ``"library"`` or sums several projections.
    """

    down: Choice
    up: Choice
    up_backward: Choice
    down_backward: Choice
    dx: Choice
    add: Choice


@dataclass(frozen=True)
class Rule:
    """Calls for which a step is Triton's. A range is from the least to the greatest; None is open.

    Attributes:
        dropout: only with, or only without, or either (None).
        rows: of M.
        ranks: of R.
        sums: of the length of the step's large sum: K for down and up, N for up_backward and dx, M
            for down_backward, R for add.
        source: the arithmetic or the measurement.
    """

    step: Step
    dtypes: tuple[torch.dtype, ...]
    dropout: bool | None
    rows: tuple[int, int | None]
    ranks: tuple[int, int | None]
    sums: tuple[int, int | None]
    source: str

    def holds(self, dtype: torch.dtype, M: int, R: int, length: int, dropout: bool) -> bool:
        return (
            dtype in self.dtypes
            and self.dropout in (None, dropout)
            and _within(M, self.rows)
            and _within(R, self.ranks)
            and _within(length, self.sums)
        )


def _within(x: int, limits: tuple[int, int | None]) -> bool:
    return limits[0] <= x and (limits[1] is None or x <= limits[1])


@functools.cache
def table() -> Mapping[str, tuple[Rule, ...]]:
    """The rules by target."""
    text = resources.files(__package__).joinpath("dispatch.json").read_text()
    return {
        target: tuple(_rule(entry) for entry in entries)
        for target, entries in json.loads(text).items()
    }


def _rule(entry: Mapping[str, Any]) -> Rule:
    return Rule(
        step=cast("Step", entry["step"]),
        dtypes=tuple(getattr(torch, name) for name in entry["dtypes"]),
        dropout=entry["dropout"],
        rows=tuple(entry["rows"]),
        ranks=tuple(entry["ranks"]),
        sums=tuple(entry["sums"]),
        source=entry["source"],
    )


def rules_for(target: str) -> tuple[Rule, ...]:
    """Those of the target, or of the nearest below it, or else of the least above.

    Of the same vendor: an NVIDIA GPU that came later has at least the units of an earlier one.
    AMD's names have no such order; one that is not in the table has no rules.
    """
    rules = table()
    if target in rules:
        return rules[target]
    if not target.startswith("sm_"):
        return ()
    known = sorted(int(name[3:]) for name in rules if name.startswith("sm_"))
    below = [capability for capability in known if capability < int(target[3:])]
    return rules[f"sm_{below[-1] if below else known[0]}"]


def plan(
    impl: str, target: str, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Plan:
    """Who runs each step of a call.

    Args:
        impl: ``"triton"`` and ``"addmm"`` leave nothing to choose; ``"auto"`` goes by the table.
        target: as `_triton.target` names it; the CPU's has no rules.
        M, N, K, R: rows, outputs, inputs, and rank, of all projections of a group together for
            down, down_backward and add.
    """
    if impl == "triton":
        return _same("triton")
    if impl == "addmm":
        return _same("library")
    return _planned(target, dtype, M, N, K, R, dropout)


def _same(choice: Choice) -> Plan:
    return Plan(*[choice] * len(STEPS))


@functools.lru_cache(maxsize=4096)
def _planned(
    target: str, dtype: torch.dtype, M: int, N: int, K: int, R: int, dropout: bool
) -> Plan:
    lengths = {"down": K, "up": K, "up_backward": N, "down_backward": M, "dx": N, "add": R}
    found = {
        rule.step
        for rule in rules_for(target)
        if rule.holds(dtype, M, R, lengths[rule.step], dropout)
    }
    return Plan(**{step: "triton" if step in found else "library" for step in STEPS})

"""The launches that are inspected, as data: which op, dtype, sizes and features.

A kernel's code follows from its dtype, how wide a head is (the tile), and which features are on;
lengths only choose among tiles. Compiling takes seconds each, so that the default grid has what
can differ, and `everywhere` what is left to ``--all``:

- head dimensions 64, 128 and 256 have a tile each, 80 is padded to 128;
- "causal" is the least code; "everything" has intervals, softcap, sinks, dropout and grouped
  heads, and so the most registers; "uncapped" and "undropped" are without one of them, because
  tables have tiles for each;
- sm_90 has the promise to keep (`mmopt.measure.kernels.rules`), and is looked at most closely;
- float16 compiles to the code of bfloat16 with other names of instructions: left to ``--all``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmopt_kernels.inspection.targets import TARGETS

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EVERYWHERE = frozenset(TARGETS)
HOPPER = frozenset({"sm_90"})
NOWHERE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: `op/what`, part of every kernel's name in a report.
        launch: calls the op's own launcher, on tensors that no kernel ever touches.
        dtype: of the operands.
        head_dim: None where the op has no heads.
        default: the targets whose default grid has it.
    """

    name: str
    launch: Callable[[], None] = field(repr=False, compare=False)
    dtype: str
    head_dim: int | None
    default: frozenset[str]


def _heads(dtype: str, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """``[B, H, S, D]`` as a projection leaves it: stored ``[B, S, H, D]``."""
    stored = torch.empty(
        batch, length, heads, head_dim, dtype=_DTYPES[dtype], device=torch.device("meta")
    )
    return stored.transpose(1, 2)


def _attention(dtype: str, head_dim: int, features: str, default: frozenset[str]) -> Case:
    """Forward and backward of 2 sequences of 4096 tokens."""

    def launch() -> None:
        from mmopt_kernels.attention import kernel, kernel_backward

        everything = features.startswith("everything")
        batch, heads, length = 2, 16, 4096
        q = _heads(dtype, batch, heads, length, head_dim)
        k = _heads(dtype, batch, heads // 4 if everything else heads, length, head_dim)
        lo = hi = sinks = seed = grad_lse = None
        if everything or features == "intervals":
            lo, hi = (q.new_empty(batch, length, dtype=torch.int32) for _ in range(2))
        if everything:
            sinks = q.new_empty(heads)
            seed = q.new_empty((), dtype=torch.int64)
            grad_lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        softcap, dropout = (30.0, 0.1) if everything else (None, 0.0)
        if features == "everything-uncapped":
            softcap = None
        if features == "everything-undropped":
            seed, dropout = None, 0.0
        scale: float = head_dim**-0.5
        rest = (lo, hi, sinks, seed, features != "full", scale, softcap, dropout)
        out, lse = kernel.launch(q, k, k, *rest)
        kernel_backward.launch_backward(out, grad_lse, q, k, k, out, lse, *rest)

    return Case(f"attention/{dtype}-d{head_dim}-{features}", launch, dtype, head_dim, default)


def _decode(dtype: str, head_dim: int, group: int, features: str, default: frozenset[str]) -> Case:
    """One query of 4 sequences against a cache of 8192 keys."""

    def launch() -> None:
        from mmopt_kernels.attention import kernel_decode

        everything = features == "everything"
        batch, heads, length = 4, 8, 8192
        q = _heads(dtype, batch, heads * group, 1, head_dim)
        k = _heads(dtype, batch, heads, length, head_dim)
        lo = hi = sinks = None
        if everything:
            lo, hi = (q.new_empty(batch, 1, dtype=torch.int32) for _ in range(2))
            sinks = q.new_empty(heads * group)
        softcap = 30.0 if everything else None
        kernel_decode.launch_decode(
            q, k, k, lo, hi, sinks, None, True, head_dim**-0.5, softcap, 0.0
        )

    name = f"decode/{dtype}-d{head_dim}-g{group}-{features}"
    return Case(name, launch, dtype, head_dim, default)


def _lora_linear(dtype: str, rows: int, rank: int, default: frozenset[str]) -> Case:
    """A square layer of 1024 features; the adapter in float32, as it is trained."""

    def launch() -> None:
        from mmopt_kernels.lora_linear import kernel

        # On the CPU and small: the launcher multiplies x and A with PyTorch, and turns autocast
        # off, which does not know meta tensors.
        x, weight = (torch.zeros(n, 1024, dtype=_DTYPES[dtype]) for n in (rows, 1024))
        a, b = torch.zeros(rank, 1024), torch.zeros(1024, rank)
        kernel.launch(x, weight, a, b, x.new_zeros(1024), 2.0)

    return Case(f"lora_linear/{dtype}-m{rows}-r{rank}", launch, dtype, None, default)


CASES: tuple[Case, ...] = (
    _attention("bf16", 64, "causal", EVERYWHERE),
    _attention("bf16", 128, "causal", EVERYWHERE),
    _attention("bf16", 256, "causal", EVERYWHERE),
    _attention("bf16", 128, "everything", EVERYWHERE),
    _attention("bf16", 64, "everything", HOPPER),
    _attention("bf16", 80, "causal", HOPPER),
    _attention("bf16", 128, "intervals", HOPPER),
    _attention("fp32", 64, "causal", HOPPER),
    _decode("bf16", 128, 4, "causal", EVERYWHERE),
    _decode("bf16", 128, 4, "everything", HOPPER),
    _lora_linear("bf16", 4096, 16, EVERYWHERE),
    _lora_linear("bf16", 16, 16, EVERYWHERE),
    _lora_linear("fp32", 4096, 16, EVERYWHERE),
    # Only with --all.
    *(_attention("bf16", d, "full", NOWHERE) for d in (64, 80, 128)),
    *(_attention("bf16", d, "intervals", NOWHERE) for d in (64, 256)),
    # Neither 16 nor 8 divides the strides of 100 and 36: no descriptors, more addresses.
    *(_attention("bf16", d, "causal", NOWHERE) for d in (16, 36, 72, 100)),
    *(_attention("bf16", d, "everything", NOWHERE) for d in (16, 36, 72, 80, 100, 256)),
    *(
        _attention("bf16", d, f"everything-{without}", NOWHERE)
        for d in (64, 72, 100, 128, 256)
        for without in ("uncapped", "undropped")
    ),
    *(_attention("fp16", d, f, NOWHERE) for d in (64, 128) for f in ("causal", "everything")),
    *(_attention("fp32", d, "everything", NOWHERE) for d in (64, 128, 256)),
    *(_decode("bf16", d, g, "everything", NOWHERE) for d in (64, 256) for g in (1, 8)),
    _lora_linear("fp16", 4096, 64, NOWHERE),
    _lora_linear("bf16", 4096, 64, NOWHERE),
)


_BY_NAME = {case.name: case for case in CASES}


def case_named(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]

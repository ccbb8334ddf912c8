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
from mmopt_kernels.quantized import NF4Weight, flatten

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


def _one_pass(dtype: str, head_dim: int, features: str, default: frozenset[str]) -> Case:
    """Backward in one pass, which no table asks for yet, of 1 sequence of 16384 tokens.

    With the first tile to tune with on sm_90, elsewhere with that of the pass which it extends.
    """

    def launch() -> None:
        from mmopt_kernels import _triton, tuning
        from mmopt_kernels.attention import kernel_backward

        batch, heads, length = 1, 16, 16384
        q = _heads(dtype, batch, heads, length, head_dim)
        k = _heads(dtype, batch, heads // 2, length, head_dim)
        lo = hi = None
        if features == "intervals":
            lo, hi = (q.new_empty(batch, length, dtype=torch.int32) for _ in range(2))
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        rest = (lo, hi, None, None, features == "causal", head_dim**-0.5, None, 0.0)
        tile, target = kernel_backward.ONE_PASS[head_dim][0], _triton.target(q.device)
        if target != "sm_90":
            heuristic = kernel_backward.config_dkdv(q.dtype, head_dim, target)
            tile = {name: heuristic.get(name, False) for name in tile}
        with tuning.forcing({"attention_backward_one_pass": tile}):
            kernel_backward.launch_backward(q, None, q, k, k, q, lse, *rest)

    name = f"one_pass/{dtype}-d{head_dim}-{features}"
    return Case(f"attention/{name}", launch, dtype, head_dim, default)


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

        x, weight, s = (
            _matrix(dtype, *shape) for shape in ((rows, 1024), (1024, 1024), (rows, rank))
        )
        kernel.up(x, weight, s, _matrix("fp32", 1024, rank), x.new_empty(1024), 2.0)

    return Case(f"lora_linear/{dtype}-m{rows}-r{rank}", launch, dtype, None, default)


def _lora_described(dtype: str, rank: int, default: frozenset[str]) -> Case:
    """Both large products through descriptors, which no table asks for yet, at a layer's size.

    With the first tiles to tune with.
    """

    def launch() -> None:
        from mmopt_kernels import tuning
        from mmopt_kernels.candidates import candidates
        from mmopt_kernels.lora_linear import kernel, kernel_backward

        x, weight = (_matrix(dtype, rows, 4096) for rows in (8192, 4096))
        s, a, b = (
            _matrix(dtype, 8192, rank),
            _matrix("fp32", rank, 4096),
            _matrix("fp32", 4096, rank),
        )
        names = ("lora_linear_forward", "lora_linear_input_backward")
        with tuning.forcing({name: candidates(name, rank)[1] for name in names}):
            kernel.up(x, weight, s, b, None, 2.0)
            kernel_backward.input_backward(x, weight, s, a, None, 0.0)

    return Case(f"lora_linear/described/{dtype}-m8192-r{rank}", launch, dtype, None, default)


def _lora_down(dtype: str, rows: int, rank: int, features: str, default: frozenset[str]) -> Case:
    """4096 features through the adapter's first factor, alone and with several adapters."""

    def launch() -> None:
        from mmopt_kernels.lora_linear import kernel

        x, a = _matrix(dtype, rows, 4096), _matrix(dtype, rank, 4096)
        kernel.down(x, a, *_drawn(x, features), *_adapters(x, rank, features))

    name = f"lora_down/{dtype}-m{rows}-r{rank}-{features}"
    return Case(name, launch, dtype, None, default)


def _lora_backward(
    dtype: str, rows: int, rank: int, features: str, default: frozenset[str]
) -> Case:
    """Every step of the backward of a square layer of 4096 features."""

    def launch() -> None:
        from mmopt_kernels.lora_linear import kernel_backward

        x, weight, a = (_matrix(dtype, n, 4096) for n in (rows, 4096, rank))
        s, b = _matrix(dtype, rows, rank), _matrix(dtype, 4096, rank)
        drawn, adapters = _drawn(x, features), _adapters(x, rank, features)
        ds, _ = kernel_backward.up_backward(x, s, b, 2.0, *adapters)
        kernel_backward.down_backward(ds, x, *drawn)
        kernel_backward.input_backward(x, weight, ds, a, *drawn)
        kernel_backward.add_masked_(x, ds, a, *drawn)

    name = f"lora_backward/{dtype}-m{rows}-r{rank}-{features}"
    return Case(name, launch, dtype, None, default)


def _nf4_weight(rows: int, columns: int, nested: bool) -> NF4Weight:
    blocks = -(-rows * columns // 64)
    main = torch.empty(rows * columns // 2, dtype=torch.uint8, device=torch.device("meta"))
    code = _matrix("fp32", 16)
    if not nested:
        return NF4Weight(main, _matrix("fp32", blocks), (rows, columns), code=code)
    return NF4Weight(
        packed=main,
        absmax=main.new_empty(blocks),
        shape=(rows, columns),
        nested_absmax=_matrix("fp32", -(-blocks // 256)),
        nested_code=_matrix("fp32", 256),
        offset=_matrix("fp32", 1),
        code=code,
    )


def _lora_nf4(dtype: str, rows: int, columns: int, nested: bool, default: frozenset[str]) -> Case:
    """Up to 64 rows through a quantized layer with 4096 outputs and its adapter of rank 16."""

    def launch() -> None:
        from mmopt_kernels.lora_linear import kernel_nf4

        x, s, b = (_matrix(dtype, *shape) for shape in ((rows, columns), (rows, 16), (4096, 16)))
        kernel_nf4.up_nf4(x, _nf4_weight(4096, columns, nested), s, b, x.new_empty(4096), 2.0)

    kind = "nested" if nested else "plain"
    return Case(f"lora_nf4/{dtype}-m{rows}-k{columns}-{kind}", launch, dtype, None, default)


def _dequantize_nf4(dtype: str, nested: bool, default: frozenset[str]) -> Case:
    """A square weight of 4096 features."""

    def launch() -> None:
        from mmopt_kernels.dequantize_nf4 import kernel

        main, (absmax, code, *inner), _ = flatten(_nf4_weight(4096, 4096, nested))
        outer, outer_code, offset = inner or (None, None, None)
        sizes = (4096, 4096, 64)
        kernel.launch(main, absmax, code, outer, outer_code, offset, *sizes, _DTYPES[dtype])

    kind = "nested" if nested else "plain"
    return Case(f"dequantize_nf4/{dtype}-{kind}", launch, dtype, None, default)


def _cross_entropy(
    dtype: str, features: str, default: frozenset[str], tokens: int = 128_256
) -> Case:
    """Logits replaced by their gradient: 256 rows of a vocabulary, some 4096 columns of it."""

    def launch() -> None:
        from mmopt_kernels.linear_cross_entropy import kernel
        from mmopt_kernels.linear_cross_entropy.chunked import Options

        room = -(-tokens // 16) * 16
        logits = _matrix(dtype, 256, room)[:, :tokens]
        labels, weights = logits.new_empty(256, dtype=torch.int64), _matrix("fp32", 256)
        everything = features == "everything"
        options = Options(-100, 30.0 if everything else None, 0.1 if everything else 0.0, 1e-4)
        kernel.launch(logits, labels, weights, options, room)
        columns = _matrix(dtype, 256, 4096)[:, : 4096 - (room - tokens)]
        kernel.launch_columns(columns, labels, weights, weights, options, 4096, tokens, 4096)

    vocabulary = "" if tokens == 128_256 else f"v{tokens}-"
    return Case(f"cross_entropy/{dtype}-{vocabulary}{features}", launch, dtype, None, default)


def _matrix(dtype: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES[dtype], device=torch.device("meta"))


def _drawn(x: Tensor, features: str) -> tuple[Tensor | None, float]:
    """Seed and probability of dropout."""
    return (x.new_empty(1, dtype=torch.int64), 0.1) if "dropout" in features else (None, 0.0)


def _adapters(x: Tensor, rank: int, features: str) -> tuple[Tensor | None, Tensor | None]:
    """Which adapter each row and each column is of."""
    if "adapters" not in features:
        return None, None
    return x.new_empty(x.shape[0], dtype=torch.int32), x.new_empty(rank, dtype=torch.int32)


def _dropout(dtype: str, default: frozenset[str]) -> Case:
    """4096 rows of 4096 features."""

    def launch() -> None:
        from mmopt_kernels.dropout import kernel

        x = _matrix(dtype, 4096, 4096)
        kernel.launch(x, x.new_empty(1, dtype=torch.int64), 0.1)

    return Case(f"dropout/{dtype}", launch, dtype, None, default)


CASES: tuple[Case, ...] = (
    _attention("bf16", 64, "causal", EVERYWHERE),
    _attention("bf16", 128, "causal", EVERYWHERE),
    _attention("bf16", 256, "causal", EVERYWHERE),
    _attention("bf16", 128, "everything", EVERYWHERE),
    _attention("bf16", 64, "everything", HOPPER),
    _attention("bf16", 80, "causal", HOPPER),
    _attention("bf16", 128, "intervals", HOPPER),
    # 8 does not divide the strides of 100 and 36: no descriptors, and loads of 8 bytes.
    _attention("bf16", 100, "causal", HOPPER),
    _attention("bf16", 100, "everything", HOPPER),
    _attention("bf16", 36, "everything", HOPPER),
    _attention("fp32", 64, "causal", HOPPER),
    _one_pass("bf16", 64, "causal", EVERYWHERE),
    _one_pass("bf16", 64, "intervals", HOPPER),
    *(_one_pass("bf16", 128, f, HOPPER) for f in ("causal", "intervals")),
    _decode("bf16", 128, 4, "causal", EVERYWHERE),
    _decode("bf16", 128, 4, "everything", HOPPER),
    _decode("bf16", 100, 1, "causal", HOPPER),
    _lora_linear("bf16", 4096, 16, EVERYWHERE),
    _lora_linear("bf16", 16, 16, EVERYWHERE),
    _lora_linear("fp32", 4096, 16, EVERYWHERE),
    _lora_linear("bf16", 4096, 8, HOPPER),
    *(_lora_described("bf16", r, HOPPER) for r in (16, 64)),
    *(_lora_down("bf16", 4096, r, f, EVERYWHERE) for r in (16, 64) for f in ("plain", "dropout")),
    _lora_down("bf16", 16, 16, "dropout", HOPPER),
    _lora_down("bf16", 4096, 192, "dropout-adapters", HOPPER),
    _lora_down("fp32", 4096, 16, "dropout", HOPPER),
    *(_lora_backward("bf16", 4096, r, "dropout", EVERYWHERE) for r in (16, 64)),
    *(_lora_backward("bf16", 4096, r, "plain", HOPPER) for r in (8, 16)),
    _lora_backward("bf16", 16, 16, "dropout", HOPPER),
    _lora_backward("bf16", 4096, 192, "dropout-adapters", HOPPER),
    _lora_backward("fp32", 4096, 16, "dropout", HOPPER),
    _dropout("bf16", EVERYWHERE),
    _lora_nf4("bf16", 16, 4096, True, EVERYWHERE),
    _lora_nf4("bf16", 64, 4096, True, EVERYWHERE),
    _dequantize_nf4("bf16", True, EVERYWHERE),
    _cross_entropy("bf16", "everything", EVERYWHERE),
    _cross_entropy("bf16", "everything", HOPPER, 50_257),
    # Only with --all.
    *(_attention("bf16", d, "full", NOWHERE) for d in (64, 80, 128)),
    *(_attention("bf16", d, "intervals", NOWHERE) for d in (64, 256)),
    *(_attention("bf16", d, "causal", NOWHERE) for d in (16, 36, 72)),
    *(_attention("bf16", d, "everything", NOWHERE) for d in (16, 72, 80, 256)),
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
    *(_lora_down("fp32", 4096, 64, f, NOWHERE) for f in ("plain", "dropout")),
    *(_lora_backward("fp32", 4096, 64, f, NOWHERE) for f in ("plain", "dropout")),
    *(_lora_backward("bf16", 4096, r, "plain", NOWHERE) for r in (64, 192)),
    _lora_down("bf16", 4096, 192, "plain", NOWHERE),
    _dropout("fp32", NOWHERE),
    _lora_nf4("bf16", 1, 4096, False, NOWHERE),
    _lora_nf4("bf16", 32, 4096, False, NOWHERE),
    # Blocks across rows and tiles, and rows that begin in the middle of a byte.
    *(_lora_nf4("bf16", 64, columns, True, NOWHERE) for columns in (4128, 4100)),
    *(_lora_nf4("fp32", rows, 4096, True, NOWHERE) for rows in (16, 64)),
    _dequantize_nf4("bf16", False, NOWHERE),
    _dequantize_nf4("fp32", True, NOWHERE),
    _cross_entropy("bf16", "plain", NOWHERE),
    _cross_entropy("fp32", "everything", NOWHERE),
)


_BY_NAME = {case.name: case for case in CASES}


def case_named(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]

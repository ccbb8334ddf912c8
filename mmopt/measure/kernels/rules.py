"""What compiled kernels must keep, whatever was recorded of them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmopt_kernels.inspection import Failure, Inspection, KernelFigures, target_named


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold.

    Attributes:
        target, name: of the kernel, or of the case where its launcher failed.
        rule: `compiles`, `launches`, `shared`, `spill`, `matrix`, `registers`, `missing` or `new`.
        value: what was found; None where there is no kernel, and for `compiles`.
        recorded: of the baseline; None where the rule needs none.
        limit: what value may be at most, or at least for `matrix`; None where that means nothing.
        message: what is wrong and what was expected, without the kernel's name.
    """

    target: str
    name: str
    rule: str
    value: int | None
    recorded: int | None
    limit: int | None
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The problem as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.target} {self.name}: {self.message}"


@dataclass(frozen=True)
class Promise:
    """Kernels of one target that never spill and always use its matrix unit.

    Attributes:
        target: its name.
        dtypes, head_dim: of the cases; a head dimension of at most this.
        instruction: what must stand in the code of every kernel that multiplies matrices.
        without_instruction: kernels that need not have it, and why.
    """

    target: str
    dtypes: frozenset[str]
    head_dim: int
    instruction: str
    without_instruction: Mapping[str, str]


PROMISES = (
    Promise(
        target="sm_90",
        dtypes=frozenset({"bf16", "fp16"}),
        head_dim=128,
        instruction="HGMMA",
        without_instruction={
            "attention_decode": "a tile has as many rows as a few queries of one group of heads, "
            "mostly fewer than the 64 that wgmma multiplies",
        },
    ),
)


def broken_rules(inspection: Inspection) -> list[Problem]:
    """Everything that does not hold without a baseline."""
    problems = [_failed(failure) for failure in inspection.failures]
    for kernel in inspection.kernels:
        problems += _limits(kernel)
        problems += _promises(kernel)
        problems += _multiplies_by_hand(kernel)
    return problems


def _failed(failure: Failure) -> Problem:
    return Problem(
        failure.target,
        failure.name,
        "compiles",
        value=None,
        recorded=None,
        limit=None,
        message=f"does not compile: {failure.reason}",
    )


def _limits(kernel: KernelFigures) -> Iterator[Problem]:
    target, used = target_named(kernel.target), kernel.shared_bytes
    if used > target.shared_per_block:
        yield Problem(
            kernel.target,
            kernel.name,
            "shared",
            value=used,
            recorded=None,
            limit=target.shared_per_block,
            message=f"takes {used} bytes of shared memory, the architecture gives a block "
            f"{target.shared_per_block}.",
        )
    elif kernel.occupancy.blocks == 0:
        yield Problem(
            kernel.target,
            kernel.name,
            "launches",
            value=0,
            recorded=None,
            limit=None,
            message=f"cannot be launched: no block fits a multiprocessor, for want of "
            f"{kernel.occupancy.limited_by}.",
        )


def _multiplies_by_hand(kernel: KernelFigures) -> Iterator[Problem]:
    """On no target: a tile that no matrix unit takes, or a compiler that left out the loop.

    Triton 3.9 made a nearly empty attention backward for sm_100 of a tile of 64 x 128 with
    descriptors and one stage; no figure but this one told.
    """
    if _multiplies(kernel) and not any(kernel.matrix_instructions.values()):
        instructions = " or ".join(target_named(kernel.target).matrix)
        yield Problem(
            kernel.target,
            kernel.name,
            "matrix",
            value=0,
            recorded=None,
            limit=1,
            message=f"multiplies matrices of {kernel.dot_bits} bits with no matrix instructions, "
            f"expected {instructions}.",
        )


def _multiplies(kernel: KernelFigures) -> bool:
    """In 16 bits or fewer, which every target has matrix instructions for."""
    return kernel.dot_bits is not None and kernel.dot_bits <= 16


def _promises(kernel: KernelFigures) -> Iterator[Problem]:
    for promise in PROMISES:
        if (
            kernel.target != promise.target
            or kernel.dtype not in promise.dtypes
            or kernel.head_dim is None
            or kernel.head_dim > promise.head_dim
        ):
            continue
        where = f"with 16-bit heads of up to {promise.head_dim}"
        if kernel.spilled_bytes:
            yield Problem(
                kernel.target,
                kernel.name,
                "spill",
                value=kernel.spilled_bytes,
                recorded=None,
                limit=0,
                message=f"spills {kernel.spilled_bytes} bytes, nothing may spill {where}.",
            )
        if (
            _multiplies(kernel)
            # Without any it is told once, whatever the target.
            and any(kernel.matrix_instructions.values())
            and kernel.kernel not in promise.without_instruction
            and not kernel.matrix_instructions.get(promise.instruction)
        ):
            yield Problem(
                kernel.target,
                kernel.name,
                "matrix",
                value=0,
                recorded=None,
                limit=1,
                message=f"has {shown_matrix(kernel.matrix_instructions)}, expected "
                f"{promise.instruction} {where}.",
            )


def shown_matrix(counts: Mapping[str, int]) -> str:
    """Matrix instructions as text."""
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "no matrix instructions"

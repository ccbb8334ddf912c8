"""What a launcher would launch: recorded in place of a launch, and specialized for a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mmopt_kernels import _triton
from mmopt_kernels.errors import MmoptError
from mmopt_kernels.inspection.cases import Case
from mmopt_kernels.inspection.targets import Target


@dataclass(frozen=True)
class Launch:
    """One call of `JITFunction.run`."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Specialized:
    """What Triton would compile for a launch, and launch it with.

    Attributes:
        kernel: its name.
        source: for `triton.compile`: signature, constants and what is known of the arguments.
        target, options: for `triton.compile`.
        grid: programs along each axis.
        config: how the launcher chose to tile it: the constants BLOCK_* and TMA, warps, stages.
    """

    kernel: str
    source: Any
    target: Any
    options: dict[str, Any]
    grid: tuple[int, ...]
    config: dict[str, int]


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches of Triton kernels inside are recorded, and nothing runs.

    Raises:
        MmoptError: kernels were decorated for Triton's interpreter, and cannot be compiled.
    """
    if _triton.interpreting():
        raise MmoptError(
            "TRITON_INTERPRET is set, expected a process without it, because kernels are then "
            "interpreted and nothing is compiled. Unset it before Python starts."
        )
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def capture(case: Case, target: Target) -> list[Specialized]:
    """What the launcher of ``case`` would launch on ``target``, in order."""
    with _triton.assuming(target.name), recording() as launches:
        case.launch()
    return [specialize(launch, target) for launch in launches]


def specialize(launch: Launch, target: Target) -> Specialized:
    """As `JITFunction.run` does it: by Triton's own binder, with the options of the target."""
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    kernel, kwargs = launch.kernel, dict(launch.kwargs)
    kwargs.setdefault("debug", kernel.debug)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = binder(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, given
    )
    chosen = {n: value for n, value in bound.items() if n.startswith("BLOCK_") or n == "TMA"}
    config = {name: int(value) for name, value in chosen.items()}
    config |= {"num_warps": options.num_warps, "num_stages": options.num_stages}
    grid = launch.grid(bound) if callable(launch.grid) else launch.grid
    return Specialized(
        kernel=kernel.__name__,
        source=ASTSource(kernel, signature, constants, attributes),
        target=gpu,
        options=dict(options.__dict__),
        grid=tuple(grid),
        config=config,
    )

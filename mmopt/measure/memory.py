"""Peak memory of one call in a process of its own, so that nothing before it counts."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmopt_kernels.errors import InputError, MmoptError


@dataclass(frozen=True)
class PeakMemory:
    """What one call needed at most. None where this machine cannot tell.

    Attributes:
        process_bytes: VmHWM, the largest resident set the process ever had: the interpreter, the
            libraries, the weights and the activations. Pages of mapped files count while they are
            resident. Unlike `ru_maxrss`, it does not start from the parent process.
        process_before_bytes: VmHWM when the call began: the interpreter and the libraries that
            came with the function.
        torch_allocated_bytes: torch's peak of allocated CUDA memory: live tensors, rounded to the
            allocator's blocks.
        torch_reserved_bytes: torch's peak of reserved CUDA memory: allocated plus cached; the
            CUDA context itself is in neither.
    """

    process_bytes: int | None
    process_before_bytes: int | None
    torch_allocated_bytes: int | None
    torch_reserved_bytes: int | None


def peak_resident_bytes() -> int | None:
    """VmHWM of this process in bytes; None where the system has no `/proc/self/status`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def torch_peaks() -> tuple[int | None, int | None]:
    """Peak allocated and reserved CUDA bytes of this process; None where CUDA is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def peak_memory(function: Callable[..., object], *arguments: object) -> PeakMemory:
    """Call `function(*arguments)` once in a fresh process and report that process's peaks.

    Args:
        function: importable by name (a module's function, not a lambda or a local one).
        arguments: picklable.

    Raises:
        InputError: the function or an argument cannot be handed to another process.
        MmoptError: the call failed there, or the process was killed (exit 3).
    """
    try:
        call = pickle.dumps((function, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"peak_memory: {function!r} cannot run in a process of its own ({error}). "
            "Pass a function that a module defines, and arguments that can be pickled."
        ) from error
    ran = subprocess.run(
        [sys.executable, "-m", "mmopt.measure._memory_worker"],
        input=call,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip().splitlines()
        raise MmoptError(
            f"peak_memory: the process that ran {function!r} ended with status "
            f"{ran.returncode}{f' ({said[-1]})' if said else ''}. A negative status is the signal "
            "that killed it; 9 is often the kernel short of memory."
        )
    answer = pickle.loads(ran.stdout)
    if not isinstance(answer, PeakMemory):
        raise TypeError(f"the worker answered {answer!r}")
    return answer

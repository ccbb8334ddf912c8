"""Peak memory of one call, in several meanings, each with a name of its own.

`peak_memory` runs a call in a process of its own, so that nothing before it counts; what it reads
there differs a little from run to run. `peak_tensor_bytes` and `ort_arena` count what an allocator
handed out, and are the same each time.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.measure._nvml import open_nvml
from mmopt_kernels.errors import InputError, MmoptError

# Between two looks at a GPU's memory; what is allocated and freed faster than this is missed.
DEVICE_SAMPLE_SECONDS = 0.005


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
        device_bytes: by how much the memory in use on the GPU grew at most, by NVML, sampled: with
            the CUDA context, libraries' workspaces, and whatever other processes did on that GPU
            meanwhile.
        tensor_bytes: `peak_tensor_bytes`: what torch's CPU allocator had handed out during a call
            and not taken back, at most: activations and outputs without the weights.
        ort_arena_bytes, ort_in_use_bytes: `ort_arena`: what ONNX Runtime's arena took from the
            system, and the most of it that was in use.
    """

    process_bytes: int | None
    process_before_bytes: int | None
    torch_allocated_bytes: int | None
    torch_reserved_bytes: int | None
    device_bytes: int | None = None
    tensor_bytes: int | None = None
    ort_arena_bytes: int | None = None
    ort_in_use_bytes: int | None = None


@dataclass(frozen=True)
class OrtArena:
    """ONNX Runtime's arena during a run, in bytes.

    Attributes:
        held_bytes: taken from the system; the arena grows and keeps what it has.
        in_use_bytes: the most that was handed out at once; the rest is fragments and reserve.
    """

    held_bytes: int
    in_use_bytes: int


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


@contextmanager
def watch_device_memory() -> Iterator[Callable[[], int | None]]:
    """Sample the memory in use on every GPU while the block runs.

    Yields:
        What answers, once the block is left, by how many bytes it grew at most on torch's current
        CUDA device; None without `nvidia-ml-py`, or where CUDA is not in use in this process.
    """
    before: dict[str, int] = {}
    highest: dict[str, int] = {}

    def growth() -> int | None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return None
        # NVML numbers the GPUs in its own order and does not know which of them torch sees.
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
        return highest[uuid] - before[uuid] if uuid in before else None

    with open_nvml() as gpus:
        for gpu in gpus:
            used = gpu.used_bytes()
            if used is not None:
                before[gpu.uuid] = highest[gpu.uuid] = used
        if not before:
            yield growth
            return
        over = threading.Event()

        def look() -> None:
            for gpu in gpus:
                highest[gpu.uuid] = max(highest.get(gpu.uuid, 0), gpu.used_bytes() or 0)

        def sample() -> None:
            while not over.wait(DEVICE_SAMPLE_SECONDS):
                look()

        thread = threading.Thread(target=sample, name="device memory", daemon=True)
        thread.start()
        try:
            yield growth
        finally:
            over.set()
            thread.join()
            look()


def peak_tensor_bytes(call: Callable[[], object]) -> int:
    """The most bytes at once that torch's CPU allocator handed out while `call` ran.

    Exact, and the same on every run of the same code: sizes are those that were asked for, in the
    order in which this thread asked (autograd's backward is part of it). Not counted: what existed
    before; memory of numpy, ONNX Runtime or oneDNN; allocations of other Python threads and of
    threads within an op. Ops that keep a buffer per thread ask for more with more threads, so fix
    `torch.set_num_threads` where the figure is compared.

    Args:
        call: run twice, and only the second run counts: the first compiles and fills caches. It
            should leave everything as it found it (no gradients that stay, say).
    """
    from torch.profiler import ProfilerActivity

    from mmopt.measure._profiler import quiet_profile

    call()
    with quiet_profile(ProfilerActivity.CPU, memory=True) as seen:
        call()
    # The tree has each allocation's address, which the public events have not; torch's own
    # _memory_profiler reads it there too.
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    return _peak(_allocations(results.experimental_event_tree()))


def ort_arena(
    model: Path,
    feeds: Mapping[str, Any],
    *,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
) -> OrtArena | None:
    """The size of ONNX Runtime's arena after two runs of `model`, in a session of its own.

    Read in the runtime's profile, which has the arena's state after each node: its Python package
    gives no other way to it. The same each time with one thread. Weights that the session copied
    into the arena, or packed for its kernels, are part of it.

    Args:
        model: the ONNX file.
        feeds: the inputs by name, numpy arrays.
        provider: the execution provider.
        threads: intra-op threads.

    Returns:
        The peaks; None where this version of ONNX Runtime does not record them (1.32 does), or the
        provider has no arena.

    Raises:
        MmoptError: the model cannot be loaded or run (exit 3).
    """
    from mmopt_export.runtime import open_session, runtime_errors

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "profile"
        session = open_session(model, provider=provider, threads=threads, profile=prefix)
        try:
            # The second run finds the memory pattern that the first one left, and follows it.
            for _ in range(2):
                session.run(None, dict(feeds))
        except runtime_errors() as error:
            raise MmoptError(f"ONNX Runtime cannot run {model}: {error}") from error
        finally:
            written = session.end_profiling()
        return _arena_peaks(json.loads(Path(written).read_text(encoding="utf-8")))


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


def _allocations(roots: Iterable[Any]) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation and release (bytes below 0), in order."""
    from torch._C._profiler import _ExtraFields_Allocation

    found = []
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return sorted(found, key=lambda allocation: allocation[0])


def _peak(allocations: Iterable[tuple[int, int, int]]) -> int:
    """The most bytes live at once; a release of what was not allocated among these is skipped."""
    live: dict[int, int] = {}
    now = highest = 0
    for _, address, size in allocations:
        if size > 0:
            live[address] = size
            now += size
            highest = max(highest, now)
        else:
            now -= live.pop(address, 0)
    return highest


def _arena_peaks(events: Iterable[Mapping[str, Any]]) -> OrtArena | None:
    """The largest figures of each provider's arena, added up over the providers."""
    held: dict[str, int] = {}
    in_use: dict[str, int] = {}
    for event in events:
        figures = event.get("args") or {}
        if "mem_arena_held" not in figures:
            continue
        provider = str(figures.get("provider"))
        held[provider] = max(held.get(provider, 0), int(figures["mem_arena_held"]))
        in_use[provider] = max(in_use.get(provider, 0), int(figures["mem_in_use_peak"]))
    return OrtArena(sum(held.values()), sum(in_use.values())) if held else None

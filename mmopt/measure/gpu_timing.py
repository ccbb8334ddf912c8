"""Three ways to time a call on a CUDA GPU, each with a name of its own.

The same matrix product reads 5.5 TFLOP/s where the host cannot keep up and 15.0 where its operands
are still in the L2 cache (triton pull request 10149): a figure means something only with the way
in which it was taken. All three are `Timer`s of `time_variants`.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from mmopt.measure._profiler import quiet_profile
from mmopt.measure.timers import TIMERS
from mmopt.measure.timing import Sampler, Timer, WallTimer, no_garbage_collection
from mmopt_kernels.errors import InputError, MmoptError, one_line

# Bytes written before each replay, in L2 caches: what is dirty in the cache counts as well, so one
# would do; twice leaves no line to a cache that is hashed unevenly. At least the second figure, so
# that the GPU is busy with it (some 80 microseconds at 3 TB/s) while the host enqueues the replay.
FLUSHED_CACHES = 2
FLUSHED_AT_LEAST = 256 << 20

# CUDA's events have a resolution of about half a microsecond (CUDA Runtime API,
# cudaEventElapsedTime); a sample lasts a thousand of these.
EVENT_RESOLUTION = 0.5e-6

# Calls before a capture, on a stream of their own, as PyTorch's documentation of CUDA graphs asks.
CALLS_BEFORE_CAPTURE = 3


def gpu_timer(name: str) -> Timer:
    """The timer called `name`, for the current CUDA device.

    Raises:
        InputError: no such timer.
        MmoptError: there is no CUDA GPU here (exit 3).
    """
    if name not in TIMERS["cuda"]:
        raise InputError(
            f"timing: there is no GPU timer {name!r}, expected one of: {', '.join(TIMERS['cuda'])}."
        )
    require_cuda()
    if name == "cuda-graph-cold-l2":
        return CudaGraphTimer()
    return KernelTimer() if name == "kernel-only" else WallTimer("host-inclusive")


def require_cuda() -> None:
    """Raise MmoptError (exit 3) unless torch sees a CUDA GPU."""
    if not torch.cuda.is_available():
        found = "sees no CUDA GPU" if torch.version.cuda else "is built without CUDA"
        raise MmoptError(
            f"timing: torch {torch.__version__} {found}, so nothing can be timed on a GPU. Run "
            "`mmopt doctor`, or time on the CPU."
        )


class CudaGraphTimer:
    """The GPU's clock around a replay of the call as a CUDA graph, with a cold L2 cache.

    Before each replay a buffer larger than the L2 cache is written, outside the timed region. The
    host enqueues the replay while the GPU still writes, so that no launch shows. What the cache
    then holds is dirty and is written back while the call runs, as in Triton's `do_bench` and
    NVIDIA's nvbench. The few microseconds that a graph takes to begin are part of the time. The
    graph replays on the inputs that it was captured with: a rotation has no effect, and needs none.
    """

    name = "cuda-graph-cold-l2"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        flushed = max(FLUSHED_CACHES * cache, FLUSHED_AT_LEAST)
        self._other = torch.empty(flushed, dtype=torch.int8, device="cuda")

    def prepare(self, call: Callable[[], object]) -> Sampler:
        """Capture the call.

        Raises:
            MmoptError: the call cannot be captured, or runs nothing on the GPU (exit 3).
        """
        graph = _capture(call)
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        def sample(calls: int) -> float:
            milliseconds = 0.0
            with no_garbage_collection():
                for _ in range(calls):
                    self._other.zero_()
                    began.record()
                    graph.replay()
                    ended.record()
                    ended.synchronize()
                    milliseconds += began.elapsed_time(ended)
            return milliseconds / 1000 / calls

        return sample

    def shortest_sample(self) -> float:
        """A thousand times what an event resolves."""
        return 1000 * EVENT_RESOLUTION


class KernelTimer:
    """The durations of the kernels that a call runs, added up, by torch's profiler (CUPTI)."""

    name = "kernel-only"

    def prepare(self, call: Callable[[], object]) -> Sampler:
        """Nothing to make ready."""

        def sample(calls: int) -> float:
            with quiet_profile(ProfilerActivity.CUDA) as seen:
                for _ in range(calls):
                    call()
                # The profile must not end before the kernels do.
                torch.cuda.synchronize()
            return kernel_seconds(seen.events()) / calls  # type: ignore[no-untyped-call]

        return sample

    def shortest_sample(self) -> float:
        """CUPTI reads the GPU's own clock at both ends of each kernel: one call will do."""
        return 0.0


def kernel_seconds(events: Iterable[Any]) -> float:
    """The durations of the kernels among a profile's events, added up.

    On the GPU's side a profile also has copies, memory sets, waits and the caller's annotations,
    which span kernels that are counted already; none of these is a kernel.

    Args:
        events: `torch.autograd.profiler_util.FunctionEvent`s.

    Raises:
        MmoptError: there is no kernel among them (exit 3).
    """
    durations = [event.time_range.elapsed_us() for event in events if _is_kernel(event)]
    if not durations:
        raise MmoptError(
            "timing: the profiler recorded no kernel. Either the call runs nothing on the GPU, or "
            "CUPTI may not be used here (its log is on stderr; containers often forbid it). Use "
            "the timer cuda-graph-cold-l2 or host-inclusive."
        )
    return float(sum(durations)) / 1e6


def _is_kernel(event: Any) -> bool:
    if event.device_type != DeviceType.CUDA:
        return False
    # Kineto's name of the activity; torch 2.11 and 2.12 may not pass it on.
    activity = getattr(event, "activity_type", None)
    if activity is not None:
        return bool(activity == "kernel")
    outside = ("Memcpy", "Memset", "Stream ", "Context ", "Event ")
    return not event.is_user_annotation and not event.name.startswith(outside)


def _capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            for _ in range(CALLS_BEFORE_CAPTURE):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.cuda.graph(graph):
                call()
    except RuntimeError as error:
        raise MmoptError(
            f"timing: the call cannot be captured as a CUDA graph "
            f"({one_line(error)}). It may read a value of the GPU on the host, "
            "or allocate outside torch. Use the timer kernel-only or host-inclusive."
        ) from error
    # PyTorch's CUDAGraph.cpp warns so; the time of a graph without nodes would be no time at all.
    if any("CUDA Graph is empty" in str(warning.message) for warning in said):
        raise MmoptError(
            "timing: the call runs nothing on the GPU, expected at least one kernel. Put the model "
            "and its inputs on the GPU."
        )
    return graph

"""Where a model is compiled and timed: the device, its timer, and the memory that a step takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmopt.measure.gpu_timing import gpu_timer
from mmopt.measure.memory import peak_tensor_bytes
from mmopt.measure.timers import TIMERS
from mmopt.measure.timing import Timer, WallTimer
from mmopt_kernels.errors import InputError, MmoptError, one_line

DEVICES = ("auto", "cpu", "cuda")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the current CUDA GPU where one can be used, else the CPU.

    Raises:
        InputError: no such name.
        MmoptError: `cuda`, and no GPU can be used here (exit 3).
    """
    if name not in DEVICES:
        raise InputError(
            f"the device is {name!r}, expected one of: {', '.join(DEVICES)}. Pass --device auto."
        )
    if name == "cpu":
        return torch.device("cpu")
    obstacle = _gpu_obstacle()
    if obstacle is None:
        return torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    raise MmoptError(
        f"no CUDA GPU is usable here: {obstacle}. Run `mmopt doctor --target cuda`, or pass "
        "--device cpu."
    )


def describe(device: torch.device) -> str:
    """The device in words: the GPU's name, or how many threads of the CPU torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'}"


def timer_for(device: torch.device) -> Timer:
    """The wall clock; on a GPU around the work that a step started there."""
    name = TIMERS[device.type][0]
    return gpu_timer(name) if device.type == "cuda" else WallTimer(name)


def step_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a step holds beyond what was held before it: beyond the weights.

    On the CPU what `peak_tensor_bytes` counts; on a GPU the peak of torch's allocator, which rounds
    each tensor up to blocks of 512 bytes. The step runs twice and must leave no gradient.
    """
    if device.type == "cpu":
        return peak_tensor_bytes(step)
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def moved(inputs: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A batch on `device`, its floating tensors in `dtype`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


@contextmanager
def memory_shortage_said(device: torch.device) -> Iterator[None]:
    """Turn a GPU's lack of memory in the block into one `MmoptError` (exit 3)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MmoptError(
            f"the memory of {describe(device)} does not suffice: "
            f"{one_line(error, 200)} Pass a smaller --batch or --length, --dtype "
            "bfloat16, or free the GPU."
        ) from error


def _gpu_obstacle() -> str | None:
    """Why no CUDA GPU can be used, or None."""
    if not torch.cuda.is_available():
        found = "sees none" if torch.version.cuda else "is built without CUDA"
        return f"torch {torch.__version__} {found}"
    try:
        # A driver or a GPU that is too old for this torch shows itself only when used.
        (torch.zeros(1, device="cuda") + 1).item()
    except RuntimeError as error:
        return f"torch's first operation on it failed ({one_line(error, 200)})"
    return None

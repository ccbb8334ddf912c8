"""NVIDIA's management library through `nvidia-ml-py`, which is optional. Needs no torch.

Every reading is None where the library, the driver or the GPU does not give it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h, "nvmlClocksEventReasons").
EVENT_REASONS = {
    0x001: "idle",
    0x002: "clocks set by the user",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal slowdown (software)",
    0x040: "thermal slowdown (hardware)",
    0x080: "power brake",
    0x100: "clocks set for the display",
}

# Those that make a GPU slower than it was set to be.
SLOWING = frozenset(EVENT_REASONS[bit] for bit in (0x004, 0x008, 0x020, 0x040, 0x080))


class Gpu:
    """One GPU as NVML sees it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle
        uuid = self._read(library.nvmlDeviceGetUUID)
        # Older releases of the library answer bytes.
        self.uuid: str = uuid.decode() if isinstance(uuid, bytes) else str(uuid)

    def used_bytes(self) -> int | None:
        """Memory in use on the device, by every process, contexts included."""
        info = self._read(self._library.nvmlDeviceGetMemoryInfo)
        return None if info is None else int(info.used)

    def sm_mhz(self) -> int | None:
        """The clock of the multiprocessors now."""
        return self._number(self._library.nvmlDeviceGetClockInfo, self._library.NVML_CLOCK_SM)

    def max_sm_mhz(self) -> int | None:
        """The highest clock that the multiprocessors can have."""
        return self._number(self._library.nvmlDeviceGetMaxClockInfo, self._library.NVML_CLOCK_SM)

    def power_limit_watts(self) -> float | None:
        """The power limit in force."""
        milliwatts = self._number(self._library.nvmlDeviceGetEnforcedPowerLimit)
        return None if milliwatts is None else milliwatts / 1000

    def event_reasons(self) -> frozenset[str] | None:
        """Why the clocks are what they are now; values of `EVENT_REASONS`."""
        # A library or a driver before release 535 knows only the second name.
        for name in ("EventReasons", "ThrottleReasons"):
            read = getattr(self._library, f"nvmlDeviceGetCurrentClocks{name}", None)
            bits = None if read is None else self._number(read)
            if bits is not None:
                return frozenset(reason for bit, reason in EVENT_REASONS.items() if bits & bit)
        return None

    def _number(self, function: Callable[..., Any], *arguments: object) -> int | None:
        value = self._read(function, *arguments)
        return None if value is None else int(value)

    def _read(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(self._handle, *arguments)
        except self._library.NVMLError:
            return None  # not supported by this GPU, or not permitted here


@contextmanager
def open_nvml() -> Iterator[list[Gpu]]:
    """Every GPU of the machine; none where `nvidia-ml-py` or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        yield []
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []  # the package is installed, the driver is not
        return
    try:
        count = pynvml.nvmlDeviceGetCount()
        gpus = [Gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except pynvml.NVMLError:
        gpus = []  # a GPU that fell off the bus, or one that we may not see
    try:
        yield gpus
    finally:
        pynvml.nvmlShutdown()

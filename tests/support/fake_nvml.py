"""A stand-in for `pynvml` whose readings a test sets: no test machine has the real one."""

from dataclasses import dataclass, field
from types import SimpleNamespace


class NVMLError(Exception):
    """What the real library raises for anything that goes wrong."""


@dataclass
class FakeGpu:
    """Readings of one GPU; None raises `NVMLError`, as for what a GPU does not support."""

    uuid: str
    used: int | None = 0
    sm_mhz: int | None = 1980
    max_sm_mhz: int | None = 1980
    milliwatts: int | None = 700_000
    reasons: int | None = 0


@dataclass
class FakeNvml:
    """Put it into `sys.modules["pynvml"]`."""

    gpus: list[FakeGpu] = field(default_factory=list)
    driver: bool = True
    opened: int = 0
    NVMLError: type[Exception] = NVMLError
    NVML_CLOCK_SM: int = 1

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("driver not loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(used=_given(gpu.used))

    def nvmlDeviceGetClockInfo(self, gpu: FakeGpu, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        return _given(gpu.sm_mhz)

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        return _given(gpu.max_sm_mhz)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu) -> int:
        return _given(gpu.milliwatts)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:
        raise NVMLError("function not found")  # a driver before release 535

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> int:
        return _given(gpu.reasons)


def _given(value: int | None) -> int:
    if value is None:
        raise NVMLError("not supported")
    return value

"""What this machine can really run, found by trying it.

Imports nothing that could be missing or broken: packages are looked up by their metadata and
tried in processes of their own (`mmopt._doctor_probes`).
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.machine import cgroup_quota_cores
from mmopt_export.progress import Progress, silent
from mmopt_export.threads import usable_cores
from mmopt_kernels.errors import InputError

Status = Literal["ok", "missing", "failed", "optional"]
Target = Literal["cpu", "cuda"]

TARGETS: tuple[Target, ...] = ("cpu", "cuda")

MINIMUM_PYTHON = "3.11"

# A probe imports torch and may run a C++ compiler; on a slow, busy machine that takes a minute.
_PROBE_SECONDS = 180.0

# Probes keep a core busy each, and torch in each of them takes some 500 MB.
_AT_ONCE = 2

_CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    # 64-bit ARM
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}
"""What matters to the CPU kernels of ONNX Runtime and Inductor, by its flag in /proc/cpuinfo."""


@dataclass(frozen=True)
class Requirement:
    """A row of the support matrix.

    Attributes:
        package: its import name.
        distributions: names it is installed under.
        minimum: oldest supported version.
        targets: what does not work without it.
        extras: the extras of mmopt that bring it; empty when mmopt itself does.
    """

    package: str
    distributions: tuple[str, ...]
    minimum: str
    targets: tuple[Target, ...] = TARGETS
    extras: tuple[Target, ...] = ()

    def wanted(self, target: Target) -> str:
        """What pip should install for `target`."""
        if not self.extras:
            return f"{self.package}>={self.minimum}"
        return f"mmopt[{target if target in self.extras else self.extras[0]}]"


SUPPORT: tuple[Requirement, ...] = (
    Requirement("torch", ("torch",), "2.11"),
    Requirement("triton", ("triton",), "3.6", targets=("cuda",)),
    Requirement("transformers", ("transformers",), "5.24"),
    Requirement("peft", ("peft",), "0.20"),
    Requirement("accelerate", ("accelerate",), "1.15"),
    Requirement("onnx", ("onnx",), "1.21"),
    Requirement("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "1.30", extras=TARGETS),
    Requirement("bitsandbytes", ("bitsandbytes",), "0.50", targets=(), extras=("cuda",)),
)


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        status: `ok`; `missing` or `failed` when the asked target needs it; `optional` when it
            does not work here and the asked target does without it.
        remedy: what to do; None when nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class DoctorReport:
    """What was found, and for which target it was asked."""

    target: Target
    lines: tuple[Line, ...]

    @property
    def exit_code(self) -> int:
        """0 when the target works here, 1 when something that it needs does not."""
        return int(any(line.status in ("missing", "failed") for line in self.lines))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "target": self.target,
            "works": self.exit_code == 0,
            "lines": [asdict(line) for line in self.lines],
        }

    def render(self) -> RenderableType:
        """The report for a terminal."""
        colors = {"ok": "green", "missing": "red", "failed": "red", "optional": "yellow"}
        works = "works" if self.exit_code == 0 else "does not work"
        table = Table(title=f"target {self.target} {works} here", title_justify="left")
        for column in ("", "status", "detail"):
            table.add_column(column, overflow="fold")
        for line in self.lines:
            detail = Text(line.detail)
            if line.remedy:
                detail.append(f"\n-> {line.remedy}", style="bold")
            table.add_row(line.name, Text(line.status, style=colors[line.status]), detail)
        return table


@dataclass(frozen=True)
class _Probe:
    """Something to try in a process of its own.

    Attributes:
        arguments: of `mmopt._doctor_probes`.
        targets: what does not work when this does not.
        remedy: what to do when it fails.
    """

    name: str
    arguments: tuple[str, ...]
    targets: tuple[Target, ...]
    remedy: str


def diagnose(target: str | None = None, *, progress: Progress = silent) -> DoctorReport:
    """Try what `target` needs on this machine, and what it could do besides.

    Args:
        target: `cpu` or `cuda`; None asks for cuda where there is an NVIDIA GPU.
        progress: hears of each probe that ends.

    Raises:
        InputError: an unknown target.
    """
    if target is not None and target not in TARGETS:
        raise InputError(f"--target {target} is not known, expected one of: {', '.join(TARGETS)}.")
    gpu = _nvidia_smi()
    asked: Target = next(
        (known for known in TARGETS if known == target), "cpu" if gpu is None else "cuda"
    )
    lines = [_cpu(), _cores(), _memory(), _gpu(gpu, asked), _python()]

    tries = [partial(_probe_line, probe, asked) for probe in _probes(asked)]
    with (
        progress("look around", len(tries) + 1) as advance,
        ThreadPoolExecutor(max_workers=_AT_ONCE) as threads,
    ):
        probes = [threads.submit(one) for one in tries]
        packages = threads.submit(package_lines, SUPPORT, asked)
        futures: list[Future[Any]] = [*probes, packages]
        for _ in as_completed(futures):
            advance(1)
    found = (*packages.result(), *(probe.result() for probe in probes))
    return DoctorReport(asked, (*lines, *found))


def _probes(target: Target) -> tuple[_Probe, ...]:
    device = target
    return (
        _Probe(
            "torch.compile",
            ("torch_compile", device),
            TARGETS,
            "Install a C++ compiler (`apt-get install g++`) and a working torch."
            if device == "cpu"
            else "Install a C compiler (`apt-get install gcc`), a working torch with CUDA and its "
            "triton.",
        ),
        _Probe(
            "Triton compiler",
            ("triton_compiles",),
            ("cuda",),
            "Run `pip install -U triton` on Linux; to run kernels it also needs a C compiler "
            "(`apt-get install gcc`).",
        ),
        _Probe(
            "ORT CPUExecutionProvider",
            ("onnxruntime_provider", "CPUExecutionProvider"),
            ("cpu",),
            "Run `pip install -U onnxruntime onnx numpy`.",
        ),
        _Probe(
            "torch CUDA",
            ("cuda",),
            ("cuda",),
            "On a machine with an NVIDIA GPU and its driver, install the CUDA build of torch: "
            "https://pytorch.org/get-started/locally. Otherwise use --target cpu.",
        ),
        _Probe(
            "ORT CUDAExecutionProvider",
            ("onnxruntime_provider", "CUDAExecutionProvider"),
            ("cuda",),
            "Run `pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install "
            "'mmopt[cuda]' 'onnxruntime-gpu[cuda,cudnn]'` for CUDA and cuDNN.",
        ),
    )


def package_lines(requirements: Sequence[Requirement], target: Target) -> list[Line]:
    """Whether each package is installed, new enough, and can be imported."""
    lines: dict[str, Line] = {}
    to_import: list[str] = []
    for one in requirements:
        line = _installed(one, target)
        lines[one.package] = line
        if line.status == "ok":
            to_import.append(one.package)
    while to_import:
        done = _start("imports", *to_import)
        imported = done.stdout.split()
        if done.returncode == 0:
            break
        # The first that did not report is the one that broke; those after it are tried again.
        broken = next(package for package in to_import if package not in imported)
        to_import = to_import[to_import.index(broken) + 1 :]
        one = next(one for one in requirements if one.package == broken)
        distribution = next(name for name in one.distributions if _version(name) is not None)
        lines[broken] = Line(
            broken,
            "failed" if target in one.targets else "optional",
            f"{lines[broken].detail}, does not import: {_reason(done)}",
            f"Run `pip install --force-reinstall {distribution}=={_version(distribution)}`.",
        )
    return list(lines.values())


def _installed(requirement: Requirement, target: Target) -> Line:
    needed = target in requirement.targets
    expected = f"expected {requirement.minimum} or newer"
    found = {
        distribution: version
        for distribution in requirement.distributions
        if (version := _version(distribution)) is not None
    }
    if not found:
        return Line(
            requirement.package,
            "missing" if needed else "optional",
            f"not installed, {expected}",
            f"Run `pip install '{requirement.wanted(target)}'`.",
        )
    wrong: Status = "failed" if needed else "optional"
    if len(found) > 1:
        return Line(
            requirement.package,
            wrong,
            f"{' and '.join(found)} overwrite each other's files, expected one of them",
            f"Run `pip uninstall -y {' '.join(found)}`, then `pip install 'mmopt[{target}]'`.",
        )
    ((distribution, version),) = found.items()
    if Version(version) < Version(requirement.minimum):
        return Line(
            requirement.package,
            wrong,
            f"{distribution} {version}, {expected}",
            f"Run `pip install -U '{distribution}>={requirement.minimum}'`.",
        )
    return Line(requirement.package, "ok", f"{version}, {expected}")


def _probe_line(probe: _Probe, target: Target) -> Line:
    done = _start(*probe.arguments)
    if done.returncode == 0:
        return Line(probe.name, "ok", _last_line(done.stdout))
    status: Status = "failed" if target in probe.targets else "optional"
    return Line(probe.name, status, _reason(done), probe.remedy)


def _start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a probe to its end; one that gives no answer in time counts as failed."""
    command = [sys.executable, "-P", "-m", "mmopt._doctor_probes", *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        # Bytes whatever `text` says (https://github.com/python/cpython/issues/87597).
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        late = f"no answer within {_PROBE_SECONDS:.0f} s"
        return subprocess.CompletedProcess(command, 1, said, late)


def _reason(failed: subprocess.CompletedProcess[str]) -> str:
    if failed.returncode < 0:
        return f"the process was killed by signal {-failed.returncode}"
    # A traceback ends with its exception, after which torch adds hints of its own.
    raised = re.findall(r"^[\w.]+(?:Error|Exception): .+$", failed.stderr, re.MULTILINE)
    reason = raised[-1] if raised else _last_line(failed.stderr)
    # ONNX Runtime only logs which library it missed; the profile then shows where the node ran.
    missed = re.search(r"(\S+\.so[.\d]*): cannot open shared object file", failed.stderr)
    if missed and missed[1] not in reason:
        return f"{reason}: {missed[1]} is missing"
    return reason


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _cpu() -> Line:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    if flags is None:
        return Line("CPU", "ok", f"{name}; its features cannot be read here")
    present = set(flags[1].split())
    features = [shown for flag, shown in _CPU_FEATURES.items() if flag in present]
    return Line("CPU", "ok", f"{name}: {', '.join(features) or 'no vector extensions'}")


def _cores() -> Line:
    detail = f"{usable_cores()} usable of {os.cpu_count()}"
    quota = cgroup_quota_cores()
    return Line("cores", "ok", detail if quota is None else f"{detail}, quota {quota:g}")


def _memory() -> Line:
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    if found is None or total is None:
        return Line("memory", "ok", "cannot be read here")
    detail = f"{int(found[1]) / 2**20:.1f} of {int(total[1]) / 2**20:.1f} GiB available"
    limits = [
        int(limit)
        for path in ("memory.max", "memory/memory.limit_in_bytes")
        if (limit := _read(f"/sys/fs/cgroup/{path}").strip()).isdigit()
    ]
    # Version 1 writes a number beyond any memory for no limit.
    if limits and limits[0] < int(total[1]) * 1024:
        detail += f", limit {limits[0] / 2**30:.1f} GiB"
    return Line("memory", "ok", detail)


def _nvidia_smi() -> str | None:
    """The GPUs and their driver as nvidia-smi names them; None when it finds none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None if done.returncode == 0 else None


def _gpu(found: str | None, target: Target) -> Line:
    if found is not None:
        return Line("GPU and driver", "ok", found)
    return Line(
        "GPU and driver",
        "missing" if target == "cuda" else "optional",
        "nvidia-smi finds no NVIDIA GPU",
        "Use a machine with an NVIDIA GPU and its driver (in a container: with the NVIDIA "
        "Container Toolkit), or use --target cpu.",
    )


def _python() -> Line:
    version = platform.python_version()
    detail = f"{version}, expected {MINIMUM_PYTHON} or newer"
    if Version(version) < Version(MINIMUM_PYTHON):
        return Line("python", "failed", detail, f"Install Python {MINIMUM_PYTHON} or newer.")
    return Line("python", "ok", detail)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # this system does not have it, or hides it from us

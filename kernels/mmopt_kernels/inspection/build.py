"""Compile every kernel of a grid of cases, in worker processes, and report what each takes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mmopt_kernels import _triton
from mmopt_kernels.errors import InputError, MmoptError
from mmopt_kernels.inspection.cases import CASES, Case
from mmopt_kernels.inspection.occupancy import Occupancy, occupancy
from mmopt_kernels.inspection.targets import Target

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# The slowest kernel so far takes 10 s; a compiler that needs this long hangs.
_LONGEST_SECONDS = 600.0

# ptxas orders some of what it emits by addresses, so that a kernel came out with 224 and 226
# registers in turn. Without random addresses (Linux's ADDR_NO_RANDOMIZE) the same text is assembled
# to the same code; where a sandbox refuses that, builds vary as before.
_REPEATABLY = (
    "import ctypes, os, sys; system = ctypes.CDLL(None); "
    "system.personality(system.personality(0xFFFFFFFF) | 0x0040000); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
_WORKER = (
    *(sys.executable, "-c", _REPEATABLY),
    # Triton 3.9 warns that a default of 3.10 will differ: no news for each kernel.
    *("-P", "-W", "ignore", "-m", "mmopt_kernels.inspection.worker"),
)


@dataclass(frozen=True)
class KernelFigures:
    """One compiled kernel.

    Attributes:
        target: its name.
        name: `op/case/kernel`.
        kernel: the function.
        dtype, head_dim: of the case.
        config: what the launcher chose: BLOCK_*, TMA (0 or 1), num_warps, num_stages.
        registers: of each thread.
        spilled_bytes: of each thread; see `machine_code.Resources`.
        shared_bytes: of each block.
        tensor_memory_columns: of each block.
        warps: of each block; more than in config where the compiler specializes warps.
        dot_bits: width of what the source multiplies as matrices; None where it does not.
        matrix_instructions: how often each kind stands in the machine code.
        code_bytes: of machine code.
        occupancy: theoretical.
        compile_seconds: of CPU time from source to binary, cold, on the machine that compiled it.
    """

    target: str
    name: str
    kernel: str
    dtype: str
    head_dim: int | None
    config: Mapping[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    warps: int
    dot_bits: int | None
    matrix_instructions: Mapping[str, int]
    code_bytes: int
    occupancy: Occupancy
    compile_seconds: float


@dataclass(frozen=True)
class Failure:
    """A kernel that does not compile, or a case that does not launch: then the name is `op/case`.

    Attributes:
        reason: one line, the compiler's where it gave one.
    """

    target: str
    name: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found, in the order of targets, cases and launches."""

    triton: str
    targets: tuple[str, ...]
    kernels: tuple[KernelFigures, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class _Planned:
    """A launch to compile. Those of one key compile to the same code."""

    target: Target
    case: Case
    index: int
    name: str
    kernel: str
    config: Mapping[str, int]
    key: str

    @property
    def stem(self) -> Path:
        return Path(self.target.name, self.name)


@contextmanager
def _silent(_description: str, _total: int | None) -> Iterator[Callable[[int], None]]:
    yield lambda _steps: None


def inspect(
    targets: Sequence[Target],
    *,
    cases: Sequence[Case] | None = None,
    jobs: int = 2,
    kept: Path | None = None,
    emit: Path | None = None,
    progress: Progress = _silent,
) -> Inspection:
    """Compile what each case launches on each target.

    Every kernel is compiled anew, so that the time is that of a cold compiler, in processes that
    see none of this one's Triton settings; the same code in two cases is compiled once.

    Args:
        cases: None stands for each target's default grid.
        jobs: worker processes.
        kept: a folder of figures by a hash of the kernel's source, arguments, options and
            compiler. What it has is not compiled again; what it has not is added.
        emit: a folder for binaries, assembly and launch metadata, which then must all be compiled.

    Raises:
        InputError: ``kept`` cannot be written.
        MmoptError: Triton is not installed, or a worker does not start.
    """
    if not _triton.installed():
        raise MmoptError("triton is not installed, expected it to compile kernels. Install triton.")
    if kept is not None:
        _make_folder(kept)
    wanted = [
        (target, case)
        for target in targets
        for case in (CASES if cases is None else cases)
        if cases is not None or target.name in case.default
    ]
    with tempfile.TemporaryDirectory(prefix="mmopt-kernels-") as scratch:
        pool = _Pool(Path(scratch), jobs)
        try:
            return _inspect(pool, targets, wanted, kept, emit, progress)
        finally:
            pool.close()


def _inspect(
    pool: _Pool,
    targets: Sequence[Target],
    wanted: Sequence[tuple[Target, Case]],
    kept: Path | None,
    emit: Path | None,
    progress: Progress,
) -> Inspection:
    failures: list[Failure] = []
    planned: list[_Planned] = []
    for (target, case), answer in zip(wanted, pool.map(_plan, wanted), strict=True):
        if isinstance(answer, str):
            failures.append(Failure(target.name, case.name, answer))
        else:
            planned += _named(target, case, answer)
    leaders = {one.key: one for one in reversed(planned)}
    answers: dict[str, dict[str, Any] | str] = {}
    if kept is not None and emit is None:
        answers = {key: found for key in leaders if (found := _read(kept, key)) is not None}
    to_build = [one for one in planned if leaders[one.key] is one and one.key not in answers]
    with progress("compile kernels", len(to_build)) as advance:

        def build(worker: _Worker, one: _Planned) -> dict[str, Any] | str:
            answer: dict[str, Any] | str = worker.ask(
                do="build",
                target=one.target.name,
                case=one.case.name,
                index=one.index,
                emit=None if emit is None else str(emit / one.stem),
            )
            # At once: who interrupts this has not waited for nothing.
            if kept is not None and not isinstance(answer, str):
                _keep(kept, one.key, answer)
            advance(1)
            return answer

        built = pool.map(build, to_build)
    answers |= {one.key: answer for one, answer in zip(to_build, built, strict=True)}
    kernels: list[KernelFigures] = []
    for one in planned:
        answer = answers[one.key]
        if isinstance(answer, str):
            failures.append(Failure(one.target.name, one.name, answer))
            continue
        kernels.append(_figures(one, answer))
        if emit is not None and leaders[one.key] is not one:
            _copy(emit / leaders[one.key].stem, emit / one.stem)
    return Inspection(
        triton=importlib.metadata.version("triton"),
        targets=tuple(target.name for target in targets),
        kernels=tuple(kernels),
        failures=tuple(failures),
    )


def _plan(worker: _Worker, wanted: tuple[Target, Case]) -> list[dict[str, Any]] | str:
    target, case = wanted
    answer: list[dict[str, Any]] | str = worker.ask(do="plan", target=target.name, case=case.name)
    return answer


def _named(target: Target, case: Case, launches: Sequence[Mapping[str, Any]]) -> Iterator[_Planned]:
    """Launches of a case by name; a kernel that is launched twice gets a number from 2 on."""
    seen: dict[str, int] = {}
    for index, launch in enumerate(launches):
        kernel = launch["kernel"]
        seen[kernel] = seen.get(kernel, 0) + 1
        name = f"{case.name}/{kernel}" + (f"-{seen[kernel]}" if seen[kernel] > 1 else "")
        yield _Planned(target, case, index, name, kernel, launch["config"], launch["key"])


def _figures(one: _Planned, answer: Mapping[str, Any]) -> KernelFigures:
    return KernelFigures(
        target=one.target.name,
        name=one.name,
        kernel=one.kernel,
        dtype=one.case.dtype,
        head_dim=one.case.head_dim,
        config=one.config,
        occupancy=occupancy(
            one.target,
            registers=answer["registers"],
            shared=answer["shared_bytes"],
            warps=answer["warps"],
            tensor_memory=answer["tensor_memory_columns"],
        ),
        **answer,
    )


def _copy(source: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    for path in source.parent.glob(f"{source.name}.*"):
        shutil.copyfile(path, copy.with_name(copy.name + path.suffix))


# --- figures kept from run to run -----------------------------------------------------------------


def _kept_path(folder: Path, key: str) -> Path:
    # How figures are read from a binary is part of what they depend on.
    readers = ("machine_code.py", "targets.py", "worker.py")
    own = b"".join(Path(__file__).with_name(name).read_bytes() for name in readers)
    return folder / f"{hashlib.sha256(key.encode() + own).hexdigest()}.json"


def _read(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads(_kept_path(folder, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or broken: compiled again and written anew
    return found if isinstance(found, dict) else None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}), expected a folder for figures."
        ) from error


def _keep(folder: Path, key: str, answer: Mapping[str, Any]) -> None:
    path = _kept_path(folder, key)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump(answer, file)
    os.replace(file.name, path)


# --- worker processes -----------------------------------------------------------------------------


class _Pool:
    """Workers that start when first needed, each asked one thing at a time."""

    def __init__(self, scratch: Path, jobs: int) -> None:
        self._threads = ThreadPoolExecutor(max_workers=jobs)
        self._workers: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(scratch / str(number)) for number in range(jobs)]
        for worker in self._all:
            self._workers.put(worker)

    def map(self, ask: Callable[[_Worker, Any], Any], tasks: Sequence[Any]) -> list[Any]:
        def run(task: Any) -> Any:
            worker = self._workers.get()
            try:
                return ask(worker, task)
            finally:
                self._workers.put(worker)

        return list(self._threads.map(run, tasks))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.close()


class _Worker:
    """One process of `mmopt_kernels.inspection.worker`, started again when the compiler ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self._messages = folder / "messages"
        self._process: subprocess.Popen[str] | None = None
        self._answered = False

    def ask(self, **request: Any) -> Any:
        """The result, or a text that says why there is none."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        before = self._messages.stat().st_size
        late = threading.Timer(_LONGEST_SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            in_time = late.is_alive()
            late.cancel()
        messages = self._messages.read_bytes()[before:].decode(errors="replace")
        if line:
            self._answered = True
            answer = json.loads(line)
            return answer["result"] if "result" in answer else _reason(answer["error"], messages)
        code = process.wait()
        self._process = None
        if not self._answered:
            last = (messages.strip().splitlines() or ["it said nothing"])[-1]
            raise MmoptError(f"the process that compiles kernels did not start: {last}")
        ended = f"the compiler ended with code {code}" if in_time else "the compiler hung"
        return _reason(ended, messages)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        # None of this process' settings: TRITON_INTERPRET, a cache, another assembler.
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env["TRITON_CACHE_DIR"] = str(self._folder / "cache")
        # They have the paths of the checkout and of Triton, which moved addresses as well.
        env["TRITON_DISABLE_LINE_INFO"] = "1"
        # The package of this very file, whatever else is installed.
        here = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [here, env.get("PYTHONPATH")]))
        with self._messages.open("ab") as messages:
            self._process = subprocess.Popen(
                _WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=env,
            )
        return self._process


def _reason(error: str, messages: str) -> str:
    """One line: what the compiler named as its error where it named one, else what was raised."""
    named = re.findall(r"(?:^|\s)error: (.+)$", messages, re.MULTILINE)
    first = next(itertools.chain(error.strip().splitlines(), ["it said nothing"]))
    return f"{first}: {named[0]}" if named and named[0] not in first else first

"""A warm start: the compiled graph of one model in a folder, and its way back into a process.

A store is code. It holds a pickle and machine code, and whoever can write it runs programs as
whoever loads it. So nothing in it is opened before `store.json`, which carries the SHA-256 of every
other file, is known to come from this user (`trust.py`) or has the SHA-256 that the caller names.
"""

import collections  # noqa: F401  Code that Dynamo writes looks for it among these globals.
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from mmopt.attach.optimize import transformers_model
from mmopt.compilation.state import ARGUMENTS, ModelState
from mmopt.compilation.tracing import Tracing, inductor_options
from mmopt.compilation.trust import sign, signed_here
from mmopt_export.files import sha256, staged_folder
from mmopt_kernels._version import __version__
from mmopt_kernels.errors import InputError, MmoptError, one_line

SCHEMA = 1
RECORD, SIGNATURE, GRAPH, STATE, KERNELS = (
    "store.json", "store.sig", "graph.bin", "state.json", "kernels",
)  # fmt: skip

# PyTorch 2.11 does not load what it pickled of a graph that refers to a builtin.
OLDEST_TORCH = Version("2.13")

# x86, and the first letters of Arm's.
_VECTORS = ("avx", "amx", "sve", "neo")

# What Inductor leaves beside the libraries it builds, and makes again when it needs it.
_LEFT_OUT = (".lock", ".cpp", ".o", ".h", ".gch", ".tmp")


def call_model(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The function that a stored graph replaces."""
    return model(**arguments)


def require_storable() -> None:
    """Raise InputError where this PyTorch cannot store a graph."""
    if Version(torch.__version__) < OLDEST_TORCH:
        raise InputError(
            f"a store needs torch {OLDEST_TORCH} or newer, and this is {torch.__version__}. Update "
            "it, or compile without a store."
        )


@dataclass
class StoredGraph:
    """One compiled graph that can leave its process.

    Attributes:
        function: takes the model and the arguments by name, in the order of `names`.
        state: what it took from the model as given.
        names: of the arguments.
        sources: SHA-256 of each Python module that was traced, by name.
    """

    function: Any
    state: ModelState
    names: tuple[str, ...]
    sources: dict[str, str]

    def mismatch(self, model: nn.Module, arguments: Mapping[str, Any]) -> str | None:
        """Why this call cannot run on the graph; None when it can."""
        if arguments.keys() != set(self.names):
            return f"the arguments are {sorted(arguments)}, were {sorted(self.names)}"
        if changed := self.state.changed(arguments):
            return changed
        if not self.function.guard_check(model, self._ordered(arguments)):
            return "a dtype, size or mode of torch (autocast, gradients) that it was not made for"
        return None

    def __call__(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """Run the graph; only after `mismatch` said None."""
        # The guards were checked a moment ago.
        return self.function.fn(model, self._ordered(arguments))

    def _ordered(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: arguments[name] for name in self.names}


def capture(
    model: nn.Module, arguments: Mapping[str, Any], *, infer: bool, dynamic: bool
) -> StoredGraph:
    """Trace and lower `model` to a graph that can be stored; with gradients, its backward too.

    Raises:
        InputError: the graph holds something that cannot leave the process.
    """
    names: list[str] = []
    absent: list[tuple[str, str]] = []

    def keep(guards: Any) -> list[bool]:
        """Note what the graph relies on; leave Dynamo the guards on tensors and modes of torch."""
        names.extend(guard.name for guard in guards if guard.name)
        absent.extend(asked for guard in guards if (asked := _asked_for(guard)) is not None)
        return [
            guard.guard_type in ("GLOBAL_STATE", "SHAPE_ENV")
            or (guard.guard_type == "TENSOR_MATCH" and guard.name.startswith(f"{ARGUMENTS}["))
            for guard in guards
        ]

    given = dict(arguments)
    try:
        with Tracing(infer=infer):
            compiler: Any = torch.compile(
                call_model,
                fullgraph=True,
                dynamic=dynamic,
                options={"guard_filter_fn": keep, **inductor_options()},
            )
            function = compiler.aot_compile(((model, given), {}))
            source_info = function.source_info()
    except (RuntimeError, AssertionError, OSError, TypeError, AttributeError) as error:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be stored ({one_line(error)}), "
            "expected one graph of code that lies in files. Use mmopt.compile without a store."
        ) from error
    imports = function._artifacts.runtime_env.import_sources
    state = ModelState.of(names, imports, model, given, absent=absent)
    modules = sorted({source.module for source in source_info.inlined_sources})
    return StoredGraph(
        function, state, tuple(given), {name: _source_sha256(name) for name in modules}
    )


def _asked_for(guard: Any) -> tuple[str, str] | None:
    """The expression, and its attribute or subscript, whose absence this guard may be about."""
    given = getattr(guard.orig_guard.create_fn, "keywords", {})
    if guard.guard_type == "HASATTR":
        return guard.name, f".{given['attr']}"
    if guard.guard_type == "NOT_PRESENT_IN_GENERIC_DICT":
        return f"{guard.name}.__dict__", f"[{given['attr']!r}]"
    if guard.guard_type == "DICT_NOT_CONTAINS" and isinstance(given["key"], str | int):
        return guard.name, f"[{given['key']!r}]"
    return None


def write_store(
    graph: StoredGraph,
    folder: Path,
    *,
    model: nn.Module,
    options: Mapping[str, Any],
    source: Mapping[str, Any] | None,
) -> str:
    """Write `graph` into a new `folder`, which appears whole or not at all.

    Args:
        graph: from `capture`.
        folder: new or empty.
        model: that the graph was made for.
        options: of the compilation, kept in the key.
        source: how the model was made, for `load_compiled` without a model; JSON values.

    Returns:
        The SHA-256 of `store.json`, by which others may trust the store.

    Raises:
        InputError: `folder` is not new, or the graph cannot be pickled.
        MmoptError: the disk refuses, or a fresh process cannot load the graph (exit 3).
    """
    with staged_folder(folder) as staging:
        (staging / GRAPH).write_bytes(_pickled(graph, model))
        state = {"facts": graph.state.facts, "imports": graph.state.imports}
        (staging / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _build_kernels(staging / GRAPH, staging / KERNELS)
        record = {
            "schema": SCHEMA,
            "key": store_key(_device_of(model)),
            "model": {"class": _class_name(model), "tensors": _tensors_sha256(model)},
            "problem_type": transformers_model(model).config.problem_type,
            "options": dict(options),
            "arguments": list(graph.names),
            "source": None if source is None else dict(source),
            "modules": graph.sources,
            "files": {
                str(path.relative_to(staging)): sha256(path)
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
        }
        written = (json.dumps(record, indent=1) + "\n").encode()
        (staging / RECORD).write_bytes(written)
        (staging / SIGNATURE).write_text(sign(written) + "\n", encoding="ascii")
    return hashlib.sha256(written).hexdigest()


@dataclass(frozen=True)
class Store:
    """A store whose `store.json` is trusted.

    Attributes:
        folder: where it lies.
        record: the content of `store.json`.
    """

    folder: Path
    record: dict[str, Any]

    def graph(self, model: nn.Module) -> StoredGraph:
        """Bring the graph to life for `model`.

        Raises:
            InputError: the machine, the model, the code or a file is not what was stored.
        """
        self._require_key(_device_of(model))
        self._require_model(model)
        files = {name: self._read(name, digest) for name, digest in self.record["files"].items()}
        kept = json.loads(files[STATE])
        state = ModelState(kept["facts"], kept["imports"])
        config = transformers_model(model).config
        undecided = config.problem_type is None
        if undecided:
            # What a classifier writes down at its first loss, which the stored model had behind it.
            config.problem_type = self.record["problem_type"]
        if difference := state.difference(model):
            if undecided:
                config.problem_type = None
            raise InputError(
                f"{self.folder} was compiled for a model in another state: {difference}. "
                "Prepare the model as it was then (mmopt.optimize, adapters, train or eval mode), "
                "or compile it again."
            )
        place_kernels(files)
        function = load_function(files[GRAPH])
        state.watch(model)
        return StoredGraph(
            function, state, tuple(self.record["arguments"]), dict(self.record["modules"])
        )

    def _require_key(self, device: torch.device) -> None:
        here = store_key(device)
        for what, stored in self.record["key"].items():
            if here.get(what) != stored:
                raise InputError(
                    f"{self.folder} was compiled with {what} {stored}, here it is "
                    f"{here.get(what)}, expected the same. Compile the model again on this machine."
                )
        for module, stored in self.record["modules"].items():
            if _source_sha256(module) != stored:
                raise InputError(
                    f"{self.folder} was compiled from another source of {module}, expected the "
                    "same code. Compile the model again."
                )

    def _require_model(self, model: nn.Module) -> None:
        stored = self.record["model"]
        if (name := _class_name(model)) != stored["class"]:
            raise InputError(
                f"{self.folder} was compiled for a {stored['class']}, expected one, got a {name}."
            )
        if _tensors_sha256(model) != stored["tensors"]:
            raise InputError(
                f"{self.folder} was compiled for a {name} with other parameters, expected the same "
                "names, sizes, dtypes, device and trained parameters. Prepare the model as it was "
                "then, or compile it again."
            )

    def _read(self, name: str, digest: str) -> bytes:
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.folder / name} cannot be read: {error.strerror}, expected a file of the "
                "store. Copy the whole folder, or compile the model again."
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(
                f"{self.folder / name} was changed after it was stored, expected SHA-256 {digest}. "
                "Copy the folder again, or compile the model again."
            )
        return content


def open_store(folder: Path, *, digest: str | None) -> Store:
    """Read `store.json` and make sure that it may be trusted.

    Args:
        folder: that `write_store` wrote.
        digest: what `write_store` returned; None asks for the signature of this user.

    Raises:
        InputError: not a store, of another version, or of unknown origin.
    """
    try:
        written = (folder / RECORD).read_bytes()
        signature = (folder / SIGNATURE).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise InputError(
            f"{folder} is no store: {error.strerror or error}, expected a folder with {RECORD} and "
            f"{SIGNATURE}. Make one with `mmopt compile MODEL -o DIR` or CompiledModel.save."
        ) from error
    if digest is not None:
        found = hashlib.sha256(written).hexdigest()
        if found != digest.lower():
            raise InputError(
                f"{folder} has SHA-256 {found}, expected {digest}. It is another store, or it was "
                "changed: do not load it unless you know why."
            )
    elif not signed_here(written, signature):
        raise InputError(
            f"{folder} was not written by this user on this machine, or was changed since; a store "
            "runs code when it is loaded. If you trust where it comes from, pass the sha256 that "
            "was printed when it was made."
        )
    try:
        record = json.loads(written)
        schema = record["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is damaged, expected JSON with a schema.") from error
    if schema != SCHEMA:
        raise InputError(
            f"{folder} has schema {schema}, expected {SCHEMA}: it was written by another version "
            "of mmopt. Compile the model again."
        )
    return Store(folder, record)


def store_key(device: torch.device) -> dict[str, Any]:
    """What has to be the same where a store is made and where it is loaded."""
    key: dict[str, Any] = {
        "mmopt": __version__,
        "python": platform.python_version(),
        "machine": f"{sys.platform} {platform.machine()}",
        **{name: _version_of(name) for name in ("torch", "triton", "transformers", "peft")},
        "device": device.type,
        # Inductor writes both into its C++ code.
        "vector instructions": _vector_instructions(),
        "CPU threads": torch.get_num_threads(),
        # Its version is part of the names of the kernels.
        "C++ compiler": _compiler(),
    }
    if device.type == "cuda":
        key["GPU"] = torch.cuda.get_device_name(device)
        key["compute capability"] = list(torch.cuda.get_device_capability(device))
        key["CUDA"] = torch.version.cuda or torch.version.hip
    return key


def load_function(content: bytes) -> Any:
    """Unpickle a graph whose bytes are trusted.

    Without precompiled headers, which Inductor would make for kernels that are there already; they
    change a kernel's name, so that who builds the kernels of a store has to do the same.
    """
    from torch._dynamo import convert_frame
    from torch._dynamo.utils import get_metrics_context
    from torch._guards import CompileContext, compile_context

    with (
        compile_context(CompileContext(convert_frame.get_compile_id({}))),
        get_metrics_context(),
        torch._inductor.config.patch(cpp_cache_precompile_headers=False),
    ):
        return torch.compiler.load_compiled_function(
            io.BytesIO(content), f_globals=call_model.__globals__
        )


def place_kernels(files: Mapping[str, bytes]) -> None:
    """Write libraries that are missing into Inductor's cache, where the graph looks for them.

    Raises:
        MmoptError: the cache cannot be written (exit 3).
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache = Path(cache_dir())
    try:
        for name, content in files.items():
            path = Path(name)
            target = cache.joinpath(*path.parts[1:])
            if path.parts[0] != KERNELS or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.{os.getpid()}")
            draft.write_bytes(content)
            os.replace(draft, target)
    except OSError as error:
        raise MmoptError(
            f"the kernels of the store cannot be written to {cache}, Inductor's cache: "
            f"{error.strerror}. Make it writable, or set TORCHINDUCTOR_CACHE_DIR to a folder that "
            "is."
        ) from error


def _pickled(graph: StoredGraph, model: nn.Module) -> bytes:
    try:
        content: bytes = type(graph.function).serialize(graph.function).serialized_data
    # Whatever the model's own objects raise when they are pickled.
    except Exception as error:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be stored ({one_line(error)}). "
            "Use mmopt.compile without a store."
        ) from error
    return content


def _build_kernels(graph: Path, kernels: Path) -> None:
    """Load `graph` in a fresh process with an empty cache, and keep what it had to build there."""
    kernels.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", _BUILD, str(graph), str(torch.get_num_threads())],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kernels), "PYTHONPATH": _python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise MmoptError(
            f"a fresh process cannot load the stored graph: {last[:300]} Nothing was stored. Use "
            "mmopt.compile without a store."
        )
    for path in sorted(kernels.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.suffix in _LEFT_OUT:
            path.unlink()


_BUILD = (
    "import sys, torch; torch.set_num_threads(int(sys.argv[2])); "
    "from mmopt.compilation.store import load_function; "
    "load_function(open(sys.argv[1], 'rb').read())"
)


def _python_path() -> str:
    """For a child that must import what this process can."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _device_of(model: nn.Module) -> torch.device:
    first: Tensor | None = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _tensors_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        line = f"{name} {x.dtype} {list(x.shape)} {x.device} {x.requires_grad}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _source_sha256(module: str) -> str:
    try:
        return hashlib.sha256(getsource(import_module(module)).encode()).hexdigest()
    except (ImportError, OSError, TypeError):
        return "no source"


def _vector_instructions() -> str:
    """What Inductor may choose from; to ask for its choice would compile programs."""
    found = torch.cpu.get_capabilities()
    used = sorted(name for name, there in found.items() if there is True and name[:3] in _VECTORS)
    return f"{torch.backends.cpu.get_cpu_capability()} of {' '.join(used) or 'none'}"


def _compiler() -> str | None:
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        told = get_compiler_version_info(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None
    found = re.search(r"(?:gcc|clang) version [^_]*", told)
    return found.group().strip() if found else hashlib.sha256(told.encode()).hexdigest()


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"

"""Which tile, warps and pipeline stages a kernel launches with: tables by target, in JSON.

A launcher asks `lookup`, and takes the heuristic beside its kernel where no entry fits. Tables
named ``<target>.json`` ship in ``mmopt_kernels/tables``; those in the folder that the environment
variable MMOPT_TABLES names are read as well and win over them. `tune` writes the latter, and only
when it is called: a launch never times anything.

An entry is found by kernel, dtype, width (the head dimension as the kernel holds it, the adapter's
rank), features that cost registers, and length. It fits a launch when it is of the same kernel and
class of dtype (16 bits, or the same one), at least as wide, chosen with all the features in use
or more, and asks for TMA only where the tensors allow it. Among those that fit the nearest wins, by
these, each only where those before it tie:

1. the ratio of the widths, from above;
2. the features it has too many;
3. the same dtype;
4. the user's before the shipped;
5. the distance of the lengths, rounded up to powers of two, in their number of doublings; entries
   without a length come last;
6. the order in the file.

An exact entry is the one at distance zero. Entries too narrow or with too few features never fit:
what holds the smaller problem in registers may spill on the larger.

Of the kernels in `OPTIONAL` an entry decides whether they are launched at all, which holds where it
was found and says nothing of other problems: there the width and the features must be the launch's
own, and so must the length, where the entry has one.

An entry whose configuration is null wins like any other, and gives the launch none: the heuristic,
or of an optional kernel what is launched in its place.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mmopt_kernels.errors import InputError, KernelInputError

Config = Mapping[str, int]

TABLES = "MMOPT_TABLES"

_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA")
# What an entry of each kernel sets, and so all that may be tuned.
FIELDS = {
    "attention_forward": _ATTENTION,
    # SPLIT: dV in one launch and dK in another, each with half of the accumulators.
    "attention_backward_dkdv": (*_ATTENTION, "SPLIT"),
    "attention_backward_dq": _ATTENTION,
    # One pass over the keys for all gradients, in place of those two. BULK: dQ is summed through
    # the tensor memory accelerator.
    "attention_backward_one_pass": (*_ATTENTION, "BULK"),
    "lora_linear_forward": (
        "BLOCK_M",
        "BLOCK_N",
        "BLOCK_K",
        "GROUP_M",
        "num_warps",
        "num_stages",
        "TMA",
    ),
    # Its width is the rows of the tile, its length N.
    "lora_linear_nf4": ("BLOCK_N", "BLOCK_K", "num_warps"),
    "lora_linear_down": ("BLOCK_M", "BLOCK_K", "num_warps", "num_stages"),
    "lora_linear_up_backward": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "lora_linear_down_backward": ("BLOCK_M", "BLOCK_K", "num_warps", "num_stages"),
    "lora_linear_input_backward": (
        "BLOCK_M",
        "BLOCK_N",
        "BLOCK_K",
        "GROUP_M",
        "num_warps",
        "num_stages",
        "TMA",
    ),
    "lora_linear_add": ("BLOCK_M", "BLOCK_K", "num_warps", "num_stages"),
    # Its width is the vocabulary, its length the rows of a chunk.
    "cross_entropy": ("BLOCK_V", "num_warps"),
}
OPTIONAL = frozenset({"attention_backward_one_pass"})
FEATURES = ("dropout", "softcap")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MEASURED = ("gpu", "triton", "torch", "date", "results")


@dataclass(frozen=True)
class Key:
    """What a launch asks with; `tma` says that its tensors allow descriptors."""

    kernel: str
    target: str
    dtype: torch.dtype
    width: int
    features: tuple[str, ...]
    length: int
    tma: bool


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        length: rounded up to a power of two; None stands for every length.
        config: arguments of the launch, as `FIELDS` lists them for the kernel; None for none.
        source: "static", chosen from what the compiler reports, or "measured".
        provenance: why, for a static entry; GPU, versions, date and results file of a measured one.
        shipped: of the package, rather than of the user.
    """

    kernel: str
    target: str
    dtype: torch.dtype
    width: int
    features: tuple[str, ...]
    length: int | None
    config: Config | None
    source: str
    provenance: Mapping[str, str]
    shipped: bool

    def fits(self, key: Key) -> bool:
        return (
            self.kernel == key.kernel
            and self.target == key.target
            and self.width >= key.width
            and _same_class(self.dtype, key.dtype)
            and set(self.features) >= set(key.features)
            and (key.tma or not needs_tma(self.config))
            and (self.kernel not in OPTIONAL or self._is_of(key))
        )

    def _is_of(self, key: Key) -> bool:
        same = self.width == key.width and self.features == key.features
        return same and self.length in (None, key.length)

    def distance(self, key: Key) -> tuple[float, ...]:
        return (
            self.width / key.width,
            len(self.features) - len(key.features),
            self.dtype != key.dtype,
            self.shipped,
            float("inf") if self.length is None else abs(_log2(self.length) - _log2(key.length)),
        )


def needs_tma(config: Config | None) -> bool:
    """Nothing but tensors that descriptors can describe, on a GPU that has them, can take it."""
    return config is not None and any(config.get(name, False) for name in ("TMA", "BULK"))


def lookup(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    width: int,
    length: int,
    features: tuple[str, ...] = (),
    tma: bool = False,
) -> Config | None:
    """The nearest entry's configuration, or None where no entry fits or the nearest has none.

    Args:
        kernel: a key of `FIELDS`.
        target: as `_triton.target` names it.
        width: power of two; see the module.
        length: the number of rows that the kernel loops over or spreads on its grid.
        features: of `FEATURES`, in their order.
        tma: every tensor that the kernel could read through a descriptor allows it.
    """
    # Launches of all lengths share as few cached answers as there are powers of two.
    bucket = 1 << max(length - 1, 0).bit_length()
    if _forced or _asked is not None:
        key = Key(kernel, target, dtype, width, features, bucket, tma)
        if _asked is not None:
            _asked.setdefault(kernel, key)
        if kernel in _forced:
            return _checked_force(key)
    return _nearest(kernel, target, dtype, width, features, bucket, tma)


@functools.lru_cache(maxsize=4096)
def _nearest(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    width: int,
    features: tuple[str, ...],
    length: int,
    tma: bool,
) -> Config | None:
    found = nearest(Key(kernel, target, dtype, width, features, length, tma))
    return found.config if found else None


def nearest(key: Key) -> Entry | None:
    """The entry that a launch with this key gets, or None where no entry fits."""
    fitting = [entry for entry in entries(key.target) if entry.fits(key)]
    return min(fitting, key=lambda entry: entry.distance(key), default=None)


@functools.cache
def entries(target: str) -> tuple[Entry, ...]:
    """What the user's and the shipped table hold for target; read once, see `reload`."""
    found: list[Entry] = []
    folder = os.environ.get(TABLES)
    if folder:
        if not Path(folder).is_dir():
            raise InputError(
                f"{TABLES} is {folder!r}, expected a folder of tables. Create it, or unset it."
            )
        table = Path(folder) / f"{target}.json"
        if table.exists():
            found += _parse(table.read_text(), str(table), target, shipped=False)
    shipped = resources.files("mmopt_kernels") / "tables" / f"{target}.json"
    if shipped.is_file():
        found += _parse(shipped.read_text(), str(shipped), target, shipped=True)
    return tuple(found)


def reload() -> None:
    """Forget what was read: MMOPT_TABLES or a table in it has changed."""
    entries.cache_clear()
    _nearest.cache_clear()


# Process-wide, not context variables: autograd runs backward launches in threads of its own.
_forced: dict[str, Config | None] = {}
_asked: dict[str, Key] | None = None


@contextlib.contextmanager
def forcing(configs: Mapping[str, Config | None]) -> Iterator[dict[str, Key]]:
    """Kernels named in configs launch with these inside, whatever the tables say; None for none.

    For tuning and tests, in one thread at a time. Of nested ones the inner alone counts, and an
    empty one goes back to the tables. Yields what each kernel first asked with.
    """
    global _forced, _asked
    before = _forced, _asked
    asked: dict[str, Key] = {}
    for kernel, config in configs.items():
        _check_config(kernel, config, f"forcing: {kernel}")
    _forced, _asked = dict(configs), asked
    try:
        yield asked
    finally:
        _forced, _asked = before


def _checked_force(key: Key) -> Config | None:
    config = _forced[key.kernel]
    if needs_tma(config) and not key.tma:
        raise KernelInputError(
            f"{key.kernel}: TMA is forced, expected tensors that descriptors can describe. Align "
            "their base and strides to 16 bytes, or force TMA off."
        )
    return config


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: milliseconds of each candidate, or why it did not run."""

    key: Key
    config: Config | None
    timings: tuple[tuple[Config | None, float | str], ...]
    table: Path
    results: Path


def tune(
    kernel: str,
    candidates: Sequence[Config | None] | None,
    call: Callable[[], object],
    *,
    folder: str | os.PathLike[str] | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
    gpu: str | None = None,
) -> Tuned:
    """Time the candidates on the present GPU and write the fastest to the user's table.

    Args:
        kernel: a key of `FIELDS`.
        candidates: configurations, each with all fields of the kernel. None stands for a launch
            without any: of an optional kernel, for what is launched in its place. First among
            them, it also wins a tie. Without a list, those of `mmopt_kernels.candidates`.
        call: runs the op that launches the kernel, with the arguments to tune for. Everything else
            that it does is timed too, alike for every candidate.
        folder: where the table and a file with all timings go; MMOPT_TABLES by default.
        clock: milliseconds that a call takes; by default those of the call as a CUDA graph, without
            what its launches cost the host (``triton.testing.do_bench_cudagraph``, the median).
        gpu: its name; that of the current CUDA device by default.

    Raises:
        InputError: there is no folder, no candidate, a candidate is malformed, call does not
            launch the kernel, or no candidate runs.

    A candidate that asks for more shared memory or registers than there are is passed over, as is
    one with TMA where the tensors do not allow it. An entry for the same key is replaced.
    """
    folder = folder or os.environ.get(TABLES)
    if not folder:
        raise InputError(f"tune: no folder to write to. Pass folder, or set {TABLES}.")
    if candidates is None:
        candidates = _known(kernel, call)
    if not candidates:
        raise InputError(f"tune: no candidates for {kernel}, expected at least one.")
    for index, config in enumerate(candidates):
        _check_config(kernel, config, f"tune: candidate {index}")
    clock = clock or _graph_milliseconds
    key: Key | None = None
    timings: list[tuple[Config | None, float | str]] = []
    for config in candidates:
        tried = None if config is None else dict(config)
        with forcing({kernel: config}) as asked:
            try:
                timings.append((tried, clock(call)))
            except _skipped() as error:
                timings.append((tried, f"{type(error).__name__}: {error}"))
        key = _key_of(kernel, asked)
    assert key is not None
    ran = [(ms, index) for index, (_, ms) in enumerate(timings) if isinstance(ms, float)]
    if not ran:
        reasons = "\n".join(f"{config}: {why}" for config, why in timings)
        raise InputError(f"tune: no candidate for {kernel} runs. Pass smaller tiles.\n{reasons}")
    best = timings[min(ran)[1]][0]
    return _write(Path(folder), key, best, timings, gpu or torch.cuda.get_device_name())


def _known(kernel: str, call: Callable[[], object]) -> Sequence[Config | None]:
    from mmopt_kernels import candidates  # which needs this module

    with forcing({}) as asked:
        call()
    return candidates.candidates(kernel, _key_of(kernel, asked).width)


def _key_of(kernel: str, asked: Mapping[str, Key]) -> Key:
    if kernel not in asked:
        raise InputError(f"tune: call does not launch {kernel}. Pass one that does.")
    return asked[kernel]


def _graph_milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, return_mode="median"))


def _skipped() -> tuple[type[Exception], ...]:
    try:
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:  # Tables are read without Triton too.
        return (KernelInputError,)
    return (KernelInputError, OutOfResources, PTXASError)


def _write(
    folder: Path,
    key: Key,
    best: Config | None,
    timings: Sequence[tuple[Config | None, float | str]],
    gpu: str,
) -> Tuned:
    now = datetime.datetime.now(datetime.UTC)
    dtype = _name(key.dtype)
    features = "".join(f"-{name}" for name in key.features)
    results = folder / "results" / f"{key.target}-{key.kernel}-{dtype}-{key.width}{features}"
    results = results.with_name(f"{results.name}-{key.length}-{now:%Y%m%dT%H%M%S%f}.json")
    table = folder / f"{key.target}.json"
    versions = {"gpu": gpu, "triton": _triton_version(), "torch": str(torch.__version__)}
    about = {**versions, "date": f"{now:%Y-%m-%d}"}
    row: dict[str, Any] = {
        "kernel": key.kernel,
        "dtype": dtype,
        "width": key.width,
        "features": list(key.features),
        "length": key.length,
        "config": best,
        "source": "measured",
        **about,
        "results": str(results.relative_to(folder)),
    }
    rows: list[dict[str, Any]] = []
    if table.exists():
        _parse(table.read_text(), str(table), key.target, shipped=False)
        rows = json.loads(table.read_text())["entries"]
    # What was found for tensors without TMA says nothing about an entry with it.
    axes = ("kernel", "dtype", "width", "features", "length")
    rows = [
        other
        for other in rows
        if any(other[axis] != row[axis] for axis in axes)
        or (needs_tma(other["config"]) and not key.tma)
    ]
    report: dict[str, Any] = {
        "key": {**asdict(key), "dtype": dtype},
        **about,
        "timings": [
            {"config": config, "ms" if isinstance(ms, float) else "skipped": ms}
            for config, ms in timings
        ],
    }
    _replace(results, report)
    _replace(table, {"target": key.target, "entries": [row, *rows]})
    reload()
    return Tuned(key, _frozen(best), tuple(timings), table, results)


def _replace(path: Path, content: object) -> None:
    """Write all of it or nothing: a launch may read the table at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _parse(text: str, file: str, target: str, *, shipped: bool) -> list[Entry]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error}. Correct or remove it.") from error
    if not isinstance(table, dict) or set(table) != {"target", "entries"}:
        raise InputError(f"{file}: expected one object with 'target' and 'entries'.")
    if table["target"] != target:
        raise InputError(f"{file}: target is {table['target']!r}, expected {target!r}.")
    if not isinstance(table["entries"], list):
        raise InputError(f"{file}: entries is not a list.")
    return [
        _entry(row, f"{file}, entry {index}", target, shipped)
        for index, row in enumerate(table["entries"])
    ]


def _entry(row: object, where: str, target: str, shipped: bool) -> Entry:
    axes = {"kernel", "dtype", "width", "features", "length", "config", "source"}
    if not isinstance(row, dict) or not axes <= set(row):
        raise InputError(f"{where}: expected an object with {', '.join(sorted(axes))}.")

    def expect(good: bool, name: str, expected: str) -> None:
        if not good:
            raise InputError(f"{where}: {name} is {row[name]!r}, expected {expected}.")

    expect(row["dtype"] in list(_DTYPES), "dtype", f"one of {', '.join(_DTYPES)}")
    expect(_power_of_two(row["width"]), "width", "a power of two")
    expect(
        row["length"] is None or _power_of_two(row["length"]), "length", "null or a power of two"
    )
    listed = [
        name for name in FEATURES if isinstance(row["features"], list) and name in row["features"]
    ]
    expect(row["features"] == listed, "features", f"a list, in order, of {', '.join(FEATURES)}")
    expect(row["source"] in ("static", "measured"), "source", "'static' or 'measured'")
    _check_config(row["kernel"], row["config"], where)
    provenance = {name: row[name] for name in row if name not in axes}
    required = _MEASURED if row["source"] == "measured" else ("why",)
    if set(provenance) != set(required) or not all(isinstance(x, str) for x in provenance.values()):
        raise InputError(
            f"{where}: a {row['source']} entry says where it comes from in {', '.join(required)}; "
            f"this one has {', '.join(provenance) or 'nothing'}."
        )
    return Entry(
        kernel=row["kernel"],
        target=target,
        dtype=_DTYPES[row["dtype"]],
        width=row["width"],
        features=tuple(listed),
        length=row["length"],
        config=_frozen(row["config"]),
        source=row["source"],
        provenance=MappingProxyType(provenance),
        shipped=shipped,
    )


def _check_config(kernel: object, config: object, where: str) -> None:
    if kernel not in list(FIELDS):
        raise InputError(f"{where}: kernel is {kernel!r}, expected one of {', '.join(FIELDS)}.")
    fields = FIELDS[str(kernel)]
    if config is None:
        return
    if not isinstance(config, Mapping) or set(config) != set(fields):
        raise InputError(f"{where}: config is {config!r}, expected {', '.join(fields)}, or null.")
    for name, value in config.items():
        if name in ("TMA", "SPLIT", "BULK"):
            good, expected = isinstance(value, bool), "true or false"
        elif name in ("num_stages", "GROUP_M"):
            good, expected = type(value) is int and value > 0, "a positive integer"
        else:
            good, expected = _power_of_two(value), "a power of two"
        if not good:
            raise InputError(f"{where}: {name} is {value!r}, expected {expected}.")


def _frozen(config: Config | None) -> Config | None:
    return None if config is None else MappingProxyType(dict(config))


def _power_of_two(x: object) -> bool:
    return type(x) is int and x > 0 and x & (x - 1) == 0


def _same_class(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a.itemsize == 2 and b.itemsize == 2)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in _DTYPES.items() if value == dtype)


def _log2(x: int) -> int:
    return x.bit_length() - 1

"""`.onnx_adapter` files and what a run makes of them. Needs NumPy and ONNX Runtime, no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_export.runtime import Tensors, runtime_errors
from mmopt_kernels.errors import InputError

A_SUFFIX = "_lora_a"
B_SUFFIX = "_lora_b"
"""Graph inputs of a target layer: A `[in, rank]` and B `[rank, out]`, the scale folded into B."""

# Ours, of the names of the inputs; ONNX Runtime keeps it and compares it with nothing.
_VERSION = 1
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def write_adapter(path: Path, arrays: Tensors) -> None:
    """Write an adapter that ONNX Runtime loads: `LoraAdapter.Load` and `add_active_adapter`.

    Args:
        path: ends in `.onnx_adapter`; its folder is made.
        arrays: by graph input, in the graph's dtype. Equal arrays give equal bytes.
    """
    import onnxruntime

    path.parent.mkdir(parents=True, exist_ok=True)
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(arrays[name]))
        for name in sorted(arrays)
    }
    file.set_parameters(values)
    file.export_adapter(str(path))


def read_adapter(path: Path) -> Tensors:
    """The arrays of an `.onnx_adapter` file, by graph input.

    Raises:
        InputError: the file is missing or damaged.
    """
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path} does not exist. Export the model with the adapter again.")
    errors: tuple[type[Exception], ...] = (*runtime_errors(), RuntimeError, ValueError)
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        # Copies: the values point into the file object, which is gone after this.
        return {name: np.array(value.numpy()) for name, value in file.get_parameters().items()}
    except errors as error:
        raise InputError(
            f"{path} is no adapter that ONNX Runtime can read ({error}). Export the model with the "
            "adapter again."
        ) from error


class AdapterSet:
    """The adapters that a session can run, by name.

    Args:
        session: of a graph with adapter inputs.
        files: `.onnx_adapter` files by the adapters' names.
        device: where the values of IO binding lie: ONNX Runtime's name, such as `cpu` or `cuda`.

    Raises:
        InputError: the graph takes no adapters, or a file does not fit it.
    """

    def __init__(self, session: Any, files: Mapping[str, Path], *, device: str = "cpu") -> None:
        inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
        self._defaults: Tensors = {
            value.name: np.zeros(
                [dim if isinstance(dim, int) else 0 for dim in value.shape],
                dtype=_DTYPES.get(value.type, "float32"),
            )
            for value in inputs
            if value.name.endswith((A_SUFFIX, B_SUFFIX))
        }
        if not self._defaults:
            raise InputError("the graph takes no adapters. Export the model with --adapters swap.")
        self._device = device
        self._arrays = {name: self._read(path) for name, path in files.items()}
        self._values: dict[str | None, dict[str, Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that may be asked for; None, no adapter, may be too."""
        return tuple(self._arrays)

    def rank(self, name: str) -> int:
        """The largest rank of an adapter's layers."""
        arrays = self._of(name)
        return max(int(arrays[key].shape[1]) for key in arrays if key.endswith(A_SUFFIX))

    def feeds(self, name: str | None) -> Tensors:
        """The inputs by which `session.run` uses an adapter; none for None.

        Inputs that an adapter has no values for have rank 0.

        Raises:
            InputError: there is no adapter of that name.
        """
        return {} if name is None else dict(self._of(name))

    def bind(self, binding: Any, name: str | None) -> None:
        """Bind every adapter input, also those that an earlier adapter may have left bound.

        `run_with_iobinding` ignores `RunOptions.add_active_adapter`, so the values are inputs like
        any other. They are moved to the device once.

        Raises:
            InputError: there is no adapter of that name.
        """
        import onnxruntime

        if name not in self._values:
            arrays = self._defaults | self.feeds(name)
            self._values[name] = {
                key: onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
                for key, array in arrays.items()
            }
        for key, value in self._values[name].items():
            binding.bind_ortvalue_input(key, value)

    def _of(self, name: str) -> Tensors:
        if name not in self._arrays:
            raise InputError(
                f"there is no adapter {name!r}, expected one of: {', '.join(self._arrays)}."
            )
        return self._arrays[name]

    def _read(self, path: Path) -> Tensors:
        arrays = read_adapter(path)
        for key, array in arrays.items():
            default = self._defaults.get(key)
            if default is None:
                raise InputError(
                    f"{path} has {key}, which the graph does not take: it is of another model. "
                    "Pass the adapter that was exported with it."
                )
            side = 0 if key.endswith(A_SUFFIX) else 1
            fits = array.ndim == 2 and array.shape[side] == default.shape[side]
            if not fits or array.dtype != default.dtype:
                raise InputError(
                    f"{path} has {key} as {array.dtype} {array.shape}, expected {default.dtype} "
                    f"with {default.shape[side]} {'rows' if side == 0 else 'columns'}. "
                    "Pass the adapter that was exported with the model."
                )
        for key, array in sorted(arrays.items()):
            ours, theirs = (A_SUFFIX, B_SUFFIX) if key.endswith(A_SUFFIX) else (B_SUFFIX, A_SUFFIX)
            other = key.removesuffix(ours) + theirs
            if other not in arrays or _rank(other, arrays[other]) != _rank(key, array):
                raise InputError(f"{path} has {key} without a {other} of the same rank.")
        return self._defaults | arrays


def _rank(key: str, array: npt.NDArray[Any]) -> int:
    return int(array.shape[1 if key.endswith(A_SUFFIX) else 0])


def group_rows(names: Sequence[str | None]) -> list[tuple[str | None, npt.NDArray[np.int64]]]:
    """The rows of a batch by adapter, each group to be run at once.

    Args:
        names: the adapter that each row asks for; None for none.

    Returns:
        Pairs of a name and its rows, in the order of each name's first row.
    """
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return [(name, np.array(of, dtype=np.int64)) for name, of in rows.items()]

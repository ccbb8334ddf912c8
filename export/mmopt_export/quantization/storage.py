"""Reads and writes ONNX files tensor by tensor, so that no more than one is in memory."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir

from mmopt_kernels.errors import InputError

# Smaller tensors stay in the protobuf, where ONNX Runtime's shape inference can read them.
INLINE_BYTES = 1024
# Large tensors start at whole pages of the data file, so that a runtime may map each of them, and
# the others at a cache line.
_LARGE, _PAGE, _LINE = 1 << 20, 4096, 64
_PIECE = 1 << 22

Array = npt.NDArray[Any]


def load(source: Path) -> onnx_ir.Model:
    """The graph of `source`; tensors in external data are mapped when they are first read.

    Raises:
        InputError: there is no such file, it is not an ONNX model, or its data lies elsewhere.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist, expected an ONNX file.")
    try:
        model = onnx_ir.load(source)
    except Exception as error:  # whatever protobuf's implementations raise: it is a bad file
        raise InputError(f"{source} is not an ONNX model ({error}).") from error
    folder = source.parent.resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, onnx_ir.ExternalTensor):
            path = Path(tensor.path).resolve()
            if not path.is_relative_to(folder):
                raise InputError(f"{source}: the data of {value.name} lies outside its folder.")
            if not path.is_file():
                raise InputError(f"{source}: its data file {path.name} is missing.")
    return model


def save(model: onnx_ir.Model, output: Path) -> None:
    """Write `output` and its data `<name>.data`, one tensor at a time and in the graph's order.

    Tensors of `model` are read, computed where they are lazy, and refer to the new file
    afterwards. Nothing is left behind when it fails.
    """
    location = f"{output.name}.data"
    data = output.with_name(location)
    try:
        with data.open("wb") as file:
            for graph in model.graphs():
                for value in graph.initializers.values():
                    value.const_value = _stored(value, file, location, output.parent)
            size = file.tell()
        if size == 0:
            data.unlink()
        onnx_ir.save(model, output)
    except BaseException:
        for path in (data, output):
            path.unlink(missing_ok=True)
        raise


def _stored(
    value: onnx_ir.Value, file: BinaryIO, location: str, folder: Path
) -> onnx_ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    assert value.name is not None
    if tensor.dtype == onnx_ir.DataType.STRING or tensor.nbytes < INLINE_BYTES:
        inline = onnx_ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
        release(tensor)
        return inline
    file.write(b"\0" * (-file.tell() % (_PAGE if tensor.nbytes >= _LARGE else _LINE)))
    offset = file.tell()
    if isinstance(tensor, onnx_ir.ExternalTensor):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    release(tensor)
    return onnx_ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]
        name=value.name,
        base_dir=folder,
    )


def release(tensor: onnx_ir.TensorProtocol) -> None:
    """Unmap a tensor in external data, or leave that to the arrays that still look at it.

    It is mapped again when it is read again.
    """
    if isinstance(tensor, onnx_ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:
            tensor.raw = None


def row_pieces(shape: tuple[int, ...]) -> Iterator[Any]:
    """The first axis in pieces of about 16 MB of fp32, so that temporaries stay small."""
    if not shape:
        yield ...
        return
    step = max(1, _PIECE // max(1, math.prod(shape[1:])))
    yield from (slice(start, start + step) for start in range(0, shape[0], step))


Parts = tuple[Array, ...]


class Group:
    """Tensors that one computation gives together: a weight's integers and its scales.

    The last computation of any group is kept, and only that: tensors are written in the order in
    which they were made, so that each group is computed once and memory holds one.
    """

    _last: "tuple[Group, Parts] | None" = None

    def __init__(self, compute: Callable[..., Parts], *arguments: Any) -> None:
        self._compute, self._arguments = compute, arguments

    def tensor(
        self, index: int, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...]
    ) -> onnx_ir.LazyTensor:
        """The lazy tensor of one of the results, which must have that type and shape."""

        def read() -> onnx_ir.TensorProtocol:
            return onnx_ir.Tensor(self._arrays()[index], dtype=dtype, name=name)

        return onnx_ir.LazyTensor(read, dtype, onnx_ir.Shape(shape), name=name)

    def _arrays(self) -> Parts:
        last = Group._last
        if last is None or last[0] is not self:
            Group._last = None  # before computing: memory holds one
            Group._last = last = (self, self._compute(*self._arguments))
        return last[1]

    @staticmethod
    def forget() -> None:
        """Drop the last computation."""
        Group._last = None

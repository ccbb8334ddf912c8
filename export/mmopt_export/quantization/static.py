"""int8 convolutions with calibrated activations (QDQ), with ONNX Runtime's own tool."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmopt_export.quantization.recipe import NothingToQuantizeError, Recipe
from mmopt_export.quantization.storage import load, save
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError

OPS = ("Conv", "Gemm", "MatMul")
_NOTHING = "int8 quantization changed nothing: no convolution has a constant."
# The tool keeps the whole model in one protobuf, which cannot be larger.
LIMIT_BYTES = 2 << 30


def quantize_static(
    source: Path, output: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, Any]:
    """Write `source` with int8 convolutions, Gemms and matmuls, as far as one side is constant.

    Weights are symmetric int8 with one scale per output channel; activations uint8 with one scale
    and zero point, found on `feeds`. uint8 with int8 is what the CPU's dot products take (VNNI).
    Everything else stays fp32, so that no other op rounds.

    Raises:
        InputError: the graph is over 2 GB.
        NothingToQuantizeError: it has no weight to quantize.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    data = source.with_name(f"{source.name}.data")
    size = source.stat().st_size + (data.stat().st_size if data.exists() else 0)
    if size > LIMIT_BYTES:
        raise InputError(
            f"{source} has {size / 1e9:.1f} GB, and static quantization takes 2 GB at most. "
            "Export it with --precision fp32."
        )
    # MatMulConstBOnly says nothing to the tool under QDQ: attention would be quantized too.
    chosen = [
        str(node.name)
        for node in load(source).graph
        if node.op_type in OPS
        and any(value is not None and value.const_value is not None for value in node.inputs[:2])
        and node.name not in recipe.keep
    ]
    if not chosen:
        raise NothingToQuantizeError(_NOTHING)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, quiet():
        made = Path(scratch) / "static.onnx"
        quantize_static(
            source,
            made,
            _Samples(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
            calibrate_method={
                "minmax": CalibrationMethod.MinMax,
                "entropy": CalibrationMethod.Entropy,
                "percentile": CalibrationMethod.Percentile,
            }[recipe.calibration],
            # One batch at a time: the histograms of a step cannot be of pictures of several sizes.
            extra_options={"CalibStridedMinMax": 1},
        )
        model = load(made)
        count = sum(
            node.op_type in OPS
            and all(
                value is not None
                and (made_by := value.producer()) is not None
                and made_by.op_type == "DequantizeLinear"
                for value in node.inputs[:2]
            )
            for node in model.graph
        )
        if not count:
            raise NothingToQuantizeError(_NOTHING)
        save(model, output)
    return {
        "weights": "int8 symmetric per output channel",
        "activations": f"uint8 per tensor, {recipe.calibration} over {len(feeds)} batches",
        "quantized": count,
    }


class _Samples:
    """What ONNX Runtime's calibrators read batches from."""

    def __init__(self, feeds: Sequence[Tensors]) -> None:
        self._feeds = feeds
        self.rewind()

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> "_Samples":
        return self

    def __next__(self) -> Tensors:
        return next(self._left)

    def get_next(self) -> Tensors | None:
        """The next batch, or None."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Start again."""
        self._left = iter(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Only these batches, as calibration in strides asks."""
        self._left = iter(self._feeds[start_index:end_index])


@contextmanager
def quiet() -> Iterator[None]:
    """The tools talk on the root logger, and one of them configures it when it is imported."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    # The calibrators divide by the range of a histogram, which may be empty.
    with np.errstate(all="ignore"):
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
            root.setLevel(level)

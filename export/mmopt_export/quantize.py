"""Quantizes an ONNX graph for its target, with ONNX Runtime's own tools."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import onnx

from mmopt_kernels.errors import MmoptError


def quantize_int8(source: Path, output: Path) -> dict[str, Any]:
    """Write a copy of `source` with int8 matmuls and int8 embedding tables.

    Weights of matmuls are symmetric int8, one scale per output channel (one per tensor takes the
    demo's cosine to 0.989); activations are uint8 with one scale and zero point per tensor,
    computed at run time, so no calibration data is needed. Embedding tables are int8 with one
    scale, which takes 61% off a MiniLM's file for a cosine of 0.9999. Gemm, which the tracer uses
    for the pooler and the head, keeps fp32: next to nothing in time and size.

    Returns:
        The recipe, for the manifest.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The tool says on the root logger that a model without shape inference may quantize badly.
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            prepared = Path(scratch) / "prepared.onnx"
            _drop_stale_value_info(source, prepared)
            quantize_dynamic(
                prepared,
                output,
                op_types_to_quantize=["MatMul", "Gather"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.disable(logging.NOTSET)
    model = onnx.load(output, load_external_data=False)
    count = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if count == 0:
        raise MmoptError("int8 quantization changed no matmul: the graph has none with a constant.")
    return {
        "method": "dynamic",
        "weights": "int8 symmetric per output channel",
        "activations": "uint8 per tensor at run time",
        "embeddings": "int8 per tensor",
        "matmuls": count,
    }


def _drop_stale_value_info(source: Path, output: Path) -> None:
    """Copy `source` as one file, without the weights' value_info: the tool transposes weights."""
    model = onnx.load(source)
    weights = {weight.name for weight in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, output)

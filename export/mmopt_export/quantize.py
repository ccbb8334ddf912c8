"""Quantizes an ONNX graph for its target, with ONNX Runtime's own tools."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from mmopt_export.runtime import Tensors, open_session
from mmopt_kernels.errors import MmoptError

# A matmul's input is quantized with one scale until the rounding that this brings, relative to the
# input, is above this. In the demo's classifier the inputs after normalizations and in attention
# are at 0.02 to 0.04, and those of feed-forward blocks, whose few large values stretch the scale,
# at 0.05 to 0.1. Giving these 9 of 24 matmuls blocks takes the predictions that int8 changes from
# 3.8% to 1.4% and the time from 0.43 to 0.55 of fp32's; blocks for all 24 leave 1.6% and cost 0.69
# (AMD EPYC with AVX512-VNNI, one thread, 8 x 64 tokens; docs/lab-notes.md).
MAX_NOISE = 0.05
# Values that share a scale in a block. With 32 the same 9 matmuls change as many predictions, in
# 0.61 of fp32's time instead of 0.55 and 2% more bytes.
BLOCK = 128
# How many batches of samples the noise is measured on.
_MEASURED = 8


def quantize_int8(source: Path, output: Path, feeds: Sequence[Tensors]) -> dict[str, Any]:
    """Write a copy of `source` with int8 matmuls and int8 embedding tables.

    Weights of matmuls are symmetric int8, one scale per output channel (one per tensor takes the
    demo's cosine to 0.989); activations are uint8 with one scale and zero point per tensor,
    computed at run time. Where one scale for all of an activation rounds it too much, the matmul
    takes int8 blocks of weights and activations instead. Embedding tables are int8 with one scale,
    which takes 61% off a MiniLM's file for a cosine of 0.9999. Gemm, which the tracer uses for the
    pooler and the head, keeps fp32: next to nothing in time and size.

    Args:
        source: the fp32 graph.
        output: file to write.
        feeds: batches like those that the graph will meet, which decide what takes blocks.

    Returns:
        The recipe, for the manifest.

    Raises:
        MmoptError: the graph has no matmul with a constant weight.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    noise = _activation_noise(source, feeds)
    if not noise:
        raise MmoptError("int8 quantization changed no matmul: the graph has none with a constant.")
    blockwise = sorted(name for name, level in noise.items() if level > MAX_NOISE)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, _quiet():
        prepared = Path(scratch) / "prepared.onnx"
        model = onnx.load(source)
        _drop_stale_value_info(model)
        onnx.save(_with_blocks(model, blockwise), prepared)
        quantize_dynamic(
            prepared,
            output,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # As the tool calls a Gemm that it has taken apart.
            nodes_to_exclude=[
                f"{node.name}_MatMul" for node in model.graph.node if node.op_type == "Gemm"
            ],
            extra_options={"MatMulConstBOnly": True},
        )
    return {
        "method": "dynamic",
        "weights": "int8 symmetric per output channel",
        "activations": "uint8 per tensor at run time",
        "embeddings": "int8 per tensor",
        "matmuls": len(noise),
        "blockwise": {
            "matmuls": blockwise,
            "weights": f"int8 symmetric per {BLOCK} inputs",
            "activations": f"int8 per {BLOCK} inputs of a token at run time",
            "activation_noise_above": MAX_NOISE,
        },
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools say on the root logger that a model without shape inference may quantize badly."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _drop_stale_value_info(model: onnx.ModelProto) -> None:
    """Leave out the weights' value_info: the tool transposes weights."""
    weights = {weight.name for weight in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _activation_noise(source: Path, feeds: Sequence[Tensors]) -> dict[str, float]:
    """How much uint8 with one scale would round the input of each matmul with a constant weight.

    The error of rounding to steps of `(max - min) / 255` has the standard deviation
    `step / sqrt(12)`; the noise is that over the input's root mean square, averaged over batches.
    """
    model = onnx.load(source, load_external_data=False)
    weights = {weight.name for weight in model.graph.initializer}
    matmuls = [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights
    ]
    if not matmuls:
        return {}
    inputs = list(dict.fromkeys(node.input[0] for node in matmuls))
    names = []
    for x in inputs:
        # Reduced within the graph, so that no activation is kept.
        model.graph.node.append(helper.make_node("Mul", [x, x], [f"{x}/squared"]))
        for op, value in (("ReduceMin", x), ("ReduceMax", x), ("ReduceMean", f"{x}/squared")):
            name = f"{x}/{op}"
            model.graph.node.append(helper.make_node(op, [value], [name], keepdims=0))
            model.graph.output.append(
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [])
            )
            names.append(name)
    # Beside the source, whose external data it reads.
    measured = source.with_name("measured.onnx")
    try:
        onnx.save(model, measured)
        session = open_session(measured, provider="CPUExecutionProvider")
        levels = []
        for index in np.linspace(0, len(feeds) - 1, min(_MEASURED, len(feeds))).round():
            values = session.run(names, feeds[int(index)])
            least, most, square = np.reshape(values, (-1, 3)).T
            # An input of zeros has no noise.
            levels.append((most - least) / 255 / np.sqrt(12 * np.maximum(square, 1e-30)))
    finally:
        measured.unlink(missing_ok=True)
    by_input = dict(zip(inputs, np.mean(levels, 0), strict=True))
    return {node.name: float(by_input[node.input[0]]) for node in matmuls}


def _with_blocks(model: onnx.ModelProto, chosen: Sequence[str]) -> onnx.ModelProto:
    """`model` with MatMulNBits of 8 bits in the place of the chosen matmuls."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if not chosen:
        return model
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=8,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,  # multiply in int8
        nodes_to_exclude=[node.name for node in model.graph.node if node.name not in chosen],
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized

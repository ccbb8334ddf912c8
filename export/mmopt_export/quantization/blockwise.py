"""Weights of matmuls in blocks of 4 or 8 bits, for decoders: reading them takes the time."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir

from mmopt_export.quantization import packing
from mmopt_export.quantization.recipe import Recipe
from mmopt_export.quantization.storage import Array, Group, row_pieces
from mmopt_export.quantization.weights import (
    Weight,
    find_embeddings,
    find_weights,
    initializer,
    read,
    remove_unused,
    replace,
)

_UINT8, _FLOAT = onnx_ir.DataType.UINT8, onnx_ir.DataType.FLOAT
# Smaller tables, of positions or of token types, are next to nothing in size.
_MIN_TABLE = 1 << 16


def blockwise_candidates(graph: onnx_ir.Graph) -> list[Weight]:
    """The matmuls and Gemms that blocks are for: all with a constant weight."""
    return list(find_weights(graph, gemm=True))


def quantize_blocks(
    graph: onnx_ir.Graph,
    weights: Iterable[Weight],
    recipe: Recipe,
    hessians: Mapping[str, Array] | None = None,
) -> dict[str, int]:
    """Replace matmuls by MatMulNBits, in place; return the bits of each.

    Nothing is computed yet: the new initializers are lazy, and a weight that two matmuls share
    (or a head with the embeddings) is stored once for all of them.

    Args:
        hessians: for `gptq`, by the name of the matmul's input.
    """
    bits_of = {}
    for weight in weights:
        bits = 8 if weight.name in recipe.wide else recipe.bits
        k, n = weight.shape
        shapes = packing.packed_shapes(k, n, bits, recipe.block)
        hessian = None if hessians is None else hessians[str(weight.x.name)]
        group = Group(_rounding(weight, recipe, bits, hessian))
        stem = f"{weight.value.name}_{'nk' if weight.transposed else 'kn'}_{bits}"
        inputs = [
            weight.x,
            initializer(graph, group.tensor(0, f"{stem}_blocks", _UINT8, shapes[0])),
            initializer(graph, group.tensor(1, f"{stem}_scales", _FLOAT, shapes[1])),
            None
            if recipe.symmetric
            else initializer(graph, group.tensor(2, f"{stem}_zeros", _UINT8, shapes[2])),
            None,
            weight.bias,
        ]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"K": k, "N": n, "bits": bits, "block_size": recipe.block}
        if recipe.accuracy_level:
            attributes["accuracy_level"] = recipe.accuracy_level
        replace(
            weight.node,
            [
                onnx_ir.node(
                    "MatMulNBits", inputs, attributes, domain="com.microsoft", name=weight.name
                )
            ],
        )
        bits_of[weight.name] = bits
    _import_contrib(graph)
    remove_unused(graph)
    return bits_of


def quantize_tables(graph: onnx_ir.Graph, block: int) -> list[str]:
    """Replace embedding tables by symmetric int8 ones in blocks, in place; return their names.

    GatherBlockQuantized reads only the rows that are asked for. 8 bits whatever the matmuls take:
    a table costs no time, and its error enters every layer.
    """
    done = []
    for node in list(find_embeddings(graph)):
        table, ids = node.inputs
        assert table is not None
        assert table.const_value is not None
        rows, columns = table.const_value.shape.numpy()
        if rows * columns < _MIN_TABLE:
            continue
        name = str(table.name)
        group = Group(lambda tensor: _rows_in_blocks(read(tensor), block), table.const_value)
        integers = group.tensor(0, f"{name}_rows_8_blocks", _UINT8, (rows, columns))
        scales = group.tensor(1, f"{name}_rows_8_scales", _FLOAT, (rows, -(-columns // block)))
        gather = onnx_ir.node(
            "GatherBlockQuantized",
            [initializer(graph, integers), ids, initializer(graph, scales)],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": 8},
            domain="com.microsoft",
            name=str(node.name),
        )
        replace(node, [gather])
        done.append(name)
    _import_contrib(graph)
    remove_unused(graph)
    return done


def _rounding(
    weight: Weight, recipe: Recipe, bits: int, hessian: Array | None
) -> Callable[[], packing.Blocks]:
    def compute() -> packing.Blocks:
        w = weight.array()
        if recipe.algorithm == "hqq":
            return packing.half_quadratic(w, bits, recipe.block)
        if hessian is not None:
            return packing.second_order(w, hessian, bits, recipe.block, recipe.symmetric)
        return packing.round_to_nearest(w, bits, recipe.block, recipe.symmetric)

    return compute


def _rows_in_blocks(table: Array, block: int) -> tuple[Array, ...]:
    rows, columns = table.shape
    integers = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, -(-columns // block)), np.float32)
    for piece in row_pieces(table.shape):
        padded = np.pad(table[piece], ((0, 0), (0, -columns % block)))
        blocks = padded.reshape(len(padded), -1, block)
        scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        scales[piece] = scale
        blocks = np.rint(blocks / np.where(scale == 0, np.float32(1), scale)[..., None]) + 128
        integers[piece] = blocks.reshape(len(padded), -1)[:, :columns]
    return integers, scales


def _import_contrib(graph: onnx_ir.Graph) -> None:
    graph.opset_imports.setdefault("com.microsoft", 1)

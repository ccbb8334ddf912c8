"""Graphs in fp16 or bf16.

onnxruntime.transformers.float16 is not used: it has no bf16, keeps a protobuf of the whole model
in memory, decides by the type of an op alone, so that a decomposed normalization overflows or all
multiplications stay fp32, and turns positions into half precision, which has no odd numbers beyond
2048.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from mmopt_export.quantization.storage import Array, row_pieces
from mmopt_export.quantization.weights import initializer, read
from mmopt_kernels.errors import MmoptError

_FLOAT = onnx_ir.DataType.FLOAT
_TYPES = {"fp16": onnx_ir.DataType.FLOAT16, "bf16": onnx_ir.DataType.BFLOAT16}
_NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# Half of the largest value, so that a mask added to a score, or to another mask, stays finite:
# a row of -inf alone makes its softmax NaN.
_LARGEST = {"fp16": 32752.0, "bf16": 1.6e38}
# Squares, sums and exponentials leave the range of fp16, or its precision. Softmax and the fused
# normalizations are not among them: their kernels accumulate in fp32.
_WIDE = frozenset(
    [
        "CumSum",
        "Cos",
        "Exp",
        "Log",
        "LogSoftmax",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Sin",
        "Softplus",
        "Sqrt",
    ]
)
KEPT_WIDE = "mmopt.fp32"
"""Metadata of a node: the half precisions, `fp16` or `fp16 bf16`, in which it stays fp32."""
# What takes a sum on: such a sum is fp32 where something is that is kept so by name.
_SUMS = frozenset(["Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
_NORMS = frozenset(["LayerNormalization", "SimplifiedLayerNormalization"])
# A node of these is fp32 where all that it computes with is: the sum of a variance and epsilon.
_FOLLOWS = frozenset(
    [
        "Abs",
        "Add",
        "Cast",
        "Clip",
        "Concat",
        "Div",
        "Expand",
        "Identity",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Reshape",
        "Slice",
        "Squeeze",
        "Sub",
        "Sum",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
# What ONNX Runtime's CUDA provider computes in bf16 at the opset of our exports, by domain. All
# else stays fp32 in a bf16 graph: around bf16, unlike fp16, ONNX Runtime inserts no casts of its
# own and refuses the graph.
# Source: get_all_opkernel_def() of onnxruntime-gpu 1.31.1, the kernels of CUDAExecutionProvider for
# opset 20 with tensor(bfloat16) among their types; without branches, sequences, random numbers and
# the com.microsoft ops that no export holds. Conv, AveragePool, Sin, Cos and Softplus have bf16
# from opset 22 on, TopK from 24 on.
_BF16_KERNELS = {
    "": frozenset(
        [
            "Abs",
            "Add",
            "Cast",
            "Compress",
            "Concat",
            "ConstantOfShape",
            "Div",
            "Dropout",
            "Erf",
            "Exp",
            "Expand",
            "Flatten",
            "Gather",
            "GatherElements",
            "GatherND",
            "Gelu",
            "Gemm",
            "Identity",
            "IsInf",
            "IsNaN",
            "LayerNormalization",
            "MatMul",
            "Max",
            "Min",
            "Mod",
            "Mul",
            "Neg",
            "Pow",
            "ReduceMean",
            "ReduceSum",
            "Relu",
            "Reshape",
            "ReverseSequence",
            "ScatterElements",
            "ScatterND",
            "Shape",
            "Sigmoid",
            "Sign",
            "SimplifiedLayerNormalization",
            "Size",
            "Slice",
            "Softmax",
            "Split",
            "Sqrt",
            "Squeeze",
            "Sub",
            "Sum",
            "Tanh",
            "Tile",
            "Transpose",
            "Trilu",
            "Unsqueeze",
            "Where",
        ]
    ),
    "com.microsoft": frozenset(
        [
            "Attention",
            "BiasGelu",
            "FastGelu",
            "FusedMatMul",
            "GatherBlockQuantized",
            "Gelu",
            "GroupQueryAttention",
            "MatMulNBits",
            "MultiHeadAttention",
            "QuickGelu",
            "RotaryEmbedding",
            "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization",
        ]
    ),
}
_INTEGER_RESULT = {
    "Shape": onnx_ir.DataType.INT64,
    "Size": onnx_ir.DataType.INT64,
    "ArgMax": onnx_ir.DataType.INT64,
    "ArgMin": onnx_ir.DataType.INT64,
    "NonZero": onnx_ir.DataType.INT64,
    **dict.fromkeys(
        [
            "And",
            "Equal",
            "Greater",
            "GreaterOrEqual",
            "IsInf",
            "IsNaN",
            "Less",
            "LessOrEqual",
            "Not",
            "Or",
            "Xor",
        ],
        onnx_ir.DataType.BOOL,
    ),
}
# Where the ops that read a cache in place take it and give it, by input and output.
_CACHES = {
    "GroupQueryAttention": ((3, 4), (1, 2)),
    "MultiHeadAttention": ((6, 7), (1, 2)),
    "Attention": ((4,), (1,)),
}
# Inputs that are fp32 whatever the others are.
_ALWAYS_FP32 = {"Resize": (1, 2)}
# Outputs that are fp32 whatever the others are: the mean and inverse deviation of a normalization.
_FP32_OUTPUTS = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (1, 2),
}


def to_half(model: onnx_ir.Model, floats: str) -> dict[str, Any]:
    """Convert `model`, in place, to compute in `floats`: `fp16` or `bf16`.

    Inputs and outputs keep their type, but for the caches that attention reads and writes in
    place, which take the new one. Initializers become lazy: each is converted when it is written.

    Returns:
        How many nodes stay fp32, and the names of inputs and outputs that changed their type.

    Raises:
        MmoptError: the graph has branches or loops.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    for node in model.graph:
        if any(
            attr.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
            for attr in node.attributes.values()
        ):
            raise MmoptError(
                f"the graph has a {node.op_type}, which cannot be converted to {floats}. "
                "Export it with --precision fp32."
            )
    _infer_types(model.graph)
    return _Conversion(model.graph, floats).run()


class _Conversion:
    def __init__(self, graph: onnx_ir.Graph, floats: str) -> None:
        self.graph, self.floats, self.type = graph, floats, _TYPES[floats]
        self.wide: set[onnx_ir.Value] = set()
        # What nodes compute that are kept fp32 by name, and the sums that it goes into.
        self.kept: set[onnx_ir.Value] = set()
        self.casts: dict[tuple[onnx_ir.Value, bool], onnx_ir.Value] = {}

    def run(self) -> dict[str, Any]:
        graph = self.graph
        floating = {
            value
            for value in (*graph.inputs, *(o for n in graph for o in n.outputs))
            if value.dtype == _FLOAT
        }
        constants = {v for v in graph.initializers.values() if v.dtype == _FLOAT}
        exact = self._from_integers(constants)
        caches = self._caches()
        kept = 0
        self.wide.update(v for v in graph.inputs if v in floating and v not in caches)
        nodes = list(graph)
        keeps = []
        for node in nodes:
            keep = node in exact or self._is_kept(node) or self._stays_wide(node, constants)
            keeps.append(keep)
            kept += keep
            if keep:
                self.wide.update(v for v in node.outputs if v in floating)
            exact_outputs = _FP32_OUTPUTS.get(node.op_type, ())
            self.wide.update(v for i, v in enumerate(node.outputs) if i in exact_outputs)
        for node, keep in zip(nodes, keeps, strict=True):
            for index, value in enumerate(node.inputs):
                if value is None or (value not in floating and value not in constants):
                    continue
                fp32 = keep or index in _ALWAYS_FP32.get(node.op_type, ())
                if value in constants:
                    node.replace_input_with(index, self._constant(value, fp32))
                elif fp32 != (value in self.wide):
                    node.replace_input_with(index, self._cast(value, fp32, node, exact))
            if not keep:
                self._retype(node)
        for value in caches:
            value.dtype = self.type
        for value in floating - self.wide:
            value.dtype = self.type
        for index, value in enumerate(list(graph.outputs)):
            if value not in floating or value in self.wide or value in caches:
                continue
            name = value.name
            value.name = f"{name}_{self.floats}"
            cast = onnx_ir.node("Cast", [value], {"to": _FLOAT}, name=f"{name}_cast")
            out = cast.outputs[0]
            out.name, out.dtype, out.shape = name, _FLOAT, value.shape
            graph.append(cast)
            graph.outputs[index] = out
        changed = [str(v.name) for v in (*graph.inputs, *graph.outputs) if v in caches]
        for value in list(constants):
            if not value.uses():
                del graph.initializers[str(value.name)]
        return {"fp32_nodes": kept, "half_inputs_outputs": changed}

    def _from_integers(self, constants: set[onnx_ir.Value]) -> set[onnx_ir.Node]:
        """Nodes that compute with integers and constants alone: positions and masks."""
        found: set[onnx_ir.Node] = set()
        values: set[onnx_ir.Value] = set()
        for node in self.graph:
            inputs = [v for v in node.inputs if v is not None and v.dtype == _FLOAT]
            outputs = [v for v in node.outputs if v.dtype == _FLOAT]
            if not outputs or node.domain or not all(v in values or v in constants for v in inputs):
                continue
            computed = any(v in values for v in inputs)
            if computed or node.op_type in ("Cast", "ConstantOfShape", "Range"):
                found.add(node)
                values.update(outputs)
        return found

    def _is_kept(self, node: onnx_ir.Node) -> bool:
        """Whether a node is fp32 by name, or adds up or normalizes what is."""
        named = self.floats in node.metadata_props.get(KEPT_WIDE, "").split()
        if not named and not any(value in self.kept for value in node.inputs):
            return False
        if named or node.op_type == "Add":
            self.kept.add(node.outputs[0])
        elif node.op_type in _SUMS:
            self.kept.update(node.outputs[3:])
        return named or node.op_type in _SUMS | _NORMS

    def _stays_wide(self, node: onnx_ir.Node, constants: set[onnx_ir.Value]) -> bool:
        if self.floats == "bf16" and not _computes_in_bf16(node):
            return True
        if node.domain or node.op_type not in _WIDE | _FOLLOWS:
            return False
        if node.op_type in _WIDE:
            return any(v is not None and v.dtype == _FLOAT for v in node.inputs)
        inputs = [
            v for v in node.inputs if v is not None and v.dtype == _FLOAT and v not in constants
        ]
        if not inputs:
            return False
        if self._weighs(node, constants):
            return False
        # x - mean, x / deviation, x * reciprocal deviation: a normalization taken apart.
        if node.op_type in ("Sub", "Div", "Mul") and any(self._normalizes(v) for v in inputs):
            return True
        return all(v in self.wide and not v.is_graph_input() for v in inputs)

    def _normalizes(self, value: onnx_ir.Value) -> bool:
        producer = value.producer()
        return (
            value in self.wide
            and producer is not None
            and producer.op_type in ("ReduceMean", "Sqrt", "Reciprocal", "ReduceL2", "Pow", "Clip")
        )

    def _weighs(self, node: onnx_ir.Node, constants: set[onnx_ir.Value]) -> bool:
        """Whether a node multiplies what is normalized in half by a weight for each channel.

        ONNX Runtime fuses it with what is before it, casts included, to a normalization of the
        value's type and the weight's: its CUDA provider has none of bf16 and fp32, either way.
        """
        if node.op_type != "Mul":
            return False
        a, b = node.inputs
        for normal, weight in ((a, b), (b, a)):
            if normal is None or weight not in constants:
                continue
            shape = weight.shape
            if shape is None or len(shape) != 1 or shape[0] == 1:
                continue
            source = self._normalized(normal)
            if source is not None and source not in self.wide:
                return True
        return False

    def _normalized(self, value: onnx_ir.Value) -> onnx_ir.Value | None:
        """The x of x / deviation, x * reciprocal deviation, or either of x - mean."""
        producer = value.producer()
        if producer is None or producer.op_type not in ("Div", "Mul") or value not in self.wide:
            return None
        x, by = producer.inputs
        if x is None or by is None:
            return None
        if producer.op_type == "Mul":
            if _is_reciprocal(x):
                x, by = by, x
            if not _is_reciprocal(by):
                return None
        if not self._normalizes(by):
            return None
        centred = x.producer()
        if centred is not None and centred.op_type == "Sub":
            before, mean = centred.inputs
            if mean is not None and self._normalizes(mean):
                return before
        return x

    def _caches(self) -> set[onnx_ir.Value]:
        """Graph inputs and outputs that attention reads and writes in place."""
        found: set[onnx_ir.Value] = set()
        for node in self.graph:
            if node.op_type not in _CACHES or node.domain != "com.microsoft":
                continue
            taken, given = _CACHES[node.op_type]
            inputs = (node.inputs[i] for i in taken if i < len(node.inputs))
            found.update(v for v in inputs if v is not None and v.is_graph_input())
            outputs = (node.outputs[i] for i in given if i < len(node.outputs))
            found.update(v for v in outputs if v.is_graph_output())
        return found

    def _constant(self, value: onnx_ir.Value, fp32: bool) -> onnx_ir.Value:
        if fp32:
            return value
        assert value.const_value is not None
        source, floats = value.const_value, self.floats

        def narrowed() -> onnx_ir.TensorProtocol:
            return onnx_ir.Tensor(_narrow(read(source), floats), dtype=_TYPES[floats], name=name)

        name = f"{value.name}_{floats}"
        return initializer(
            self.graph,
            onnx_ir.LazyTensor(
                narrowed,
                self.type,
                source.shape,  # type: ignore[arg-type]
                name=name,
            ),
        )

    def _cast(
        self, value: onnx_ir.Value, fp32: bool, reader: onnx_ir.Node, exact: set[onnx_ir.Node]
    ) -> onnx_ir.Value:
        if (value, fp32) not in self.casts:
            producer = value.producer()
            nodes = []
            source = value
            if not fp32 and producer in exact and producer.op_type not in ("Cos", "Sin"):
                # A mask of -3e38, say.
                bound = np.float32(_LARGEST[self.floats])
                low, high = (
                    initializer(self.graph, onnx_ir.Tensor(np.array(each), name=name))
                    for each, name in ((-bound, "half_lowest"), (bound, "half_highest"))
                )
                clip = onnx_ir.node("Clip", [value, low, high], name=f"{value.name}_clip")
                source = clip.outputs[0]
                source.name, source.dtype, source.shape = f"{value.name}_clip", _FLOAT, value.shape
                nodes.append(clip)
            to = _FLOAT if fp32 else self.type
            name = f"{value.name}_{'fp32' if fp32 else self.floats}"
            cast = onnx_ir.node("Cast", [source], {"to": to}, name=f"{name}_cast")
            cast.outputs[0].name, cast.outputs[0].dtype = name, to
            cast.outputs[0].shape = value.shape
            nodes.append(cast)
            if producer is not None:
                self.graph.insert_after(producer, nodes)
            else:
                self.graph.insert_before(self.graph[0], nodes)
            self.casts[value, fp32] = cast.outputs[0]
        return self.casts[value, fp32]

    def _retype(self, node: onnx_ir.Node) -> None:
        """Attributes that hold a type or a tensor."""
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.value == _FLOAT:
            node.attributes["to"] = onnx_ir.AttrInt64("to", self.type)
        fill = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and (fill is None or fill.value.dtype == _FLOAT):
            array = np.zeros(1, np.float32) if fill is None else fill.value.numpy()
            tensor = onnx_ir.Tensor(_narrow(array, self.floats), dtype=self.type)
            node.attributes["value"] = onnx_ir.AttrTensor("value", tensor)


def _computes_in_bf16(node: onnx_ir.Node) -> bool:
    """Whether a node has no floats, or a kernel for them in bf16 on CUDA."""
    if node.op_type in _BF16_KERNELS.get(node.domain, ()):
        return True
    return not any(v is not None and v.dtype == _FLOAT for v in (*node.inputs, *node.outputs))


def _is_reciprocal(value: onnx_ir.Value) -> bool:
    """1 / x, or x to a negative power."""
    producer = value.producer()
    if producer is None or producer.op_type != "Pow":
        return producer is not None and producer.op_type == "Reciprocal"
    exponent = producer.inputs[1]
    if exponent is None or exponent.const_value is None:
        return False
    return bool((exponent.const_value.numpy() < 0).all())


def _narrow(array: Array, floats: str) -> Array:
    """Rounded to nearest; finite values stay finite, and a lone epsilon stays above zero."""
    bound = np.float32(_LARGEST[floats])
    # Only what has no place in the type is moved, to where sums of two have one.
    limit = np.float32(65504.0) if floats == "fp16" else np.float32(3.38e38)
    out = np.empty(array.shape, _NUMPY[floats])
    for rows in row_pieces(array.shape):
        values = array[rows]
        beyond = (np.abs(values) > limit) & np.isfinite(values)
        if beyond.any():
            values = np.where(beyond, np.copysign(bound, values), values)
        if floats == "fp16" and array.size == 1:
            tiny = (values != 0) & (np.abs(values) < np.float32(2**-24))
            values = np.where(tiny, np.copysign(np.float32(2**-24), values), values)
        out[rows] = values.astype(out.dtype)
    return out


def _infer_types(graph: onnx_ir.Graph) -> None:
    """Types where the graph has none: passes that make nodes need not know them."""
    for node in graph:
        for index, value in enumerate(node.outputs):
            if value.dtype is not None:
                continue
            if node.op_type in _INTEGER_RESULT:
                value.dtype = _INTEGER_RESULT[node.op_type]
            elif node.op_type == "Cast":
                value.dtype = onnx_ir.DataType(node.attributes["to"].as_int())
            elif any(v is not None and v.dtype == _FLOAT for v in node.inputs):
                value.dtype = _FLOAT
            elif node.inputs and index == 0 and node.inputs[0] is not None:
                value.type = node.inputs[0].type

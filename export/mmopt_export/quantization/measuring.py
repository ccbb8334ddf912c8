"""What samples tell of a graph: the inputs of its matmuls, and how much a change of it costs."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from mmopt_export.quantization.storage import Array, save
from mmopt_export.quantization.weights import Weight, initializer
from mmopt_export.runtime import Tensors, open_session, run_graph
from mmopt_kernels.errors import InputError

_FLOAT = onnx_ir.DataType.FLOAT
# How many batches of samples inputs are measured on.
_MEASURED = 8
# What the matrices of one pass over the samples may weigh.
_HESSIAN_BYTES = 1 << 30
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class InputStats:
    """An input of matmuls over the samples.

    Attributes:
        noise: how much uint8 with one scale rounds it: the standard deviation of the error,
            `(max - min) / 255 / sqrt(12)`, over the root mean square; the mean over batches.
        extremes: the largest absolute value of each channel, `[K]`.
    """

    noise: float
    extremes: npt.NDArray[np.float32]


def require_samples(feeds: Sequence[Tensors], what: str) -> None:
    """Raise InputError unless there is a batch."""
    if not feeds:
        raise InputError(
            f"{what} is fitted to samples, expected at least one batch. "
            "Give it texts, pictures or sounds with --calibration FILE."
        )


def spread(feeds: Sequence[Tensors], most: int = _MEASURED) -> list[Tensors]:
    """At most so many of them, evenly spread: samples come sorted by length."""
    count = min(most, len(feeds))
    return [feeds[int(i)] for i in np.linspace(0, len(feeds) - 1, count).round()]


def input_stats(
    model: onnx_ir.Model, folder: Path, weights: Sequence[Weight], feeds: Sequence[Tensors]
) -> dict[str, InputStats]:
    """Measure the inputs of some matmuls of `model`, which is left as it was, by their names.

    Reduced within the graph, so that no activation is kept. `folder` is the one of its weights.
    """
    inputs = list(dict.fromkeys(weight.x for weight in weights))
    with _probes(model) as graph:
        names = []
        widths = {weight.x: weight.shape[0] for weight in weights}
        axes = _constant(graph, "probe_axis", np.array([0]))
        for x in inputs:
            square = _probe(graph, "Mul", [x, x])
            size = _probe(graph, "Abs", [x])
            shape = _constant(graph, f"probe_{widths[x]}", np.array([-1, widths[x]]))
            rows = _probe(graph, "Reshape", [size, shape])
            for value in (
                _probe(graph, "ReduceMin", [x], {"keepdims": 0}),
                _probe(graph, "ReduceMax", [x], {"keepdims": 0}),
                _probe(graph, "ReduceMean", [square], {"keepdims": 0}),
                _probe(graph, "ReduceMax", [rows, axes], {"keepdims": 0}),
            ):
                value.dtype = _FLOAT
                graph.outputs.append(value)
                names.append(str(value.name))
        with _written(model, folder) as probed:
            session = open_session(probed, provider=_CPU)
        noise: list[Array] = []
        extremes: list[Array] | None = None
        for batch in spread(feeds):
            values = session.run(names, batch)
            least, most, power = (np.array(values[i::4], np.float64) for i in range(3))
            # An input of zeros has no noise.
            noise.append((most - least) / 255 / np.sqrt(12 * np.maximum(power, 1e-30)))
            sizes = values[3::4]
            extremes = (
                sizes
                if extremes is None
                else [np.maximum(a, b) for a, b in zip(extremes, sizes, strict=True)]
            )
    assert extremes is not None
    levels = np.mean(noise, axis=0)
    return {
        str(x.name): InputStats(float(level), extreme)
        for x, level, extreme in zip(inputs, levels, extremes, strict=True)
    }


def hessians(
    model: onnx_ir.Model, folder: Path, weights: Sequence[Weight], feeds: Sequence[Tensors]
) -> dict[str, Array]:
    """`x.T @ x` over all samples, fp32 `[K, K]`, of the inputs of some matmuls, by their names.

    In several passes where the matrices of one would not fit in a gigabyte. `folder` is the one
    of the model's weights.
    """
    sizes = {str(weight.x.name): weight.shape[0] for weight in weights}
    passes: list[list[onnx_ir.Value]] = [[]]
    room = _HESSIAN_BYTES
    for x in dict.fromkeys(weight.x for weight in weights):
        need = 4 * sizes[str(x.name)] ** 2
        if passes[-1] and need > room:
            passes.append([])
            room = _HESSIAN_BYTES
        passes[-1].append(x)
        room -= need
    found: dict[str, Array] = {}
    for inputs in passes:
        with _probes(model) as graph:
            names = {}
            for x in inputs:
                shape = _constant(
                    graph, f"probe_{sizes[str(x.name)]}", np.array([-1, sizes[str(x.name)]])
                )
                rows = _probe(graph, "Reshape", [x, shape])
                columns = _probe(graph, "Transpose", [rows], {"perm": [1, 0]})
                product = _probe(graph, "MatMul", [columns, rows])
                product.dtype = _FLOAT
                graph.outputs.append(product)
                names[str(x.name)] = str(product.name)
            with _written(model, folder) as probed:
                session = open_session(probed, provider=_CPU)
            for batch in feeds:
                for name, value in zip(
                    names, session.run(list(names.values()), batch), strict=True
                ):
                    found[name] = found[name] + value if name in found else value
    return found


def sensitivities(
    model: onnx_ir.Model,
    folder: Path,
    weights: Sequence[Weight],
    quantize: Callable[[Sequence[Weight]], object],
    feeds: Sequence[Tensors],
) -> dict[str, float]:
    """How much quantization changes the output of each matmul, given the fp32 input.

    All in one pass: beside each matmul runs a twin, which is quantized, and reads the same input.
    `model` is used up.

    Args:
        quantize: replaces the twins that it is given.

    Returns:
        By the matmul's name, the root mean square of the difference over that of the output.
    """
    graph = model.graph
    names = []
    twins = []
    for weight in weights:
        node = weight.node
        twin = onnx_ir.node(
            node.op_type,
            node.inputs,
            {name: attr.value for name, attr in node.attributes.items()},
            name=weight.name,
        )
        node.name = f"{weight.name}_exact"
        graph.insert_after(node, twin)
        exact, changed = node.outputs[0], twin.outputs[0]
        changed.name, changed.dtype = f"{exact.name}_twin", _FLOAT
        difference = _probe(graph, "Sub", [changed, exact])
        for value in (difference, exact):
            square = _probe(graph, "ReduceSumSquare", [value], {"keepdims": 0})
            square.dtype = _FLOAT
            graph.outputs.append(square)
            names.append(str(square.name))
        twins.append(replace(weight, node=twin))
    quantize(twins)
    graph.sort()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save(model, Path(scratch) / "twins.onnx")
        session = open_session(Path(scratch) / "twins.onnx", provider=_CPU)
        totals = np.zeros((len(weights), 2))
        for batch in spread(feeds):
            totals += np.reshape(session.run(names, batch), (-1, 2)).astype(np.float64)
    ratios = np.sqrt(totals[:, 0] / np.maximum(totals[:, 1], 1e-30))
    return {weight.name: float(ratio) for weight, ratio in zip(twins, ratios, strict=True)}


def relative_error(
    expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]
) -> float:
    """The norm of the difference over the norm of what was expected, of the worst float output.

    Infinite where a value is not finite or a shape is another. A cosine of 0.995 is about 0.1.
    """
    worst = 0.0
    for name, first in expected[0].items():
        if not np.issubdtype(first.dtype, np.floating):
            continue
        difference = norm = 0.0
        for want, got in zip(expected, actual, strict=True):
            a, b = want[name].astype(np.float64), got[name].astype(np.float64)
            if a.shape != b.shape or not np.isfinite(b).all():
                return float("inf")
            difference += float(((a - b) ** 2).sum())
            norm += float((a**2).sum())
        worst = max(worst, float(np.sqrt(difference / max(norm, 1e-30))))
    return worst


def run_all(session: Any, feeds: Sequence[Tensors]) -> list[Tensors]:
    """The named outputs of a session for each batch, in fp32 where they are shorter floats."""
    names = [output.name for output in session.get_outputs()]
    found = []
    for batch in feeds:
        values = zip(names, run_graph(session, names, batch), strict=True)
        found.append({name: value for name, value in values if value is not None})
    return found


def latency_ms(session: Any, feeds: Tensors, runs: int = 5) -> float:
    """The median time of a batch in milliseconds, after one to warm up."""
    names = [output.name for output in session.get_outputs()]
    run_graph(session, names, feeds)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run_graph(session, names, feeds)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@contextmanager
def _probes(model: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    """Take out again, at the end, what the block appends to the graph."""
    graph = model.graph
    nodes, outputs, constants = set(graph), len(graph.outputs), set(graph.initializers)
    try:
        yield graph
    finally:
        del graph.outputs[outputs:]
        added = [node for node in graph if node not in nodes]
        graph.remove(added, safe=True)
        for name in set(graph.initializers) - constants:
            del graph.initializers[name]


@contextmanager
def _written(model: onnx_ir.Model, folder: Path) -> Iterator[Path]:
    """A graph in a file for as long as the block runs, beside the weights, which stay there.

    ONNX Runtime reads external data only from the folder of the graph.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probed.", suffix=".onnx") as file:
        onnx_ir.save(model, file.name)
        yield Path(file.name)


def _probe(
    graph: onnx_ir.Graph,
    op: str,
    inputs: Sequence[onnx_ir.Value],
    attributes: Mapping[str, Any] | None = None,
) -> onnx_ir.Value:
    node = onnx_ir.node(op, inputs, attributes)
    graph.append(node)
    node.outputs[0].name = f"probe_{op}_{len(graph)}"
    node.name = f"node_probe_{op}_{len(graph)}"
    return node.outputs[0]


def _constant(graph: onnx_ir.Graph, name: str, array: Array) -> onnx_ir.Value:
    return initializer(graph, onnx_ir.Tensor(array.astype(np.int64), name=name))

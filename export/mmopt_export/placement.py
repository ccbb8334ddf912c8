"""Which execution provider runs which node, read from ONNX Runtime's own profile of a run.

ONNX Runtime moves a node to the CPU without a word when its provider has no kernel for it, and
puts copies around it. What a target promises instead is data, in `PROMISES`.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_export.integrity import messages, read_graph
from mmopt_kernels.errors import MmoptError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_COPIES = ("MemcpyFromHost", "MemcpyToHost")

# Operators of ONNX Runtime that stand for several of ONNX's, or that its optimizer or our exporter
# puts in place of them: their number is what a fusion gained.
FUSED_OPERATORS = (
    "Attention",
    "BiasGelu",
    "BiasSplitGelu",
    "DecoderMaskedMultiHeadAttention",
    "DynamicQuantizeMatMul",
    "EmbedLayerNormalization",
    "FastGelu",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GatherBlockQuantized",
    "Gelu",
    "Gemm",
    "GroupNorm",
    "GroupQueryAttention",
    "LayerNormalization",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "NhwcFusedConv",
    "PackedMultiHeadAttention",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
    "QMoE",
    "QuickGelu",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipGroupNorm",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)


def _reasons() -> dict[str, str]:
    reasons = {
        "reads a shape, which the host knows": "Shape Size",
        "picks or arranges dimensions of a shape": (
            "Concat Expand Gather Identity Reshape Slice Split Squeeze Unsqueeze ConstantOfShape"
        ),
        "computes with dimensions of a shape": (
            "Abs Add Cast Ceil Div Floor Max Min Mod Mul Neg Pow Range ReduceMax ReduceMin "
            "ReduceProd ReduceSum Sign Sqrt Sub"
        ),
        "chooses between dimensions of shapes": (
            "And Equal Greater GreaterOrEqual If Less LessOrEqual Not Or Where"
        ),
    }
    return {operator: reason for reason, names in reasons.items() for operator in names.split()}


@dataclass(frozen=True)
class Promise:
    """What a provider promises for every graph that it runs.

    Attributes:
        provider: runs every node but those below.
        on_cpu: operators that may run on the CPU all the same, each with the reason.
        types: of the tensors that such a node may read and write, as ONNX Runtime names them.
        most_values: the largest of them, in elements.
        most_copies: copies between host and device within the graph.
    """

    provider: str
    on_cpu: Mapping[str, str]
    types: frozenset[str]
    most_values: int
    most_copies: int


# CUDA: ONNX Runtime itself leaves a node on the CPU whose inputs all lie there: what a kernel
# writes to the host, as Shape does, and small constants (GetCpuPreferredNodes in its
# core/framework/fallback_cpu_capability.cc; small is 100 values there, hence the 100 here). On the
# device each would cost a launch and a copy back to where the shape is needed. Such a chain needs
# no copy node, and half precision is never moved. A node that works on the tensors themselves
# shows by its size, its type or a copy.
_SHAPE_TYPES = frozenset({"int64", "int32", "bool", "float", "double"})
PROMISES = {
    CPU: Promise(CPU, on_cpu={}, types=frozenset(), most_values=0, most_copies=0),
    CUDA: Promise(CUDA, on_cpu=_reasons(), types=_SHAPE_TYPES, most_values=100, most_copies=0),
}


@dataclass(frozen=True)
class PlacedNode:
    """A node that ran.

    Attributes:
        name: its name after ONNX Runtime's optimizations.
        operator: its type.
        provider: which execution provider ran it.
        values: elements of the largest tensor that it read or wrote in any run.
        types: of those tensors.
        reason: why it may be on the CPU; None where it need not or must not be.
    """

    name: str
    operator: str
    provider: str
    values: int
    types: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one graph ran, against what its provider promises.

    Attributes:
        component: which graph.
        provider: which should run it.
        nodes: how many nodes each provider ran. Branches that did not run are not among them.
        misplaced: nodes that ran elsewhere than promised.
        on_cpu: nodes that ran on the CPU and may, each with its reason.
        copies: names of the nodes that copy between host and device.
        most_copies: how many of them there may be.
        fused: operators that stand for several, with their number in the file and in the run.
        total: nodes in the file and in the run.
    """

    component: str
    provider: str
    nodes: dict[str, int]
    misplaced: tuple[PlacedNode, ...]
    on_cpu: tuple[PlacedNode, ...]
    copies: tuple[str, ...]
    most_copies: int
    fused: dict[str, tuple[int, int]]
    total: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Whether every node ran where it should, without more copies than promised."""
        return not self.misplaced and len(self.copies) <= self.most_copies

    def to_dict(self) -> dict[str, Any]:
        """The placement as JSON values."""
        return {**dataclasses.asdict(self), "holds": self.holds}

    def lines(self) -> list[str]:
        """For a terminal: a line of counts, one for each node out of place, one of fusions."""
        counts = ", ".join(f"{name} {count}" for name, count in self.nodes.items())
        allowed = f" ({len(self.on_cpu)} of them on shapes, on purpose)" if self.on_cpu else ""
        lines = [f"placement of {self.component}: {counts}{allowed}; {len(self.copies)} copies"]
        lines += [
            f"  {node.name} ({node.operator}) ran on {node.provider}, expected {self.provider}"
            for node in self.misplaced
        ]
        if len(self.copies) > self.most_copies:
            names = ", ".join(self.copies)
            lines.append(f"  copies: {names}, expected at most {self.most_copies}")
        changed = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.fused.items())
        lines.append(f"  nodes {self.total[0]} -> {self.total[1]}; {changed or 'nothing fused'}")
        return lines


def read_profile(path: Path) -> list[PlacedNode]:
    """The nodes in a profile that `InferenceSession.end_profiling` wrote, each once.

    Raises:
        MmoptError: it is no such file, or says of no node where it ran (exit 3).
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        nodes: dict[tuple[str, str, str], PlacedNode] = {}
        for event in events:
            arguments = event.get("args", {})
            if event.get("cat") != "Node" or not arguments.get("provider"):
                continue
            operator, provider = arguments["op_name"], arguments["provider"]
            name = event["name"].removesuffix("_kernel_time")
            # Nodes may share a name (or have none), in one graph they do not share an index.
            key = (name, operator, str(arguments.get("node_index")))
            values, types = _tensors(arguments)
            if key in nodes:
                values = max(values, nodes[key].values)
            nodes[key] = PlacedNode(name, operator, provider, values, types)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MmoptError(
            f"{path} is no profile of ONNX Runtime ({error!r}); placement cannot be checked."
        ) from error
    if not nodes:
        raise MmoptError(f"{path} names no node that ran; placement cannot be checked.")
    return list(nodes.values())


def _tensors(arguments: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The largest size and all types in `[{"int64": [2, 3]}, ...]` of inputs and outputs."""
    most, types = 0, set()
    for key in ("input_type_shape", "output_type_shape"):
        for tensor in arguments.get(key, ()):
            for kind, shape in tensor.items():
                most = max(most, math.prod(shape))
                types.add(kind)
    return most, tuple(sorted(types))


def judge_placement(
    component: str,
    nodes: Iterable[PlacedNode],
    operators: Mapping[str, int],
    *,
    provider: str,
) -> Placement:
    """Hold the nodes of a run against what a provider promises.

    Args:
        component: the graph's name, for the report.
        nodes: from `read_profile`.
        operators: nodes by type in the file, from `count_operators`.
        provider: which should run the graph.
    """
    # A provider without an entry promises to run everything, without copies.
    promise = PROMISES.get(provider, dataclasses.replace(PROMISES[CPU], provider=provider))
    ran = sorted(nodes, key=lambda node: (node.name, node.operator))
    copies = [node for node in ran if node.operator in _COPIES]
    misplaced, on_cpu = [], []
    for node in ran:
        if node.provider == provider or node.operator in _COPIES:
            continue
        reason = promise.on_cpu.get(node.operator) if node.provider == CPU else None
        small = node.values <= promise.most_values and promise.types.issuperset(node.types)
        if reason is not None and small:
            on_cpu.append(dataclasses.replace(node, reason=reason))
        else:
            misplaced.append(node)
    after = Counter(node.operator for node in ran)
    return Placement(
        component=component,
        provider=provider,
        nodes=dict(sorted(Counter(node.provider for node in ran).items())),
        misplaced=tuple(misplaced),
        on_cpu=tuple(on_cpu),
        copies=tuple(node.name for node in copies),
        most_copies=promise.most_copies,
        fused={
            name: (operators.get(name, 0), after[name])
            for name in FUSED_OPERATORS
            if operators.get(name, 0) or after[name]
        },
        total=(sum(operators.values()), len(ran)),
    )


def measure_placement(component: str, model: Path, session: Any, *, provider: str) -> Placement:
    """Where the nodes of a graph ran, from a session opened with `open_session(profile=...)`.

    Call it after the last run: it ends the profile. Run the longest samples too, since a node
    counts as one on shapes only while its tensors are small.

    Raises:
        MmoptError: the session ran nothing, or was opened without a profile (exit 3).
    """
    nodes = read_profile(Path(session.end_profiling()))
    return judge_placement(component, nodes, count_operators(model), provider=provider)


def count_operators(model: Path) -> dict[str, int]:
    """Nodes by type in an ONNX file, those of subgraphs included; weights are not read."""
    nodes = messages(read_graph(model).graph)
    return dict(Counter(one.op_type for one in nodes if one.DESCRIPTOR.name == "NodeProto"))

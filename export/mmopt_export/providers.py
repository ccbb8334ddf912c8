"""What each target can run, as data: adding a target is one entry here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mmopt_kernels.errors import InputError

KINDS = ("encoder", "convolutional", "decoder")
"""What a graph mostly does, which decides how it is quantized.

`encoder`: matmuls over many tokens at once. `convolutional`: convolutions. `decoder`: a few tokens
at a time over a cache, so that reading the weights takes the time.
"""

AUTO = "auto"
"""The precision that asks for the narrowest that meets an accuracy budget."""

_CPU_HALF = "ONNX Runtime's CPU kernels compute half precision through casts to fp32"
_ENCODER_INT4 = (
    "4-bit weights save reading them, which takes the time only where few tokens are computed at "
    "once, in decoders; int8 is faster here"
)
_CONVOLUTION_INT4 = "ONNX Runtime has no convolution with 4-bit weights"
_CUDA_INT8 = (
    "DynamicQuantizeLinear and MatMulInteger fall from CUDA to the CPU with copies; only decoders "
    "have int8 there, of weights alone"
)
_CUDA_STATIC = "QLinearConv has no CUDA kernel and falls to the CPU with copies"
_CUDA_FP32_CACHE = (
    "GroupQueryAttention, which reads the cache in place, takes fp16 and bf16 only on CUDA"
)
_NO_CONTRIB = (
    "MatMulNBits belongs to com.microsoft, and the standard blocked DequantizeLinear to a later "
    "opset than artifacts have"
)


@dataclass(frozen=True)
class Capability:
    """What one kind of model can have on a target.

    Attributes:
        precisions: what `--precision` takes, widest first; `auto` goes with every one of them.
        default: what is taken where nobody chooses.
        refused: precisions that exist elsewhere, with the reason why not here.
    """

    precisions: tuple[str, ...]
    default: str
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """An execution target of an artifact.

    Attributes:
        name: what `--target` takes.
        provider: the ONNX Runtime execution provider that must run every node.
        contrib: whether graphs may hold ONNX Runtime's own ops (`com.microsoft`).
        kinds: what it can do for each of `KINDS`.
    """

    name: str
    provider: str
    contrib: bool
    kinds: Mapping[str, Capability]

    def capability(self, kind: str) -> Capability:
        """What `kind` of model can have here; ValueError for a kind that does not exist."""
        if kind not in self.kinds:
            raise ValueError(f"kind {kind!r}, expected one of: {', '.join(KINDS)}")
        return self.kinds[kind]

    def require_precision(self, kind: str | None, precision: str) -> None:
        """Raise InputError, with the reason where one is known, unless `precision` runs here.

        Args:
            kind: one of `KINDS`; None while the model is not loaded yet refuses only what no kind
                of model can have here.
            precision: what `--precision` was given; `auto` always runs.
        """
        if precision == AUTO:
            return
        chosen = self.kinds if kind is None else {kind: self.capability(kind)}
        if any(precision in capability.precisions for capability in chosen.values()):
            return
        reasons = dict.fromkeys(
            capability.refused[precision]
            for capability in chosen.values()
            if precision in capability.refused
        )
        known = dict.fromkeys(name for each in chosen.values() for name in each.precisions)
        what = f"target {self.name}" if kind is None else f"a model of kind {kind} on {self.name}"
        raise InputError(
            f"--precision {precision} is not available for {what} "
            f"({'; '.join(reasons) or 'no such precision'}), "
            f"expected one of: {', '.join(known)}, {AUTO}."
        )

    def default_precision(self, kind: str) -> str:
        """The precision for `kind` where nobody chooses one."""
        return self.capability(kind).default


def _kinds(
    *, encoder: Capability, convolutional: Capability, decoder: Capability
) -> Mapping[str, Capability]:
    return MappingProxyType(
        {"encoder": encoder, "convolutional": convolutional, "decoder": decoder}
    )


_CPU = {"fp16": _CPU_HALF, "bf16": _CPU_HALF}
_PORTABLE = {
    "fp16": _CPU_HALF + ", so that it cannot be proven as it would run",
    "bf16": "ONNX Runtime's CPU provider has no bf16, so that it cannot be proven",
}

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            provider="CPUExecutionProvider",
            contrib=True,
            kinds=_kinds(
                encoder=Capability(("fp32", "int8"), "fp32", {**_CPU, "int4": _ENCODER_INT4}),
                convolutional=Capability(
                    ("fp32", "int8"), "fp32", {**_CPU, "int4": _CONVOLUTION_INT4}
                ),
                decoder=Capability(("fp32", "int8", "int4"), "fp32", _CPU),
            ),
        ),
        Target(
            name="cuda",
            provider="CUDAExecutionProvider",
            contrib=True,
            kinds=_kinds(
                encoder=Capability(
                    ("fp32", "bf16", "fp16"), "fp16", {"int8": _CUDA_INT8, "int4": _ENCODER_INT4}
                ),
                convolutional=Capability(
                    ("fp32", "fp16"),
                    "fp16",
                    {
                        "bf16": "ONNX Runtime's CUDA convolutions take fp32 and fp16 alone in "
                        "the oldest version that artifacts promise",
                        "int8": _CUDA_STATIC,
                        "int4": _CONVOLUTION_INT4,
                    },
                ),
                decoder=Capability(
                    ("bf16", "fp16", "int8", "int4"), "fp16", {"fp32": _CUDA_FP32_CACHE}
                ),
            ),
        ),
        # Standard ONNX ops alone, for any provider; proven on the CPU.
        Target(
            name="portable",
            provider="CPUExecutionProvider",
            contrib=False,
            kinds=_kinds(
                encoder=Capability(("fp32", "int8"), "fp32", {**_PORTABLE, "int4": _NO_CONTRIB}),
                convolutional=Capability(
                    ("fp32", "int8"), "fp32", {**_PORTABLE, "int4": _CONVOLUTION_INT4}
                ),
                decoder=Capability(
                    ("fp32",), "fp32", {**_PORTABLE, "int8": _NO_CONTRIB, "int4": _NO_CONTRIB}
                ),
            ),
        ),
    )
}


def get_target(name: str) -> Target:
    """The target called `name`; InputError names the known ones otherwise."""
    if name not in TARGETS:
        raise InputError(f"--target {name} is not known, expected one of: {', '.join(TARGETS)}.")
    return TARGETS[name]

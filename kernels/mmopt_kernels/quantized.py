"""Quantized weights of a linear layer, in the layouts of bitsandbytes. Needs only torch.

Ops take tensors and strings, so a weight crosses into one in three parts: its main tensor, its
other tensors, and a string that says how they belong together.

    layout         main            others
    ""             weight [N, K]   none
    "nf4:NxK:B"    packed bytes    absmax, code
    "nf4:NxK:B:C"  packed bytes    absmax, code, nested_absmax, nested_code, offset
    "int8"         values [N, K]   scb

B values share an absmax, and C absmax values a nested one. Nothing here reads a tensor's values on
the host, and everything traces under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmopt_kernels.errors import KernelInputError

# The 4-bit normal float: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Those of bitsandbytes. A power of two, so that a block starts on a byte and kernels divide by it
# with a shift.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# bitsandbytes fixes it, in its kernels too.
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight of 4-bit normal floats, as bitsandbytes stores it.

    Value ``i`` of the flattened ``[N, K]`` weight is ``code[nibble i] * absmax[i // blocksize]``,
    where nibble ``i`` is the high half of byte ``i // 2`` for an even ``i`` and the low half for an
    odd one. With double quantization absmax is itself stored in bytes, and ``absmax[j]`` stands for
    ``nested_code[absmax[j]] * nested_absmax[j // nested_blocksize] + offset``.

    Attributes:
        packed: ``ceil(N * K / 2)`` bytes, in any shape and dtype.
        absmax: ``[ceil(N * K / blocksize)]``, float32, or uint8 with double quantization.
        shape: ``(N, K)``.
        blocksize: one of 32, 64, ..., 4096.
        nested_absmax: ``[ceil(blocks / nested_blocksize)]`` float32, or None.
        nested_code: ``[256]`` float32, or None.
        offset: one float32, or None.
        nested_blocksize: 256.
        code: ``[16]`` float32. None is the NF4 table, which is then copied to the device with each
            call; pass `nf4_code` where that must not be, as in a CUDA graph.
        layout: as `flatten` gives it. Made here, where sizes are numbers: to torch.compile those of
            an argument may be symbols, which no string can hold.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE
    code: Tensor | None = None
    layout: str = field(init=False)

    def __post_init__(self) -> None:
        layout = f"nf4:{'x'.join(map(str, self.shape))}:{self.blocksize}"
        if self.nested_absmax is not None:
            layout += f":{self.nested_blocksize}"
        object.__setattr__(self, "layout", layout)

    @classmethod
    def from_bitsandbytes(cls, weight: Tensor, quant_state: Any = None) -> NF4Weight:
        """The weight of a ``Linear4bit``, sharing its memory.

        Args:
            weight: a ``Params4bit``, or its bytes alone.
            quant_state: its ``QuantState``; the one that ``weight`` carries by default.

        Raises:
            KernelInputError: the weight is not quantized, not NF4, repacked for bitsandbytes' CPU
                kernel, or the state does not fit it.
        """
        op = "NF4Weight.from_bitsandbytes"
        state = getattr(weight, "quant_state", None) if quant_state is None else quant_state
        if state is None:
            raise KernelInputError(
                f"{op}: weight is {weight.dtype} {tuple(weight.shape)} without a quant_state, "
                "expected a quantized one. Move the layer to its device, which quantizes it, or "
                "pass quant_state (a Linear4bit keeps a second reference to it)."
            )
        if state.quant_type != "nf4":
            raise KernelInputError(
                f"{op}: quant_type is {state.quant_type!r}, expected 'nf4'. Quantize the model "
                "with bnb_4bit_quant_type='nf4', or leave this layer to bitsandbytes."
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise KernelInputError(
                f"{op}: bitsandbytes has repacked the weight for its CPU kernel, expected its "
                "storage format. It does so in the first forward of a layer in eval mode, without "
                "a gradient, on a CPU with AVX512-BF16, and rounds absmax to bfloat16 for good. "
                "Load the layer again, and do not run it by itself before."
            )
        shape = state.shape
        if shape is None or len(shape) != 2:
            raise KernelInputError(
                f"{op}: the quantized weight has shape {None if shape is None else tuple(shape)}, "
                "expected (N, K). Pass the weight of a linear layer."
            )
        nested = state.state2 if state.nested else None
        offset = None if nested is None else state.offset
        found = cls(
            # Not the parameter itself: its data may be replaced.
            packed=weight.detach(),
            absmax=state.absmax,
            shape=(int(shape[0]), int(shape[1])),
            blocksize=int(state.blocksize),
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            # Has the weight's own dtype where bitsandbytes has undone its packing for the CPU.
            offset=None if offset is None else offset.float(),
            nested_blocksize=NESTED_BLOCKSIZE if nested is None else int(nested.blocksize),
            code=state.code,
        )
        check(op, found)
        return found


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight of bytes with a scale for each row, as bitsandbytes' ``Linear8bitLt`` stores it.

    Stands for ``values * (scb / 127)[:, None]``.

    Attributes:
        values: ``[N, K]`` int8.
        scb: ``[N]`` float32, the absolute maximum of each row.
    """

    values: Tensor
    scb: Tensor

    @classmethod
    def from_bitsandbytes(cls, linear: Any) -> Int8Weight:
        """The weight of a ``Linear8bitLt``, sharing its memory, before or after its first forward.

        Raises:
            KernelInputError: the layer keeps its weight in 16 bits, or is not quantized yet.
        """
        op = "Int8Weight.from_bitsandbytes"
        if linear.state.has_fp16_weights:
            raise KernelInputError(
                f"{op}: the layer has has_fp16_weights=True, expected False: its weight is "
                "trained, and quantized anew in each forward. Leave it to bitsandbytes."
            )
        weight = linear.weight
        # The first forward moves both from the weight to the state.
        if getattr(weight, "CB", None) is not None:
            values, scb = weight.CB, weight.SCB
        else:
            values, scb = linear.state.CB, linear.state.SCB
        if values is None or scb is None:
            raise KernelInputError(
                f"{op}: weight is {weight.dtype} {tuple(weight.shape)} without its row scales "
                "SCB, expected a quantized one. Move the layer to its device, which quantizes it."
            )
        found = cls(values.detach(), scb.detach())
        check(op, found)
        return found


Weight = Tensor | NF4Weight | Int8Weight


def nf4_code(device: torch.device | str) -> Tensor:
    """The NF4 table on a device."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def flatten(weight: Weight) -> tuple[Tensor, list[Tensor], str]:
    """Main tensor, other tensors and layout, as the module lists them. No copy is made."""
    if isinstance(weight, NF4Weight):
        packed = weight.packed.reshape(-1).view(torch.uint8)
        code = nf4_code(packed.device) if weight.code is None else weight.code
        rest = [weight.absmax, code]
        if weight.nested_absmax is not None:
            assert weight.nested_code is not None
            assert weight.offset is not None
            rest += [weight.nested_absmax, weight.nested_code, weight.offset]
        return packed, rest, weight.layout
    if isinstance(weight, Int8Weight):
        return weight.values, [weight.scb], "int8"
    return weight, [], ""


def unflatten(main: Tensor, rest: Sequence[Tensor], layout: str) -> Weight:
    """The weight that `flatten` took apart."""
    if layout == "":
        return main
    if layout == "int8":
        return Int8Weight(main, rest[0])
    return nf4_weight(main, rest, layout)


def nf4_weight(packed: Tensor, rest: Sequence[Tensor], layout: str) -> NF4Weight:
    """`unflatten` of an ``nf4`` layout."""
    _, sizes, blocksize, *nested = layout.split(":")
    N, K = sizes.split("x")
    absmax, code, *inner = rest
    nested_absmax, nested_code, offset = inner if nested else (None, None, None)
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        shape=(int(N), int(K)),
        blocksize=int(blocksize),
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        offset=offset,
        nested_blocksize=int(nested[0]) if nested else NESTED_BLOCKSIZE,
        code=code,
    )


def layout_shape(main_shape: Sequence[int], layout: str) -> tuple[int, int]:
    """``(N, K)`` of a weight whose main tensor has that shape."""
    if layout in ("", "int8"):
        N, K = main_shape
        return N, K
    N, K = map(int, layout.split(":")[1].split("x"))
    return N, K


def tensors_in(layout: str) -> int:
    """How many tensors a weight has beside its main one."""
    if layout == "":
        return 0
    if layout == "int8":
        return 1
    return 2 if layout.count(":") == 2 else 5


def dense(
    main: Tensor, rest: Sequence[Tensor], layout: str, dtype: torch.dtype, impl: str = "auto"
) -> Tensor:
    """The weight as ``[N, K]`` in ``dtype``; ``main`` itself where it is dense already.

    For use inside ops and their backward, on tensors that carry no gradient.

    Args:
        impl: of `dequantize_nf4`; the other layouts have one implementation.
    """
    if layout == "":
        return main
    if layout == "int8":
        # The bytes are exact in every floating dtype; the product is rounded once, as in the
        # backward of bitsandbytes' own op.
        return main.to(dtype).mul_((rest[0] * (1.0 / 127.0))[:, None])
    # Its folder imports this module.
    from mmopt_kernels.dequantize_nf4.ops import dequantize

    return dequantize(nf4_weight(main, rest, layout), dtype, impl)


def check(op: str, weight: Weight) -> None:
    """Raise unless the parts of a quantized weight fit together.

    Args:
        op: what the message begins with.

    Raises:
        KernelInputError: they do not; the message names both sides. A dense weight always passes.
    """
    if isinstance(weight, NF4Weight):
        _check_nf4(op, weight)
    elif isinstance(weight, Int8Weight):
        _check_int8(op, weight)


_TOGETHER = "Take all parts of the weight from the same layer."


def _check_nf4(op: str, weight: NF4Weight) -> None:
    if len(weight.shape) != 2 or min(weight.shape) < 0:
        raise KernelInputError(
            f"{op}: the NF4 weight has shape {tuple(weight.shape)}, expected (N, K), neither "
            f"negative. {_TOGETHER}"
        )
    N, K = weight.shape
    if weight.blocksize not in BLOCKSIZES:
        raise KernelInputError(
            f"{op}: the NF4 weight has blocksize {weight.blocksize}, expected one of "
            f"{', '.join(map(str, BLOCKSIZES))}. Pass the blocksize it was quantized with."
        )
    expected = -(-N * K // 2)
    found = weight.packed.numel() * weight.packed.element_size()
    if found != expected:
        raise KernelInputError(
            f"{op}: the NF4 weight has {found} packed bytes, expected {expected} because its shape "
            f"is ({N}, {K}). {_TOGETHER}"
        )
    nested = {
        "nested_absmax": weight.nested_absmax,
        "nested_code": weight.nested_code,
        "offset": weight.offset,
    }
    missing = [name for name, part in nested.items() if part is None]
    if len(missing) in (1, 2):
        given = [name for name in nested if name not in missing]
        raise KernelInputError(
            f"{op}: the NF4 weight has {', '.join(given)} and lacks {', '.join(missing)}, expected "
            "all of them (double quantization) or none. Pass both parts of the quant_state."
        )
    double = not missing
    if double and weight.nested_blocksize != NESTED_BLOCKSIZE:
        raise KernelInputError(
            f"{op}: the NF4 weight has nested_blocksize {weight.nested_blocksize}, expected "
            f"{NESTED_BLOCKSIZE}, the only one that bitsandbytes' kernels know. Quantize the "
            "weight with bitsandbytes' default."
        )
    blocks = -(-N * K // weight.blocksize)
    kind = "with" if double else "without"
    scale = torch.uint8 if double else torch.float32
    # As functions, because torch.compile cannot make strings of sizes that it does not know.
    _part(
        op, "absmax", weight.absmax, blocks,
        lambda: f"because a weight of ({N}, {K}) has {blocks} blocks of {weight.blocksize}",
        scale, f"{kind} double quantization", weight,
    )  # fmt: skip
    stored = "as bitsandbytes has it"
    if double:
        outer = -(-blocks // NESTED_BLOCKSIZE)
        parts: tuple[tuple[str, Tensor | None, int, Callable[[], str]], ...] = (
            (
                "nested_absmax",
                weight.nested_absmax,
                outer,
                lambda: f"because absmax has {blocks} values in blocks of {NESTED_BLOCKSIZE}",
            ),
            ("nested_code", weight.nested_code, 256, lambda: "one for each byte"),
            ("offset", weight.offset, 1, lambda: "for the whole weight"),
        )
        for name, part, size, reason in parts:
            assert part is not None
            _part(op, name, part, size, reason, torch.float32, stored, weight)
    if weight.code is not None:
        _part(
            op,
            "code",
            weight.code,
            16,
            lambda: "one for each nibble",
            torch.float32,
            stored,
            weight,
        )


def _part(
    op: str,
    name: str,
    part: Tensor,
    size: int,
    why_size: Callable[[], str],
    dtype: torch.dtype,
    why_dtype: str,
    weight: NF4Weight,
) -> None:
    if part.numel() != size:
        raise KernelInputError(
            f"{op}: {name} of the NF4 weight has {part.numel()} values, expected {size}, "
            f"{why_size()}. {_TOGETHER}"
        )
    if part.dtype != dtype:
        raise KernelInputError(
            f"{op}: {name} of the NF4 weight has dtype {part.dtype}, expected {dtype} "
            f"{why_dtype}. Load the quantized layer again; a cast of its parts changes the weight."
        )
    if part.device != weight.packed.device:
        raise KernelInputError(
            f"{op}: {name} of the NF4 weight is on {part.device}, expected "
            f"{weight.packed.device} like its bytes. Move the layer as a whole."
        )


def _check_int8(op: str, weight: Int8Weight) -> None:
    values, scb = weight.values, weight.scb
    if values.dim() != 2 or values.dtype != torch.int8:
        raise KernelInputError(
            f"{op}: values of the int8 weight are {values.dtype} {tuple(values.shape)}, expected "
            "torch.int8 [N, K]. Pass the weight as Linear8bitLt stores it."
        )
    if scb.shape != values.shape[:1] or scb.dtype != torch.float32:
        raise KernelInputError(
            f"{op}: scb of the int8 weight is {scb.dtype} {tuple(scb.shape)}, expected "
            f"torch.float32 ({values.shape[0]},) because values have {values.shape[0]} rows. "
            f"{_TOGETHER}"
        )
    if scb.device != values.device:
        raise KernelInputError(
            f"{op}: scb of the int8 weight is on {scb.device}, expected {values.device} like its "
            "values. Move the layer as a whole."
        )


def size(weight: Weight) -> tuple[int, int]:
    """``(N, K)`` of a weight."""
    if isinstance(weight, NF4Weight):
        return weight.shape
    N, K = (weight.values if isinstance(weight, Int8Weight) else weight).shape
    return N, K

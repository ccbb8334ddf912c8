"""What compiled kernels say about themselves: text and bytes in, numbers out."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What each thread of a kernel takes.

    Attributes:
        registers: 32 bits each; on AMD vector and accumulation registers together.
        spilled_bytes: written to memory for want of registers, as the code stands: a spill in a
            loop counts once. Scalar registers that AMD moves to vector registers do not count.
    """

    registers: int
    spilled_bytes: int


def parse_ptxas(log: str) -> Resources:
    """Read what ``ptxas -v`` says about the one kernel in it."""
    return Resources(
        registers=_only(r"Used (\d+) registers", log),
        spilled_bytes=_only(r"(\d+) bytes spill stores", log),
    )


def parse_amdgcn(assembly: str) -> Resources:
    """Read the metadata that LLVM writes at the end of AMD's assembly."""
    return Resources(
        registers=_only(r"^\s*\.vgpr_count:\s+(\d+)", assembly),
        spilled_bytes=4 * _only(r"^\s*\.vgpr_spill_count:\s+(\d+)", assembly),
    )


# An instruction begins its line, after the address in NVIDIA's case, and perhaps a predicate:
# "        /*0150*/              @!UPT HGMMA.64x32x16.F32.BF16 R24, ..." or "\tv_mfma_f32_...".
_MNEMONIC = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)


def count_matrix_instructions(text: str, matrix: Mapping[str, str]) -> dict[str, int]:
    """How often each matrix instruction of `Target.matrix` stands in disassembled code."""
    kinds = [(name, re.compile(mnemonic)) for name, mnemonic in matrix.items()]
    counts: dict[str, int] = {}
    for mnemonic in _MNEMONIC.findall(text):
        for name, pattern in kinds:
            if pattern.fullmatch(mnemonic):
                counts[name] = counts.get(name, 0) + 1
    return counts


# "tt.dot %a, %b, %c : tensor<128x64xbf16> * ..."; the first operand's type stands for both.
_DOT = re.compile(r"\btt\.dot(?:_scaled)? .*? : tensor<(?:\d+x)+[a-z]+(\d+)\w*>")


def dot_bits(ttir: str) -> int | None:
    """The width of what the kernel multiplies as matrices, None where it does not.

    Read from Triton's own intermediate code, so that it holds whatever the machine code became.
    """
    return min(map(int, _DOT.findall(ttir)), default=None)


# Elf64_Ehdr and Elf64_Shdr, little endian: both vendors' binaries are.
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGBITS = 1
_EXECUTABLE = 4


def code_bytes(binary: bytes) -> int:
    """The size of the instructions in a cubin or hsaco, without debug information or constants."""
    header = _HEADER.unpack_from(binary)
    if header[0][:5] != b"\x7fELF\x02":
        raise ValueError("expected a 64-bit ELF file")
    offset, size, count = header[6], header[11], header[12]
    total = 0
    for index in range(count):
        section = _SECTION.unpack_from(binary, offset + index * size)
        kind, flags, length = section[1], section[2], section[5]
        if kind == _PROGBITS and flags & _EXECUTABLE:
            total += length
    return total


def _only(pattern: str, text: str) -> int:
    found = re.findall(pattern, text, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"expected one match of {pattern!r}, found {len(found)}")
    return int(found[0])

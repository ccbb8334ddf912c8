"""What kernels are told of sizes and strides that 16 does not divide.

Triton asks of every integer argument whether 16 divides it, and after no smaller power of two. Of
rows of 72 or 100 elements, or of 8 ranks, it knows nothing then and moves element by element: each
has an address of its own, and 2 bytes are too few to be copied asynchronously (PTX ISA, cp.async:
4, 8 or 16). So a launcher divides such arguments by `vector_of` them, which the kernel takes as
VECTOR, and multiplies by again.
"""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import triton
import triton.language as tl


def vector_of(*numbers: int) -> int:
    """The greatest of 2, 4 and 8 that divides all; 1 where none does, or 16, which Triton sees."""
    found = math.gcd(16, *numbers)
    return 1 if found == 16 else found


@triton.jit
def stride_of(n, VECTOR: tl.constexpr):
    """A stride in elements, of which the launcher passed n, its VECTOR-th part."""
    if VECTOR > 1:
        # Before it is multiplied: n may fit 32 bits where the stride does not.
        n = tl.cast(n, tl.int64) * VECTOR
    return n

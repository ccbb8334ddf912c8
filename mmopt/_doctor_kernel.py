"""The kernel that `mmopt doctor` compiles: Triton reads a kernel's source from its file."""

import triton
import triton.language as tl


@triton.jit
def add_one(p_x, p_y, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``y = x + 1`` over N float32 elements."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=m_n, other=0.0) + 1.0, mask=m_n)

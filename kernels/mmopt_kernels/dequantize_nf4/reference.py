"""NF4 dequantization written out plainly: the oracle, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of the weight at a time: the temporaries, 12 bytes for each, stay in a CPU's caches and
# small beside the weight. A multiple of every blocksize.
SLICE = 1 << 18


def reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """``[N, K]`` in ``dtype``; arguments as in `NF4Weight`, packed as flat bytes."""
    scales = _scales(absmax.reshape(-1), nested_absmax, nested_code, offset)  # [blocks]
    # Both values of each byte, high half first: one look-up for two.
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], dim=1)  # [256, 2]
    # As numbers of 64 bits: PyTorch looks those up faster than rows of two.
    words = pairs.view(torch.int64).view(256)
    out = packed.new_empty(N * K, dtype=dtype)
    for start in range(0, N * K, SLICE):
        end = min(start + SLICE, N * K)
        part = packed[start // 2 : (end + 1) // 2].int()
        values = words.index_select(0, part).view(torch.float32)[: end - start]
        factors = scales[start // blocksize : -(-end // blocksize)]
        whole = (end - start) // blocksize * blocksize
        blocks = whole // blocksize
        # Computed in float32, rounded on the way out.
        torch.mul(
            values[:whole].view(blocks, blocksize),
            factors[:blocks, None],
            out=out[start : start + whole].view(blocks, blocksize),
        )
        if whole < end - start:  # the last block of the weight
            out[start + whole : end] = values[whole:] * factors[-1]
    return out.view(N, K)


def _scales(
    absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Absmax of each block in float32, each step rounded."""
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    outer = nested_absmax.reshape(-1).repeat_interleave(256)[: absmax.numel()]
    return nested_code[absmax.int()] * outer + offset

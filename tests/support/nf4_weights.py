"""NF4 weights for tests, and what they stand for in float64, value by value."""

from __future__ import annotations

import torch
from torch import Tensor

from mmopt_kernels import NF4Weight
from mmopt_kernels.quantized import NF4_CODE


def random_nf4(
    N: int, K: int, *, nested: bool = False, blocksize: int = 64, seed: int = 0
) -> NF4Weight:
    """Random bytes and scales, on the CPU."""
    g = torch.Generator().manual_seed(seed)

    def draw_bytes(number: int) -> Tensor:
        return torch.randint(0, 256, (number,), generator=g).to(torch.uint8)

    blocks = -(-N * K // blocksize)
    packed = draw_bytes(-(-N * K // 2))
    if not nested:
        return NF4Weight(packed, torch.rand(blocks, generator=g) + 0.5, (N, K), blocksize)
    return NF4Weight(
        packed,
        draw_bytes(blocks),
        (N, K),
        blocksize,
        nested_absmax=torch.rand(-(-blocks // 256), generator=g) + 0.5,
        nested_code=torch.rand(256, generator=g) - 0.5,
        offset=torch.tensor(1.25),
    )


def dense64(weight: NF4Weight) -> Tensor:
    """``[N, K]`` float64."""
    N, K = weight.shape
    code = torch.tensor(NF4_CODE, dtype=torch.float32).double().tolist()
    data = weight.packed.reshape(-1).view(torch.uint8).tolist()
    absmax = weight.absmax.reshape(-1).tolist()
    if weight.nested_absmax is not None:
        table, outer = weight.nested_code.tolist(), weight.nested_absmax.tolist()
        offset = weight.offset.item()
        absmax = [table[byte] * outer[i // 256] + offset for i, byte in enumerate(absmax)]
    values = [
        code[data[i // 2] % 16 if i % 2 else data[i // 2] // 16] * absmax[i // weight.blocksize]
        for i in range(N * K)
    ]
    return torch.tensor(values, dtype=torch.float64).view(N, K)

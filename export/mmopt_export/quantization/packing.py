"""Weights as MatMulNBits stores them.

A weight `[K, N]` is cut into blocks of consecutive inputs. Per output it becomes
`[N, blocks, block * bits / 8]` bytes, the lower half of a byte first, scales `[N, blocks]`, and
with zero points as many bits per block: `w = scale * (q - zero)`, where zero is 2 ** (bits - 1)
without zero points. A last block that K does not fill is filled with zeros.
"""

import numpy as np

from mmopt_export.quantization.storage import Array
from mmopt_kernels.errors import MmoptError

Blocks = tuple[Array, Array, Array]
"""Packed integers, scales (fp32) and packed zero points."""


def packed_shapes(
    k: int, n: int, bits: int, block: int
) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]:
    """The shapes of integers, scales and zero points of a `[K, N]` weight."""
    blocks = -(-k // block)
    return (n, blocks, block * bits // 8), (n, blocks), (n, -(-blocks * bits // 8))


def round_to_nearest(w: Array, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round fp32 `[K, N]`, contiguous, with ONNX Runtime's own function.

    Without zero points the extreme value of a block becomes -8 of 4 bits exactly, so that its
    scale may be negative.
    """
    from onnxruntime.capi import _pybind_state as state

    k, n = w.shape
    shapes = packed_shapes(k, n, bits, block)
    integers = np.zeros(shapes[0], np.uint8)
    scales = np.zeros(shapes[1], np.float32)
    zeros = np.zeros(shapes[2], np.uint8)
    if pad := -k % block:
        w = np.pad(w, ((0, pad), (0, 0)))
    function = state.quantize_matmul_4bits if bits == 4 else state.quantize_matmul_8bits
    function(integers, w, scales, zeros, block, n, k, symmetric)
    return integers, scales, zeros


def half_quadratic(w: Array, bits: int, block: int) -> Blocks:
    """Round fp32 `[K, N]` with zero points fitted by HQQ, as ONNX Runtime's tool implements it.

    HQQ's zero points are fractions, which MatMulNBits computes without its integer kernels: they
    are rounded, and the weights rounded again to them.
    """
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        HQQWeightOnlyQuantConfig,
        HQQWeightOnlyQuantizer,
    )

    k, n = w.shape
    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=block, bits=bits))
    _, scale, zero = quantizer.quantize_internal(
        torch.from_numpy(np.array(w.T, order="C")), bits=bits, group_size=block
    )
    blocks = -(-k // block)
    scales = scale.numpy().reshape(n, blocks).astype(np.float32)
    zeros = np.clip(np.rint(zero.numpy().reshape(n, blocks)), 0, 2**bits - 1)
    return pack(_in_blocks(w, block), scales, zeros, bits)


def second_order(w: Array, hessian: Array, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round fp32 `[K, N]` by GPTQ: what rounding one input's weights costs, later inputs make up.

    Our own, because the implementation that ONNX Runtime ships (of neural-compressor, 1.32) gives
    what rounding to nearest gives, to the digit: it reads the lower triangle of an upper
    triangular matrix, so that nothing is made up for.

    Args:
        w: the weight.
        hessian: `x.T @ x` over the samples, fp32 `[K, K]`.

    Raises:
        MmoptError: the inputs of the samples are so alike that their matrix cannot be inverted.

    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1.
    """
    k, n = w.shape
    left = w.astype(np.float64)
    matrix = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", matrix)
    unused = diagonal == 0
    diagonal[unused] = 1.0
    left[unused] = 0.0
    # 1% of the mean diagonal, as the paper damps it.
    diagonal += 0.01 * diagonal.mean()
    try:
        factor = np.linalg.cholesky(np.linalg.inv(matrix)).T
    except np.linalg.LinAlgError as error:
        raise MmoptError(
            f"GPTQ could not invert the {k} x {k} matrix of a layer's inputs ({error}). "
            "Give it more samples."
        ) from error
    blocks = -(-k // block)
    integers = np.full((blocks * block, n), 2 ** (bits - 1), np.uint8)
    scales, zeros = np.empty((2, blocks, n))
    for index in range(blocks):
        start, stop = index * block, min((index + 1) * block, k)
        scale, zero = scales[index], zeros[index] = _range(left[start:stop], bits, symmetric)
        # The scale as it is stored.
        scale = np.where(scale == 0, 1.0, scale.astype(np.float32).astype(np.float64))
        errors = np.empty((stop - start, n))
        for row in range(start, stop):
            q = np.clip(np.rint(left[row] / scale) + zero, 0, 2**bits - 1)
            integers[row] = q
            missed = (left[row] - scale * (q - zero)) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], missed)
            errors[row - start] = missed
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return (
        _nibbles(np.ascontiguousarray(integers.T).reshape(n, blocks, block), bits),
        np.ascontiguousarray(scales.T.astype(np.float32)),
        _nibbles(np.ascontiguousarray(zeros.T.astype(np.uint8)), bits),
    )


def _range(values: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Scale and zero point for each column of a block."""
    middle, most = 2 ** (bits - 1), 2**bits - 1
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    if symmetric:
        extreme = np.where(-low > high, low, high)
        return extreme / -middle, np.full(extreme.shape, float(middle))
    scale = (high - low) / most
    return scale, np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, most)


def pack(values: Array, scales: Array, zeros: Array, bits: int) -> Blocks:
    """Round `[N, blocks, block]` to given scales and integral zero points `[N, blocks]`."""
    safe = np.where(scales == 0, np.float32(1), scales)[..., None]
    integers = np.clip(np.rint(values / safe) + zeros[..., None], 0, 2**bits - 1).astype(np.uint8)
    return (
        _nibbles(integers, bits),
        scales.astype(np.float32),
        _nibbles(zeros.astype(np.uint8), bits),
    )


def _in_blocks(w: Array, block: int) -> Array:
    k, n = w.shape
    blocks: Array = np.pad(w, ((0, -k % block), (0, 0))).T.reshape(n, -1, block)
    return blocks


def _nibbles(values: Array, bits: int) -> Array:
    """Pack the last axis."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: Array = (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)
    return packed

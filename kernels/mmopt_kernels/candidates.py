"""What `tuning.tune` tries where its caller has no list: tiles by kernel and width, for 16 bits.

All of them were compiled for sm_90 with Triton 3.7.1, in ranks of up to 64 and without dropout and
softcap. None of LoRA, of the loss or of the attention forward spills. In the attention backward one
tile or two of each width do, up to 452 bytes a thread; for one pass see `ONE_PASS` in
attention/kernel_backward.py. On another GPU those that ask for too much are passed over when they
are timed. The first, None, is what is launched without a table of the user's own: it also wins a
tie.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmopt_kernels.tuning import Config


def candidates(kernel: str, width: int) -> tuple[Config | None, ...]:
    """Configurations of a kernel in `tuning.FIELDS` for a width; None alone where there are none.

    Args:
        kernel: see `tuning.FIELDS`.
        width: as of `tuning.lookup`: the head dimension or rank that a program holds.
    """
    if kernel == "attention_backward_one_pass":
        from mmopt_kernels.attention.kernel_backward import ONE_PASS  # Triton

        return (None, *ONE_PASS.get(width, ()))
    make = _MAKERS.get(kernel)
    return (None, *make(width)) if make else (None,)


def _tiles(names: str, rows: Iterable[tuple[int | bool, ...]]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


_ATTENTION = "BLOCK_M BLOCK_N num_warps num_stages TMA"


def _attention(width: int) -> list[dict[str, int]]:
    """Of the forward and of dQ: query tiles stay, key tiles stream."""
    if width <= 64:
        rows = [(64, 64, 4, 3, True), (64, 64, 4, 4, True), (128, 64, 8, 3, True)]
        rows += [(128, 128, 8, 2, True), (64, 128, 4, 2, True), (128, 64, 4, 3, True)]
    elif width <= 128:
        rows = [(64, 64, 4, 2, True), (64, 64, 4, 3, True), (128, 64, 8, 2, True)]
        rows += [(128, 64, 8, 3, True), (128, 128, 8, 2, True)]
    else:
        rows = [(64, 32, 4, 2, True), (128, 64, 8, 2, True), (128, 32, 8, 2, True)]
    return _tiles(_ATTENTION, rows)


def _dkdv(width: int) -> list[dict[str, int]]:
    """Key tiles stay, query tiles stream."""
    if width <= 64:
        rows = [(64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 128, 8, 2, True)]
        rows += [(32, 128, 8, 3, True), (128, 128, 8, 2, True)]
    elif width <= 128:
        rows = [(64, 64, 4, 2, True), (32, 64, 4, 3, True), (32, 128, 8, 2, True)]
        rows += [(32, 128, 8, 3, True), (64, 128, 8, 2, True)]
    else:
        return [tile | {"SPLIT": True} for tile in _tiles(_ATTENTION, [(32, 64, 4, 2, True)])]
    return [tile | {"SPLIT": False} for tile in _tiles(_ATTENTION, rows)]


_GEMM = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages TMA"


def _forward(_width: int) -> list[dict[str, int]]:
    rows = [(128, 256, 64, 8, 4, True), (128, 256, 64, 8, 3, True), (256, 128, 64, 8, 4, True)]
    rows += [(128, 128, 64, 8, 4, True), (128, 128, 64, 4, 3, True), (128, 256, 64, 8, 3, False)]
    return [tile | {"GROUP_M": 8} for tile in _tiles(_GEMM, rows)]


def _input_backward(_width: int) -> list[dict[str, int]]:
    rows = [(128, 64, 256, 8, 4, True), (128, 64, 256, 8, 3, True), (256, 64, 128, 8, 4, True)]
    rows += [(128, 64, 128, 8, 4, True), (128, 64, 128, 4, 3, True), (128, 64, 256, 8, 3, False)]
    return [tile | {"GROUP_M": 8} for tile in _tiles(_GEMM, rows)]


def _down(width: int) -> list[dict[str, int]]:
    """Low ones make programs enough without sharing the sum; deep ones hide the latency."""
    rows = [(32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 8, 4)]
    rows += [(64, 64, 4, 6), (128, 64, 8, 4)]
    if width <= 16:
        rows.append((16, 256, 4, 4))
    return _tiles("BLOCK_M BLOCK_K num_warps num_stages", rows)


def _up_backward(width: int) -> list[dict[str, int]]:
    """Rows divide the partial sums of db, columns in flight hide the latency."""
    rows = [(256, 64, 8, 3), (256, 32, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3)]
    if width <= 16:
        rows.append((512, 32, 8, 3))
    return _tiles("BLOCK_M BLOCK_N num_warps num_stages", rows)


def _down_backward(_width: int) -> list[dict[str, int]]:
    rows = [(64, 128, 4, 4), (64, 128, 8, 4), (32, 128, 4, 6), (64, 256, 8, 3), (32, 256, 4, 4)]
    rows += [(128, 64, 4, 4), (64, 64, 4, 6)]
    return _tiles("BLOCK_M BLOCK_K num_warps num_stages", rows)


def _add(_width: int) -> list[dict[str, int]]:
    rows = [(64, 128, 8, 1), (128, 64, 8, 1), (32, 128, 4, 1), (32, 256, 8, 1), (64, 64, 4, 1)]
    return _tiles("BLOCK_M BLOCK_K num_warps num_stages", rows)


def _cross_entropy(_width: int) -> list[dict[str, int]]:
    rows = [(2048, 8), (4096, 8), (8192, 16), (8192, 32), (4096, 32)]
    return _tiles("BLOCK_V num_warps", rows)


_MAKERS = {
    "attention_forward": _attention,
    "attention_backward_dq": _attention,
    "attention_backward_dkdv": _dkdv,
    "lora_linear_forward": _forward,
    "lora_linear_input_backward": _input_backward,
    "lora_linear_down": _down,
    "lora_linear_up_backward": _up_backward,
    "lora_linear_down_backward": _down_backward,
    "lora_linear_add": _add,
    "cross_entropy": _cross_entropy,
}

"""The arithmetic and the proofs behind `Intervals`: plain tensors in, plain tensors out.

``where`` is always the public name that an error message starts with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmopt_kernels.errors import KernelInputError

# How much of a mask is reduced at once, in elements. Each costs a bool and two int32, so 2**22 is
# some 40 MB, however long the sequence.
BLOCK_ELEMENTS = 2**22

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGERS = (*SIGNED, torch.uint8)
_INT32_MAX = 2**31 - 1


def positions(S: int, T: int, device: torch.device | str | None) -> Tensor:
    """``[S]`` int64: the key at which each query stands, the last query at the last key."""
    return torch.arange(S, device=device) + (T - S)


def clamped(lo: Tensor, hi: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Bounds of one shape, moved into ``[0, T]``, as int32; a vector becomes a batch of one."""
    if lo.dim() == 1:
        lo, hi = lo[None], hi[None]
    return lo.clamp(0, T).to(torch.int32), hi.clamp(0, T).to(torch.int32)


def require_size(where: str, name: str, value: int, least: int = 0) -> None:
    """Refuse what is not an integer from ``least`` up to the largest int32."""
    if not isinstance(value, int | torch.SymInt) or value < least or value > _INT32_MAX:
        raise KernelInputError(
            f"{where}: {name} is {value!r}, expected an integer from {least} to 2**31 - 1. "
            f"Count {name} in {'sequences' if name == 'B' else 'tokens'}."
        )


def require_tensor(where: str, name: str, value: object) -> None:
    """Refuse lists, arrays and numbers, in which no method of a tensor would be found."""
    if not isinstance(value, Tensor):
        raise KernelInputError(
            f"{where}: {name} is of type {type(value).__name__}, expected a tensor. "
            f"Pass torch.as_tensor({name})."
        )


def require_lengths(where: str, name: str, lengths: Tensor, T: int, check: bool) -> Tensor:
    """``[B, 1]`` int64 from ``[B]`` integers; with ``check``, each proven to be in ``[0, T]``."""
    require_tensor(where, name, lengths)
    if lengths.dim() != 1 or lengths.dtype not in _INTEGERS:
        raise KernelInputError(
            f"{where}: {name} is {lengths.dtype} {tuple(lengths.shape)}, expected integers [B]. "
            "Give one number of tokens per sequence."
        )
    if check:
        wrong = ((lengths < 0) | (lengths > T)).nonzero()
        if len(wrong):
            b = int(wrong[0])
            raise KernelInputError(
                f"{where}: {name}[{b}] is {int(lengths[b])}, expected 0 to {T} because there are "
                f"{T} keys. Count the tokens of sequence {b} only."
            )
    return lengths.to(torch.int64)[:, None]


def require_cu_seqlens(where: str, cu_seqlens: Tensor, S: int, check: bool) -> None:
    """Refuse what is not int32 ``[n + 1]``; with ``check``, not sorted from 0 to ``S``."""
    require_tensor(where, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] == 0:
        raise KernelInputError(
            f"{where}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected "
            "torch.int32 [n + 1] for n documents. Pass the running sum of their lengths after a "
            "leading 0, with .to(torch.int32)."
        )
    if not check:
        return
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != S:
        raise KernelInputError(
            f"{where}: cu_seqlens runs from {edges[0]} to {edges[-1]}, expected 0 to {S} because "
            f"S is {S}. Add the padding at the end as a document of its own."
        )
    for n in range(len(edges) - 1):
        if edges[n + 1] < edges[n]:
            raise KernelInputError(
                f"{where}: cu_seqlens falls from {edges[n]} to {edges[n + 1]} at index {n + 1}, "
                "expected it never to fall. Pass running sums, not lengths."
            )


def reduce_rows(
    seen_of: Callable[[int, int], Tensor], S: int, T: int, *, B: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of a mask that exists for a block of queries at a time, and which rows they belie.

    Args:
        seen_of: bool ``[B, stop - start, T]`` for the queries from ``start`` to ``stop``.

    Returns:
        ``lo``, ``hi`` and whether the row has a hole between them, each ``[B, S]``.
    """
    if torch.compiler.is_compiling():
        # One piece: Inductor evaluates the mask inside the reductions and never stores it.
        return _reduce(seen_of(0, S), T)
    rows = max(1, BLOCK_ELEMENTS // max(1, B * T))
    starts = range(0, max(1, S), rows)
    blocks = [_reduce(seen_of(start, min(start + rows, S)), T) for start in starts]
    lo, hi, broken = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    return lo, hi, broken


def require_runs(where: str, lo: Tensor, hi: Tensor, broken: Tensor) -> None:
    """Refuse, on the host, what `reduce_rows` found to have a hole."""
    holes = broken.nonzero()
    if len(holes):
        b, i = holes[0].tolist()
        raise KernelInputError(
            f"{where}: mask row {i} of sequence {b} has a hole between key {int(lo[b, i])} "
            f"and key {int(hi[b, i]) - 1}, expected one run of keys in each row ({len(holes)} "
            "rows break this). Use dense attention for this mask."
        )


def _reduce(seen: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """``lo``, ``hi`` and whether the row has a hole, each ``[B, s]``, of bool ``[B, s, T]``."""
    if T == 0:
        nothing = seen.new_zeros(seen.shape[:2], dtype=torch.int32)
        return nothing, nothing, nothing.bool()
    key = torch.arange(T, dtype=torch.int32, device=seen.device)
    lo = torch.where(seen, key, T).amin(2)
    hi = torch.where(seen, key + 1, 0).amax(2)
    # An empty row reads (T, 0); (0, 0) says the same and keeps hi - lo the count of keys.
    lo = torch.minimum(lo, hi)
    return lo, hi, seen.sum(2, dtype=torch.int32) != hi - lo


def mask_function_rows(
    where: str,
    mask_function: Callable[..., Tensor | bool],
    index: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Bool ``[B, s, T]`` from a Hugging Face mask function, by broadcasting its four indices."""
    batch, head, query, key = index
    B, s, T = batch.shape[0], query.shape[2], key.shape[3]
    returned = mask_function(batch, head, query, key)
    if not isinstance(returned, Tensor | bool):
        raise KernelInputError(
            f"{where}: mask_function returned {type(returned).__name__}, expected a bool for each "
            "query and key. Return what it computes."
        )
    seen = torch.as_tensor(returned, device=key.device)
    shape = (1,) * (4 - seen.dim()) + tuple(seen.shape)
    fits = len(shape) == 4 and all(
        n in (1, most) for n, most in zip(shape, (B, 1, s, T), strict=True)
    )
    if not fits or seen.dtype not in (torch.bool, *_INTEGERS):
        raise KernelInputError(
            f"{where}: mask_function returned {seen.dtype} {tuple(seen.shape)}, expected a bool "
            f"that broadcasts to {(B, 1, s, T)}. Write it with tensor operations on its four "
            "indices, the same for every head."
        )
    return (seen.reshape(shape)[:, 0] != 0).expand(B, s, T)


def runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First index of the run of equal ids around each position, and the one after its last.

    Args:
        ids: integer ``[B, T]``.

    Returns:
        Two int64 ``[B, T]``.
    """
    T = ids.shape[1]
    index = torch.arange(T, device=ids.device)
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    change = ids[:, 1:] != ids[:, :-1]
    first = torch.where(torch.cat([edge, change], 1), index, 0).cummax(1).values
    after = torch.where(torch.cat([change, edge], 1), index + 1, T)
    # Running minimum from the right: the nearest end at or after each position.
    return first, after.flip(1).cummin(1).values.flip(1)


def require_single_runs(where: str, ids: Tensor) -> None:
    """Prove, on the host, that no id from 0 up comes back after its run has ended."""
    value, index = ids.sort(dim=1, stable=True)
    back = (value[:, 1:] == value[:, :-1]) & (value[:, 1:] >= 0)
    back &= index[:, 1:] != index[:, :-1] + 1
    found = back.nonzero()
    if not len(found):
        return
    b = int(found[0, 0])
    at = index[b, 1:][back[b]]
    j = int(at.min())
    before = int(index[b, :-1][back[b]][at.argmin()])
    raise KernelInputError(
        f"{where}: block {int(ids[b, j])} of sequence {b} ends at key {before} and returns at key "
        f"{j}, expected each block to be one run of keys ({len(found)} returns break this). Give "
        "each image an id of its own and text a negative one."
    )


def unite(
    where: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, check: bool
) -> tuple[Tensor, Tensor]:
    """Bounds of the keys that either sees; with ``check``, proven to leave no hole in a row."""
    # A negative bound is key 0, or what ends before key 0 would count as something seen.
    (a_lo, a_hi), (b_lo, b_hi) = ((lo.clamp(min=0), hi) for lo, hi in (a, b))
    a_empty, b_empty = a_lo >= a_hi, b_lo >= b_hi
    if check:
        apart = torch.maximum(a_lo, b_lo) > torch.minimum(a_hi, b_hi)
        holes = (apart & ~a_empty & ~b_empty).nonzero()
        if len(holes):
            s, i = holes[0].tolist()
            one, other = (
                [int(x.expand(apart.shape)[s, i]) for x in pair]
                for pair in ((a_lo, a_hi), (b_lo, b_hi))
            )
            raise KernelInputError(
                f"{where}: row {i} of sequence {s} would see keys {one[0]} to {one[1] - 1} and "
                f"{other[0]} to {other[1] - 1} with a hole between them, expected ranges that "
                f"overlap or touch ({len(holes)} rows break this). Use dense attention for this "
                "mask."
            )
    lo = torch.where(a_empty, b_lo, torch.where(b_empty, a_lo, torch.minimum(a_lo, b_lo)))
    hi = torch.where(a_empty, b_hi, torch.where(b_empty, a_hi, torch.maximum(a_hi, b_hi)))
    return lo, hi

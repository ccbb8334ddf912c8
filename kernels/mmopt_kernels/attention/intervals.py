"""Attention masks in which every query sees one contiguous range of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmopt_kernels.attention import bounds
from mmopt_kernels.errors import KernelInputError


@dataclass(frozen=True)
class Intervals:
    """Query row ``i`` of sequence ``b`` sees the keys ``lo[b, i] <= j < hi[b, i]``.

    Causal, sliding-window, padded, packed, prefix-LM, image-block and chunked masks all have this
    form, in ``O(S)`` memory. A row with ``lo >= hi`` sees nothing: its output and its gradients
    are zero. Bounds outside ``[0, T]`` act as if clamped to it.

    The constructors compose: ``a & b`` is what both see, ``a | b`` what either sees. Thus
    ``packed(...) & causal(S)``, ``causal(S) & key_padding(mask)``, ``chunked(...) & causal(S)``.
    Where ``S`` and ``T`` differ (a cached prefix), the last query stands at the last key:
    query ``i`` is at position ``p = i + T - S``.

    ``check=True`` proves what the values of a tensor must satisfy, by reading it on the host: a
    wait for the device, and a graph break under ``torch.compile``. ``check=False`` reads nothing
    and compiles with ``fullgraph=True``; what happens to bad values is then said in each place.

    Args:
        lo, hi: int32 ``[B, S]``, or ``[1, S]`` to serve every sequence of the batch.

    Raises:
        KernelInputError: a dtype is not int32, or the two are not one ``[B or 1, S]`` shape.
    """

    lo: Tensor
    hi: Tensor

    def __post_init__(self) -> None:
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            bounds.require_tensor("Intervals", name, bound)
            if bound.dtype != torch.int32:
                raise KernelInputError(
                    f"Intervals: {name} has dtype {bound.dtype}, expected torch.int32. "
                    f"Pass {name}.to(torch.int32)."
                )
            if bound.dim() != 2:
                raise KernelInputError(
                    f"Intervals: {name} has shape {tuple(bound.shape)}, expected [B or 1, S]. "
                    f"For one row of bounds shared by the batch, pass {name}[None]."
                )
        if self.lo.shape != self.hi.shape or self.lo.device != self.hi.device:
            raise KernelInputError(
                f"Intervals: hi is {tuple(self.hi.shape)} on {self.hi.device}, expected "
                f"{tuple(self.lo.shape)} on {self.lo.device} like lo. "
                "Build both bounds from the same queries."
            )

    @classmethod
    def causal(
        cls, S: int, T: int | None = None, *, device: torch.device | str | None = None
    ) -> Intervals:
        """``[1, S]``: query ``i`` sees keys ``j <= i + T - S``, so the last one sees them all.

        Args:
            S: queries.
            T: keys, ``S`` when left out.
            device: where the bounds live.

        Raises:
            KernelInputError: ``S`` or ``T`` is negative.
        """
        T = _sizes("Intervals.causal", S, T)
        p = bounds.positions(S, T, device)
        return cls(*bounds.clamped(torch.zeros_like(p), p + 1, T))

    @classmethod
    def sliding_window(
        cls,
        left: int | None,
        right: int | None,
        S: int,
        T: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Intervals:
        """``[1, S]``: the query at ``p`` sees the keys ``p - left <= j <= p + right``.

        As flash-attn's ``window_size=(left, right)``. A causal ``sliding_window`` of ``w`` in a
        Hugging Face config counts the query itself: ``sliding_window(w - 1, 0, S)``.

        Args:
            left, right: keys seen before and after the query; None is no limit on that side.
            S: queries.
            T: keys, ``S`` when left out.
            device: where the bounds live.

        Raises:
            KernelInputError: ``left``, ``right``, ``S`` or ``T`` is negative.
        """
        where = "Intervals.sliding_window"
        T = _sizes(where, S, T)
        for name, reach in (("left", left), ("right", right)):
            if reach is not None:
                bounds.require_size(where, name, reach)
        p = bounds.positions(S, T, device)
        lo = torch.zeros_like(p) if left is None else p - left
        hi = torch.full_like(p, T) if right is None else p + right + 1
        return cls(*bounds.clamped(lo, hi, T))

    @classmethod
    def chunked(
        cls,
        size: int,
        S: int,
        T: int | None = None,
        *,
        left_padding: Tensor | None = None,
        device: torch.device | str | None = None,
        check: bool = True,
    ) -> Intervals:
        """A query sees the chunk of ``size`` keys it stands in, both ways.

        Llama 4's chunked attention is ``chunked(size, S) & causal(S)``.

        Args:
            size: keys in a chunk.
            S: queries.
            T: keys, ``S`` when left out.
            left_padding: integers ``[B]``, padded keys before each sequence, which move its
                chunks to the right; ``[1, S]`` bounds without it, ``[B, S]`` with it.
            device: where the bounds live, that of ``left_padding`` if given.
            check: prove that ``left_padding`` is in ``[0, T]``; any value is safe without.

        Raises:
            KernelInputError: ``size`` is below 1, ``S`` or ``T`` negative, or ``left_padding``
                not integers ``[B]`` in ``[0, T]``.
        """
        where = "Intervals.chunked"
        bounds.require_size(where, "size", size, least=1)
        T = _sizes(where, S, T)
        if left_padding is not None:
            bounds.require_tensor(where, "left_padding", left_padding)
        p = bounds.positions(S, T, device if left_padding is None else left_padding.device)
        start = torch.zeros_like(p[:1])
        if left_padding is not None:
            start = bounds.require_lengths(where, "left_padding", left_padding, T, check)
        lo = (p - start) // size * size + start
        return cls(*bounds.clamped(lo, lo + size, T))

    @classmethod
    def key_padding(
        cls,
        keep: Tensor,
        S: int | None = None,
        *,
        T: int | None = None,
        side: Literal["right", "left"] = "right",
        check: bool = True,
    ) -> Intervals:
        """``[B, S]``: every query of a sequence sees that sequence's unpadded keys.

        Args:
            keep: ``[B, T]`` mask, nonzero where a key is real, or integer lengths ``[B]``.
            S: queries, ``T`` when left out.
            T: keys; needed with lengths, known from a mask.
            side: where the padding of ``lengths`` sits. A mask says that itself.
            check: prove that each mask row is one run of keys, or each length in ``[0, T]``.
                Without, a row with a hole sees the keys in its hole, and lengths are clamped.

        Raises:
            KernelInputError: a row of the mask has a hole, a length is outside ``[0, T]``, or
                ``keep``, ``S``, ``T`` or ``side`` is not usable.
        """
        where = "Intervals.key_padding"
        if side not in ("right", "left"):
            raise KernelInputError(
                f"{where}: side is {side!r}, expected 'right' or 'left'. "
                "Name the side on which the tokenizer pads."
            )
        bounds.require_tensor(where, "keep", keep)
        masked = keep.dim() == 2
        counted = keep.dim() == 1 and keep.dtype != torch.bool
        if keep.is_floating_point() or not (masked or counted):
            raise KernelInputError(
                f"{where}: keep is {keep.dtype} {tuple(keep.shape)}, expected a "
                "mask [B, T] or integer lengths [B]. Pass the tokenizer's attention_mask."
            )
        if T is None and not masked:
            raise KernelInputError(
                f"{where}: T is None, expected the number of keys because keep holds "
                "lengths. Pass T=k.shape[2]."
            )
        keys = keep.shape[1] if T is None else T
        queries = keys if S is None else S
        _sizes(where, queries, keys)
        if masked:
            if keep.shape[1] != keys:
                raise KernelInputError(
                    f"{where}: T is {keys}, expected {keep.shape[1]} because keep has shape "
                    f"{tuple(keep.shape)}. Leave T out when keep is a mask."
                )
            # One row serves all queries of its sequence.
            row = (keep != 0)[:, None]
            each = cls._reduced(where, lambda *_: row, 1, keys, keep.shape[0], check)
            return cls(each.lo.expand(-1, queries), each.hi.expand(-1, queries))
        lengths = bounds.require_lengths(where, "keep", keep, keys, check).expand(-1, queries)
        lo, hi = bounds.clamped(torch.zeros_like(lengths), lengths, keys)
        return cls(lo, hi) if side == "right" else cls(keys - hi, torch.full_like(hi, keys))

    @classmethod
    def prefix(
        cls, lengths: Tensor, S: int, T: int | None = None, *, check: bool = True
    ) -> Intervals:
        """``[B, S]``, prefix-LM: every query sees the prefix, and up to itself what follows it.

        Args:
            lengths: integers ``[B]``, keys in the prefix of each sequence; 0 is plain causal.
            S: queries.
            T: keys, ``S`` when left out.
            check: prove that the lengths are in ``[0, T]``; they are clamped without.

        Raises:
            KernelInputError: ``lengths`` is not integers ``[B]`` in ``[0, T]``, or ``S`` or ``T``
                is negative.
        """
        where = "Intervals.prefix"
        T = _sizes(where, S, T)
        length = bounds.require_lengths(where, "lengths", lengths, T, check)
        hi = torch.maximum(length, bounds.positions(S, T, lengths.device) + 1)
        return cls(*bounds.clamped(torch.zeros_like(hi), hi, T))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, S: int, *, check: bool = True) -> Intervals:
        """``[1, S]``: documents laid end to end, each seeing all of itself and nothing else.

        Queries and keys share ``cu_seqlens``, as in flash-attn's varlen functions. Causal
        documents are ``packed(cu_seqlens, S) & causal(S)``.

        Args:
            cu_seqlens: int32 ``[n + 1]``: 0, then the running sum of the ``n`` lengths, up to
                ``S``. Documents of length 0 may be among them.
            S: queries, and keys.
            check: prove that ``cu_seqlens`` is sorted and runs from 0 to ``S``. Without, rows
                past its last value see nothing, and unsorted values give undefined bounds.

        Raises:
            KernelInputError: ``cu_seqlens`` is not int32 ``[n + 1]``, not sorted, or does not run
                from 0 to ``S``.
        """
        where = "Intervals.packed"
        bounds.require_size(where, "S", S)
        bounds.require_cu_seqlens(where, cu_seqlens, S, check)
        row = torch.arange(S, dtype=torch.int32, device=cu_seqlens.device)
        # The first edge beyond the row ends its document; of equal edges, only the last starts one.
        end = torch.searchsorted(cu_seqlens, row, right=True)
        last = cu_seqlens.shape[0] - 1
        lo, hi = cu_seqlens[(end - 1).clamp(min=0)], cu_seqlens[end.clamp(max=last)]
        return cls(*bounds.clamped(lo, hi, S))

    @classmethod
    def bidirectional_blocks(
        cls,
        block_ids: Tensor,
        S: int | None = None,
        *,
        base: Intervals | None = None,
        check: bool = True,
    ) -> Intervals:
        """``[B, S]``: image blocks that see all of themselves, inside text that is causal.

        A token sees its block **or** what ``base`` lets it see. Both hold the token itself for a
        causal or sliding-window ``base``, so the row stays an interval however long the block
        is. Gemma 3's full layers are the default, its sliding layers
        ``base=Intervals.sliding_window(w - 1, 0, S, T)``. Apply padding and packing afterwards,
        with ``&``.

        Args:
            block_ids: integers ``[B, T]``, one per key: negative for text, the same number from 0
                up throughout a block. These are transformers' ``block_sequence_ids``, and not
                ``token_type_ids``, in which text is 0 and would count as a block.
            S: queries, the last ``S`` of the keys; ``T`` when left out.
            base: what a token sees besides its block, ``[B or 1, S]``; causal when None.
            check: prove that a block does not return after it ended, and that ``base`` leaves no
                hole. Without, each run of equal ids is a block of its own, and a row with a hole
                sees the keys in its hole.

        Raises:
            KernelInputError: ``block_ids`` is not integers ``[B, T]``, a block comes in several
                runs, ``base`` has another shape or device, or a row has a hole.
        """
        where = "Intervals.bidirectional_blocks"
        bounds.require_tensor(where, "block_ids", block_ids)
        if block_ids.dim() != 2 or block_ids.dtype not in bounds.SIGNED:
            raise KernelInputError(
                f"{where}: block_ids is {block_ids.dtype} {tuple(block_ids.shape)}, expected "
                "signed integers [B, T]. Number the blocks from 0 and give text -1."
            )
        T = block_ids.shape[1]
        queries = T if S is None else S
        _sizes(where, queries, T)
        if check:
            bounds.require_single_runs(where, block_ids)
        first, after = bounds.runs(block_ids)
        text = block_ids < 0
        lo, hi = bounds.clamped(first.masked_fill(text, 0), after.masked_fill(text, 0), T)
        if S is not None:
            # A negative amount crops the keys that have no query; a positive one is for queries
            # before the first key, which stand in no block.
            lo, hi = pad(lo, (queries - T, 0)), pad(hi, (queries - T, 0))
        if base is None:
            base = cls.causal(queries, T, device=block_ids.device)
        return cls(lo, hi)._united(base, where, check)

    @classmethod
    def from_dense(cls, mask: Tensor, *, check: bool = True) -> Intervals:
        """Reduce a dense mask, proving that each of its rows is one interval.

        Args:
            mask: ``[B or 1, S, T]``, nonzero where the query sees the key (not an additive mask).
            check: prove it. Without, a row with a hole silently sees the keys in its hole.

        Raises:
            KernelInputError: ``mask`` is not three-dimensional or is floating point, or a row has
                a hole; names the first such row.
        """
        bounds.require_tensor("Intervals.from_dense", "mask", mask)
        if mask.dim() != 3 or mask.is_floating_point():
            raise KernelInputError(
                f"Intervals.from_dense: mask is {mask.dtype} {tuple(mask.shape)}, expected bool "
                "or integer [B or 1, S, T]. Drop the head dimension with mask[:, 0]; of an "
                "additive mask pass mask == 0."
            )
        B, S, T = mask.shape
        return cls._reduced(
            "Intervals.from_dense", lambda start, stop: mask[:, start:stop] != 0, S, T, B, check
        )

    @classmethod
    def from_mask_function(
        cls,
        mask_function: Callable[..., Tensor | bool],
        S: int,
        T: int | None = None,
        *,
        B: int = 1,
        q_offset: int | Tensor | None = None,
        kv_offset: int = 0,
        device: torch.device | str | None = None,
        check: bool = True,
    ) -> Intervals:
        """``[B, S]``: reduce a Hugging Face mask function, proving that each row is an interval.

        Nothing of size ``S x T`` is kept: the mask exists for a block of queries at a time, and
        compiled not at all.

        Args:
            mask_function: ``(batch_idx, head_idx, q_idx, kv_idx) -> bool``, as
                ``transformers.masking_utils`` composes them and FlexAttention takes them. It is
                called with int64 indices ``[B, 1, 1, 1]``, ``[1, 1, 1, 1]``, ``[1, 1, s, 1]`` and
                ``[1, 1, 1, T]`` and must broadcast. Only head 0 is asked for.
            S: queries.
            T: keys, ``S`` when left out.
            B: sequences.
            q_offset: ``q_idx`` of the first query; ``kv_offset + T - S`` when None, which puts
                the last query at the last key.
            kv_offset: ``kv_idx`` of the first key.
            device: where the indices live: that of the tensors which ``mask_function`` reads.
            check: prove it. Without, a row with a hole silently sees the keys in its hole.

        Raises:
            KernelInputError: a row has a hole (names the first such row), or the function returns
                something else than a bool for each query and key.
        """
        where = "Intervals.from_mask_function"
        T = _sizes(where, S, T)
        bounds.require_size(where, "B", B)
        offset = kv_offset + T - S if q_offset is None else q_offset
        batch = torch.arange(B, device=device)[:, None, None, None]
        head = torch.zeros_like(batch[:1]) if B else torch.zeros(1, 1, 1, 1, device=device)
        key = (torch.arange(T, device=device) + kv_offset)[None, None, None]

        def seen_of(start: int, stop: int) -> Tensor:
            query = (torch.arange(start, stop, device=device) + offset)[None, None, :, None]
            return bounds.mask_function_rows(where, mask_function, (batch, head, query, key))

        return cls._reduced(where, seen_of, S, T, B, check)

    @classmethod
    def _reduced(
        cls, where: str, seen_of: Callable[[int, int], Tensor], S: int, T: int, B: int, check: bool
    ) -> Intervals:
        lo, hi, broken = bounds.reduce_rows(seen_of, S, T, B=B)
        if check:
            bounds.require_runs(where, lo, hi, broken)
        return cls(lo, hi)

    def __and__(self, other: Intervals) -> Intervals:
        """The keys that both see; the intersection of two intervals is an interval."""
        if not isinstance(other, Intervals):
            return NotImplemented
        self._require_same_queries(other, "Intervals &")
        return Intervals(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))

    def __or__(self, other: Intervals) -> Intervals:
        """The keys that either sees, proven on the host to be an interval: see `union`."""
        if not isinstance(other, Intervals):
            return NotImplemented
        return self._united(other, "Intervals |", check=True)

    def union(self, other: Intervals, *, check: bool = True) -> Intervals:
        """The keys that either sees, where those are an interval in each row.

        Args:
            other: bounds of the same queries, ``[B or 1, S]``. Bounds beyond the last key count
                as keys here; the constructors make none.
            check: prove that the two ranges overlap or touch, or that one is empty. Without, for
                use inside ``torch.compile``, a row sees the keys between its two ranges as well.

        Raises:
            KernelInputError: a row has a hole (names the first such row and sequence), or the
                two differ in queries, batch or device.
        """
        return self._united(other, "Intervals.union", check)

    def _united(self, other: Intervals, where: str, check: bool) -> Intervals:
        if not isinstance(other, Intervals):
            raise KernelInputError(
                f"{where}: the second is of type {type(other).__name__}, expected Intervals. "
                "Make them of a mask with Intervals.from_dense."
            )
        self._require_same_queries(other, where)
        mine, theirs = (self.lo, self.hi), (other.lo, other.hi)
        return Intervals(*bounds.unite(where, mine, theirs, check=check))

    def _require_same_queries(self, other: Intervals, where: str) -> None:
        mine, theirs = tuple(self.lo.shape), tuple(other.lo.shape)
        batches = {mine[0], theirs[0]} - {1}
        if mine[1] != theirs[1] or len(batches) > 1:
            raise KernelInputError(
                f"{where}: the second has shape {theirs}, expected [{mine[0]} or 1, {mine[1]}] "
                f"because the first has {mine}. Build both for the same queries and batch."
            )
        if self.lo.device != other.lo.device:
            raise KernelInputError(
                f"{where}: the second is on {other.lo.device}, expected {self.lo.device} like the "
                "first. Build both on one device."
            )


def _sizes(where: str, S: int, T: int | None) -> int:
    """``T``, or ``S`` when it is None, with both found usable."""
    keys = S if T is None else T
    bounds.require_size(where, "S", S)
    bounds.require_size(where, "T", keys)
    return keys

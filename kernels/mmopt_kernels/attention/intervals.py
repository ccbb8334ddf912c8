"""Attention masks in which every query sees one contiguous range of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmopt_kernels.errors import KernelInputError


@dataclass(frozen=True)
class Intervals:
    """Query row ``i`` of sequence ``b`` sees the keys ``lo[b, i] <= j < hi[b, i]``.

    Causal, sliding-window, padded, packed, prefix-LM and chunked masks all have this form, in
    ``O(S)`` memory. A row with ``lo >= hi`` sees nothing: its output and its gradients are zero.
    Bounds outside ``[0, T]`` act as if clamped to it.

    Args:
        lo, hi: int32 ``[B, S]``, or ``[1, S]`` to serve every sequence of the batch.

    Raises:
        KernelInputError: a dtype is not int32, or the two are not one ``[B or 1, S]`` shape.
    """

    lo: Tensor
    hi: Tensor

    def __post_init__(self) -> None:
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
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
        """
        keys = S if T is None else T
        hi = torch.arange(1, S + 1, dtype=torch.int32, device=device) + (keys - S)
        return cls(torch.zeros_like(hi)[None], hi[None])

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
            check: prove that each mask row is one run of keys. This reads the mask on the host;
                pass False inside ``torch.compile``, for a mask already known to be contiguous.

        Raises:
            KernelInputError: a row of the mask has a hole, or ``T`` or ``side`` is not usable.
        """
        if side not in ("right", "left"):
            raise KernelInputError(
                f"Intervals.key_padding: side is {side!r}, expected 'right' or 'left'. "
                "Name the side on which the tokenizer pads."
            )
        if keep.dim() == 2:
            bounds = cls.from_dense(keep[:, None, :], check=check)
            queries = keep.shape[1] if S is None else S
            return cls(bounds.lo.expand(-1, queries), bounds.hi.expand(-1, queries))
        if keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
            raise KernelInputError(
                f"Intervals.key_padding: keep is {keep.dtype} {tuple(keep.shape)}, expected a "
                "mask [B, T] or integer lengths [B]. Pass the tokenizer's attention_mask."
            )
        if T is None:
            raise KernelInputError(
                "Intervals.key_padding: T is None, expected the number of keys because keep holds "
                "lengths. Pass T=k.shape[2]."
            )
        lengths = keep.to(torch.int32)[:, None].expand(-1, T if S is None else S)
        if side == "right":
            return cls(torch.zeros_like(lengths), lengths)
        return cls(T - lengths, torch.full_like(lengths, T))

    @classmethod
    def from_dense(cls, mask: Tensor, *, check: bool = True) -> Intervals:
        """Reduce a dense mask, proving that each of its rows is one interval.

        Args:
            mask: ``[B or 1, S, T]``, nonzero where the query sees the key (not an additive mask).
            check: read the proof on the host. False skips it, for use inside ``torch.compile``;
                a row with a hole then silently sees the keys in its hole.

        Raises:
            KernelInputError: ``mask`` is not three-dimensional or is floating point, or a row has
                a hole; names the first such row.
        """
        if mask.dim() != 3 or mask.is_floating_point():
            raise KernelInputError(
                f"Intervals.from_dense: mask is {mask.dtype} {tuple(mask.shape)}, expected bool "
                "or integer [B or 1, S, T]. Drop the head dimension with mask[:, 0]; of an "
                "additive mask pass mask == 0."
            )
        seen = mask != 0
        T = mask.shape[2]
        key = torch.arange(T, dtype=torch.int32, device=mask.device)
        # The appended column keeps amin and amax defined when T is 0.
        edge = torch.full((*mask.shape[:2], 1), T, dtype=torch.int32, device=mask.device)
        lo = torch.cat([torch.where(seen, key, T), edge], 2).amin(2)
        hi = torch.cat([torch.where(seen, key + 1, 0), edge * 0], 2).amax(2)
        # An empty row reads (T, 0); (0, 0) says the same and keeps hi - lo the count of keys.
        lo = torch.minimum(lo, hi)
        if check:
            broken = (seen.sum(2, dtype=torch.int32) != hi - lo).nonzero()
            if len(broken):
                b, i = broken[0].tolist()
                raise KernelInputError(
                    f"Intervals.from_dense: mask row {i} of sequence {b} has a hole between key "
                    f"{int(lo[b, i])} and key {int(hi[b, i]) - 1}, expected one run of keys in "
                    f"each row ({len(broken)} rows break this). Use dense attention for this mask."
                )
        return cls(lo, hi)

    def __and__(self, other: Intervals) -> Intervals:
        """The keys that both see; the intersection of two intervals is an interval."""
        return Intervals(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))

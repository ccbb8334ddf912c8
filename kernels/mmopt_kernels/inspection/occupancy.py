"""Theoretical occupancy: how many warps of a kernel a multiprocessor holds at once."""

from dataclasses import dataclass

from mmopt_kernels.inspection.targets import (
    PARTITIONS,
    REGISTER_GRANULE,
    REGISTERS_PER_LANE,
    THREADS_PER_BLOCK,
    Target,
)


@dataclass(frozen=True)
class Occupancy:
    """What fits on one multiprocessor.

    Attributes:
        blocks: at once; 0 when not even one can be launched.
        warps: of all of them.
        share: of the most that the architecture holds.
        limited_by: what ran out first.
    """

    blocks: int
    warps: int
    share: float
    limited_by: str


def occupancy(
    target: Target, *, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> Occupancy:
    """Occupancy as NVIDIA's cuda_occupancy.h and LLVM's AMDGPU backend calculate it.

    Scalar registers, which AMD counts apart, are left out: more than 100 of them allow 7 waves per
    SIMD in place of 8, which a kernel with over 64 vector registers has anyway.

    Args:
        registers: of each thread.
        shared: bytes of each block.
        warps: of each block.
        tensor_memory: columns of each block.
    """
    # In the order of preference when several run out together.
    limits: dict[str, int] = {}
    if registers:
        limits["registers"] = _blocks_by_registers(target, registers, warps)
    if charged := _round_up(shared + target.shared_reserved, target.shared_granule):
        fits = shared <= target.shared_per_block
        limits["shared memory"] = target.shared // charged if fits else 0
    if tensor_memory:
        limits["tensor memory"] = target.tensor_memory // tensor_memory
    limits["warps"] = target.warps // warps
    if warps * target.warp_size > THREADS_PER_BLOCK:
        limits["warps"] = 0
    # AMD's limit is one of barriers, which a single wave does not need.
    if target.backend != "hip" or warps > 1:
        limits["blocks"] = target.blocks
    limited_by = min(limits, key=lambda resource: limits[resource])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps, blocks * warps / target.warps, limited_by)


def _blocks_by_registers(target: Target, registers: int, warps: int) -> int:
    if registers > target.registers:
        return 0
    each = REGISTERS_PER_LANE // _round_up(registers, REGISTER_GRANULE)
    # A launch is refused unless it fits with its warps spread evenly over the partitions.
    if _round_up(warps, PARTITIONS) > each * PARTITIONS:
        return 0
    return each * PARTITIONS // warps


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""The GPUs that kernels are compiled for, and what one multiprocessor of each holds.

NVIDIA's numbers: CUDA C++ Programming Guide, appendix "Compute Capabilities", tables of
multiprocessor and memory information; what a block is charged is from cuda_occupancy.h, which
Triton ships. AMD's: "CDNA 3" instruction set guide, and LLVM's AMDGPUBaseInfo.cpp
(getTotalNumVGPRs, getVGPRAllocGranule, getMaxWavesPerEU, getMaxWorkGroupsPerCU).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mmopt_kernels.errors import InputError


@dataclass(frozen=True)
class Target:
    """One architecture. A warp is a wavefront on AMD, a multiprocessor a compute unit.

    Attributes:
        name: as `_triton.target` says it.
        backend, arch, warp_size: of Triton's `GPUTarget`.
        warps: most that a multiprocessor holds at once.
        blocks: most that it holds at once; a block of one warp does not count on AMD.
        shared: bytes of shared memory (LDS) of a multiprocessor.
        shared_per_block: most that one block may ask for.
        shared_reserved: bytes that each block costs besides.
        shared_granule: what a block's shared memory is rounded up to.
        registers: most that a thread may have; on AMD vector and accumulation registers together.
        tensor_memory: columns of tensor memory in a multiprocessor; 0 where there is none.
        matrix: how matrix instructions are called in reports, and their mnemonics as a regular
            expression.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    shared_reserved: int
    shared_granule: int
    registers: int
    tensor_memory: int
    matrix: Mapping[str, str]


# Each of these has four partitions, one scheduler and its registers, and gives a warp registers in
# units of 8 for each of its lanes: 256 of 16384 on NVIDIA (cudaOccRegAllocationGranularity,
# cudaOccSubPartitionsPerMultiprocessor), 8 of 512 on CDNA 3, whose wavefront has 64 lanes.
PARTITIONS = 4
REGISTERS_PER_LANE = 512
REGISTER_GRANULE = 8

THREADS_PER_BLOCK = 1024

_KIB = 1024


def _nvidia(
    capability: int,
    *,
    warps: int,
    blocks: int,
    shared: int,
    matrix: tuple[str, ...],
    tensor_memory: int = 0,
) -> Target:
    return Target(
        name=f"sm_{capability}",
        backend="cuda",
        arch=capability,
        warp_size=32,
        warps=warps,
        blocks=blocks,
        shared=shared,
        # The driver keeps 1 KiB of every block's shared memory from compute capability 8.0 on.
        shared_per_block=shared - _KIB,
        shared_reserved=_KIB,
        shared_granule=128,
        registers=255,
        tensor_memory=tensor_memory,
        matrix={name: name for name in matrix},
    )


# The first of the matrix instructions is the architecture's fastest for 16 bits. H is for 16 bits
# and TF32, Q for 8, I for integers, D for 64, O for the 4-bit formats; G is for warp groups
# (wgmma), UTC for tensor memory (tcgen05). NVIDIA, "CUDA Binary Utilities", instruction sets.
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _nvidia(80, warps=64, blocks=32, shared=164 * _KIB, matrix=("HMMA", "IMMA", "DMMA")),
        _nvidia(
            90,
            warps=64,
            blocks=32,
            shared=228 * _KIB,
            matrix=("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "DMMA"),
        ),
        _nvidia(
            100,
            warps=64,
            blocks=32,
            shared=228 * _KIB,
            tensor_memory=512,
            matrix=("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "HMMA", "IMMA", "DMMA"),
        ),
        _nvidia(
            120,
            warps=48,
            blocks=24,
            shared=100 * _KIB,
            matrix=("HMMA", "QMMA", "IMMA", "OMMA", "DMMA"),
        ),
        Target(
            name="gfx942",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            warps=32,
            blocks=16,
            shared=64 * _KIB,
            shared_per_block=64 * _KIB,
            shared_reserved=0,
            shared_granule=512,
            registers=512,
            tensor_memory=0,
            matrix={"MFMA": r"v_mfma_\w+", "SMFMAC": r"v_smfmac_\w+"},
        ),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        InputError: there is none.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise InputError(
            f"--target {name} is not known, expected one of: {', '.join(TARGETS)}."
        ) from None

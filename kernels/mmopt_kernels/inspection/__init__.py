"""What the compiler makes of every kernel for a GPU that need not be here.

`inspect` launches the ops with tensors that have no data while a recorder stands in for the GPU,
compiles what they would have launched with Triton's own compiler, and reads registers, spills,
shared memory and matrix instructions from the result. Needs Triton; nothing else imports this.
"""

from mmopt_kernels.inspection.build import Failure, Inspection, KernelFigures, inspect
from mmopt_kernels.inspection.cases import CASES, Case
from mmopt_kernels.inspection.targets import TARGETS, Target, target_named

__all__ = [
    "CASES",
    "TARGETS",
    "Case",
    "Failure",
    "Inspection",
    "KernelFigures",
    "Target",
    "inspect",
    "target_named",
]

"""Attention over one contiguous range of keys for each query."""

from mmopt_kernels.attention.api import attention
from mmopt_kernels.attention.intervals import Intervals

__all__ = ["Intervals", "attention"]

"""A weight of 4-bit normal floats as a dense one."""

from mmopt_kernels.dequantize_nf4.api import dequantize_nf4

__all__ = ["dequantize_nf4"]

"""A linear layer and its low-rank adapter in one op."""

from mmopt_kernels.lora_linear.api import lora_linear

__all__ = ["lora_linear"]

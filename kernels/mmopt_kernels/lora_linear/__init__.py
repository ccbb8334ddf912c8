"""Linear layers and their low-rank adapters in one op."""

from mmopt_kernels.lora_linear.api import Projection, lora_linear, lora_linear_group

__all__ = ["Projection", "lora_linear", "lora_linear_group"]

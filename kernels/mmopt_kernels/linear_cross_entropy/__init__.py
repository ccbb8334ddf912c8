"""The cross-entropy of a linear layer's outputs, whose logits never exist as a whole."""

from mmopt_kernels.linear_cross_entropy.api import LoraFactors, linear_cross_entropy

__all__ = ["LoraFactors", "linear_cross_entropy"]

"""Attach the fused ops to an existing Hugging Face or PEFT model, in place and reversibly."""

from mmopt.attach.optimize import optimize
from mmopt.attach.report import OptimizationReport, Row

__all__ = ["OptimizationReport", "Row", "optimize"]

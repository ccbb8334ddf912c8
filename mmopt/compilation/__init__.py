"""Compile a model into one graph, and prove and time what that and the fused ops change."""

from mmopt.compilation.checkpoint import CompileReport, compile_checkpoint
from mmopt.compilation.model import CompiledModel, GraphBreak, Recompile, compile

__all__ = [
    "CompileReport",
    "CompiledModel",
    "GraphBreak",
    "Recompile",
    "compile",
    "compile_checkpoint",
]

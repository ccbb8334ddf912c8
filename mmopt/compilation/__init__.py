"""Compile a model into one graph, and prove and time what that and the fused ops change."""

from mmopt.compilation.checkpoint import compile_checkpoint
from mmopt.compilation.model import CompiledModel, GraphBreak, Recompile, compile
from mmopt.compilation.report import CompileReport
from mmopt.compilation.warm_start import load_compiled

__all__ = [
    "CompileReport",
    "CompiledModel",
    "GraphBreak",
    "Recompile",
    "compile",
    "compile_checkpoint",
    "load_compiled",
]

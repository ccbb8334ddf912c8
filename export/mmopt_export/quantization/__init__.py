"""Quantizes an ONNX graph for its target: recipes as data, to follow one or choose from several."""

from mmopt_export.quantization.apply import layer_sensitivities, quantize
from mmopt_export.quantization.choosing import Metric, choose
from mmopt_export.quantization.recipe import (
    NothingToQuantizeError,
    Recipe,
    candidates,
    recipe_for,
    with_wider,
)
from mmopt_export.quantization.rewrites import rewrite_for_cpu

__all__ = [
    "Metric",
    "NothingToQuantizeError",
    "Recipe",
    "candidates",
    "choose",
    "layer_sensitivities",
    "quantize",
    "recipe_for",
    "rewrite_for_cpu",
    "with_wider",
]

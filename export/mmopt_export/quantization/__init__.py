"""Quantizes an ONNX graph for its target: recipes as data, to follow one or choose from several."""

from mmopt_export.quantization.apply import layer_sensitivities, quantize
from mmopt_export.quantization.choosing import Metric, choose, without_times
from mmopt_export.quantization.recipe import (
    FLOATS,
    NothingToQuantizeError,
    Recipe,
    candidates,
    read_options,
    recipe_for,
    require_heeded,
    with_options,
    with_wider,
)
from mmopt_export.quantization.rewrites import rewrite_for_cpu

__all__ = [
    "FLOATS",
    "Metric",
    "NothingToQuantizeError",
    "Recipe",
    "candidates",
    "choose",
    "layer_sensitivities",
    "quantize",
    "read_options",
    "recipe_for",
    "require_heeded",
    "rewrite_for_cpu",
    "with_options",
    "with_wider",
    "without_times",
]

"""Fine-tuning from a YAML recipe, on transformers' Trainer."""

from mmopt.train.recipe import Recipe, read_recipe
from mmopt.train.run import TrainReport, run_recipe

__all__ = ["Recipe", "TrainReport", "read_recipe", "run_recipe"]

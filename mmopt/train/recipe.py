"""The recipe of `mmopt train`: a YAML file, checked whole before anything is loaded."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmopt_kernels.errors import InputError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Section):
    """JSON Lines files; paths are relative to the current folder."""

    train: Path
    test: Path
    text: str = "text"
    label: str = "label"
    max_length: int = Field(default=128, ge=1)


class Adapter(_Section):
    """A LoRA adapter, in PEFT's terms."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    # Modules trained whole beside the adapter; the new head always is.
    train_whole: list[str] = []


class Training(_Section):
    """How long and how fast; the optimizer is AdamW with linear decay."""

    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    seed: int = Field(default=0, ge=0, lt=2**32)  # NumPy takes no other


class Recipe(_Section):
    """A fine-tuning run.

    Attributes:
        model: a local folder or a hub id.
        output: a new folder for the adapter, the head, the tokenizer and `mmopt-train.json`.
        config: values that replace those of the model's config.json, such as dropout rates.
        optimize: attach mmopt's ops with `mmopt.optimize`.
        compile: compile the training step with `mmopt.compile`.
    """

    model: str
    task: Literal["text-classification"]
    data: Data
    output: Path
    adapter: Adapter = Adapter()
    training: Training = Training()
    config: dict[str, Any] = {}
    optimize: bool = True
    compile: bool = True

    @field_validator("config")
    @classmethod
    def _finite(cls, config: dict[str, Any]) -> dict[str, Any]:
        for key, value in config.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} is {value}, expected a finite number")
        return config


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` or `section.key=value`, the value in YAML, as `--set` takes them.

    Raises:
        InputError: the file is missing or not YAML, or a value is not as expected; every fault
            is named at once.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist, expected a YAML recipe.")
    try:
        document = _loaded(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no mapping, expected keys such as model, data and output.")
    for override in overrides:
        _override(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise InputError(f"{path} is not a valid recipe:\n" + "\n".join(faults)) from error


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        # A date that no calendar has, a number of too many digits, brackets too deep: PyYAML lets
        # Python's own errors through.
        raise yaml.YAMLError(str(error)) from error


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected key=value, such as training.epochs=1.")
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise InputError(f"--set {override}: {section} is not a section of the recipe.")
    try:
        document[last] = _loaded(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML.") from error

"""What is done to a graph's numbers, as data."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmopt_export.providers import Target
from mmopt_kernels.errors import InputError, MmoptError

METHODS = ("none", "half", "dynamic", "static", "weights")
ALGORITHMS = ("rtn", "hqq", "gptq")
CALIBRATIONS = ("minmax", "entropy", "percentile")
FLOATS = ("fp32", "fp16", "bf16")

# The fields that a user may change, by the methods that heed them.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "half": (),
    "dynamic": ("embeddings",),
    "static": ("calibration",),
    "weights": ("algorithm", "block", "symmetric", "accuracy_level", "embeddings"),
}
_KEYS = tuple(sorted({name for names in _OPTIONS.values() for name in names}))


class NothingToQuantizeError(MmoptError):
    """The graph has no weight that the recipe is for."""


@dataclass(frozen=True)
class Recipe:
    """How a graph is quantized. Two runs with one recipe write the same bytes.

    Attributes:
        precision: the name that the artifact carries.
        method: `none`; `half` for floats of 16 bits alone; `dynamic`: int8 matmuls, activations
            quantized at run time; `static`: QDQ int8 convolutions with calibrated activations;
            `weights`: matmul weights alone, in blocks (MatMulNBits).
        floats: the type of everything that is not quantized.
        bits: of weights under `weights`: 4 or 8.
        block: consecutive inputs of a weight that share a scale: a power of two from 16 to 256.
        symmetric: whether blocks have no zero point.
        accuracy_level: of MatMulNBits: 1 multiplies in fp32, 2 in fp16, 3 in bf16, 4 in int8, 0 in
            the activation's type.
        algorithm: `rtn` rounds to nearest; `hqq` fits zero points (asymmetric only); `gptq` makes
            up for each rounding in what is not rounded yet, and needs samples.
        embeddings: whether embedding tables become int8 as well.
        calibration: how `static` finds the range of an activation.
        keep: names of nodes whose weights stay floats.
        wide: names of nodes whose weights take 8 bits where the others take 4.

    Raises:
        InputError: a value is not one of these, or two do not go together.
    """

    precision: str
    method: str
    floats: str = "fp32"
    bits: int = 8
    block: int = 32
    symmetric: bool = True
    accuracy_level: int = 0
    algorithm: str = "rtn"
    embeddings: bool = True
    calibration: str = "minmax"
    keep: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("method", self.method, METHODS),
            ("algorithm", self.algorithm, ALGORITHMS),
            ("calibration", self.calibration, CALIBRATIONS),
            ("floats", self.floats, FLOATS),
            ("bits", self.bits, (4, 8)),
            ("block", self.block, (16, 32, 64, 128, 256)),
            ("symmetric", self.symmetric, (True, False)),
            ("accuracy_level", self.accuracy_level, (0, 1, 2, 3, 4)),
            ("embeddings", self.embeddings, (True, False)),
        ):
            if value not in allowed:
                raise InputError(
                    f"a recipe has {what} {value!r}, expected one of: "
                    f"{', '.join(str(each) for each in allowed)}."
                )
        if self.method in ("dynamic", "static") and self.floats != "fp32":
            raise InputError(f"{self.method} int8 has fp32 around it, got {self.floats}.")
        if self.method == "half" and self.floats == "fp32":
            raise InputError("half precision is fp16 or bf16, got fp32.")
        if self.algorithm == "hqq" and self.symmetric:
            raise InputError("hqq fits zero points: it goes with symmetric=False only.")

    @property
    def needs_samples(self) -> bool:
        """Whether it cannot be followed without batches of samples."""
        return self.method in ("dynamic", "static") or (
            self.method == "weights" and self.algorithm == "gptq"
        )

    def record(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def recipe_for(target: Target, kind: str, precision: str) -> Recipe:
    """The recipe that gives `kind` of model `precision` on `target`.

    Raises:
        InputError: the target cannot run it; or `auto`, which is several recipes (`candidates`).
    """
    target.require_precision(kind, precision)
    if precision == "fp32":
        return Recipe("fp32", "none")
    if precision in ("fp16", "bf16"):
        return Recipe(precision, "half", floats=precision)
    if precision not in ("int8", "int4"):
        raise InputError(f"{precision} is no single recipe, expected a precision.")
    if kind == "convolutional":
        return Recipe(precision, "static")
    if kind == "encoder":
        return Recipe(precision, "dynamic")
    bits = 4 if precision == "int4" else 8
    if target.name == "cuda":
        # The compact kernels of stock wheels want symmetric blocks of 32 under fp16.
        return Recipe(precision, "weights", "fp16", bits=bits)
    return Recipe(precision, "weights", bits=bits, accuracy_level=4)


def candidates(target: Target, kind: str) -> list[Recipe]:
    """What `auto` tries, narrowest first; the last is the answer where nothing else will do.

    Of the two types of 16 bits, which are as fast, only the target's default is tried.
    """
    capability = target.capability(kind)
    return [
        recipe_for(target, kind, precision)
        for precision in reversed(capability.precisions)
        if precision not in ("fp16", "bf16") or precision == capability.default
    ]


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Changes to a recipe from `key=value`, as `mmopt export --set` takes them.

    Raises:
        InputError: no such key, or no value.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in _KEYS:
            raise InputError(
                f"--set {word}: expected key=value with one of the keys {', '.join(_KEYS)}, such "
                "as algorithm=gptq."
            )
        try:
            options[name] = json.loads(text)
        except (ValueError, RecursionError):
            options[name] = text
    return options


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """`recipe` with those of `options` that its method heeds.

    Raises:
        InputError: a value is none that a recipe may have.
    """
    heeded = _OPTIONS[recipe.method]
    return replace(recipe, **{key: value for key, value in options.items() if key in heeded})


def require_heeded(options: Mapping[str, Any], recipes: Iterable[Recipe]) -> None:
    """Raise where none of `recipes` heeds one of `options`, or cannot have its value.

    Raises:
        InputError: such an option.
    """
    heeded = {name for one in recipes for name in _OPTIONS[with_options(one, options).method]}
    for name in options:
        if name not in _KEYS:
            raise InputError(f"the option {name} is not one of: {', '.join(_KEYS)}.")
        if name not in heeded:
            methods = [method for method, names in _OPTIONS.items() if name in names]
            raise InputError(
                f"--set {name} is for the quantization of method {' or '.join(methods)}, and "
                "nothing of this model takes it at this precision. Leave it out."
            )


def with_wider(recipe: Recipe, nodes: tuple[str, ...]) -> Recipe:
    """`recipe` with more room for some nodes: 8 bits for 4, floats for 8."""
    if recipe.method == "weights" and recipe.bits == 4:
        return replace(recipe, wide=tuple(sorted({*recipe.wide, *nodes})))
    return replace(recipe, keep=tuple(sorted({*recipe.keep, *nodes})))

"""An adapter as the caller names it. Needs neither torch nor PEFT."""

import math
from dataclasses import dataclass
from pathlib import Path

from mmopt_kernels.errors import InputError


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter and how much of it is wanted.

    Attributes:
        path: a PEFT adapter folder or a hub id.
        weight: multiplies what the adapter changes.

    Raises:
        InputError: a weight that is zero or not finite.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise InputError(
                f"the adapter {self.path} has weight {self.weight}, expected a finite number other "
                "than 0. Leave out an adapter that is not wanted."
            )

    @classmethod
    def parse(cls, text: str) -> "AdapterSpec":
        """`PATH` or `PATH=WEIGHT`; a path that exists as it is written wins.

        Raises:
            InputError: what follows the last `=` is no number, and no such path exists.
        """
        path, found, weight = text.rpartition("=")
        if not found or Path(text).exists():
            return cls(text)
        try:
            value = float(weight)
        except ValueError as error:
            raise InputError(
                f"the adapter {text!r} has the weight {weight!r}, expected a number, as in "
                "`--adapter PATH=0.7`."
            ) from error
        return cls(path, value)

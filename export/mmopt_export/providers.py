"""What each target can run, as data: adding a target is one entry here."""

from dataclasses import dataclass

from mmopt_kernels.errors import InputError


@dataclass(frozen=True)
class Target:
    """An execution target of an artifact.

    Attributes:
        name: what `--target` takes.
        provider: the ONNX Runtime execution provider that must run every node.
        precisions: what `--precision` takes for it.
        refused: precisions that exist elsewhere, with the reason why not here.
    """

    name: str
    provider: str
    precisions: tuple[str, ...]
    refused: dict[str, str]

    def require_precision(self, precision: str) -> None:
        """Raise InputError, with the reason where one is known, unless `precision` runs here."""
        if precision in self.precisions:
            return
        reason = self.refused.get(precision, "no such precision")
        raise InputError(
            f"--precision {precision} is not available for target {self.name} ({reason}), "
            f"expected one of: {', '.join(self.precisions)}."
        )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            provider="CPUExecutionProvider",
            precisions=("fp32", "int8"),
            refused={
                "fp16": "ONNX Runtime's CPU kernels compute half precision through casts to fp32",
                "bf16": "ONNX Runtime's CPU kernels compute half precision through casts to fp32",
            },
        ),
    )
}


def get_target(name: str) -> Target:
    """The target called `name`; InputError names the known ones otherwise."""
    if name not in TARGETS:
        raise InputError(f"--target {name} is not known, expected one of: {', '.join(TARGETS)}.")
    return TARGETS[name]

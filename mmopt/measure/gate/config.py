"""What the gate is told: `[tool.mmopt.gate]` of pyproject.toml or a file, and options."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from mmopt_kernels.errors import InputError


def parse_share(text: object) -> float:
    """`3%` or `0.03` as 0.03.

    Raises:
        ValueError: it is neither, or not above 0 and below 1 (100%).
    """
    try:
        value = text
        if isinstance(text, str):
            number = text.strip()
            value = float(number[:-1]) / 100 if number.endswith("%") else float(number)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no share, expected 3% or 0.03 (above 0, below 100%)")


def _within(path: Path) -> Path:
    # Joined to a checkout, any other path would lead both sides to the same files.
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{path} leaves the checkout, expected a path relative to the repository's root"
        )
    return path


Share = Annotated[float, BeforeValidator(parse_share)]
Inner = Annotated[Path, AfterValidator(_within)]


class GateConfig(BaseModel):
    """How two revisions of a suite are compared.

    Attributes:
        suite: folder or file of the suite, relative to the repository's root.
        sources: folders of the checkout that are put on PYTHONPATH, before what is installed;
            those that a checkout does not have are left out.
        build: shell commands run in each checkout before anything is measured.
        margin: the slowdown that must not pass.
        margins: margins of the benchmarks whose node id fits a pattern (`*` and `?`; the first
            that fits counts).
        skip: patterns of benchmarks that are not timed.
        alpha: of all suites without a slowdown, the share that may be called REGRESSED.
        beta: of all benchmarks slower by their margin, the share that may pass.
        budget: seconds to measure for; what is undecided then is INCONCLUSIVE.
        threads: threads, and cores, that both sides of a pair get.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Inner = Path("bench")
    sources: tuple[Inner, ...] = (Path("src"), Path("."))
    build: tuple[str, ...] = ()
    margin: Share = 0.03
    margins: dict[str, Share] = {}
    skip: tuple[str, ...] = ()
    alpha: Share = 0.01
    beta: Share = 0.01
    budget: float = Field(default=480.0, gt=0, allow_inf_nan=False)
    threads: int = Field(default=1, ge=1)

    def margin_of(self, name: str) -> float:
        """The margin of one benchmark."""
        for pattern, margin in self.margins.items():
            if _fits(name, pattern):
                return margin
        return self.margin

    def skips(self, name: str) -> bool:
        """Whether this benchmark is left out."""
        return any(_fits(name, pattern) for pattern in self.skip)


def _fits(name: str, pattern: str) -> bool:
    # Node ids carry brackets, which in a pattern would be a choice of characters.
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def read_config(root: Path, file: Path | None, **options: Any) -> GateConfig:
    """Read the configuration, all faults in one message.

    Args:
        root: the repository, whose pyproject.toml may have `[tool.mmopt.gate]`.
        file: a TOML file with the same keys at its top; in place of the table.
        options: from the command line, over the file's; None is not given.

    Raises:
        InputError: no such file, no TOML, an unknown key, or a value that does not fit.
    """
    source = file or root / "pyproject.toml"
    values: dict[str, Any] = {}
    if file is not None and not file.is_file():
        raise InputError(f"--config {file}: there is no such file.")
    if source.is_file():
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{source} is no TOML file: {error}.") from error
        except OSError as error:
            raise InputError(f"{source} cannot be read: {error.strerror}.") from error
        for table in () if file else ("tool", "mmopt", "gate"):
            values = values.get(table, {})
            if not isinstance(values, dict):
                raise InputError(f"{source}: {table} is {values!r}, expected [tool.mmopt.gate].")
    values = {**values, **{key: value for key, value in options.items() if value is not None}}
    try:
        return GateConfig.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise InputError(
            f"the gate's configuration ({source} and the command line) does not hold: {faults}."
        ) from error

"""What `mmopt.optimize` did to each module, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        name: its dotted path in the model; `""` is the model itself.
        kind: `attention` (a tower: every layer that shares one config), `lora` (one adapted
            layer), `loss` (the loss of the model) or `graph` (a method that stops a compiler).
        became: the op that it now calls, the method that it now has, or None when it was left
            alone.
        reason: why it was left alone, when an attached layer still takes PEFT's own path, or what
            an attached layer computes otherwise.
    """

    name: str
    kind: str
    became: str | None
    reason: str | None


@dataclass(frozen=True)
class OptimizationReport:
    """A row per module that an op could serve, attached or not.

    Attributes:
        rows: towers first, then LoRA layers, each in the model's own order, then the loss, then
            methods.
    """

    rows: tuple[Row, ...]
    _restorers: tuple[Callable[[], None], ...] = field(default=(), repr=False, compare=False)
    _check: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def attached(self) -> int:
        """How many rows became an op."""
        return sum(row.became is not None for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0: what was left alone is left as correct as it was."""
        return 0

    def undo(self) -> None:
        """Give every attached module its former behaviour back. Harmless when called again.

        A module that changed hands in between (another attention implementation, an adapter
        unloaded) stays as it is now.
        """
        for restore in self._restorers:
            restore()

    def check_gradients(self) -> None:
        """After a backward pass: raise when an adapter that should train got no gradient.

        Call it once, after the first backward. It reads every gradient on the host.

        Raises:
            CheckFailedError: the loss does not reach an active, trainable adapter; names it.
        """
        if self._check is not None:
            self._check()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "attached": self.attached,
            "rows": [
                {"name": row.name, "kind": row.kind, "became": row.became, "reason": row.reason}
                for row in self.rows
            ],
        }

    def render(self) -> Table:
        """A table with one line per module; equal neighbours (24 LoRA layers, say) share one."""
        table = Table(title=f"{self.attached} of {len(self.rows)} modules use mmopt's ops")
        for heading in ("module", "kind", "became", "why"):
            table.add_column(heading, overflow="fold")
        for row, more in _fold(self.rows):
            name = row.name or "(model)"
            table.add_row(
                f"{name} and {more} more" if more else name,
                row.kind,
                row.became or "left alone",
                row.reason or "",
            )
        return table


def _fold(rows: tuple[Row, ...]) -> list[tuple[Row, int]]:
    """Rows of the same fate, in the order of their first: the first, and how many follow it."""
    groups: dict[tuple[str, str | None, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.became, row.reason), []).append(row)
    return [(group[0], len(group) - 1) for group in groups.values()]

"""What `mmopt compile` found, as tables and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.attach import OptimizationReport
from mmopt.compilation.explain import explain
from mmopt.compilation.inputs import Contents
from mmopt.compilation.model import GraphBreak, Mode, Recompile
from mmopt.compilation.parity import Parity
from mmopt.measure.statistics import Interval, bootstrap_median, median
from mmopt.measure.timers import TIMER_MEANING

EAGER, COMPILED, ATTACHED = "eager", "torch.compile", "torch.compile + mmopt"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Variant:
    """One way to run the model's step, measured.

    Attributes:
        seconds: samples of one step, round by round, all variants in each round.
        first_call_seconds: of compiling and the first step, from empty compile caches; None of
            eager.
        peak_bytes: the most that a step holds beyond the weights.
    """

    seconds: list[float]
    first_call_seconds: float | None
    peak_bytes: int

    def ratio_to(self, base: "Variant") -> tuple[float, Interval]:
        """The median of this variant's time over the base's, round by round, and its 95% interval.

        Both ran in each round, so that what slows a round down cancels.
        """
        ratios = [mine / other for mine, other in zip(self.seconds, base.seconds, strict=True)]
        return median(ratios), bootstrap_median(ratios)


@dataclass(frozen=True)
class CompileReport:
    """What `mmopt compile` found.

    Attributes:
        model, mode, dtype, batch, length, data: what was asked.
        device: where it ran, in words.
        shapes: of the tensors in the two batches that were compared; the first one was timed.
        contents: what the timed batch holds.
        loss: what was trained on: the model's own loss, or the mean square of its outputs; None in
            mode `infer`.
        optimization: what each module became.
        graph_breaks, recompiles: of the compiled model with mmopt's ops, over both batches, in mode
            `train` with dropout off and on.
        parity: outputs, and in mode `train` the loss and every gradient, of the compiled model
            with the ops against the untouched eager model in float32, with dropout off. The fused
            loss forms no logits; with it, the loss and the gradients stand for them.
        dead_adapters: in mode `train`, the trainable adapters that got no gradient.
        variants: eager, torch.compile, and torch.compile with mmopt's ops.
        timer: of `mmopt.measure.timers.TIMERS`.
        explained: whether to say what usually helps against breaks and recompiles.
        output: where the warm start was to be stored; None when nothing was.
        store_sha256: of the store; None when nothing was stored, for the checks do not hold.
    """

    model: str
    mode: Mode
    dtype: str
    device: str
    batch: int
    length: int
    data: str | None
    shapes: tuple[Shapes, Shapes]
    contents: Contents
    loss: str | None
    optimization: OptimizationReport
    graph_breaks: tuple[GraphBreak, ...]
    recompiles: tuple[Recompile, ...]
    parity: tuple[Parity, ...]
    dead_adapters: tuple[str, ...]
    variants: Mapping[str, Variant]
    timer: str
    explained: bool = False
    output: str | None = None
    store_sha256: str | None = None

    @property
    def exit_code(self) -> int:
        """1 when a graph breaks, another length recompiles, a tensor is off or an adapter dead."""
        bad = self.graph_breaks or self.recompiles or self.dead_adapters
        return 0 if not bad and all(group.holds for group in self.parity) else 1

    @property
    def worst(self) -> Parity | None:
        """The first group of tensors that is off; None when all hold."""
        return next((group for group in self.parity if not group.holds), None)

    def rates(self, variant: Variant) -> dict[str, float | None]:
        """Tokens, images and seconds of audio per second, by JSON key."""
        step = median(variant.seconds)
        return {
            f"{name}_per_second": None if count is None else count / step
            for name, count in asdict(self.contents).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        base = self.variants[COMPILED]
        ratios = {name: variant.ratio_to(base) for name, variant in self.variants.items()}
        rates = {name: self.rates(variant) for name, variant in self.variants.items()}
        worst = self.worst
        return {
            "model": self.model,
            "mode": self.mode,
            "dtype": self.dtype,
            "device": self.device,
            "batch": self.batch,
            "length": self.length,
            "data": self.data,
            "shapes": [{name: list(shape) for name, shape in one.items()} for one in self.shapes],
            **{f"step_{name}": count for name, count in asdict(self.contents).items()},
            "loss": self.loss,
            "holds": self.exit_code == 0,
            "optimization": self.optimization.to_dict(),
            "graph_breaks": [self._place(place) for place in self.graph_breaks],
            "recompiles": [self._place(place) for place in self.recompiles],
            "parity": [group.to_dict() for group in self.parity],
            "worst": None if worst is None else {"group": worst.group, "tensor": worst.worst},
            "dead_adapters": list(self.dead_adapters),
            "timer": self.timer,
            "seconds": {
                name: {"median": median(variant.seconds), "samples": variant.seconds}
                for name, variant in self.variants.items()
            },
            "ratio_to_torch_compile": {
                name: {"median": middle, "low": interval.low, "high": interval.high}
                for name, (middle, interval) in ratios.items()
            },
            **{key: {name: rates[name][key] for name in self.variants} for key in rates[COMPILED]},
            "step_peak_bytes": {
                name: variant.peak_bytes for name, variant in self.variants.items()
            },
            "first_call_seconds": {
                name: variant.first_call_seconds for name, variant in self.variants.items()
            },
            "store": self.output if self.store_sha256 else None,
            "store_sha256": self.store_sha256,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def render(self) -> RenderableType:
        """Tables for a terminal."""
        parts: list[RenderableType] = [self.optimization.render()]
        parts += [*map(Text, self._findings()), self._table()]
        if self.store_sha256:
            parts.append(
                Text(
                    f"stored for mmopt.load_compiled: {self.output}\nA store is code. Whoever else "
                    f"loads it passes its sha256: {self.store_sha256}"
                )
            )
        elif self.output:
            parts.append(Text(f"NOT STORED in {self.output}: the checks above do not hold."))
        return Group(*parts)

    def _place(self, place: GraphBreak | Recompile) -> dict[str, Any]:
        found: dict[str, Any] = {"file": place.file, "line": place.line, "reason": place.reason}
        return {**found, **explain(place).to_dict()} if self.explained else found

    def _findings(self) -> Iterator[str]:
        for title, places in (("graph break", self.graph_breaks), ("recompile", self.recompiles)):
            yield f"{len(places)} {title}{'' if len(places) == 1 else 's'}"
            for place in places:
                yield f"  {place}"
                if self.explained:
                    yield from (f"    {line}" for line in explain(place).lines())
        if (self.graph_breaks or self.recompiles) and not self.explained:
            yield "Pass --explain for the lines and what usually helps."
        yield from map(str, self.parity)
        if self.dead_adapters:
            yield f"{len(self.dead_adapters)} adapters got NO GRADIENT:"
            yield from (f"  {name}" for name in self.dead_adapters)

    def _table(self) -> Table:
        what = "forward + backward" if self.mode == "train" else "forward"
        sizes = ", ".join(
            f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes[0].items() if shape
        )
        rates = {name: self.rates(variant) for name, variant in self.variants.items()}
        units = [key for key, value in rates[COMPILED].items() if value is not None]
        table = Table(
            title=f"{what}, {self.dtype}, {self.device}\n{sizes}",
            caption=f"{self.timer}: {TIMER_MEANING[self.timer]}. Peak memory: beyond the weights. "
            "First call: compiling included, from empty caches.",
        )
        table.add_column("variant")
        headings = ["median ms", "against torch.compile (95%)", *(_heading(unit) for unit in units)]
        for heading in (*headings, "peak MB", "first call s"):
            table.add_column(heading, justify="right")
        base = self.variants[COMPILED]
        for name, variant in self.variants.items():
            ratio, interval = variant.ratio_to(base)
            first = variant.first_call_seconds
            table.add_row(
                name,
                f"{median(variant.seconds) * 1e3:.2f}",
                f"{ratio:.3f}x ({interval.low:.3f} to {interval.high:.3f})",
                *(f"{rates[name][unit]:,.0f}" for unit in units),
                f"{variant.peak_bytes / 1e6:,.1f}",
                "-" if first is None else f"{first:.1f}",
            )
        return table


def _heading(unit: str) -> str:
    return {
        "tokens_per_second": "tokens/s",
        "images_per_second": "images/s",
        "audio_seconds_per_second": "audio s/s",
    }[unit]

"""`auto`: the narrowest recipe that meets an accuracy budget, with its worst layers wider."""

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_export.quantization.apply import layer_sensitivities, quantize
from mmopt_export.quantization.measuring import (
    latency_ms,
    relative_error,
    require_samples,
    run_all,
)
from mmopt_export.quantization.recipe import NothingToQuantizeError, Recipe, with_wider
from mmopt_export.quantization.storage import Array
from mmopt_export.runtime import Tensors, open_session
from mmopt_kernels.errors import InputError, MmoptError

Metric = Callable[[Callable[[Tensors], Tensors]], float]
"""Scores a function from inputs to outputs; higher is better."""
Parity = Callable[[Any, str], bool]
"""Whether an ONNX Runtime session is within the threshold of a precision."""


@dataclass(frozen=True)
class _Tried:
    """What a recipe gave: whether it will do, the record of `quantize`, and that of the trial."""

    meets: bool
    record: dict[str, Any]
    trial: dict[str, Any]


def choose(
    source: Path,
    output: Path,
    candidates: Sequence[Recipe],
    feeds: Sequence[Tensors],
    expected: Sequence[Mapping[str, Array]] | None,
    budget: float,
    *,
    metric: Metric | None = None,
    parity: Parity | None = None,
    provider: str = "CPUExecutionProvider",
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the first of `candidates` that can be made to meet `budget`.

    A candidate that does not meet it as it is gets more room for its most sensitive matmuls (8
    bits for 4, floats for int8), as few as possible, found by halving. Where that does not help
    with half of them, the next candidate is tried. The last one is the answer without meeting
    anything. Times are reported and decide nothing, so that the choice repeats.

    Args:
        source: the fp32 graph.
        output: file to write.
        candidates: narrowest first; `recipe.candidates` gives a target's.
        feeds: batches, for quantization and for the error.
        expected: the outputs of PyTorch for `feeds` by name; None runs `source`.
        budget: the most that may be lost: of the outputs, relative to them (0.1 is a cosine of
            about 0.995), or of `metric`, in its own unit.
        metric: scores a graph by itself, with higher better, such as accuracy.
        parity: what a graph within the budget must meet as well.
        provider: where graphs are run to measure them.
        threads: for the sessions.

    Returns:
        The record of `quantize` with what was measured under `auto`: `chosen`, and every trial
        with its recipe, bytes, milliseconds for the first batch, error, whether it has parity (None
        where that was not measured: beyond the budget), and whether it was taken.

    Raises:
        InputError: no samples, no candidates, or a budget below zero.
    """
    require_samples(feeds, "auto")
    if not candidates:
        raise InputError("auto has no candidates, expected at least one recipe.")
    if not (budget >= 0 and math.isfinite(budget)):
        raise InputError(f"--max-drop {budget} is no budget, expected zero or more.")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        search = _Search(
            source,
            Path(scratch),
            output.name,
            feeds,
            expected,
            budget,
            metric,
            parity,
            provider,
            threads,
        )
        fitting = (search.fit(recipe) for recipe in candidates[:-1])
        chosen = next((tried for tried in fitting if tried is not None), None)
        if chosen is None:
            chosen = search.try_one(candidates[-1], last=True)
        for file in search.best.iterdir():
            file.replace(output.with_name(file.name))
    chosen.trial["chosen"] = True
    return chosen.record | {
        "auto": {
            "budget": budget,
            "measure": "relative output error" if metric is None else "drop of the metric",
            "met": chosen.meets,
            "trials": search.trials,
        }
    }


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `choose` without what no two runs share."""
    trials = [
        {name: value for name, value in trial.items() if name != "milliseconds"}
        for trial in record["auto"]["trials"]
    ]
    return {**record, "auto": {**record["auto"], "trials": trials}}


class _Search:
    def __init__(
        self,
        source: Path,
        folder: Path,
        name: str,
        feeds: Sequence[Tensors],
        expected: Sequence[Mapping[str, Array]] | None,
        budget: float,
        metric: Metric | None,
        parity: Parity | None,
        provider: str,
        threads: int | None,
    ) -> None:
        self.source, self.folder, self.name, self.feeds = source, folder, name, feeds
        self.best = folder / "best"
        self.budget, self.metric, self.parity = budget, metric, parity
        self.provider, self.threads = provider, threads
        self.trials: list[dict[str, Any]] = []
        self.base = 0.0
        self.expected = expected
        if expected is None or metric is not None:
            session = open_session(source, provider=provider, threads=threads)
            if expected is None:
                self.expected = run_all(session, feeds)
            if metric is not None:
                self.base = metric(lambda batch: run_all(session, [batch])[0])

    def try_one(self, recipe: Recipe, *, last: bool = False) -> _Tried:
        """Quantize, measure, and note it down.

        `best` is kept: the latest that meets the budget and has parity, or the `last`.
        """
        made = self.folder / "trial"
        made.mkdir(exist_ok=True)
        path = made / self.name
        record = quantize(self.source, path, recipe, self.feeds)
        session = open_session(path, provider=self.provider, threads=self.threads)
        assert self.expected is not None
        actual = run_all(session, self.feeds)
        names = set(self.expected[0]) & set(actual[0])
        error = relative_error(
            [{name: batch[name] for name in sorted(names)} for batch in self.expected], actual
        )
        drop = None
        if self.metric is not None:
            drop = self.base - self.metric(lambda batch: run_all(session, [batch])[0])
        meets = (error if drop is None else drop) <= self.budget
        held = None
        if meets and self.parity is not None:
            meets = held = self.parity(session, record["recipe"]["precision"])
        trial = {
            "recipe": record["recipe"],
            "bytes": sum(file.stat().st_size for file in made.iterdir()),
            "milliseconds": latency_ms(session, self.feeds[0]),
            "relative_error": error if math.isfinite(error) else None,
            "metric_drop": drop,
            "parity": held,
            "chosen": False,
        }
        self.trials.append(trial)
        if last or meets:
            shutil.rmtree(self.best, ignore_errors=True)
            made.rename(self.best)
        return _Tried(meets, record, trial)

    def fit(self, recipe: Recipe) -> _Tried | None:
        """`recipe` with as few matmuls wider as the budget asks; None where half are too few."""
        try:
            plain = self.try_one(recipe)
        except MmoptError as error:
            if isinstance(error, InputError):
                raise
            # Nothing to quantize: the next one may have.
            self.trials.append({"recipe": recipe.record(), "failed": str(error), "chosen": False})
            return None
        if plain.meets:
            return plain
        if recipe.method not in ("dynamic", "weights"):
            return None
        try:
            ratios = layer_sensitivities(self.source, self.folder, recipe, self.feeds)
        except NothingToQuantizeError:
            return None  # tables alone, which cannot be wider
        plain.trial["sensitivities"] = ratios
        # Ties go by name, so that the choice repeats.
        order = sorted(ratios, key=lambda name: (-ratios[name], name))
        low, high = 0, (len(order) + 1) // 2
        best = self.try_one(with_wider(recipe, tuple(order[:high])))
        if not best.meets:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.try_one(with_wider(recipe, tuple(order[:middle])))
            if trial.meets:
                best, high = trial, middle
            else:
                low = middle
        return best

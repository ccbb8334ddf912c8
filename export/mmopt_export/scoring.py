"""What a graph is worth on samples: the number that `--precision auto` keeps to a budget."""

from collections.abc import Callable, Sequence

import numpy as np

from mmopt_export.parity import Sample
from mmopt_export.runtime import Tensors

Run = Callable[[Tensors], Tensors]


def measure_of(samples: Sequence[Sample]) -> str:
    """What `metric_of` measures on these samples."""
    return "accuracy" if any(sample.labels for sample in samples) else "relative output error"


def metric_of(samples: Sequence[Sample]) -> Callable[[Run], float]:
    """Scores a graph: higher is better, and a drop of it is what the budget is for.

    Where samples have labels that is the share of right ones. Else it is the negative error of the
    outputs relative to PyTorch's, `|found - expected| / |expected|` in the Euclidean norm over all
    rows that are compared, the worst of the outputs.
    """
    if measure_of(samples) == "accuracy":
        return lambda run: _accuracy(samples, run)
    return lambda run: -_error(samples, run)


def _accuracy(samples: Sequence[Sample], run: Run) -> float:
    right = known = 0
    for sample in samples:
        outputs = run(sample.feeds)
        for name, labels in sample.labels.items():
            winners = sample.rows(name, outputs[name]).argmax(-1)
            right += int((winners == labels)[labels >= 0].sum())
            known += int((labels >= 0).sum())
    return right / known


def _error(samples: Sequence[Sample], run: Run) -> float:
    differences: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for sample in samples:
        outputs = run(sample.feeds)
        for name, expected in sample.expected.items():
            if name not in outputs:
                continue  # a cache in bf16
            want = sample.rows(name, expected).astype(np.float64)
            got = sample.rows(name, outputs[name]).astype(np.float64)
            differences[name] = differences.get(name, 0.0) + float(np.square(want - got).sum())
            sizes[name] = sizes.get(name, 0.0) + float(np.square(want).sum())
    # A NaN is no small error.
    return max(
        float(np.sqrt(difference / max(sizes[name], 1e-30))) if np.isfinite(difference) else np.inf
        for name, difference in differences.items()
    )

"""Pairwise coverage: few rows in which every two values of different factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(row: dict[str, Any], names: Iterable[str]) -> list[Pair]:
    """Every two values of a row that may still lack some, in the order of the names."""
    return list(itertools.combinations(((n, row[n]) for n in names if n in row), 2))


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Greedily few rows, always the same ones."""
    missing = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    }
    rows = []
    while missing:
        row = dict(min(missing, key=repr))
        for name, values in factors.items():
            if name not in row:
                gains = [
                    sum(
                        pair in missing
                        for pair in pairs(row | {name: x}, factors)
                        if name in dict(pair)
                    )
                    for x in values
                ]
                row[name] = values[gains.index(max(gains))]
        rows.append({name: row[name] for name in factors})
        missing -= set(pairs(row, factors))
    return rows

"""Pairwise coverage: few rows in which every two values of different factors meet."""

from __future__ import annotations

import itertools
from typing import Any


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Greedily few rows, always the same ones."""
    names = list(factors)

    def pairs(row: dict[str, Any]) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
        return list(itertools.combinations(((n, row[n]) for n in names if n in row), 2))

    missing = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(names, 2)
        for a in factors[one]
        for b in factors[other]
    }
    rows = []
    while missing:
        row = dict(min(missing, key=repr))
        for name in names:
            if name not in row:
                gains = [
                    sum(pair in missing for pair in pairs(row | {name: x}) if name in dict(pair))
                    for x in factors[name]
                ]
                row[name] = factors[name][gains.index(max(gains))]
        rows.append({name: row[name] for name in names})
        missing -= set(pairs(row))
    return rows

"""The suite on which `mmopt bench gate --self-test` measures the gate: ten light benchmarks.

Each repeats its unit of work as often as work.json beside this file says. A slowdown by 3% is 103
units in place of 100, so that it is real work and its size is known.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORK = json.loads(Path(__file__).with_name("work.json").read_text(encoding="utf-8"))

TEXT = "The quick brown fox 123 jumps over lazy dogs 456. " * 2
DIGITS = re.compile(r"\d+")
NUMBERS = [(i * 7919) % 101 for i in range(100)]
TABLE = {str(i): i for i in range(64)}
KEYS = list(TABLE)[:16]
DOCUMENT = json.dumps({"a": [1, 2, 3], "b": {"c": "d" * 10}, "e": [1.5, None, True]})
MATRIX = np.random.default_rng(0).random((48, 48))
VECTOR = np.random.default_rng(1).random(2000)
BYTES = TEXT.encode() * 5


def integers() -> None:
    total = 0
    for i in range(20):
        total += i * i


def lookups() -> None:
    for key in KEYS:
        TABLE[key]


def bisection() -> None:
    for i in range(0, 100, 10):
        bisect.bisect(KEYS, str(i))


UNITS: dict[str, Callable[[], object]] = {
    "integers": integers,
    "lookups": lookups,
    "bisection": bisection,
    "sort": lambda: sorted(NUMBERS),
    "regex": lambda: DIGITS.findall(TEXT),
    "json": lambda: json.loads(DOCUMENT),
    "strings": lambda: TEXT.replace("fox", "cat").upper().split(" "),
    "sha256": lambda: hashlib.sha256(BYTES).digest(),
    "matmul": lambda: MATRIX @ MATRIX,
    "vector": lambda: np.sqrt(VECTOR).sum(),
}


@pytest.mark.parametrize("name", UNITS)
def bench_light(benchmark: Any, name: str) -> None:
    unit = UNITS[name]
    units = range(WORK[name])

    def work() -> None:
        for _ in units:
            unit()

    benchmark(work)

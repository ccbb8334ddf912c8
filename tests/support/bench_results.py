"""Stored results as `mmopt bench` writes them, made by hand: whole, to be read or spoiled."""

import json
import random
from pathlib import Path
from typing import Any

MACHINE: dict[str, Any] = {
    "cpu": "Example CPU @ 2.0 GHz",
    "cores": 2,
    "quota_cores": None,
    "torch_threads": 2,
    "gpus": [],
    "system": "Linux 6.1",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "onnxruntime": "1.32.0",
}

CONDITIONS: dict[str, Any] = {
    "seconds": 12.5,
    "steal_share": 0.031,
    "throttled_periods": 0,
    "cpu_clock": None,
    "gpus": None,
    "warnings": ["the hypervisor took 3.1% of the CPU time (steal)"],
}


def save(path: Path, document: object) -> Path:
    """Write any document as JSON and return its path."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def samples(centre: float, count: int = 30, seed: int = 0) -> list[float]:
    """Seconds around `centre`, skewed as times are."""
    draw = random.Random(f"{centre} {seed}")
    return [centre * (1 + abs(draw.gauss(0, 0.03))) for _ in range(count)]


def bench_run(
    *,
    created: str = "2026-11-24T12:00:00+00:00",
    scale: float = 1.0,
    seed: int = 0,
    batches: tuple[int, ...] = (1, 8),
    machine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `mmopt bench run -o` writes of one model and one artifact."""
    costs = {"eager": 4e-3, "compile": 2.5e-3, "mmopt": 2.2e-3, "ort": 1.1e-3}
    measurements = []
    for batch in batches:
        for backend, cost in costs.items():
            centre = scale * cost * (0.6 + 0.4 * batch)
            largest = batch == max(batches)
            measurements.append(
                {
                    "source": "models/tiny-onnx" if backend == "ort" else "models/tiny",
                    "backend": backend,
                    "batch": batch,
                    "length": 16,
                    "timer": "wall",
                    "first_call_seconds": 10 * centre,
                    "calls_per_sample": 1,
                    "steady": True,
                    "memory": {"process_bytes": 400_000_000, "process_before_bytes": 300_000_000}
                    if largest
                    else None,
                    "instructions_per_call": None,
                    "samples_seconds": samples(centre, seed=seed),
                }
            )
    return {
        "schema": 1,
        "mmopt": "0.1.0",
        "created": created,
        "adapter": None,
        "seed": 0,
        "device": "cpu",
        "timer": "wall",
        "fingerprint": dict(MACHINE if machine is None else machine),
        "conditions": CONDITIONS,
        "measurements": measurements,
    }


def suite(
    *,
    created: str = "2026-11-24T12:00:00.123456+00:00",
    scale: float = 1.0,
    seed: int = 0,
    names: tuple[str, ...] = ("bench_forward[mmopt]", "bench_forward[peft]", "bench_export"),
    figures: dict[str, int] | None = None,
    ours: bool = True,
) -> dict[str, Any]:
    """pytest-benchmark's JSON, with our key unless `ours` is False."""
    document: dict[str, Any] = {
        "machine_info": {"node": "here", "cpu": {"brand_raw": "Example CPU"}},
        "commit_info": {"id": "0123456789abcdef0123", "dirty": False},
        "benchmarks": [
            {
                "group": name.partition("[")[0] if "[" in name else None,
                "name": name,
                "fullname": f"bench/bench_op.py::{name}",
                "params": {"peer": name.partition("[")[2].rstrip("]")} if "[" in name else None,
                "param": None,
                "extra_info": {},
                # pytest-benchmark writes Infinity where it divides by nothing.
                "stats": {
                    "data": samples(scale * 1e-4 * (index + 1), seed=seed),
                    "iterations": 1,
                    "ops": float("inf"),
                },
            }
            for index, name in enumerate(names)
        ],
        "datetime": created,
        "version": "5.3.1",
    }
    if ours:
        counted = {"bytes": 2048} if figures is None else figures
        document["mmopt"] = {
            "schema": 1,
            "version": "0.1.0",
            "fingerprint": dict(MACHINE),
            "conditions": None,
            "figures": {
                f"bench/bench_op.py::exact_op::{name}": {
                    "value": value,
                    "unit": "bytes",
                    "better": "lower",
                }
                for name, value in counted.items()
            },
        }
    return document


def contest(name: str, verdict: str, slowdown: float | None, **changes: Any) -> dict[str, Any]:
    """One timed benchmark of a gate's report."""
    measured = slowdown is not None
    return {
        "name": name,
        "verdict": verdict,
        "margin": 0.03,
        "slowdown": slowdown,
        "interval": [slowdown - 0.006, slowdown + 0.006] if slowdown is not None else None,
        "pairs": 12 if measured else 0,
        "base_seconds": 120e-6 if measured else None,
        "head_seconds": 120e-6 * (1 + slowdown) if slowdown is not None else None,
        "p_slower": 1.0,
        "p_faster": 1.0,
        "p_within": 1.0,
        "log_ratios": [],
        "note": None,
        **changes,
    }


def figure(name: str, verdict: str, base: int | None, head: int | None) -> dict[str, Any]:
    """One exact figure of a gate's report."""
    return {
        "name": name,
        "unit": "bytes",
        "better": "lower",
        "base": base,
        "head": head,
        "verdict": verdict,
    }


SELF_TEST: dict[str, Any] = {
    "created": "2026-11-20T08:00:00+00:00",
    "trials": 200,
    "false_alarms": 1,
    "inconclusive": 2,
    "slow_trials": 100,
    "slowdown": 0.03,
    "found": 98,
    "missed": 0,
    "seconds_per_suite": 18.0,
    "fingerprint": MACHINE,
    "peer": {
        "name": "pytest-benchmark --benchmark-compare-fail=mean:3%",
        "trials": 200,
        "false_alarms": 150,
        "slow_trials": 100,
        "found": 80,
    },
}


def gate(
    verdict: str = "REGRESSED",
    *,
    benchmarks: list[dict[str, Any]] | None = None,
    figures: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A gate's report; by default one with every verdict in it."""
    if benchmarks is None:
        benchmarks = [
            contest("bench/bench_op.py::bench_forward[mmopt]", "PASSED", 0.002),
            contest("bench/bench_op.py::bench_forward[peft]", "REGRESSED", 0.041),
            contest("bench/bench_op.py::bench_backward", "IMPROVED", -0.05),
            contest("bench/bench_op.py::bench_load", "INCONCLUSIVE", 0.016, pairs=40),
            contest("bench/bench_op.py::bench_old", "MISSING", None, note="renamed to bench_new?"),
            contest("bench/bench_op.py::bench_new", "NEW", None),
            contest("bench/bench_op.py::bench_broken", "FAILED", None, note="head: KeyError: 'x'"),
        ]
    if figures is None:
        figures = [
            figure("bench/bench_op.py::exact_export::artifact bytes", "REGRESSED", 4096, 4100),
            figure("bench/bench_op.py::exact_graph::graph breaks", "PASSED", 0, 0),
        ]
    exit_code = {"REGRESSED": 1, "INCONCLUSIVE": 3}.get(verdict, 0)
    return {
        "schema": 1,
        "kind": "gate",
        "mmopt": "0.1.0",
        "created": "2026-11-24T12:00:00+00:00",
        "seconds": 41.0,
        "base": {"ref": "HEAD~1", "commit": "a" * 40},
        "head": {"ref": "feature/x", "commit": "b" * 40},
        "margin": 0.03,
        "alpha": 0.01,
        "verdict": verdict,
        "exit_code": exit_code,
        "benchmarks": benchmarks,
        "figures": figures,
        "fingerprint": dict(MACHINE),
        "conditions": CONDITIONS,
        "notes": [],
        "self_test": None,
        **changes,
    }

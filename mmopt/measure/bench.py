"""Measure models and artifacts side by side: what `mmopt bench run` calls."""

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmopt.attach.optimize import optimize
from mmopt.measure.caches import rotate
from mmopt.measure.fingerprint import fingerprint
from mmopt.measure.gpu_timing import gpu_timer
from mmopt.measure.instructions import count_instructions, instructions_available
from mmopt.measure.memory import ort_arena, peak_memory, peak_tensor_bytes
from mmopt.measure.results import BenchReport, Measurement
from mmopt.measure.throttling import watch_conditions
from mmopt.measure.timers import TIMERS
from mmopt.measure.timing import ColdWallTimer, Timer, WallTimer, time_variants
from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.manifest import MANIFEST_NAME
from mmopt_export.progress import Progress, silent
from mmopt_export.runtime import MODEL_NAME, Runner
from mmopt_kernels.errors import InputError, MmoptError, one_line

CHECKPOINT_BACKENDS = ("eager", "compile", "mmopt")
ARTIFACT_BACKENDS = ("ort",)
BACKENDS = CHECKPOINT_BACKENDS + ARTIFACT_BACKENDS

# Sets of token ids in rotation: with as many tokens as the vocabulary has, a call finds hardly any
# of its rows of the embedding table in the caches because of the call before. More than this many
# sets take longer to make than they are worth.
MOST_INPUTS = 1024

# Instructions are counted over this many calls, and the middle count is kept.
COUNTED_CALLS = 3

TokenIds = npt.NDArray[np.int64]
Prepare = Callable[[TokenIds], Callable[[], object]]
"""Turns `[batch, length]` token ids into the call to be timed, inputs allocated."""


@dataclass(frozen=True)
class GridPoint:
    """`batch` sequences of `length` tokens each per call."""

    batch: int
    length: int


DEFAULT_GRID = tuple(itertools.starmap(GridPoint, itertools.product((1, 8), (16, 128))))


@dataclass(frozen=True)
class _Variant:
    """One backend of one source, opened.

    `vocabulary` and `longest` bound the ids and the length that it takes; `allocated` answers the
    fields of `PeakMemory` that are counted, not sampled.
    """

    source: str
    backend: str
    prepare: Prepare
    vocabulary: int
    longest: int
    allocated: Callable[[TokenIds], dict[str, int]]


def bench_run(
    models: Sequence[str],
    *,
    backends: Sequence[str] | None = None,
    grid: Sequence[GridPoint] = DEFAULT_GRID,
    rounds: int = 30,
    memory: bool = False,
    adapter: str | None = None,
    device: str = "cpu",
    timer: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> BenchReport:
    """Time every backend of every model at every grid point.

    At one grid point all variants take turns in random order (`time_variants`); the inputs are
    allocated beforehand and every variant has as many threads as torch. `compile` is
    `torch.compile` with dynamic shapes, so that one compilation serves the whole grid as it would
    serve requests; `mmopt` is the same after `mmopt.optimize`; `eager` is the model as loaded.

    Every call gets other random token ids, without padding, as requests would have; all variants
    go through the same sets of them. Token ids are small: what they move through the caches is the
    rows of the embedding table that they pick. The weights are the same for every call, and with
    the timer `wall` those that fit stay in the caches, as they do under load; `wall-cold-cache` is
    what a model costs that was idle while others ran.

    Args:
        models: checkpoints (folders or hub ids), and artifacts (folders with `mmopt.json`).
        backends: of `BACKENDS`; None takes all that fit each model: `ort` fits artifacts, the
            others fit checkpoints.
        grid: the points to measure.
        rounds: samples per variant and point. A p95 needs 130.
        memory: also run every variant in a process of its own for its peak, at the largest point.
        adapter: PEFT adapter that every checkpoint carries, not merged.
        device: `cpu`, or `cuda` for the current CUDA device, on which artifacts cannot be measured.
        timer: of `TIMERS[device]`; None takes the first.
        seed: of the token ids and of the order.

    Raises:
        InputError: an unknown or unfitting backend, device or timer, a model that takes more than
            text, a length that a model cannot take, a fault in the grid; or what loading a model
            raises.
        MmoptError: a backend could not run, there is no CUDA GPU, or the timer cannot work here
            (exit 3).
    """
    _check(models, grid, rounds, adapter)
    _check_device(models, device, timer)
    pairs = _fitting(models, backends)
    takes_samples = _timer(device, timer)
    with progress("load", len(models)) as advance:
        variants = []
        for source in models:
            chosen = [backend for named, backend in pairs if named == source]
            variants += _open(source, chosen, adapter, device)
            advance(1)
    _check_lengths(variants, grid)

    # The same ids for every variant, so the smallest vocabulary bounds them.
    vocabulary = min(variant.vocabulary for variant in variants)
    measurements = []
    with watch_conditions() as watch:
        for point in grid:
            ids = _rotation(point, vocabulary, seed)
            measurements += _measure(variants, point, ids, rounds, takes_samples, seed, progress)
    if memory:
        measurements = _with_memory(
            variants, measurements, vocabulary, adapter, device, seed, progress
        )
    return BenchReport(
        measurements=tuple(measurements),
        fingerprint=fingerprint(),
        adapter=adapter,
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        conditions=watch.conditions,
    )


def parse_grid(axes: Sequence[str]) -> tuple[GridPoint, ...]:
    """Every combination of axes such as `batch=1,8` and `length=16,128`.

    An axis that is not given keeps its values in `DEFAULT_GRID`.

    Raises:
        InputError: an axis that is malformed, unknown, or given twice.
    """
    example = "Pass --grid batch=1,8 --grid length=16,128."
    values: dict[str, list[int]] = {}
    for axis in axes:
        name, equals, numbers = axis.partition("=")
        if name not in ("batch", "length") or not equals:
            raise InputError(f"--grid {axis}: expected batch=... or length=.... {example}")
        if name in values:
            raise InputError(f"--grid {axis}: {name} was given before, expected once. {example}")
        parts = [part.strip() for part in numbers.split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise InputError(
                f"--grid {axis}: {numbers!r} is no list of whole numbers above 0. {example}"
            )
        values[name] = list(dict.fromkeys(map(int, parts)))
    batches = values.get("batch") or sorted({point.batch for point in DEFAULT_GRID})
    lengths = values.get("length") or sorted({point.length for point in DEFAULT_GRID})
    return tuple(itertools.starmap(GridPoint, itertools.product(batches, lengths)))


def _check(
    models: Sequence[str], grid: Sequence[GridPoint], rounds: int, adapter: str | None
) -> None:
    if not models:
        raise InputError("bench: no model was given. Pass a model folder, a hub id or an artifact.")
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise InputError(f"bench: {twice} was given twice, expected each model once.")
    if not grid or any(point.batch < 1 or point.length < 1 for point in grid):
        raise InputError(
            f"bench: the grid is {list(grid)}, expected one point or more, "
            "batch and length above 0."
        )
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: expected 1 or more.")
    if adapter is not None and all(map(_is_artifact, models)):
        raise InputError(
            f"--adapter {adapter}: only artifacts were given, and they carry their adapters "
            "already. Pass the checkpoint that the adapter was trained on as well."
        )


def _check_device(models: Sequence[str], device: str, timer: str | None) -> None:
    if device not in TIMERS:
        raise InputError(f"--device {device}: unknown, expected one of: {', '.join(TIMERS)}.")
    if timer is not None and timer not in TIMERS[device]:
        known = ", ".join(TIMERS[device])
        fitting = [other for other, names in TIMERS.items() if timer in names]
        there = f" It is a timer of --device {fitting[0]}." if fitting else ""
        raise InputError(f"--timer {timer}: on {device} expected one of: {known}.{there}")
    artifacts = [model for model in models if _is_artifact(model)]
    if device != "cpu" and artifacts:
        raise InputError(
            f"--device {device}: {artifacts[0]} is an artifact and runs on the provider that it "
            "was exported for, the CPU. Measure it without --device, or pass checkpoints only."
        )


def _timer(device: str, name: str | None) -> Timer:
    name = name or TIMERS[device][0]
    if device == "cuda":
        return gpu_timer(name)
    return ColdWallTimer() if name == ColdWallTimer.name else WallTimer(name)


def _is_artifact(source: str) -> bool:
    return (Path(source) / MANIFEST_NAME).is_file()


def _fitting(models: Sequence[str], backends: Sequence[str] | None) -> list[tuple[str, str]]:
    """The (source, backend) pairs to measure; every source and chosen backend occurs."""
    chosen = BACKENDS if backends is None else tuple(dict.fromkeys(backends))
    if unknown := [backend for backend in chosen if backend not in BACKENDS]:
        raise InputError(
            f"--backends {','.join(unknown)}: unknown, expected one or more of "
            f"{','.join(BACKENDS)}."
        )
    pairs = []
    for source in models:
        fitting = ARTIFACT_BACKENDS if _is_artifact(source) else CHECKPOINT_BACKENDS
        found = [(source, backend) for backend in chosen if backend in fitting]
        if not found:
            kind = "an artifact" if _is_artifact(source) else "a checkpoint"
            raise InputError(
                f"--backends {','.join(chosen) or '(none)'}: none of them runs {source}, which is "
                f"{kind}. Add one of {','.join(fitting)}, or leave the model out."
            )
        pairs += found
    idle = [backend for backend in chosen if backend not in {backend for _, backend in pairs}]
    if backends is not None and idle:
        needed = "an artifact (mmopt export)" if idle[0] in ARTIFACT_BACKENDS else "a checkpoint"
        raise InputError(
            f"--backends {','.join(idle)}: no model given fits, expected {needed}. "
            "Pass one as well, or leave the backend out."
        )
    return pairs


def _open(
    source: str, backends: Sequence[str], adapter: str | None, device: str = "cpu"
) -> list[_Variant]:
    if _is_artifact(source):
        return [_open_artifact(source)]
    variants = []
    as_loaded: Any = None  # eager and compile share it; optimize changes its own in place
    for backend in backends:
        if backend == "mmopt" or as_loaded is None:
            adapters = () if adapter is None else (adapter,)
            checkpoint = load_checkpoint(source, adapters=adapters)
            model = checkpoint.model.to(device)
            vocabulary, longest = _text_bounds(source, model, checkpoint.tokenizer)
        if backend == "mmopt":
            optimize(model)
            run = torch.compile(model, dynamic=True)
        else:
            as_loaded = as_loaded or model
            run = as_loaded if backend == "eager" else torch.compile(as_loaded, dynamic=True)
        prepare = _torch_prepare(run, device)
        allocated = partial(_torch_allocated, prepare, device)
        variants.append(_Variant(source, backend, prepare, vocabulary, longest, allocated))
    return variants


def _text_bounds(source: str, model: Any, tokenizer: Any) -> tuple[int, int]:
    """The size of the vocabulary and the longest sequence of a model that takes only text."""
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise InputError(
            f"{source} is a {type(model).__name__} that takes {model.main_input_name}"
            f"{' and a decoder input' if model.config.is_encoder_decoder else ''}; bench run feeds "
            "token ids only. Pass a text encoder or a decoder-only model."
        )
    limits = [getattr(model.config, "max_position_embeddings", None)]
    limits.append(None if tokenizer is None else tokenizer.model_max_length)
    longest = min((limit for limit in limits if limit is not None), default=sys.maxsize)
    return int(model.config.vocab_size), int(longest)


def _torch_allocated(prepare: Prepare, device: str, ids: TokenIds) -> dict[str, int]:
    return {"tensor_bytes": peak_tensor_bytes(prepare(ids))} if device == "cpu" else {}


def _torch_prepare(model: Any, device: str) -> Prepare:
    def prepare(ids: TokenIds) -> Callable[[], object]:
        inputs = torch.from_numpy(ids).to(device)
        mask = torch.ones_like(inputs)

        def call() -> object:
            with torch.inference_mode():
                return model(input_ids=inputs, attention_mask=mask)

        return call

    return prepare


def _open_artifact(source: str) -> _Variant:
    from tokenizers import Tokenizer

    runner = Runner(Path(source), threads=torch.get_num_threads())
    fill = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}
    names = [spec.name for spec in runner.manifest.inputs]
    longest = runner.manifest.max_length
    strange = sorted(set(names) - {"input_ids", *fill})
    if strange or longest is None:
        raise InputError(
            f"{source} takes {', '.join(strange) or 'no text'}; bench run feeds input_ids, "
            "attention_mask and token_type_ids only. Pass the artifact of a text encoder."
        )

    def feed(ids: TokenIds) -> dict[str, TokenIds]:
        return {name: fill[name](ids) if name in fill else ids for name in names}

    def prepare(ids: TokenIds) -> Callable[[], object]:
        feeds = feed(ids)
        return lambda: runner.run(feeds)

    def allocated(ids: TokenIds) -> dict[str, int]:
        arena = ort_arena(
            Path(source) / MODEL_NAME,
            feed(ids),
            provider=runner.provider,
            threads=torch.get_num_threads(),
        )
        if arena is None:
            return {}
        return {"ort_arena_bytes": arena.held_bytes, "ort_in_use_bytes": arena.in_use_bytes}

    # The Runner has read the same file.
    vocabulary = Tokenizer.from_file(str(Path(source) / "tokenizer.json")).get_vocab_size()
    return _Variant(source, "ort", prepare, vocabulary, longest, allocated)


def _check_lengths(variants: Sequence[_Variant], grid: Sequence[GridPoint]) -> None:
    length = max(point.length for point in grid)
    for variant in variants:
        if length > variant.longest:
            raise InputError(
                f"--grid length={length}: {variant.source} takes at most {variant.longest} tokens. "
                "Pass smaller lengths."
            )


def _rotation(point: GridPoint, vocabulary: int, seed: int) -> list[TokenIds]:
    """The sets of ids that calls take in turn."""
    sets = min(max(2, -(-vocabulary // (point.batch * point.length))), MOST_INPUTS)
    return [_token_ids(point, vocabulary, seed, turn) for turn in range(sets)]


def _token_ids(point: GridPoint, vocabulary: int, seed: int, turn: int = 0) -> TokenIds:
    draw = np.random.default_rng((seed, turn))
    return draw.integers(vocabulary, size=(point.batch, point.length), dtype=np.int64)


def _measure(
    variants: Sequence[_Variant],
    point: GridPoint,
    ids: Sequence[TokenIds],
    rounds: int,
    timer: Timer,
    seed: int,
    progress: Progress,
) -> list[Measurement]:
    def announced(what: str, total: int | None) -> Any:
        return progress(f"{what}, batch {point.batch}, {point.length} tokens", total)

    calls = {f"{v.backend} of {v.source}": rotate(v.prepare, ids) for v in variants}
    try:
        timings = time_variants(calls, rounds=rounds, timer=timer, seed=seed, progress=announced)
    except RuntimeError as error:  # torch: out of memory, or no working compiler
        raise MmoptError(
            f"bench: batch {point.batch}, {point.length} tokens could not run "
            f"({one_line(error)}). If memory ran out, pass a smaller grid; if "
            "torch.compile failed, check `mmopt doctor` or leave its --backends out."
        ) from error
    return [
        Measurement(
            source=variant.source,
            backend=variant.backend,
            batch=point.batch,
            length=point.length,
            samples=tuple(timing.samples),
            calls=timing.calls,
            first_call=timing.first_call,
            steady=timing.steady,
            timer=timing.timer,
            instructions=_instructions(call),
        )
        for variant, call, timing in zip(variants, calls.values(), timings.values(), strict=True)
    ]


def _instructions(call: Callable[[], object]) -> int | None:
    if instructions_available() is not None:
        return None
    return statistics.median_low(count_instructions(call) for _ in range(COUNTED_CALLS))


def _with_memory(
    variants: Sequence[_Variant],
    measurements: Sequence[Measurement],
    vocabulary: int,
    adapter: str | None,
    device: str,
    seed: int,
    progress: Progress,
) -> list[Measurement]:
    """Add the peak of each variant at the point with the most tokens, where it is highest."""
    largest = max((m.batch * m.length, m.batch) for m in measurements)
    opened = {(variant.source, variant.backend): variant for variant in variants}
    measured = []
    with progress("peak memory", len(opened)) as advance:
        for m in measurements:
            peak = None
            if (m.batch * m.length, m.batch) == largest:
                point = GridPoint(m.batch, m.length)
                peak = peak_memory(
                    load_and_run, m.source, m.backend, adapter, device, point, vocabulary, seed
                )
                ids = _token_ids(point, vocabulary, seed)
                peak = replace(peak, **opened[m.source, m.backend].allocated(ids))
                advance(1)
            measured.append(replace(m, memory=peak))
    return measured


def load_and_run(
    source: str,
    backend: str,
    adapter: str | None,
    device: str,
    point: GridPoint,
    vocabulary: int,
    seed: int,
) -> None:
    """Open one variant and run it twice: what `peak_memory` measures in a fresh process."""
    (variant,) = _open(source, [backend], adapter, device)
    call = variant.prepare(_token_ids(point, vocabulary, seed))
    call()
    call()

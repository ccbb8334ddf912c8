"""Brings a traced graph to its precision, and holds every stage of it against PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir

from mmopt_export.adapters.swap import add_defaults
from mmopt_export.files import sha256
from mmopt_export.graph import tensor_specs
from mmopt_export.manifest import PRECISIONS, CacheMap, Component
from mmopt_export.parity import Sample, StageParity, compare_samples, is_random
from mmopt_export.placement import Placement
from mmopt_export.progress import Progress
from mmopt_export.providers import AUTO, Target
from mmopt_export.quantization import (
    NothingToQuantizeError,
    Recipe,
    candidates,
    choose,
    quantize,
    recipe_for,
    with_options,
    without_times,
)
from mmopt_export.runtime import MODEL_NAME, open_session
from mmopt_export.scoring import measure_of, metric_of
from mmopt_export.verification import prove_component

FULL = "fp32"


@dataclass(frozen=True)
class TracedGraph:
    """A part on disk in fp32, what it is held against, and what becomes of it.

    Attributes:
        name: of the part.
        kind: its row of the capability table.
        precision: what it is to have.
        folder: where `model.onnx` goes.
        file: the graph as traced; where that is not `model.onnx` it is removed in the end.
        samples: batches with PyTorch's outputs.
        generated: what PyTorch generates, for a decoder that is held against it.
        cache: its KV cache, as traced; None without one.
        swapped: whether adapters are inputs of it.
        alone: whether it is the artifact's only graph.
    """

    name: str
    kind: str
    precision: str
    folder: Path
    file: Path
    samples: list[Sample]
    generated: list[Sample]
    cache: CacheMap | None
    swapped: bool
    alone: bool


@dataclass(frozen=True)
class FinishedGraph:
    """A graph at its precision.

    Attributes:
        component: for the manifest.
        quantization: how its weights became integers, with the times that `auto` measured, which
            the component has not, so that two exports are byte-identical. None for fp32.
        cache: with the type that its buffers have now.
        stages: parity of each of its outputs at every stage.
        placement: where its nodes ran.
    """

    component: Component
    quantization: dict[str, Any] | None
    cache: CacheMap | None
    stages: list[StageParity]
    placement: Placement


def width_of(target: Target, kind: str, wanted: str) -> str:
    """What a graph of `kind` takes in an artifact of `wanted`: that, or the next wider it can have.

    A vision tower beside a decoder of int4 has int8 on the CPU, say.
    """
    if wanted == AUTO:
        return AUTO
    return _from(target, kind, wanted)[0]


def _from(target: Target, kind: str, wanted: str) -> list[str]:
    """The precisions that `kind` can have there from `wanted` on, narrowest first."""
    available = target.capability(kind).precisions
    wider = PRECISIONS[: PRECISIONS.index(wanted) + 1]
    fitting = [one for one in reversed(wider) if one in available]
    return fitting or [target.default_precision(kind)]


def recipes_of(target: Target, kind: str, precision: str) -> list[Recipe]:
    """What may become of a graph of `kind`: the recipe of a precision, or those of `auto`."""
    if precision == AUTO:
        return candidates(target, kind)
    return [recipe_for(target, kind, precision)]


def finish(
    graph: TracedGraph,
    folder: Path,
    *,
    target: Target,
    provider: str,
    calibration: Path | None,
    max_drop: float,
    options: Mapping[str, Any],
    longest: int | None,
    progress: Progress,
) -> FinishedGraph:
    """Bring a graph to its precision as `model.onnx`, and hold every stage of it.

    Args:
        folder: the artifact's.
        provider: where it is run.
        calibration: the file whose texts, images or sounds are among the samples.
        max_drop, options: as `export` takes them.
        longest: tokens that a decoder has positions for.
    """
    stages: list[StageParity] = []
    model = graph.folder / MODEL_NAME

    def hold(stage: str, *, optimize: bool) -> None:
        with progress(f"parity of {graph.name}: {stage}", None):
            session = open_session(graph.file, provider=provider, optimize=optimize)
            stages.extend(compare_samples(stage, FULL, graph.samples, session))

    hold("fp32-unoptimized", optimize=False)
    precision, recipe = FULL, None
    if graph.file != model:
        hold(FULL, optimize=True)
        with progress(f"quantize {graph.name}", None):
            precision, recipe = _quantize(graph, model, target, provider, max_drop, options)
        graph.file.unlink()
        graph.file.with_name(f"{graph.file.name}.data").unlink(missing_ok=True)
        if graph.swapped:
            add_defaults(model)
        if recipe is not None and calibration is not None:
            recipe["calibration"] = {"sha256": sha256(calibration)}
    final = onnx_ir.load(model).graph
    component = Component(
        file=model.relative_to(folder).as_posix(),
        inputs=tensor_specs(final.inputs),
        outputs=tensor_specs(final.outputs),
        precision=precision,
        quantization=without_times(recipe) if recipe and "auto" in recipe else recipe,
    )
    cache = graph.cache
    if cache is not None:
        types = {spec.name: spec.dtype for spec in component.inputs}
        cache = replace(cache, dtype=types[cache.layers[0][0]])
    with progress(f"parity and placement of {graph.name}", None):
        held, placement = prove_component(
            graph.name,
            model,
            precision,
            [*graph.samples, *graph.generated],
            provider=provider,
            cache=cache,
            longest=longest,
        )
    return FinishedGraph(component, recipe, cache, [*stages, *held], placement)


def _quantize(
    graph: TracedGraph,
    model: Path,
    target: Target,
    provider: str,
    max_drop: float,
    options: Mapping[str, Any],
) -> tuple[str, dict[str, Any] | None]:
    """Write `model` from the fp32 graph; its precision and the record of how."""
    # Real inputs where there are any: random ids make other activations than language does.
    real = [sample for sample in graph.samples if not is_random(sample.kind)]
    samples = real or graph.samples
    feeds = [sample.feeds for sample in samples]
    if graph.precision != AUTO:
        for width in _from(target, graph.kind, graph.precision):
            recipe = with_options(recipe_for(target, graph.kind, width), options)
            try:
                record = quantize(graph.file, model, recipe, feeds)
            except NothingToQuantizeError:
                # One of several graphs may have no weight, and takes the next wider precision.
                if graph.alone:
                    raise
                continue
            return _precision(record), record if recipe.method != "none" else None

    def parity(session: Any, width: str) -> bool:
        stages = compare_samples(width, width, samples, session)
        return all(stage.holds for stage in stages if stage.gates)

    record = choose(
        graph.file,
        model,
        [with_options(one, options) for one in candidates(target, graph.kind)],
        feeds,
        None,
        max_drop,
        metric=metric_of(samples),
        parity=parity,
        provider=provider,
    )
    record["auto"]["measure"] = measure_of(samples)
    return _precision(record), record


def _precision(record: Mapping[str, Any]) -> str:
    return str(record["recipe"]["precision"])

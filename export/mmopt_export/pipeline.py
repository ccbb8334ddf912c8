"""The export: load, merge, trace, finish each graph, prove the whole, and move into place."""

import gc
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from rich.console import Group, RenderableType

from mmopt_export.adapters.files import write_adapter
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.adapters.swap import Swap, SwapLinear, swappable
from mmopt_export.card import write_card
from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.files import require_artifact, require_output, require_space, staged_folder
from mmopt_export.finishing import FULL, TracedGraph, finish, recipes_of, width_of
from mmopt_export.graph import trace
from mmopt_export.manifest import (
    ADAPTER_SUFFIX,
    PRECISIONS,
    FileRecord,
    Manifest,
    Source,
    record_files,
)
from mmopt_export.parity import StageParity, parity_table, stored_samples, write_parity
from mmopt_export.parts import Proof
from mmopt_export.placement import CPU, Placement
from mmopt_export.progress import Progress, silent
from mmopt_export.providers import AUTO, Target, get_target
from mmopt_export.quantization import FLOATS, require_heeded, rewrite_for_cpu
from mmopt_export.replacing import failed_place, is_kept, require_failed
from mmopt_export.runtime import MODEL_NAME, has_provider, runtime_version
from mmopt_export.signing import read_private_key, sign
from mmopt_export.tasks import make_plan
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError

MINIMUM_ONNXRUNTIME = "1.30"
MAX_DROP = 0.05
"""What `auto` may lose where nobody says: outputs that are off by a twentieth, which is a cosine of
about 0.999, or a twentieth of the accuracy where there are labels."""

_TOOLS = ("torch", "transformers", "peft", "onnx", "onnxscript", "mmopt")


@dataclass(frozen=True)
class ExportReport:
    """What `export` did and whether parity and placement held.

    Attributes:
        path: the artifact.
        kept: the artifact that stands where this one was to go, and stays since this one failed.
        status: as in the manifest.
        size: bytes of all files.
        stages: parity of every graph at every stage.
        placement: of each graph, where its nodes ran.
        quantization: the recipe of each graph, None for fp32; of `auto` every trial and its time.
        warnings: what to know of the checkpoint and its adapters.
    """

    path: Path
    kept: Path | None
    task: str
    precision: str
    status: str
    size: int
    files: dict[str, FileRecord]
    stages: tuple[StageParity, ...]
    placement: tuple[Placement, ...]
    quantization: dict[str, dict[str, Any] | None]
    warnings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 when all that could be checked here held, or its drift was accepted; 1 otherwise."""
        return 1 if self.status == "failed" else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "kept": str(self.kept) if self.kept is not None else None,
            "placement": [placement.to_dict() for placement in self.placement],
        }

    def render(self) -> RenderableType:
        """A parity table, the placement, what `auto` chose, and one line on the artifact."""
        return Group(
            *(f"warning: {warning}" for warning in self.warnings),
            parity_table(self.stages),
            *(line for placement in self.placement for line in placement.lines()),
            *_auto_lines(self.quantization),
            f"{self.path}: {self.task}, {self.precision}, {self.size / 1e6:.1f} MB, {self.status}",
            *([] if self.kept is None else [f"{self.kept} is as it was, since the new one failed"]),
        )


def _auto_lines(quantization: Mapping[str, dict[str, Any] | None]) -> Iterator[str]:
    """What `auto` chose for each graph, as it measured it."""
    for name, record in quantization.items():
        if record is None or "auto" not in record:
            continue
        chosen = next(trial for trial in record["auto"]["trials"] if trial["chosen"])
        yield (
            f"auto of {name}: {chosen['recipe']['precision']}, {chosen['bytes'] / 1e6:.1f} MB, "
            f"{chosen['milliseconds']:.2f} ms a batch, loses {chosen['metric_drop']:.3g} "
            f"({record['auto']['measure']})"
        )


def export(
    model: str,
    output: Path,
    *,
    adapters: Sequence[str | AdapterSpec] = (),
    swap: bool = False,
    target: str = "cpu",
    precision: str | None = None,
    task: str | None = None,
    calibration: Path | None = None,
    max_drop: float | None = None,
    options: Mapping[str, Any] | None = None,
    allow_drift: bool = False,
    unproven: bool = False,
    sign_key: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Turn a model and its adapters into a verified ONNX artifact in `output`.

    Adapters are merged in fp32. Outputs of the merged PyTorch model are then compared with ONNX
    Runtime without optimizations, with them, and at the target's precision. The folder appears
    only when complete; when parity or placement do not hold it appears marked `failed`, and is
    not served.

    Args:
        model: a local folder or a hub id.
        output: a new or an empty folder, apart from what is read.
        adapters: PEFT adapter folders or hub ids, each with a weight where it is not 1.
        swap: keep LoRA adapters beside the graph, as inputs that a run chooses, instead of merging.
        target: a name of `mmopt_export.providers.TARGETS`.
        precision: one that the target has for this kind of model; None takes the target's default.
            `auto` takes the narrowest that meets `max_drop`.
        task: a name of `mmopt_export.tasks.TASKS`; None takes the architecture's.
        calibration: JSON Lines of real inputs (`text`, `image` or `audio`), on which parity is
            measured as well, and accuracy where they have a `label`; weights of few bits are gated
            on them, and fitted to them.
        max_drop: for `auto`, what outputs may be off, relative to them, or what accuracy may drop
            where there are labels.
        options: changes to how weights become integers, by field of `quantization.Recipe`:
            `algorithm` (`rtn`, `hqq`, `gptq`), `block`, `symmetric`, `accuracy_level`, `embeddings`
            (False keeps their tables floats) and `calibration` of a CNN.
        allow_drift: mark an artifact whose parity does not hold `accepted`, to be served all the
            same.
        unproven: where the target's provider is missing, prove on the CPU what can be, and mark the
            artifact `unproven`: `mmopt verify --record` on its target then makes it `verified`. Not
            in bf16, which the CPU cannot run.
        sign_key: a private Ed25519 key in PEM, to sign the manifest with.
        force: replace an artifact that is there. One that failed replaces only another that failed,
            and goes to `OUTPUT.failed` where it must not.

    Raises:
        InputError: bad input, before anything is written (exit 2).
        MmoptError: the trace failed, the provider is missing, or the disk is full (exit 3).
    """
    specs = [AdapterSpec.parse(one) if isinstance(one, str) else one for one in adapters]
    destination = get_target(target)
    if precision is not None:
        destination.require_precision(None, precision)
    if max_drop is not None and precision != AUTO:
        raise InputError(
            f"--max-drop is what --precision {AUTO} may lose, and --precision is "
            f"{precision or 'left out'}. "
            f"Pass --precision {AUTO}, or leave --max-drop out."
        )
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise InputError(f"--max-drop {max_drop} is no budget, expected zero or more.")
    options = options or {}
    if options and (precision is None or precision in FLOATS):
        raise InputError(
            f"--set {next(iter(options))} changes how weights become integers, and --precision is "
            f"{precision or 'left out'}. Pass --precision int8, int4 or {AUTO}, or leave it out."
        )
    if swap and not specs:
        raise InputError("--adapters swap needs an adapter, expected --adapter PATH.")
    sources = [Path(model), *(Path(spec.path) for spec in specs)]
    require_output(output, sources=sources, replace=force)
    if is_kept(output):
        require_output(failed_place(output), sources=sources, replace=True, ours=require_failed)
    key = read_private_key(sign_key) if sign_key is not None else None
    if calibration is not None and not calibration.is_file():
        raise InputError(f"{calibration} does not exist, expected a JSON Lines file.")
    provable = has_provider(destination.provider)
    if not provable and not unproven:
        raise MmoptError(
            f"ONNX Runtime here has no {destination.provider}, on which --target {target} is "
            "proven. Export on a machine that has it (`mmopt doctor` says what this one has), or "
            "pass --unproven for an artifact that `mmopt verify --record` proves there."
        )
    if not provable and precision == "bf16":
        raise InputError(
            f"--precision bf16 needs {destination.provider}, which ONNX Runtime here has not: its "
            "CPU provider, on which --unproven runs what it can, has no bf16. Export on a machine "
            "that has it, or pass --precision fp16."
        )
    provider = destination.provider if provable else CPU
    path = output

    def ours(place: Path) -> None:
        (require_artifact if place == output else require_failed)(place)

    with staged_folder(output, replace=force, ours=ours, place=lambda _output: path) as folder:
        traced = _trace(
            model,
            folder,
            specs=specs,
            swap=swap,
            target=destination,
            precision=precision,
            options=options,
            task=task,
            calibration=calibration,
            progress=progress,
        )
        # Models and what traced them refer to themselves.
        gc.collect()
        with _naming(traced.architecture):
            finished = {
                graph.name: finish(
                    graph,
                    folder,
                    target=destination,
                    provider=provider,
                    calibration=calibration,
                    max_drop=MAX_DROP if max_drop is None else max_drop,
                    options=options,
                    longest=traced.max_length,
                    progress=progress,
                )
                for graph in traced.graphs
            }
        components = {name: one.component for name, one in finished.items()}
        stages = [stage for one in finished.values() for stage in one.stages]
        placements = tuple(one.placement for one in finished.values())
        reached = max((one.precision for one in components.values()), key=PRECISIONS.index)
        if traced.proof is not None:
            with progress("parity: as a whole", None):
                stages += traced.proof(folder, reached, provider)
        samples = [[*stored_samples(one.samples), *one.generated] for one in traced.graphs]
        write_parity(folder, stages, [sample for of_graph in samples for sample in of_graph])
        holds = all(stage.holds for stage in stages if stage.gates)
        placed = all(placement.holds for placement in placements) or not provable
        status = _status(holds, placed, provable=provable, allow_drift=allow_drift)
        kept = status == "failed" and is_kept(output)
        path = failed_place(output) if kept else output
        manifest = Manifest(
            name=path.name,
            task=traced.task,
            architecture=traced.architecture,
            target=target,
            provider=destination.provider,
            precision=reached,
            status=status,
            opset=traced.opset,
            minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
            components=components,
            caches={name: one.cache for name, one in finished.items() if one.cache is not None},
            adapters=traced.adapters,
            labels=traced.labels,
            max_length=traced.max_length,
            preprocessing=traced.preprocessing,
            source=traced.source,
            tools={
                **{tool: importlib.metadata.version(tool) for tool in _TOOLS},
                # Two distributions, onnxruntime and onnxruntime-gpu, give this one package.
                "onnxruntime": runtime_version(),
            },
            files={},
        )
        write_card(folder, manifest, stages)
        manifest = manifest.with_files(record_files(folder))
        manifest.write(folder)
        if key is not None:
            sign(folder, key)
    return ExportReport(
        path=path,
        kept=output if kept else None,
        task=manifest.task,
        precision=reached,
        status=manifest.status,
        size=sum(record.size for record in manifest.files.values()),
        files=manifest.files,
        stages=tuple(stages),
        placement=placements,
        quantization={name: one.quantization for name, one in finished.items()},
        warnings=traced.warnings,
    )


@contextmanager
def _naming(architecture: str) -> Iterator[None]:
    """Say which model it was whose graphs could not be run."""
    try:
        yield
    except (InputError, CheckFailedError):
        raise
    except MmoptError as error:
        raise MmoptError(f"{architecture} could not be exported: {error}") from error


def _status(holds: bool, placed: bool, *, provable: bool, allow_drift: bool) -> str:
    """What the artifact may be called; drift may be accepted, a node out of place may not."""
    if not placed or not (holds or allow_drift):
        return "failed"
    if not provable:
        return "unproven"
    return "verified" if holds else "accepted"


@dataclass(frozen=True)
class _Traced:
    """What is left of a model when its graphs are on disk: nothing here holds its weights."""

    task: str
    architecture: str
    graphs: list[TracedGraph]
    opset: dict[str, int]
    adapters: dict[str, dict[str, str]]
    labels: tuple[str, ...]
    max_length: int | None
    preprocessing: dict[str, Any]
    source: Source
    warnings: tuple[str, ...]
    proof: Proof | None


def _trace(
    model: str,
    folder: Path,
    *,
    specs: Sequence[AdapterSpec],
    swap: bool,
    target: Target,
    precision: str | None,
    options: Mapping[str, Any],
    task: str | None,
    calibration: Path | None,
    progress: Progress,
) -> _Traced:
    """Load, merge, trace every part into `folder`, and run the samples through PyTorch.

    When it returns the model's memory is free again for the sessions that it is held against.
    """
    with progress("load model", None):
        checkpoint = load_checkpoint(model, adapters=specs, adapt="swap" if swap else "merge")
    plan = make_plan(checkpoint, task=task, calibration=calibration)
    wanted = precision or target.default_precision(plan.kind)
    target.require_precision(plan.kind, wanted)
    kinds = {part.name: part.kind or plan.kind for part in plan.parts}
    widths = {name: width_of(target, kind, wanted) for name, kind in kinds.items()}
    require_heeded(
        options, [one for name in kinds for one in recipes_of(target, kinds[name], widths[name])]
    )
    swap_layers = checkpoint.swap.layers(plan.parts) if checkpoint.swap is not None else {}
    weight_bytes = sum(p.numel() * p.element_size() for p in checkpoint.model.parameters())
    # The fp32 graph, the copy that quantization prepares from it, and the quantized graph.
    require_space(folder, 3 * weight_bytes + (16 << 20))
    plan.write(folder)
    if plan.write_for is not None:
        plan.write_for(folder, target.provider)
    alone = len(plan.parts) == 1
    graphs = []
    opset: dict[str, int] = {}
    for part in plan.parts:
        label = "" if alone else f" {part.name}"
        swapped = bool(swap_layers.get(part.name))
        if checkpoint.swap is not None:
            part = swappable(part, checkpoint.swap, swap_layers[part.name])
        with progress(f"trace{label}", None):
            graph = trace(part, target=target.name)
            if target.name == "cpu" and part.tracer is None:
                rewrite_for_cpu(graph)
        place = folder if alone else folder / part.name
        place.mkdir(exist_ok=True)
        width = widths[part.name]
        # What is not fp32 in the end is made from the fp32 graph, which is removed then.
        file = place / (MODEL_NAME if width == FULL and not swapped else f"{FULL}.onnx")
        onnx_ir.save(graph, file, external_data=f"{file.name}.data")
        opset |= {domain or "ai.onnx": version for domain, version in graph.opset_imports.items()}
        with progress(f"PyTorch's outputs{label}", None):
            samples = list(part.sampled(target.name))
            generated = [part.generated()] if part.generated is not None else []
        graphs.append(
            TracedGraph(
                name=part.name,
                kind=kinds[part.name],
                precision=width,
                folder=place,
                file=file,
                samples=samples,
                generated=generated,
                cache=plan.caches.get(part.name),
                swapped=swapped,
                alone=alone,
            )
        )
    proof = plan.proof() if plan.proof is not None else None
    adapter_files = {}
    if checkpoint.swap is not None:
        adapter_files = _write_adapters(folder, checkpoint.swap, swap_layers)
    _let_go(checkpoint.model)
    return _Traced(
        task=plan.task,
        architecture=type(checkpoint.model).__name__,
        graphs=graphs,
        opset=opset,
        adapters=adapter_files,
        labels=plan.labels,
        max_length=plan.max_length,
        preprocessing=dict(plan.preprocessing),
        source=Source(
            model, checkpoint.base_sha256, checkpoint.records, quantized=checkpoint.quantized
        ),
        warnings=checkpoint.warnings,
        proof=proof,
    )


def _let_go(model: torch.nn.Module) -> None:
    """Free the weights. Rewriters of ONNX graphs keep the last graph that they saw, and what was in
    it, so that letting go of the model alone frees nothing."""
    for value in (*model.parameters(), *model.buffers()):
        value.data = torch.empty(0, dtype=value.dtype)


def _write_adapters(
    folder: Path, swap: Swap, layers: Mapping[str, Sequence[SwapLinear]]
) -> dict[str, dict[str, str]]:
    """Write `.onnx_adapter` files; by adapter and graph, the file.

    Args:
        layers: by graph those that take adapters.
    """
    written: dict[str, dict[str, str]] = {}
    for adapter in swap.adapters:
        for graph in filter(layers.get, layers):
            name = f"{adapter.name}{ADAPTER_SUFFIX}"
            file = Path("adapters", *(() if len(layers) == 1 else (graph,)), name)
            write_adapter(folder / file, swap.arrays(layers[graph], adapter))
            written.setdefault(adapter.name, {})[graph] = file.as_posix()
    return written

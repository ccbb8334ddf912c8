"""Follows a recipe: one fp32 ONNX file in, one quantized file out."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from mmopt_export.quantization.blockwise import (
    blockwise_candidates,
    quantize_blocks,
    quantize_tables,
)
from mmopt_export.quantization.dynamic import (
    dynamic_candidates,
    quantize_embeddings,
    quantize_matmuls,
)
from mmopt_export.quantization.half import to_half
from mmopt_export.quantization.measuring import (
    hessians,
    input_stats,
    require_samples,
    sensitivities,
)
from mmopt_export.quantization.outliers import relieve
from mmopt_export.quantization.recipe import NothingToQuantizeError, Recipe
from mmopt_export.quantization.rewrites import rewrite_for_cpu, split_lone_gemms
from mmopt_export.quantization.static import quantize_static, quiet
from mmopt_export.quantization.storage import Group, load, save
from mmopt_export.quantization.weights import Weight, name_nodes
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError


def quantize(
    source: Path, output: Path, recipe: Recipe, feeds: Sequence[Tensors] = ()
) -> dict[str, Any]:
    """Write `source` as `recipe` says. The same arguments give the same bytes.

    One weight is in memory at a time, whatever the model's size, except under `static`, which
    takes 2 GB at most, and `gptq`, which keeps a matrix for each input of a matmul.

    Args:
        source: an fp32 graph; external data lies beside it.
        output: another file, written with its data as `<name>.data` beside it.
        recipe: what to do.
        feeds: batches like those that the graph will meet; see `Recipe.needs_samples`.

    Returns:
        The record for the manifest, which JSON can hold. The precision of its recipe is what the
        graph has in the end: wider where no weight took the width that the recipe is named for.

    Raises:
        InputError: no samples where they are needed, an unknown node in the recipe, `source` is
            no ONNX file or is `output`.
        NothingToQuantizeError: the graph has no weight that the recipe is for.
        MmoptError: ONNX Runtime cannot run the graph.
    """
    if source.resolve() == output.resolve():
        raise InputError(f"{output} is the source itself, expected another file.")
    if recipe.needs_samples:
        require_samples(feeds, f"{recipe.precision} ({recipe.method})")
    record: dict[str, Any] = {"recipe": recipe.record()}
    try:
        if recipe.method == "static":
            _require_nodes(recipe, [str(node.name) for node in load(source).graph])
            record |= quantize_static(source, output, recipe, feeds)
        else:
            model = load(source)
            name_nodes(model.graph)
            with quiet():
                record |= _METHODS[recipe.method](model, source.parent, recipe, feeds)
                save(model, output)
            if recipe.method in ("dynamic", "weights"):
                record["recipe"]["precision"] = _reached(recipe, record)
    finally:
        Group.forget()
    record["samples"] = _digest(feeds) if recipe.needs_samples else None
    return record


def layer_sensitivities(
    source: Path, folder: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, float]:
    """How much `recipe` changes the output of each matmul that it quantizes, by node name.

    Args:
        source: the fp32 graph.
        folder: where a temporary file of the size of both graphs together may be written.
        recipe: of method `dynamic` or `weights`, all of whose matmuls are quantized.
        feeds: batches; at most eight of them are used.

    Raises:
        InputError: no samples.
        NothingToQuantizeError: the graph has no weight that the recipe is for.
        MmoptError: ONNX Runtime cannot run the graph.
    """
    require_samples(feeds, "the sensitivity of layers")
    model = load(source)
    name_nodes(model.graph)
    try:
        with quiet():
            if recipe.method == "dynamic":
                weights = _integer_candidates(model)
                _require_something(recipe, weights)
                stats = input_stats(model, source.parent, weights, feeds)
                weights, rest, _ = relieve(model.graph, weights, stats)

                def twin(weights: Sequence[Weight]) -> None:
                    # A twin's result has no bias behind it and is only compared.
                    quantize_matmuls(model.graph, weights, rest)

                return sensitivities(model, folder, weights, twin, feeds)
            weights = blockwise_candidates(model.graph)
            _require_something(recipe, weights)
            matrices = (
                hessians(model, source.parent, weights, feeds)
                if recipe.algorithm == "gptq"
                else None
            )
            return sensitivities(
                model,
                folder,
                weights,
                lambda weights: quantize_blocks(model.graph, weights, recipe, matrices),
                feeds,
            )
    finally:
        Group.forget()


def _none(
    model: onnx_ir.Model, folder: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, Any]:
    return {}


def _half(
    model: onnx_ir.Model, folder: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, Any]:
    return to_half(model, recipe.floats)


def _dynamic(
    model: onnx_ir.Model, folder: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, Any]:
    weights = _integer_candidates(model)
    _require_nodes(recipe, [weight.name for weight in weights])
    chosen = [weight for weight in weights if weight.name not in recipe.keep]
    stats = input_stats(model, folder, chosen, feeds) if chosen else {}
    chosen, rest, outliers = relieve(model.graph, chosen, stats)
    quantize_matmuls(model.graph, chosen, rest)
    tables = quantize_embeddings(model.graph) if recipe.embeddings else []
    _require_something(recipe, weights, tables)
    return {
        "weights": "int8 symmetric per output channel",
        "activations": "uint8 per tensor at run time",
        "embeddings": {"tables": tables, "type": "int8 per tensor"},
        "matmuls": len(chosen),
        "outliers": outliers,
    }


def _weights(
    model: onnx_ir.Model, folder: Path, recipe: Recipe, feeds: Sequence[Tensors]
) -> dict[str, Any]:
    weights = blockwise_candidates(model.graph)
    _require_nodes(recipe, [weight.name for weight in weights])
    chosen = [weight for weight in weights if weight.name not in recipe.keep]
    matrices = hessians(model, folder, chosen, feeds) if recipe.algorithm == "gptq" else None
    bits = quantize_blocks(model.graph, chosen, recipe, matrices)
    tables = quantize_tables(model.graph, recipe.block) if recipe.embeddings else []
    _require_something(recipe, weights, tables)
    record: dict[str, Any] = {
        "weights": f"{'symmetric' if recipe.symmetric else 'asymmetric'} blocks of {recipe.block}",
        "embeddings": {"tables": tables, "type": f"int8 symmetric blocks of {recipe.block}"},
        "matmuls": len(bits),
        "bits": {str(width): sum(b == width for b in bits.values()) for width in (4, 8)},
    }
    if recipe.floats != "fp32":
        record |= to_half(model, recipe.floats)
    return record


_METHODS: dict[str, Callable[[onnx_ir.Model, Path, Recipe, Sequence[Tensors]], dict[str, Any]]] = {
    "none": _none,
    "half": _half,
    "dynamic": _dynamic,
    "weights": _weights,
}


def _reached(recipe: Recipe, record: dict[str, Any]) -> str:
    """The narrowest type that a weight took."""
    if record.get("bits", {}).get("4"):
        return "int4"
    return "int8" if record["matmuls"] or record["embeddings"]["tables"] else recipe.floats


def _integer_candidates(model: onnx_ir.Model) -> list[Weight]:
    rewrite_for_cpu(model)
    split_lone_gemms(model)
    return dynamic_candidates(model.graph)


def _require_something(
    recipe: Recipe, weights: Sequence[Weight], tables: Sequence[str] = ()
) -> None:
    if not weights and not tables:
        raise NothingToQuantizeError(
            f"{recipe.precision} quantization changed no matmul: the graph has none with a "
            "constant. Export it with --precision fp32."
        )


def _require_nodes(recipe: Recipe, names: Sequence[str]) -> None:
    unknown = sorted({*recipe.keep, *recipe.wide} - set(names))
    if unknown:
        raise InputError(
            f"the recipe names {', '.join(unknown)}, which the graph has not, expected some of: "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        )


def _digest(feeds: Sequence[Tensors]) -> dict[str, Any]:
    """What the samples were: how many batches, and a hash of all of their bytes."""
    digest = hashlib.sha256()
    for batch in feeds:
        for name in sorted(batch):
            array = batch[name]
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return {"batches": len(feeds), "sha256": digest.hexdigest()}

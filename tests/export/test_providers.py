"""The table of what each target can run, and the recipes it leads to."""

from __future__ import annotations

import dataclasses

import pytest

from mmopt_export.providers import AUTO, KINDS, TARGETS, get_target
from mmopt_export.quantization import Recipe, candidates, recipe_for, with_wider
from mmopt_kernels.errors import InputError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
PAIRS = [(target, kind) for target in TARGETS.values() for kind in KINDS]
pairs = pytest.mark.parametrize(
    ("target", "kind"), PAIRS, ids=[f"{target.name}-{kind}" for target, kind in PAIRS]
)


@pairs
def test_every_precision_runs_or_is_refused_with_a_reason(target: object, kind: str) -> None:
    capability = target.capability(kind)  # type: ignore[attr-defined]
    assert set(capability.precisions) | set(capability.refused) == set(PRECISIONS)
    assert not set(capability.precisions) & set(capability.refused)
    assert capability.default in capability.precisions
    assert all(len(reason) > 20 for reason in capability.refused.values())


@pairs
def test_every_precision_that_runs_has_a_recipe_of_its_name(target, kind) -> None:  # type: ignore[no-untyped-def]
    for precision in target.capability(kind).precisions:
        assert recipe_for(target, kind, precision).precision == precision
    for precision in target.capability(kind).refused:
        with pytest.raises(InputError, match="is not available"):
            recipe_for(target, kind, precision)


@pairs
def test_auto_runs_everywhere_and_ends_with_what_loses_least(target, kind) -> None:  # type: ignore[no-untyped-def]
    target.require_precision(kind, AUTO)
    order = candidates(target, kind)
    assert order[-1].method in ("none", "half")
    assert all(recipe.method != "none" for recipe in order[:-1])
    names = [recipe.precision for recipe in order]
    assert names == sorted(names, key=["int4", "int8", "fp16", "bf16", "fp32"].index)


@pytest.mark.parametrize(
    ("target", "kind", "precision", "reason"),
    [
        ("cuda", "encoder", "int8", "DynamicQuantizeLinear and MatMulInteger fall from CUDA"),
        ("cuda", "convolutional", "int8", "QLinearConv has no CUDA kernel"),
        ("cuda", "decoder", "fp32", "GroupQueryAttention.* takes fp16 and bf16 only on CUDA"),
        ("cpu", "decoder", "fp16", "through casts to fp32"),
        ("cpu", "encoder", "int4", "int8 is faster here"),
        ("portable", "decoder", "int4", r"MatMulNBits belongs to com\.microsoft"),
        ("portable", "encoder", "bf16", "no bf16"),
        ("cpu", "encoder", "int3", "no such precision"),
    ],
)
def test_a_refusal_says_why_and_what_to_take(
    target: str, kind: str, precision: str, reason: str
) -> None:
    message = (
        f"--precision {precision} is not available for a model of kind {kind} on {target} "
        rf"\(.*{reason}.*\), expected one of: fp32|bf16.*auto\."
    )
    with pytest.raises(InputError, match=message):
        get_target(target).require_precision(kind, precision)


def test_before_the_kind_is_known_only_what_no_kind_has_is_refused() -> None:
    get_target("cpu").require_precision(None, "int4")
    get_target("cuda").require_precision(None, "int8")
    with pytest.raises(InputError, match="--precision fp16 is not available for target cpu"):
        get_target("cpu").require_precision(None, "fp16")
    with pytest.raises(InputError, match="no such precision"):
        get_target("cuda").require_precision(None, "int3")


def test_an_unknown_target_and_an_unknown_kind_are_named() -> None:
    with pytest.raises(InputError, match="--target tpu is not known, expected one of: cpu, cuda"):
        get_target("tpu")
    with pytest.raises(ValueError, match="'picture', expected one of: encoder"):
        get_target("cpu").capability("picture")


def test_cuda_decoders_take_symmetric_blocks_of_32_in_fp16_and_cpu_ones_multiply_in_int8() -> None:
    cuda = recipe_for(get_target("cuda"), "decoder", "int4")
    assert (cuda.bits, cuda.block, cuda.symmetric, cuda.floats) == (4, 32, True, "fp16")
    cpu = recipe_for(get_target("cpu"), "decoder", "int4")
    assert (cpu.bits, cpu.block, cpu.accuracy_level, cpu.floats) == (4, 32, 4, "fp32")


def test_more_room_is_8_bits_for_4_and_floats_for_8() -> None:
    narrow = recipe_for(get_target("cpu"), "decoder", "int4")
    assert with_wider(narrow, ("b", "a")).wide == ("a", "b")
    assert with_wider(dataclasses.replace(narrow, bits=8), ("b",)).keep == ("b",)
    assert with_wider(Recipe("int8", "dynamic", keep=("a",)), ("b",)).keep == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "static", "floats": "fp16"}, "static int8 has fp32 around it, got fp16"),
        ({"method": "half"}, "half precision is fp16 or bf16, got fp32"),
        ({"method": "weights", "algorithm": "hqq"}, "symmetric=False only"),
        ({"method": "weights", "bits": 3}, "bits 3, expected one of: 4, 8"),
        ({"method": "weights", "block": 33}, "block 33, expected one of: 16, 32"),
        ({"method": "magic"}, "method 'magic', expected one of: none, half"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Recipe("int8", **fields)  # type: ignore[arg-type]

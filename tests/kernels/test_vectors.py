"""Rows whose length 16 does not divide are moved in whole vectors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the module compiles a Triton function")

from mmopt_kernels._vectors import vector_of
from mmopt_kernels.inspection import TARGETS, inspect
from mmopt_kernels.inspection.cases import case_named

# What is one element and no tile: the sink of a head, and the logit of a row's label.
ALONE = {
    ("attention/bf16-d36-everything", "attention_forward"),
    ("cross_entropy/bf16-v50257-everything", "cross_entropy"),
}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((72,), 8), ((100,), 4), ((50_258, 4096), 2), ((101, 4096), 1), ((0, 12), 4), ((8,), 8)],
)
def test_the_greatest_power_of_two_below_16_is_found(
    numbers: tuple[int, ...], expected: int
) -> None:
    assert vector_of(*numbers) == expected


@pytest.mark.parametrize("numbers", [(), (0,), (16,), (48, 4096), (2**40, 0)])
def test_what_triton_sees_by_itself_is_left_to_it(numbers: tuple[int, ...]) -> None:
    assert vector_of(*numbers) == 1


@pytest.mark.parametrize(
    "name",
    [
        "attention/bf16-d100-causal",
        "attention/bf16-d36-everything",
        "decode/bf16-d100-g1-causal",
        "lora_linear/bf16-m4096-r8",
        "lora_backward/bf16-m4096-r8-plain",
        "cross_entropy/bf16-v50257-everything",
    ],
)
def test_no_tile_of_16_bits_moves_element_by_element(name: str, tmp_path: Path) -> None:
    """In what Triton makes of it for sm_90: 4 bytes or more for each address."""
    found = inspect([TARGETS["sm_90"]], cases=[case_named(name)], jobs=1, emit=tmp_path)
    assert not found.failures
    written = sorted((tmp_path / "sm_90").rglob("*.ptx"))
    assert len(written) == len(found.kernels)
    for path in written:
        moved = re.findall(r"\b(?:ld|st)\.global[.\w:]*\.b16\b", path.read_text())
        assert len(moved) == ((name, path.stem) in ALONE), path.stem

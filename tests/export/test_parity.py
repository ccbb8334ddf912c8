"""The parity gate: NaN never passes, thresholds gate, unmeasured figures are None."""

import numpy as np
import pytest

from mmopt_export.parity import compare, make_grid

GOOD = np.array([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0]], dtype=np.float32)


def test_equal_logits_hold() -> None:
    stage = compare("fp32", "fp32", "grid", GOOD, GOOD.copy(), gates=True)
    assert stage.holds
    assert stage.max_abs == 0
    assert stage.cosine == pytest.approx(1)
    assert stage.argmax_agreement == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["expected", "actual"])
def test_a_value_that_is_not_finite_never_holds(value: float, side: str) -> None:
    broken = GOOD.copy()
    broken[0, 1] = value
    pair = (broken, GOOD) if side == "expected" else (GOOD, broken)
    stage = compare("fp32", "fp32", "grid", *pair, gates=True)
    assert not stage.holds
    assert not stage.finite
    assert stage.max_abs is None
    assert stage.cosine is None


def test_fp32_fails_beyond_its_absolute_threshold_even_at_a_good_cosine() -> None:
    stage = compare("fp32", "fp32", "grid", GOOD, GOOD + np.float32(2e-4), gates=True)
    assert stage.cosine is not None
    assert stage.cosine > 0.9999
    assert not stage.holds


def test_int8_fails_below_its_cosine() -> None:
    turned = GOOD[:, ::-1].copy()
    assert not compare("int8", "int8", "text", GOOD, turned, gates=True).holds
    assert compare("int8", "int8", "text", GOOD, GOOD * np.float32(1.01), gates=True).holds


def test_an_all_zero_output_does_not_pass_for_a_direction() -> None:
    stage = compare("int8", "int8", "text", GOOD, np.zeros_like(GOOD), gates=True)
    assert stage.cosine == 0
    assert not stage.holds


def test_another_shape_never_holds() -> None:
    assert not compare("fp32", "fp32", "grid", GOOD, GOOD[:1], gates=True).holds


def test_the_grid_covers_one_token_and_padding_and_repeats() -> None:
    inputs = ["input_ids", "attention_mask"]
    grid = make_grid(inputs, vocabulary=50, pad_id=3, longest=20)
    again = make_grid(inputs, vocabulary=50, pad_id=3, longest=20)
    assert (1, 1) in [feeds["input_ids"].shape for feeds in grid]
    assert max(feeds["input_ids"].shape[1] for feeds in grid) == 20
    padded = [feeds for feeds in grid if not feeds["attention_mask"].all()]
    assert padded
    for feeds in padded:
        assert (feeds["input_ids"][feeds["attention_mask"] == 0] == 3).all()
    for one, two in zip(grid, again, strict=True):
        np.testing.assert_array_equal(one["input_ids"], two["input_ids"])

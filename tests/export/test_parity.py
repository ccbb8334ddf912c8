"""The parity gate: NaN never passes, thresholds gate, unmeasured figures are None."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmopt_export.parity import (
    Sample,
    StageParity,
    compare_samples,
    compare_values,
    condensed,
    has_grown,
    is_near_tie,
    read_samples,
    stored_samples,
    tokens_stage,
    write_parity,
)
from mmopt_kernels.errors import InputError

GOOD = np.array([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0]], dtype=np.float32)


class Session:
    """Answers with fixed outputs in the place of ONNX Runtime."""

    def __init__(self, **outputs: Any) -> None:
        self._outputs = outputs

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, names: list[str], _feeds: object) -> list[np.ndarray]:
        return [self._outputs[name] for name in names]


def compare(
    precision: str, expected: np.ndarray, actual: np.ndarray, *, kind: str = "text", **fields: Any
) -> StageParity:
    sample = Sample("model", kind, {}, {"logits": expected}, scores=("logits",), **fields)
    (stage,) = compare_samples(precision, precision, [sample], Session(logits=actual))
    return stage


def test_equal_logits_hold() -> None:
    stage = compare("fp32", GOOD, GOOD.copy())
    assert stage.holds
    assert stage.rows == 2
    assert stage.max_abs == 0
    assert stage.cosine == pytest.approx(1)
    assert stage.argmax_agreement == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["expected", "actual"])
def test_a_value_that_is_not_finite_never_holds(value: float, side: str) -> None:
    broken = GOOD.copy()
    broken[0, 1] = value
    pair = (broken, GOOD) if side == "expected" else (GOOD, broken)
    stage = compare("fp32", *pair)
    assert not stage.holds
    assert not stage.finite
    assert stage.max_abs is None
    assert stage.cosine is None


def test_one_sample_that_is_not_finite_spoils_the_others_of_its_kind() -> None:
    class Second(Session):
        calls = 0

        def run(self, names: list[str], _feeds: object) -> list[np.ndarray]:
            self.calls += 1
            return [GOOD if self.calls == 1 else GOOD * np.float32(np.nan)]

    samples = [Sample("model", "text", {}, {"logits": GOOD}) for _ in range(2)]
    (stage,) = compare_samples("fp32", "fp32", samples, Second())
    assert not stage.finite
    assert not stage.holds


def test_fp32_fails_beyond_its_absolute_threshold_even_at_a_good_cosine() -> None:
    stage = compare("fp32", GOOD, GOOD + np.float32(5e-4))
    assert stage.cosine is not None
    assert stage.cosine > 0.9999
    assert not stage.holds


def test_the_absolute_threshold_grows_with_the_size_of_the_output() -> None:
    large = GOOD * np.float32(100)
    assert compare("fp32", large, large + np.float32(5e-3)).holds
    assert not compare("fp32", large, large + np.float32(5e-2)).holds


def test_int8_fails_below_its_cosine() -> None:
    assert not compare("int8", GOOD, GOOD[:, ::-1].copy()).holds
    assert compare("int8", GOOD, GOOD * np.float32(1.01)).holds


def test_an_all_zero_output_does_not_pass_for_a_direction() -> None:
    stage = compare("int8", GOOD, np.zeros_like(GOOD))
    assert stage.cosine == 0
    assert not stage.holds


def test_another_shape_never_holds() -> None:
    assert not compare("fp32", GOOD, GOOD[:1]).holds


def test_integers_must_be_equal() -> None:
    codes = np.array([[1, 2, 3]])
    assert compare("int4", codes, codes.copy()).holds
    assert not compare("int4", codes, codes + np.array([[0, 0, 1]])).holds


def test_positions_that_mean_nothing_are_not_compared() -> None:
    expected = np.zeros((2, 2, 3), np.float32)
    expected[:, 0] = GOOD
    actual = expected.copy()
    actual[:, 1] = np.nan
    valid = {"logits": np.array([[True, False], [True, False]])}
    stage = compare("fp32", expected, actual, valid=valid)
    assert stage.holds
    assert stage.rows == 2
    actual[0, 0, 0] += 1
    assert not compare("fp32", expected, actual, valid=valid).holds


def test_a_mask_lies_on_the_leading_dimensions() -> None:
    cache = np.ones((2, 4, 3, 5), np.float32)
    cache[1, :, 2] = np.nan
    valid = {"logits": np.array([[[True] * 3], [[True, True, False]]])}
    assert compare("fp32", cache, np.nan_to_num(cache, nan=7.0), valid=valid).rows == 4 * (3 + 2)


def test_weights_of_few_bits_gate_on_real_samples_where_there_are_any() -> None:
    samples = [Sample("model", kind, {}, {"logits": GOOD}) for kind in ("grid", "text")]
    session = Session(logits=GOOD)
    gates = {s.kind: s.gates for s in compare_samples("int8", "int8", samples, session)}
    assert gates == {"grid": False, "text": True}
    gates = {s.kind: s.gates for s in compare_samples("fp16", "fp16", samples, session)}
    assert gates == {"grid": True, "text": True}
    (alone,) = compare_samples("int8", "int8", samples[:1], session)
    assert alone.gates


@pytest.mark.parametrize("wrong", [GOOD * np.float32(np.nan), GOOD[:1]], ids=["nan", "shape"])
def test_what_is_not_finite_gates_on_random_samples_too(wrong: np.ndarray) -> None:
    """Weights of few bits excuse an inaccurate value there, not a missing one."""

    class Random(Session):
        def run(self, names: list[str], feeds: Any) -> list[np.ndarray]:
            return [wrong if "random" in feeds else GOOD]

    samples = [
        Sample("model", "grid", {"random": GOOD}, {"logits": GOOD}),
        Sample("model", "text", {}, {"logits": GOOD}),
    ]
    stages = {s.kind: s for s in compare_samples("int8", "int8", samples, Random())}
    assert (stages["grid"].gates, stages["grid"].holds) == (True, False)
    assert stages["text"].holds


@pytest.mark.parametrize(
    ("precision", "cosine"),
    [("fp32", 0.9999), ("fp16", 0.999), ("bf16", 0.999), ("int8", 0.99), ("int4", 0.95)],
)
def test_every_precision_has_its_cosine(precision: str, cosine: float) -> None:
    """Of values so small that no other figure decides."""
    size = 1e-3

    def turned(to: float) -> np.ndarray:
        return np.array([[size * to, size * math.sqrt(1 - to * to)]], np.float32)

    straight = np.array([[size, 0.0]], np.float32)
    margin = (1 - cosine) / 50
    assert compare(precision, straight, turned(cosine + margin)).holds
    assert not compare(precision, straight, turned(cosine - margin)).holds


def test_where_nothing_is_compared_nothing_holds() -> None:
    valid = {"logits": np.zeros(2, bool)}
    stage = compare("fp32", GOOD, GOOD.copy(), valid=valid)
    assert (stage.rows, stage.finite, stage.holds) == (0, False, False)


@pytest.mark.parametrize(
    ("figures", "grown"),
    [
        ({"max_abs": 0.4 * 1.25 + 0.9e-4}, False),
        ({"max_abs": 0.4 * 1.25 + 1.1e-4}, True),
        ({"worst_cosine": 0.75 - 0.9e-4}, False),
        ({"worst_cosine": 0.75 - 1.1e-4}, True),
        ({"max_abs": 9.0, "holds": True}, False),
        ({"finite": False, "max_abs": None, "worst_cosine": None}, True),
    ],
)
def test_accepted_drift_may_grow_by_a_quarter_and_a_rounding(
    figures: dict[str, Any], grown: bool
) -> None:
    stage = dataclasses.replace(
        compare("int8", GOOD, -GOOD), max_abs=0.4, worst_cosine=0.8, holds=False
    )
    assert has_grown(dataclasses.replace(stage, **figures), stage) is grown
    assert has_grown(stage, None)


@pytest.mark.parametrize(
    ("precision", "best", "lead", "tie"),
    [
        ("fp32", 1.5, 1.9e-4, True),
        ("fp32", 20.0, 2.1e-4, False),
        ("fp16", 0.0, 0.0099, True),
        ("fp16", 0.5, 0.0101, False),
        ("fp16", -20.0, 0.199, True),
        ("fp16", 20.0, 0.201, False),
        ("bf16", 20.0, 1.59, True),
        ("bf16", 20.0, 1.61, False),
        ("int4", 20.0, 0.199, True),
        ("fp32", 1.0, np.inf, False),
        ("fp32", 1.0, np.nan, False),
    ],
)
def test_a_near_tie_is_within_twice_the_threshold_which_grows_in_half_precision(
    precision: str, best: float, lead: float, tie: bool
) -> None:
    assert is_near_tie(best, best - lead, precision) is tie


def _tokens(expected: list[int], actual: list[int], lead: float = 1.0) -> StageParity:
    leads = [[(3.0, 3.0 - lead)] * len(expected)]
    return tokens_stage("decoder", "text", [expected], leads, [actual], "fp32")


def test_tokens_fail_where_they_differ() -> None:
    """A wrong token, one that is missing and one too many each count; a tie does not."""
    same = _tokens([4, 5, 6], [4, 5, 6])
    assert same.holds
    assert same.rows == 3
    wrong = _tokens([4, 5, 6], [4, 7, 6])
    assert not wrong.holds
    assert wrong.argmax_agreement == pytest.approx(1 / 3)
    assert not _tokens([4, 5, 6], [4, 5]).holds
    assert not _tokens([4, 5], [4, 5, 6]).holds
    tie = _tokens([4, 5, 6], [4, 7, 6], lead=1e-5)
    assert tie.holds
    assert tie.rows == 1
    assert tie.note == "1 near-ties"


@pytest.mark.parametrize(("precision", "gates"), [("fp32", True), ("fp16", True), ("int4", False)])
def test_tokens_of_floats_decide_and_those_of_few_bits_do_not(precision: str, gates: bool) -> None:
    stage = tokens_stage("decoder", "text", [[4]], [[(3.0, 1.0)]], [[5]], precision)
    assert not stage.holds
    assert stage.gates is gates


@pytest.mark.parametrize(("precision", "holds"), [("fp32", False), ("fp16", True)])
def test_pixels_are_held_to_the_threshold_of_the_precision(precision: str, holds: bool) -> None:
    """6 x 0.005 is what fp16 may be off."""
    pixels = np.linspace(-6, 6, 96, dtype=np.float32).reshape(2, 4, 4, 3)
    names: dict[str, Any] = {"component": "image_decoder", "stage": "greedy", "kind": "drawing"}
    stage = compare_values(
        pixels, pixels + np.float32(0.02), precision, **names, output="pixels", gates=True
    )
    assert (stage.rows, stage.holds) == (2, holds)
    assert stage.max_abs == pytest.approx(0.02, rel=1e-4)


def test_stored_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [
        Sample(
            "decoder",
            kind,
            {"ids": np.arange(size)[None]},
            {"logits": GOOD * np.float32(size)},
            valid={"logits": np.array([True, False])},
            scores=("logits",),
        )
        for kind in ("grid", "text")
        for size in range(1, 8)
    ]
    stored = stored_samples(samples)
    assert [(one.kind, one.feeds["ids"].size) for one in stored] == [
        (kind, size) for kind in ("grid", "text") for size in (1, 3, 5, 7)
    ]
    write_parity(tmp_path, [], stored)
    for one, again in zip(stored, read_samples(tmp_path), strict=True):
        assert (one.component, one.kind, one.scores) == (again.component, again.kind, again.scores)
        for group in ("feeds", "expected", "valid"):
            want, got = getattr(one, group), getattr(again, group)
            assert want.keys() == got.keys()
            for name in want:
                np.testing.assert_array_equal(want[name], got[name])
                assert want[name].dtype == got[name].dtype


def test_samples_that_do_not_belong_to_the_record_are_bad_input(tmp_path: Path) -> None:
    write_parity(tmp_path, [], [Sample("model", "text", {"x": GOOD}, {"logits": GOOD})])
    (tmp_path / "samples.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="no samples that parity can be checked on"):
        read_samples(tmp_path)


def test_a_reader_sees_one_row_for_a_cache_and_for_all_samples_that_were_made_up() -> None:
    outputs = {"logits": GOOD, **{f"present.{layer}.key": GOOD for layer in range(3)}}
    samples = [
        Sample("model", kind, {}, outputs, scores=("logits",))
        for kind in ("prefill", "decode", "text")
    ]
    worse = outputs | {"present.1.key": GOOD + np.float32(1e-5)}
    rows = condensed(compare_samples("fp32", "fp32", samples, Session(**worse)))
    assert [(row.kind, row.output) for row in rows] == [
        ("made up", "logits"),
        ("made up", "present.*.key"),
        ("text", "logits"),
        ("text", "present.*.key"),
    ]
    assert rows[1].rows == 12
    assert rows[1].max_abs == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("layer", range(3))
def test_one_output_that_does_not_hold_is_the_verdict_of_its_row(layer: int) -> None:
    outputs = {f"present.{at}.key": GOOD for at in range(3)}
    off = Session(**(outputs | {f"present.{layer}.key": GOOD + 1}))
    lost = Session(**(outputs | {f"present.{layer}.key": GOOD * np.float32(np.nan)}))
    sample = Sample("model", "text", {}, outputs)
    (wrong,) = condensed(compare_samples("fp32", "fp32", [sample], off))
    assert (wrong.holds, wrong.finite) == (False, True)
    (missing,) = condensed(compare_samples("fp32", "fp32", [sample], lost))
    assert (missing.holds, missing.finite, missing.max_abs, missing.cosine) == (
        False,
        False,
        None,
        None,
    )

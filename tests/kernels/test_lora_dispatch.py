"""Who runs which step of the LoRA linear layer: what the table says, and what follows from it."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmopt_kernels.inspection import TARGETS
from mmopt_kernels.lora_linear import dispatch
from mmopt_kernels.lora_linear.dispatch import STEPS, Plan, Rule, Step, plan

BF16, FP32 = torch.bfloat16, torch.float32
HALF = (torch.float16, torch.bfloat16)


def auto(
    target: str = "sm_90",
    dtype: torch.dtype = BF16,
    M: int = 8192,
    N: int = 4096,
    K: int = 4096,
    R: int = 16,
    dropout: bool = False,
) -> set[str]:
    """The steps that are Triton's."""
    found = plan("auto", target, dtype, M, N, K, R, dropout)
    return {step for step in STEPS if getattr(found, step) == "triton"}


@pytest.mark.parametrize("target", ["interpreter", "sm_90"])
def test_explicit_implementations_leave_nothing_to_choose(target: str) -> None:
    for impl, choice in (("triton", "triton"), ("addmm", "library")):
        found = plan(impl, target, FP32, 1, 1, 1, 1, True)
        assert all(getattr(found, step) == choice for step in STEPS)


def test_the_cpu_takes_the_library() -> None:
    for M, R, dropout in itertools.product((1, 10**6), (1, 256), (False, True)):
        assert auto("interpreter", M=M, R=R, dropout=dropout) == set()


def test_dropout_is_drawn_inside_the_skinny_steps() -> None:
    assert {"down", "down_backward", "add"} <= auto(dropout=True)
    assert not {"down", "down_backward", "add"} & auto(dropout=False)
    # Beyond the ranks that one program holds x would be read again.
    assert {"down", "down_backward"} <= auto(R=256, dropout=True)
    assert not {"down", "down_backward"} & auto(R=257, dropout=True)


def test_the_layers_own_gemm_stays_with_the_library() -> None:
    """But where a GPU said that ours loses less than one pass over the output saves."""
    for target, size in itertools.product(TARGETS, (2048, 4096)):
        assert not {"up", "dx"} & auto(target, K=size, N=size)
    for target, N in itertools.product(TARGETS, (512, 1024)):
        measured = {"dx"} if target == "sm_90" else set()
        assert auto(target, N=N) & {"up", "dx"} == measured
    assert "dx" not in auto("sm_90", N=1024, M=2048)
    assert "dx" not in auto("sm_90", N=1024, dropout=True)


@pytest.mark.parametrize(("R", "fused"), [(8, True), (16, True), (32, True), (64, False)])
def test_one_read_of_dy_where_partial_sums_cost_less_than_the_second(R: int, fused: bool) -> None:
    """e + 8 R / T + 8 S R / N < 2 e, with the tile and the splits that a launch takes."""
    pytest.importorskip("triton", reason="asks the launcher's module for its tile")
    from mmopt_kernels.lora_linear.kernel import block_r, splits
    from mmopt_kernels.lora_linear.kernel_backward import config_up_backward

    for M, N in itertools.product((2048, 8192, 32768), (2048, 4096, 14336)):
        tile = config_up_backward(BF16, M, block_r(R))
        S = splits(-(-M // tile["BLOCK_M"]), -(-N // tile["BLOCK_N"]))
        parts = 8 * R / tile["BLOCK_M"] + (8 * S * R / N if S > 1 else 0)
        assert ("up_backward" in auto(M=M, N=N, R=R)) is fused
        # Few rows have many splits; their partial sums stay in the caches.
        if M >= 8192 and N >= 4096:
            assert (2 + parts < 4) is fused, (M, N, parts)


def test_float32_multiplies_with_the_library_where_nothing_is_dropped() -> None:
    assert auto(dtype=FP32) == set()
    assert auto(dtype=FP32, dropout=True) == {"down", "down_backward", "add"}
    assert auto(dtype=torch.float64, dropout=True) == set()


def test_every_target_has_rules_and_every_rule_says_where_it_is_from() -> None:
    table = dispatch.table()
    assert set(table) == set(TARGETS)
    for rules in table.values():
        for rule in rules:
            assert rule.step in STEPS
            assert rule.source.startswith(("arithmetic, not measured: ", "measured: "))
            for least, most in (rule.rows, rule.ranks, rule.sums):
                assert least >= 1
                assert most is None or most >= least


def test_an_unlisted_gpu_takes_the_rules_of_the_nearest_before_it() -> None:
    rules = dispatch.rules_for
    assert rules("sm_86") is rules("sm_89") is rules("sm_80")
    assert rules("sm_103") is rules("sm_100")
    assert rules("sm_121") is rules("sm_120")
    assert rules("sm_75") is rules("sm_80")
    assert rules("gfx90a") == ()


def test_a_rule_holds_within_its_bounds_and_not_beyond() -> None:
    rule = Rule("down", HALF, True, (16, None), (2, 8), (100, 200), "a test")
    assert rule.holds(BF16, 16, 2, 100, True)
    assert rule.holds(BF16, 10**6, 8, 200, True)
    for wrong in (
        (FP32, 16, 2, 100, True),
        (BF16, 15, 2, 100, True),
        (BF16, 16, 1, 100, True),
        (BF16, 16, 9, 100, True),
        (BF16, 16, 2, 99, True),
        (BF16, 16, 2, 201, True),
        (BF16, 16, 2, 100, False),
    ):
        assert not rule.holds(*wrong)


@pytest.mark.parametrize(
    ("step", "length"),
    [("down", 3), ("up", 3), ("up_backward", 2), ("dx", 2), ("down_backward", 1), ("add", 4)],
)
def test_a_rule_asks_for_the_length_of_its_own_steps_sum(
    step: Step, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of M = 1, N = 2, K = 3 and R = 4."""
    rule = Rule(step, HALF, None, (1, None), (1, None), (length, length), "a test")
    monkeypatch.setattr(dispatch, "rules_for", lambda _: (rule,))
    assert auto(f"a test of {step}", M=1, N=2, K=3, R=4) == {step}


def test_a_plan_names_each_step_once() -> None:
    assert tuple(Plan.__dataclass_fields__) == STEPS

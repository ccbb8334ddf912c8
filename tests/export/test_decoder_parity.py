"""Greedy parity: every step is compared, near-ties are told from errors."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmopt_export.decoder.parity import (
    GreedyReference,
    greedy_parity,
    greedy_reference,
    prove_greedy,
)
from mmopt_export.parity import GENERATED, Sample, StageParity
from mmopt_kernels.errors import InputError
from tiny_decoders import Exported, traced

pytestmark = pytest.mark.usefixtures("one_thread")


class _Scripted:
    """A generator that gives written logits and records what it is fed."""

    def __init__(self, steps: list[list[list[float]]]) -> None:
        self.steps = [np.asarray(one, dtype=np.float32) for one in steps]
        self.fed: list[list[int]] = []

    def start(self, rows: int) -> None:
        assert rows == len(self.steps[0])

    def prefill(self, prompts: Any, _: Any) -> Any:
        return self.steps[0]

    def step(self, tokens: list[int], _: Any) -> Any:
        self.fed.append(tokens)
        return self.steps[len(self.fed)]


def _reference(logits: list[list[list[float]]]) -> GreedyReference:
    """From logits `[B][steps][V]`."""
    values = np.asarray(logits, dtype=np.float32)
    best = np.argsort(-values, axis=-1, kind="stable")
    return GreedyReference(
        prompts=tuple((1,) for _ in logits),
        best=best,
        logits=np.take_along_axis(values, best, -1),
    )


def test_a_near_tie_is_no_error_and_the_comparison_goes_on_with_eagers_token() -> None:
    """Margin 1.5e-4 at step 0, within twice 1e-4; at step 1 the margin is 3: an error."""
    reference = _reference([[[0.0, 2.0, 1.99985], [5.0, 2.0, 0.0], [0.0, 0.0, 9.0]]])
    scripted = _Scripted([[[0.0, 1.99989, 1.9999]], [[1.0, 2.0, 0.0]], [[0.0, 0.0, 9.0]]])
    parity = greedy_parity(reference, scripted)  # type: ignore[arg-type]
    assert parity.steps == 3
    # Both differences were seen, and what was fed is eager's.
    assert scripted.fed == [[1], [0]]
    near, wrong = parity.differences
    assert (near.step, near.expected, near.found, near.near_tie) == (0, 1, 2, True)
    assert (wrong.step, wrong.expected, wrong.found, wrong.near_tie) == (1, 0, 1, False)
    assert wrong.margin == pytest.approx(3.0)
    assert parity.max_error == pytest.approx(4.0)
    assert not parity.holds
    assert replace(parity, differences=(near,)).holds


def test_a_token_that_is_not_among_the_best_is_never_a_near_tie() -> None:
    reference = _reference([[[3.0, 2.99999, 2.99998, 2.99997]]])
    cut = replace(reference, best=reference.best[..., :2], logits=reference.logits[..., :2])
    parity = greedy_parity(cut, _Scripted([[[0.0, 0.0, 0.0, 1.0]]]))  # type: ignore[arg-type]
    assert [one.near_tie for one in parity.differences] == [False]


def test_a_nan_does_not_pass_though_it_lies_where_the_winner_should() -> None:
    """argmax lands on a NaN as if it had won."""
    reference = _reference([[[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]])
    scripted = _Scripted([[[0.0, np.nan, 1.0]], [[0.0, 2.0, 1.0]]])
    parity = greedy_parity(reference, scripted)  # type: ignore[arg-type]
    assert parity.differences == ()
    assert np.isnan(parity.max_error)


def test_what_is_stored_of_a_reference_comes_back() -> None:
    reference = replace(_reference([[[3.0, 2.0]] * 4] * 2), prompts=((5, 0, 7), (8,)))
    again = GreedyReference.of(reference.sample("model"))
    assert again.prompts == reference.prompts
    np.testing.assert_array_equal(again.best, reference.best)
    np.testing.assert_array_equal(again.tokens, [[0] * 4] * 2)


@pytest.mark.parametrize("change", ["prompts", "best", "kind", "rows"])
def test_another_sample_is_no_reference(change: str) -> None:
    sample = _reference([[[3.0, 2.0]] * 4] * 2).sample("model")
    feeds, expected = dict(sample.feeds), dict(sample.expected)
    if change == "prompts":
        del feeds["prompts"]
    elif change == "best":
        expected["best"] = expected["best"][0]
    elif change == "kind":
        expected["best"] = expected["best"].astype(np.float32)
    else:
        feeds["prompts"] = feeds["prompts"][:1]
    with pytest.raises(InputError, match="is not stored as prompts with"):
        GreedyReference.of(Sample("model", GENERATED, feeds, expected))


def test_tokens_that_the_graph_does_not_know_are_refused() -> None:
    reference = _reference([[[3.0, 2.0, 1.0]]])
    with pytest.raises(InputError, match="tokens from 0 to 2 are expected, and the graph knows 2"):
        greedy_parity(reference, _Scripted([[[1.0, 0.0]]]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported() -> Exported:
    return traced("llama")


def test_the_proof_of_a_folder_finds_a_changed_weight(exported: Exported, tmp_path: Path) -> None:
    sample = greedy_reference(exported.part, [[5, 6, 7], [8]], steps=8).sample("model")

    def prove(folder: Path, precision: str) -> StageParity:
        return prove_greedy(
            sample,
            folder / "model.onnx",
            precision,
            provider="CPUExecutionProvider",
            cache=exported.cache,
            longest=exported.part.limits["total"],
        )

    stage = prove(exported.folder, "fp32")
    assert (stage.stage, stage.output, stage.rows) == ("greedy", "tokens", 16)
    assert stage.holds
    assert stage.gates
    assert stage.argmax_agreement == 1.0
    assert stage.max_abs is not None
    assert stage.max_abs < 3e-5
    shutil.copytree(exported.folder, tmp_path / "changed")
    data = tmp_path / "changed" / "model.onnx.data"
    values = np.fromfile(data, dtype=np.float32)
    values[: len(values) // 2] *= 1.3
    values.tofile(data)
    changed = prove(tmp_path / "changed", "fp32")
    assert not changed.holds
    assert changed.note is not None
    assert "which eager has ahead by" in changed.note
    # Weights of few bits are reported; the artifact's other stages judge them.
    assert not prove(tmp_path / "changed", "int4").gates
    # But no NaN is excused.
    values[:] = np.nan
    values.tofile(data)
    lost = prove(tmp_path / "changed", "int4")
    assert (lost.finite, lost.max_abs, lost.gates, lost.holds) == (False, None, True, False)


def test_a_part_that_does_not_take_ids_is_refused(exported: Exported) -> None:
    for part in (replace(exported.part, inputs={}), replace(exported.part, module=torch.nn.ReLU())):
        with pytest.raises(InputError, match=f"the part {part.name} is no decoder of ids"):
            greedy_reference(part, [[5]])


def test_prompts_without_room_are_refused(exported: Exported) -> None:
    for prompts in ([[5] * 90], [[5], []]):
        with pytest.raises(InputError, match="expected at least one token and at most 96"):
            greedy_reference(exported.part, prompts, steps=8)

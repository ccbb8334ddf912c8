"""Greedy parity: every step is compared, near-ties are told from errors."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmopt_export.decoder.parity import (
    Difference,
    GreedyParity,
    GreedyReference,
    _stage,
    greedy_parity,
    greedy_reference,
    prove_greedy,
)
from mmopt_export.manifest import CacheMap
from mmopt_export.parity import GENERATED, Sample, StageParity
from mmopt_kernels.errors import InputError, MmoptError
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


@pytest.mark.parametrize(
    "change", ["prompts", "best", "kind", "rows", "steps", "none", "logits", "ranks"]
)
def test_another_sample_is_no_reference(change: str) -> None:
    sample = _reference([[[3.0, 2.0]] * 4] * 2).sample("model")
    feeds, expected = dict(sample.feeds), dict(sample.expected)
    if change == "prompts":
        del feeds["prompts"]
    elif change == "best":
        expected["best"] = expected["best"][0]
    elif change == "kind":
        expected["best"] = expected["best"].astype(np.float32)
    elif change == "steps":
        expected["logits"] = expected["logits"][:, :1]
    elif change == "none":
        expected = {name: value[:, :0] for name, value in expected.items()}
    elif change == "logits":
        expected["logits"] = expected["logits"].astype(np.int64)
    elif change == "ranks":
        feeds["prompts"] = feeds["prompts"][0]
    else:
        feeds["prompts"] = feeds["prompts"][:1]
    with pytest.raises(InputError, match="is not stored as prompts with"):
        GreedyReference.of(Sample("model", GENERATED, feeds, expected))


def test_tokens_that_the_graph_does_not_know_are_refused() -> None:
    reference = _reference([[[3.0, 2.0, 1.0]]])
    with pytest.raises(InputError, match="tokens from 0 to 2 are expected, and the graph knows 2"):
        greedy_parity(reference, _Scripted([[[1.0, 0.0]]]))  # type: ignore[arg-type]


def test_a_negative_token_is_refused() -> None:
    reference = replace(_reference([[[3.0, 2.0]]]), best=np.array([[[-1, 1]]]))
    with pytest.raises(InputError, match="tokens from -1 to 1 are expected"):
        greedy_parity(reference, _Scripted([[[1.0, 0.0]]]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported() -> Exported:
    return traced("llama")


def test_of_equal_logits_the_first_leads_and_none_is_lost(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.topk` gives them in any order; a graph that takes another one is at a tie."""
    logits = torch.arange(0.0, -67.0, -1.0)
    logits[[11, 23, 31, 47, 59]] = 5.0
    assert int(torch.topk(logits, 16).indices[0]) != 11
    monkeypatch.setattr("mmopt_export.decoder.lowering.call", lambda *_: logits[None, None])
    reference = greedy_reference(exported.part, [[5]], steps=1)
    assert reference.tokens.tolist() == [[11]]
    assert sorted(reference.best[0, 0, :5].tolist()) == [11, 23, 31, 47, 59]
    for found in (23, 31, 47, 59):
        changed = logits.clone()
        changed[found] += 1e-5
        scripted = _Scripted([changed[None].tolist()])
        (difference,) = greedy_parity(reference, scripted).differences  # type: ignore[arg-type]
        assert difference.near_tie


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


def test_the_stage_counts_the_tokens_that_differ_and_names_the_first_wrong_one() -> None:
    tie = Difference(row=0, step=1, expected=4, found=5, margin=1e-5, near_tie=True)
    wrong = Difference(row=1, step=2, expected=6, found=7, margin=0.25, near_tie=False)
    stage = _stage(GreedyParity(8, (tie, wrong), 0.5), "model", True, 2)
    assert (stage.argmax_agreement, stage.max_abs, stage.holds) == (0.75, 0.5, False)
    assert stage.note == (
        "4 tokens of 2 prompts, 1 near-ties, row 1 step 2 gives 7 for 6, which eager has ahead by "
        "0.25"
    )
    assert _stage(GreedyParity(8, (), 0.5), "model", True, 2).note == "4 tokens of 2 prompts"


def test_what_cannot_generate_is_no_proof(exported: Exported) -> None:
    sample = greedy_reference(exported.part, [[5, 6]], steps=2).sample("model")
    graph = exported.folder / "model.onnx"

    def prove(cache: CacheMap | None) -> StageParity:
        provider = "CPUExecutionProvider"
        return prove_greedy(sample, graph, "fp32", provider=provider, cache=cache, longest=96)

    with pytest.raises(InputError, match="the graph model has no cache to generate with"):
        prove(None)
    with pytest.raises(MmoptError, match="ONNX Runtime failed where a row has 2 tokens") as e:
        prove(replace(exported.cache, heads=exported.cache.heads + 1))
    assert not isinstance(e.value, InputError)


def test_a_part_that_does_not_take_ids_is_refused(exported: Exported) -> None:
    for part in (replace(exported.part, inputs={}), replace(exported.part, module=torch.nn.ReLU())):
        with pytest.raises(InputError, match=f"the part {part.name} is no decoder of ids"):
            greedy_reference(part, [[5]])


def test_prompts_without_room_are_refused(exported: Exported) -> None:
    for prompts in ([[5] * 89], [[5], []]):
        with pytest.raises(InputError, match="expected at least one token and at most 96"):
            greedy_reference(exported.part, prompts, steps=8)
    assert greedy_reference(exported.part, [[5] * 94], steps=2).tokens.shape == (1, 2)

"""Classifiers of texts and of their tokens, over families of encoders, held against PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from mmopt_export import ExportReport, Runner, export, load_checkpoint
from mmopt_export.encoders import fused_attention
from mmopt_export.graph import trace
from mmopt_export.tasks import make_plan
from mmopt_export.tasks.text import random_ids
from mmopt_kernels.errors import InputError, MmoptError
from tiny_encoders import save_text_encoder

FAST = ("DistilBert",)
SLOW = ("Roberta", "ModernBert", "DebertaV2", "Bert", "XLMRoberta", "Electra", "MPNet", "Albert")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


def logits_of(folder: Path, **inputs: np.ndarray) -> np.ndarray:
    """The model's own logits in eager attention, which is not what the export traces."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    return np.asarray(result.logits)


def ids(batch: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Ids of words and letters, no special ones."""
    return np.random.default_rng(seed).integers(4, 70, (batch, length))


def masks(batch: int, length: int, side: str) -> np.ndarray:
    """A mask per row that leaves out one token more than that of the row before."""
    kept = np.arange(length)[None, :] < length - np.arange(batch)[:, None] * 3
    return (kept if side == "right" else kept[:, ::-1]).astype(np.int64)


def all_hold(report: ExportReport) -> bool:
    stages = {stage.stage for stage in report.stages}
    assert {"fp32-unoptimized", "fp32"} <= stages
    return report.exit_code == 0 and all(stage.holds for stage in report.stages if stage.gates)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_each_family_gives_pytorchs_logits(family: str, tmp_path: Path) -> None:
    model = save_text_encoder(tmp_path / "model", family, "ForSequenceClassification")
    assert all_hold(export(str(model), tmp_path / "out", precision="fp32"))
    runner = Runner(tmp_path / "out")
    longest = runner.manifest.max_length
    assert longest == 64
    for batch, length, side in ((1, 1, "right"), (2, 7, "left"), (3, 41, "right"), (2, 64, "left")):
        feeds = {"input_ids": ids(batch, length), "attention_mask": masks(batch, length, side)}
        # RoBERTa and its like count positions by ids that are not padding.
        padding = 1 if family == "MPNet" else 0
        feeds["input_ids"] = np.where(feeds["attention_mask"] == 1, feeds["input_ids"], padding)
        expected = logits_of(model, **feeds)
        assert np.ptp(expected) > 0.05
        np.testing.assert_allclose(runner.run(feeds)["logits"], expected, atol=5e-5)


@pytest.mark.parametrize(
    ("family", "target", "ops"),
    [
        ("Bert", "cpu", 1),
        ("Bert", "portable", 0),
        pytest.param("ModernBert", "cpu", 0, marks=pytest.mark.slow),
    ],
)
def test_attention_with_a_mask_of_padding_is_one_op_and_any_other_stays(
    family: str, target: str, ops: int, tmp_path: Path
) -> None:
    """The local layers of ModernBert see a window."""
    changes = {"num_hidden_layers": 1} if family == "Bert" else {}
    model = save_text_encoder(tmp_path / "model", family, "ForSequenceClassification", **changes)
    checkpoint = load_checkpoint(str(model), adapt="merge")
    (part,) = make_plan(checkpoint, task=None, calibration=None).parts
    nodes = [node.op_type for node in trace(part, target=target).graph]
    assert nodes.count("MultiHeadAttention") == ops


def test_a_mask_that_is_made_only_where_there_is_padding_is_met_before_the_trace(
    tmp_path: Path,
) -> None:
    """Such a model attends without a mask to an example of nothing but real tokens."""
    folder = save_text_encoder(
        tmp_path / "model", "Bert", "ForSequenceClassification", num_hidden_layers=1
    )
    model = load_checkpoint(str(folder), adapt="merge").model

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            own = None if attention_mask.all() else attention_mask[:, None, None].bool()
            return self.model(input_ids=input_ids, attention_mask=own).logits

    inputs = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    with fused_attention(Own(), inputs) as fused:
        assert not fused
    with fused_attention(model, inputs) as fused:
        assert fused


@pytest.mark.slow
def test_masked_tokens_have_no_part_in_the_logits(tmp_path: Path) -> None:
    model = save_text_encoder(
        tmp_path / "model", "ModernBert", "ForSequenceClassification", classifier_pooling="mean"
    )
    export(str(model), tmp_path / "out", precision="fp32")
    runner = Runner(tmp_path / "out")
    for side in ("right", "left"):
        mask = masks(3, 30, side)
        one = ids(3, 30)
        other = np.where(mask == 1, one, ids(3, 30, seed=1))
        logits = runner.run({"input_ids": one, "attention_mask": mask})["logits"]
        same = runner.run({"input_ids": other, "attention_mask": mask})["logits"]
        np.testing.assert_allclose(logits, same, atol=1e-5)
        # And those that are not masked have one: the mask is not taken for everything.
        seen = runner.run({"input_ids": other, "attention_mask": np.ones_like(mask)})["logits"]
        assert np.abs(logits - seen)[1:].max() > 1e-2


@pytest.mark.slow
def test_local_attention_reaches_as_far_as_its_window_and_no_further(tmp_path: Path) -> None:
    # Traced at 16 tokens, less than the window of 20 on each side.
    model = save_text_encoder(
        tmp_path / "model",
        "ModernBert",
        "ForTokenClassification",
        local_attention=40,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "sliding_attention"],
    )
    assert all_hold(export(str(model), tmp_path / "out", precision="fp32"))
    runner = Runner(tmp_path / "out")
    mask = np.ones((1, 64), np.int64)
    one = ids(1, 64)
    other = one.copy()
    other[0, 0] = one[0, 0] % 60 + 5
    before = runner.run({"input_ids": one, "attention_mask": mask})["logits"]
    after = runner.run({"input_ids": other, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(
        before, logits_of(model, input_ids=one, attention_mask=mask), atol=5e-5
    )
    changed = np.abs(before - after)[0].max(-1) > 1e-6
    # Two layers of 20 tokens each side.
    assert changed[:41].all()
    assert not changed[41:].any()


@pytest.mark.slow
def test_positions_of_roberta_count_from_behind_the_padding(tmp_path: Path) -> None:
    model = save_text_encoder(tmp_path / "model", "Roberta", "ForTokenClassification")
    assert all_hold(export(str(model), tmp_path / "out", precision="fp32"))
    runner = Runner(tmp_path / "out")
    text = ids(1, 20)
    alone = runner.run({"input_ids": text, "attention_mask": np.ones((1, 20), np.int64)})["logits"]
    for side in ("left", "right"):
        widths = ((0, 0), (9, 0) if side == "left" else (0, 9))
        padded = {
            "input_ids": np.pad(text, widths),
            "attention_mask": np.pad(np.ones_like(text), widths),
        }
        logits = runner.run(padded)["logits"]
        kept = logits[:, 9:] if side == "left" else logits[:, :20]
        np.testing.assert_allclose(kept, alone, atol=2e-5)


def test_int8_of_another_family_stays_close_on_texts(texts: Path, tmp_path: Path) -> None:
    model = save_text_encoder(tmp_path / "model", "DistilBert", "ForSequenceClassification")
    report = export(str(model), tmp_path / "out", precision="int8", calibration=texts)
    assert all_hold(report)
    (int8,) = [one for one in report.stages if (one.stage, one.kind) == ("int8", "text")]
    assert int8.cosine is not None
    assert int8.cosine > 0.995


@pytest.mark.slow
def test_padding_on_the_left_is_kept_in_the_tokenizer(tmp_path: Path) -> None:
    model = save_text_encoder(
        tmp_path / "model", "DistilBert", "ForSequenceClassification", padding_side="left"
    )
    export(str(model), tmp_path / "out", precision="fp32")
    runner = Runner(tmp_path / "out")
    feeds = runner.tokenize(["a", "the sum of two numbers"])
    assert feeds["attention_mask"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    tokenizer = load_checkpoint(str(model)).tokenizer
    expected = tokenizer(["a", "the sum of two numbers"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(feeds["input_ids"], expected["input_ids"])


def test_block_sparse_attention_is_refused_by_name(tmp_path: Path) -> None:
    """Traced at a few tokens it is dense, and wrong at many."""
    model = save_text_encoder(tmp_path / "model", "BigBird", "ForSequenceClassification")
    with pytest.raises(InputError, match="BigBirdForSequenceClassification has block-sparse"):
        export(str(model), tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("longest", "found"), [(96, 96), (5000, 1024)])
def test_parity_sees_a_text_of_every_position_up_to_1024(longest: int, found: int) -> None:
    feeds = random_ids(["input_ids"], vocabulary=9, pad_id=0, longest=longest)
    assert max(one["input_ids"].shape[1] for one in feeds) == found


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("Bert", "ForMultipleChoice", r"BertForMultipleChoice cannot be exported, expected an"),
        ("Bert", "ForMaskedLM", r"BertForMaskedLM cannot be exported, expected an"),
    ],
)
def test_an_architecture_without_a_task_is_refused_by_name(
    family: str, head: str, message: str, tmp_path: Path
) -> None:
    model = save_text_encoder(tmp_path / "model", family, head)
    with pytest.raises(InputError, match=message):
        export(str(model), tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_traced_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DistilBertForSequenceClassification

    forward = DistilBertForSequenceClassification.forward

    def branching(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        if int(input_ids.sum()) > 7:  # a decision on values: no graph has it
            return forward(self, input_ids=input_ids, **rest)
        return forward(self, input_ids=input_ids + 1, **rest)

    model = save_text_encoder(tmp_path / "model", "DistilBert", "ForSequenceClassification")
    monkeypatch.setattr(DistilBertForSequenceClassification, "forward", branching)
    with pytest.raises(MmoptError) as caught:
        export(str(model), tmp_path / "out", precision="fp32")
    message = str(caught.value)
    assert message.startswith("DistilBertForSequenceClassification could not be traced: ")
    assert "data-dependent" in message
    assert not (tmp_path / "out").exists()


def test_a_size_that_an_old_torch_cannot_prove_names_the_torch_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DistilBertForSequenceClassification

    def unproven(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        raise ValueError("Constraints violated (sequence)! Not all values of sequence satisfy")

    model = save_text_encoder(tmp_path / "model", "DistilBert", "ForSequenceClassification")
    monkeypatch.setattr(DistilBertForSequenceClassification, "forward", unproven)
    monkeypatch.setattr("mmopt_export.graph.PROVES_SIZES", Version("99.0"))
    with pytest.raises(MmoptError, match=r"Constraints violated.* torch 99.0 proves .*: update it"):
        export(str(model), tmp_path / "out", precision="fp32")


def test_a_graph_that_cannot_be_run_is_named_with_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stage: str, *_: Any) -> None:
        raise MmoptError(f"ONNX Runtime could not run stage {stage}: no kernel")

    model = save_text_encoder(tmp_path / "model", "DistilBert", "ForSequenceClassification")
    monkeypatch.setattr("mmopt_export.finishing.compare_samples", fail)
    named = "^DistilBertForSequenceClassification could not be exported: .*stage fp32-unoptimized"
    with pytest.raises(MmoptError, match=named):
        export(str(model), tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()

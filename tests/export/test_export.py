"""Exports of a small real classifier with an adapter, held against PyTorch."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

import mmopt_export.parity
from mmopt_export import Runner, export, load_checkpoint, read_manifest, verify
from mmopt_export.files import same_artifact
from mmopt_export.graph import quiet
from mmopt_export.texts import read_texts
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError
from tiny_artifacts import make_artifact, watch_weights


@pytest.fixture(scope="module")
def fp32(classifier: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "fp32"
    assert export(str(classifier), output, adapters=[str(adapter)]).exit_code == 0
    return output


@pytest.fixture(scope="module")
def again(
    classifier: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The same export a second time, and the weights that were there as its graph was opened."""
    output = tmp_path_factory.mktemp("again") / "fp32"
    with pytest.MonkeyPatch.context() as patch:
        held = watch_weights(patch)
        export(str(classifier), output, adapters=[str(adapter)])
    return output, held


@pytest.fixture
def impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph can be as close as int8 now has to be."""
    threshold = mmopt_export.parity.Threshold(cosine=1.1, max_abs=None)
    monkeypatch.setitem(mmopt_export.parity.THRESHOLDS, "int8", threshold)


def logits_of(model: str, adapters: list[str], texts: list[str]) -> np.ndarray:
    """Logits of PEFT's own unmerged model, one text at a time: no padding, the oracle."""
    checkpoint = load_checkpoint(model, adapters=adapters)
    with torch.no_grad():
        rows = [
            checkpoint.model(**checkpoint.tokenizer(text, return_tensors="pt")).logits
            for text in texts
        ]
    return torch.cat(rows).numpy()


def test_fp32_artifact_gives_the_logits_of_the_unmerged_peft_model(
    classifier: Path, adapter: Path, texts: Path, fp32: Path
) -> None:
    sentences = read_texts(texts).texts
    expected = logits_of(str(classifier), [str(adapter)], sentences)
    np.testing.assert_allclose(Runner(fp32).classify(sentences), expected, atol=1e-5, rtol=0)


def test_the_adapter_changes_the_logits(classifier: Path, adapter: Path, texts: Path) -> None:
    sentences = read_texts(texts).texts[:8]
    with_adapter = logits_of(str(classifier), [str(adapter)], sentences)
    without = logits_of(str(classifier), [], sentences)
    assert np.abs(with_adapter - without).max() > 0.05


def test_int8_artifact_runs_integer_matmuls_and_stays_close(artifact: Path, texts: Path) -> None:
    graph = onnx.load(artifact / "model.onnx").graph
    manifest = read_manifest(artifact)
    recipe = manifest.component.quantization
    assert recipe is not None
    count = sum(node.op_type in ("MatMulInteger", "MatMulNBits") for node in graph.node)
    assert count == recipe["matmuls"] > 0
    digest = hashlib.sha256(texts.read_bytes()).hexdigest()
    assert recipe["calibration"] == {"sha256": digest}
    assert recipe["samples"]["batches"] == 2
    report = verify(artifact)
    assert report.exit_code == 0
    assert all(stage.cosine is not None and stage.cosine > 0.99 for stage in report.stages)
    (gating,) = [stage for stage in report.stages if stage.gates]
    # The texts have labels: what the graph and PyTorch make of them stands side by side.
    assert gating.kind == "text"
    assert gating.accuracy is not None
    assert gating.expected_accuracy is not None


def test_batch_and_length_of_one_and_padding_do_not_change_a_row(fp32: Path) -> None:
    runner = Runner(fp32)
    together = runner.run(runner.tokenize(["a", "return the sum of two numbers"]))["logits"]
    alone = runner.run(runner.tokenize(["a"]))["logits"]
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize("method", ["classify", "tokenize"])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a graph", "texts is the string 'a graph', expected a list of texts"),
        (["a", "b \ud800"], r"texts\[1\] has half of a surrogate pair"),
    ],
)
def test_what_is_no_list_of_texts_is_bad_input(
    fp32: Path, method: str, texts: str | list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        getattr(Runner(fp32), method)(texts)


def test_texts_longer_than_the_model_are_truncated(fp32: Path) -> None:
    runner = Runner(fp32)
    feeds = runner.tokenize(["graph " * 500])
    assert feeds["input_ids"].shape == (1, runner.manifest.max_length) == (1, 64)
    assert np.isfinite(runner.run(feeds)["logits"]).all()


def test_two_exports_of_the_same_inputs_are_byte_identical(
    fp32: Path, again: tuple[Path, list[int]]
) -> None:
    assert same_artifact(fp32, again[0]) == []


def test_the_model_is_let_go_before_its_graph_is_opened(again: tuple[Path, list[int]]) -> None:
    assert again[1] == [0]


def test_manifest_says_what_the_artifact_is_and_was_made_from(fp32: Path, adapter: Path) -> None:
    manifest = read_manifest(fp32)
    assert manifest.labels == ("class", "function", "method")
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    assert manifest.inputs[0].shape == ("batch", "sequence")
    assert manifest.outputs[0].dtype == "float32"
    assert set(manifest.files) == {path.name for path in fp32.iterdir()} - {"mmopt.json"}
    (record,) = manifest.source.adapters
    assert record["path"] == str(adapter)
    assert set(record["scale"].values()) == {2.0}
    assert dataclasses.asdict(manifest)["schema"] == 2


def test_runner_and_verify_import_neither_torch_nor_transformers(artifact: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from mmopt_export import Runner, verify\n"
        f"path = Path({str(artifact)!r})\n"
        "Runner(path).classify(['a graph']); verify(path)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_verify_measures_accuracy_on_labelled_texts(artifact: Path, texts: Path) -> None:
    report = verify(artifact, data=texts)
    data = read_texts(texts, label="label")
    predicted = Runner(artifact).classify(data.texts).argmax(axis=1)
    labels = read_manifest(artifact).labels
    right = [labels[i] == label for i, label in zip(predicted, data.labels or (), strict=True)]
    assert report.accuracy == pytest.approx(np.mean(right))
    assert [graph.nodes.keys() for graph in report.placement] == [{"CPUExecutionProvider"}]


def test_verify_names_an_unknown_label(artifact: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "a", "label": "module"}))
    with pytest.raises(InputError, match="'module', expected one of: class, function, method"):
        verify(artifact, data=data)


@pytest.mark.usefixtures("impossible")
def test_failed_parity_is_marked_and_not_served_and_force_with_accepted_drift_replaces_it(
    classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = export(str(classifier), output, precision="int8")
    assert report.exit_code == 1
    failed = read_manifest(output)
    assert failed.status == "failed"
    with pytest.raises(CheckFailedError, match="marked failed"):
        Runner(output)

    with pytest.raises(InputError, match="--force"):
        export(str(classifier), output, precision="int8", allow_drift=True)
    assert read_manifest(output) == failed
    report = export(str(classifier), output, precision="int8", allow_drift=True, force=True)
    assert report.exit_code == 0
    assert not all(stage.holds for stage in report.stages)
    assert read_manifest(output).status == "accepted"
    assert Runner(output).classify(["a"]).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("impossible")
def test_a_failed_artifact_replaces_none_but_a_failed_one_and_is_left_beside_others(
    classifier: Path, tmp_path: Path
) -> None:
    output = make_artifact(tmp_path / "out")
    beside = make_artifact(tmp_path / "out.failed", status="failed")
    before, old = read_manifest(output), read_manifest(beside)
    report = export(str(classifier), output, precision="int8", force=True)
    assert (report.exit_code, report.path, report.kept) == (1, beside, output)
    assert read_manifest(output) == before
    failed = read_manifest(beside)
    assert (failed.status, failed.name) == ("failed", "out.failed")
    assert failed != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed"]
    assert report.to_dict()["kept"] == str(output)
    console = Console(record=True, width=1000)
    console.print(report.render())
    assert f"{output} is as it was, since the new one failed" in console.export_text()


def test_what_stands_where_a_failed_artifact_would_go_is_named_before_the_work(
    tmp_path: Path,
) -> None:
    output = make_artifact(tmp_path / "out")
    make_artifact(tmp_path / "out.failed")
    with pytest.raises(InputError, match=r"out\.failed is where an artifact goes that fails"):
        export("nowhere", output, force=True)


def test_what_exporters_log_below_an_error_is_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    """onnx_ir logs a whole traceback where it leaves a model as it is."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir.passes.common.shape_inference"):
        with quiet():
            logging.getLogger(name).warning("unheard")
        logging.getLogger(name).warning("heard")
    assert {record.message for record in caplog.records} == {"heard"}


def test_an_artifact_for_a_newer_runtime_says_what_to_install(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", minimum_onnxruntime="99.0")
    for use in (Runner, verify):
        with pytest.raises(MmoptError, match=r"needs onnxruntime 99\.0 or newer"):
            use(artifact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "--target tpu is not known, expected one of: cpu"),
        ({"precision": "fp16"}, "--precision fp16 is not available for target cpu"),
        ({"precision": "int3"}, "no such precision"),
        ({"calibration": Path("/nowhere.jsonl")}, "does not exist, expected a JSON Lines file"),
        ({"max_drop": 0.1}, "--max-drop is what --precision auto may lose"),
        ({"precision": "auto", "max_drop": -0.1}, "--max-drop -0.1 is no budget, expected zero"),
        ({"precision": "auto", "max_drop": float("nan")}, "--max-drop nan is no budget"),
        ({"swap": True}, "--adapters swap needs an adapter"),
        ({"options": {"block": 64}}, "--set block changes how weights become integers"),
        ({"options": {"block": 64}, "precision": "fp32"}, "--precision is fp32. Pass"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export("/no/such/model", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForNextSentencePrediction

    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    folder = tmp_path / "bert"
    BertForNextSentencePrediction(config).save_pretrained(folder)
    with pytest.raises(InputError, match="BertForNextSentencePrediction cannot be exported"):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""`verify`: what it runs, what it reports, and what it records."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

import mmopt_export.placement
import mmopt_export.verification
from mmopt_export import Runner, VerifyReport, read_manifest, verify
from mmopt_export.parity import GENERATED, Sample, read_samples, write_parity
from mmopt_export.placement import CPU, CUDA, PlacedNode
from mmopt_export.signing import read_private_key, sign
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError
from tiny_artifacts import edit_graph, edit_manifest, make_artifact, save_pair, seal


def subtract(model: onnx.ModelProto) -> None:
    """Another graph, of the same shapes."""
    model.graph.node[1].op_type = "Sub"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


def shown(report: VerifyReport) -> str:
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(report.render())
    return console.export_text().strip()


def test_the_report_is_one_json_document_with_every_part(tiny: Path) -> None:
    report = verify(tiny)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["holds"] is True
    assert document["signature"] is None
    assert document["accuracy"] is None
    (placement,) = document["placement"]
    assert placement["component"] == "model"
    assert placement["nodes"] == {CPU: 1}
    assert placement["fused"] == {"Gemm": [0, 1]}
    (stage,) = document["stages"]
    assert (stage["output"], stage["holds"]) == ("logits", True)


def test_the_report_for_a_terminal_says_what_was_found(tiny: Path) -> None:
    text = shown(dataclasses.replace(verify(tiny), accuracy=0.5, examples=8))
    assert "signature: none" in text
    assert "integrity: 5 files have their SHA-256" in text
    assert f"placement of model: {CPU} 1; 0 copies" in text
    assert "accuracy: 50.00% of 8 texts" in text
    assert text.endswith(f"{tiny}: holds")


def test_a_graph_that_computes_something_else_fails_parity(tiny: Path) -> None:
    """Its hashes are right: only running it tells."""
    edit_graph(tiny, subtract)
    report = verify(tiny)
    assert report.exit_code == 1
    assert not report.agrees
    assert report.placed


@pytest.fixture
def drifted(tmp_path: Path) -> Path:
    """An artifact whose graph computes something else, as its `parity.json` says."""
    artifact = make_artifact(tmp_path / "artifact", status="accepted")
    edit_graph(artifact, subtract)
    write_parity(artifact, verify(artifact).stages, read_samples(artifact))
    seal(artifact)
    return artifact


def test_accepted_drift_does_not_fail_and_is_said(drifted: Path) -> None:
    report = verify(drifted)
    assert (report.exit_code, report.agrees, report.grown) == (0, False, ())
    assert shown(report).endswith("holds (parity did not hold at export; its drift was accepted)")


@pytest.mark.parametrize("value", [3.0, np.nan], ids=["further-off", "nan"])
def test_accepted_drift_that_has_grown_fails(drifted: Path, value: float) -> None:
    (drifted / "model.onnx.data").write_bytes(np.full(15, value, np.float32).tobytes())
    seal(drifted)
    report = verify(drifted)
    assert (report.exit_code, report.placed) == (1, True)
    assert [stage.output for stage in report.grown] == ["logits"]
    assert shown(report).endswith(
        "DOES NOT HOLD (parity did not hold at export; its drift was accepted, and has grown)"
    )


@pytest.mark.parametrize("stages", [7, [7], [{"component": "model"}], None])
def test_recorded_parity_that_cannot_be_read_is_named(drifted: Path, stages: object) -> None:
    document = json.loads((drifted / "parity.json").read_text())
    (drifted / "parity.json").write_text(json.dumps({**document, "stages": stages}))
    seal(drifted)
    with pytest.raises(InputError, match="no parity that can be measured again"):
        verify(drifted)


def test_an_artifact_marked_failed_does_not_hold(tmp_path: Path) -> None:
    """The export measured more than the samples that it stored."""
    report = verify(make_artifact(tmp_path / "artifact", status="failed"))
    assert (report.exit_code, report.agrees) == (1, True)


def test_a_node_out_of_place_exits_1_and_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA artifact of which ONNX Runtime moved a node to the CPU, as its profile would say."""
    edit_manifest(tiny, lambda document: document.update(provider=CUDA))
    opened = mmopt_export.verification.open_session
    monkeypatch.setattr(
        mmopt_export.verification,
        "open_session",
        lambda model, *, provider, profile: opened(model, provider=CPU, profile=profile),
    )
    ran = [
        PlacedNode("product", "MatMul", CUDA, 12, ("float",)),
        PlacedNode("Memcpy_1", "MemcpyToHost", CUDA, 6, ("float",)),
        PlacedNode("sum", "Add", CPU, 6, ("float16",)),
    ]
    monkeypatch.setattr(mmopt_export.placement, "read_profile", lambda _path: ran)
    report = verify(tiny)
    assert report.exit_code == 1
    (placement,) = report.placement
    assert [node.name for node in placement.misplaced] == ["sum"]
    assert placement.copies == ("Memcpy_1",)


def test_a_graph_without_samples_cannot_be_verified(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", components=("vision", "text"))
    edit_manifest(
        artifact,
        lambda document: document["components"].update(audio=document["components"]["text"]),
    )
    with pytest.raises(CheckFailedError, match="no samples of the graph audio"):
        verify(artifact)


def test_an_unproven_artifact_is_served_only_after_record(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", status="unproven")
    with pytest.raises(CheckFailedError, match="was never run on"):
        Runner(artifact)
    assert verify(artifact).status == "unproven"
    assert read_manifest(artifact).status == "unproven"
    assert "It was never run on" in (artifact / "README.md").read_text()
    assert verify(artifact, record=True).status == "verified"
    assert "Parity with the PyTorch model holds" in (artifact / "README.md").read_text()
    before = read_manifest(artifact)
    assert before.status == "verified"
    assert Runner(artifact).manifest == before
    assert verify(artifact, record=True).exit_code == 0
    assert read_manifest(artifact) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_an_unproven_artifact_that_does_not_hold_is_not_recorded(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", status="unproven")
    edit_graph(artifact, subtract)
    assert verify(artifact, record=True).exit_code == 1
    assert read_manifest(artifact).status == "unproven"


@pytest.mark.parametrize("status", ["failed", "accepted"])
def test_record_changes_nothing_but_unproven_artifacts(tmp_path: Path, status: str) -> None:
    artifact = make_artifact(tmp_path / "artifact", status=status)
    verify(artifact, record=True)
    assert read_manifest(artifact).status == status


def test_recording_a_signed_artifact_signs_it_again(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", status="unproven")
    private, public = save_pair(tmp_path)
    sign(artifact, read_private_key(private))
    with pytest.raises(InputError, match="--record changes what was signed"):
        verify(artifact, record=True)
    assert verify(artifact, record=True, sign_key=private, public_key=public).exit_code == 0
    report = verify(artifact, public_key=public)
    assert (report.status, report.signature) == ("verified", "holds")


def test_sign_without_record_is_bad_usage(tiny: Path) -> None:
    with pytest.raises(InputError, match="Pass --record as well"):
        verify(tiny, sign_key=save_pair(tiny.parent)[0])


@pytest.mark.parametrize("refused", ["README.md", "mmopt.json", "mmopt.json.sig"])
def test_a_record_that_cannot_be_written_leaves_the_artifact_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    artifact = make_artifact(tmp_path / "artifact", status="unproven")
    private, public = save_pair(tmp_path)
    sign(artifact, read_private_key(private))
    replace = os.replace

    def refuse(source: Path, place: Path) -> None:
        if source.parent.name == "new" and source.name == refused:
            raise PermissionError(13, "Permission denied")
        replace(source, place)

    monkeypatch.setattr(mmopt_export.verification.os, "replace", refuse)
    with pytest.raises(MmoptError, match="could not be recorded") as caught:
        verify(artifact, record=True, sign_key=private)
    assert caught.value.exit_code == 3
    assert verify(artifact, public_key=public).status == "unproven"


def test_accuracy_is_refused_for_another_task_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tmp_path / "artifact", task="image-classification")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "class"}\n')
    monkeypatch.delattr(mmopt_export.verification, "open_session")
    with pytest.raises(InputError, match="this artifact is for image-classification"):
        verify(artifact, data=data)


def test_reports_compare_equal_for_equal_artifacts(tiny: Path) -> None:
    first, second = verify(tiny), verify(tiny)
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_tokens_of_a_graph_without_a_cache_are_one_message(tiny: Path) -> None:
    ids = np.zeros((1, 1), np.int64)
    scores = {"best": ids[..., None], "logits": np.zeros((1, 1, 1), np.float32)}
    stored = Sample("model", GENERATED, {"prompts": ids}, scores)
    write_parity(tiny, [], [*read_samples(tiny), stored])
    seal(tiny)
    with pytest.raises(InputError, match="the graph model has no cache to generate with"):
        verify(tiny)

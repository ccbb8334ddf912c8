"""Artifacts made by hand in milliseconds: a real graph with external data, samples, a manifest."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.card import write_card
from mmopt_export.manifest import (
    Component,
    Manifest,
    Source,
    TensorSpec,
    read_manifest,
    record_files,
)
from mmopt_export.parity import Sample, write_parity

LABELS = ("class", "function", "method")
_SHAPES = {"input": ("batch", 4), "logits": ("batch", 3)}


def weights() -> np.ndarray:
    """The graph's only large tensor, float32 `[4, 3]`."""
    return np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def make_graph() -> onnx.ModelProto:
    """`logits = input @ w + b`, its tensors still inside."""
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["input", "w"], ["product"], name="product"),
                helper.make_node("Add", ["product", "b"], ["logits"], name="sum"),
            ],
            "tiny",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, _SHAPES["input"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, _SHAPES["logits"])],
            [
                numpy_helper.from_array(weights(), "w"),
                numpy_helper.from_array(np.ones(3, np.float32), "b"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def text_component(labels: int) -> Component:
    """A graph of ids and a mask to one score per label."""
    tokens = ("batch", "sequence")
    return Component(
        file="model.onnx",
        inputs=(
            TensorSpec("input_ids", "int64", tokens),
            TensorSpec("attention_mask", "int64", tokens),
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", labels)),),
        precision="fp32",
        quantization=None,
    )


def make_manifest(name: str, components: Mapping[str, Component], **changes: Any) -> Manifest:
    """The manifest of a text classifier in fp32 on the CPU; `changes` are fields of it."""
    fields: dict[str, Any] = {
        "name": name,
        "task": "text-classification",
        "architecture": "Tiny",
        "target": "cpu",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "status": "verified",
        "opset": {"ai.onnx": 20},
        "minimum_onnxruntime": "1.30",
        "components": dict(components),
        "caches": {},
        "adapters": {},
        "labels": LABELS,
        "max_length": None,
        "preprocessing": {},
        "source": Source("tiny", "0" * 64, ()),
        "tools": {},
        "files": {},
    }
    return Manifest(**{**fields, **changes})


def make_artifact(folder: Path, *, components: Sequence[str] = ("model",), **changes: Any) -> Path:
    """Write an artifact that verifies; `changes` are fields of its manifest."""
    samples = []
    parts = {}
    for name in components:
        place = folder if len(components) == 1 else folder / name
        place.mkdir(parents=True, exist_ok=True)
        onnx.save_model(
            make_graph(),
            place / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=0,
        )
        fed = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
        expected = fed @ weights() + 1
        samples.append(Sample(name, "grid", {"input": fed}, {"logits": expected}))
        parts[name] = Component(
            file=(place / "model.onnx").relative_to(folder).as_posix(),
            inputs=(TensorSpec("input", "float32", _SHAPES["input"]),),
            outputs=(TensorSpec("logits", "float32", _SHAPES["logits"]),),
            precision="fp32",
            quantization=None,
        )
    write_parity(folder, [], samples)
    manifest = make_manifest(folder.name, parts, **changes)
    write_card(folder, manifest, [])
    manifest = dataclasses.replace(manifest, files=record_files(folder))
    manifest.write(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the manifest again with the hashes of what lies there now, as an attacker would."""
    manifest = read_manifest(folder)
    files = {
        name: record for name, record in record_files(folder).items() if name in manifest.files
    }
    dataclasses.replace(manifest, files={**manifest.files, **files}).write(folder)


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change `model.onnx` as a protobuf message, its external data unread, and seal the folder."""
    path = folder / "model.onnx"
    model = onnx.ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    seal(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `mmopt.json` as a JSON document."""
    path = folder / "mmopt.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def save_pair(folder: Path, key: Any = None, name: str = "key") -> tuple[Path, Path]:
    """Write both halves of a key as PEM, of a new Ed25519 one where none is given."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate() if key is None else key
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def refuse_sessions(monkeypatch: Any) -> None:
    """Opening anything fails the test with an error that no check raises."""
    import onnxruntime

    import mmopt_export.runtime
    import mmopt_export.verification

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a session was opened before the artifact was checked")

    monkeypatch.setattr(mmopt_export.runtime, "open_session", refuse)
    monkeypatch.setattr(mmopt_export.verification, "open_session", refuse)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


def watch_weights(monkeypatch: Any) -> list[int]:
    """Filled during an export: bytes of the model's weights that are there as a graph is opened."""
    import weakref

    import mmopt_export.pipeline as pipeline

    weights: list[weakref.ref[Any]] = []
    held: list[int] = []
    load, finish = pipeline.load_checkpoint, pipeline.finish

    def loaded(*arguments: Any, **options: Any) -> Any:
        checkpoint = load(*arguments, **options)
        weights.extend(weakref.ref(one) for one in checkpoint.model.parameters())
        assert weights
        return checkpoint

    def finished(*arguments: Any, **options: Any) -> Any:
        alive = [value for one in weights if (value := one()) is not None]
        held.append(sum(value.untyped_storage().nbytes() for value in alive))
        return finish(*arguments, **options)

    monkeypatch.setattr(pipeline, "load_checkpoint", loaded)
    monkeypatch.setattr(pipeline, "finish", finished)
    return held

"""`deploy triton`: the repository parses with Triton's own schema and holds what Triton opens."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import mmopt_export.deploy.triton as deploy
from mmopt_export import read_manifest
from mmopt_export.deploy.triton import deploy_triton, model_config
from mmopt_export.manifest import TensorSpec
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError
from tiny_artifacts import LABELS, edit_graph, edit_manifest, make_artifact, weights

CACHE = {
    "layers": [["past.0.key", "past.0.value", "present.0.key", "present.0.value"]],
    "heads": 2,
    "head_size": 8,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def parse() -> Callable[[str], Any]:
    """Parse a config.pbtxt with Triton's model_config.proto, which tritonclient carries."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("tritonclient, which carries Triton's schema, is not installed")
    # By its path: importing tritonclient.grpc needs grpcio, which pins an older protobuf.
    path = Path(package.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    from google.protobuf import text_format

    return lambda text: text_format.Parse(text, schema.ModelConfig())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


def config_of(artifact: Path, component: str = "model", max_batch: int = 32) -> str:
    manifest = read_manifest(artifact)
    inputs = manifest.components[component].inputs
    return model_config(manifest, component, "tiny", inputs, max_batch=max_batch, delay=100)


def test_a_classifier_becomes_one_model_that_batches(
    tiny: Path, tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    report = deploy_triton(tiny, tmp_path / "models", name="docs", max_batch=16, queue_delay=500)
    assert (report.exit_code, report.models, report.max_batch) == (0, ("docs",), {"docs": 16})
    model = tmp_path / "models" / "docs"
    config = parse((model / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("docs", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx"
    (one,) = config.input
    # 11 is TYPE_FP32; the batch is not among the dimensions.
    assert (one.name, one.data_type, list(one.dims)) == ("input", 11, [4])
    (out,) = config.output
    assert (out.name, list(out.dims), out.label_filename) == ("logits", [3], "labels.txt")
    assert (model / "labels.txt").read_text().split() == list(LABELS)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert not config.HasField("optimization")
    assert "up to 16 rows of waiting requests" in (model / "README.md").read_text()


def test_what_triton_opens_is_the_graph_with_its_weights(tiny: Path, tmp_path: Path) -> None:
    import onnxruntime

    report = deploy_triton(tiny, tmp_path / "models")
    model = tmp_path / "models" / "artifact"
    assert sorted(path.relative_to(model).as_posix() for path in model.rglob("*")) == [
        "1", "1/model.onnx", "1/model.onnx.data", "README.md", "config.pbtxt", "labels.txt",
        "mmopt.json",
    ]  # fmt: skip
    assert report.size == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    assert all(path.stat().st_nlink == 1 for path in model.rglob("*") if path.is_file())
    # The folder alone: nothing of the artifact is needed any more.
    for path in sorted(tiny.rglob("*"), reverse=True):
        path.unlink()
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    fed = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(session.run(None, {"input": fed})[0], fed @ weights() + 1)


def test_each_graph_becomes_a_model_of_its_own(tmp_path: Path, parse: Callable[[str], Any]) -> None:
    artifact = make_artifact(tmp_path / "clip", components=("text", "vision"))
    repository = tmp_path / "models"
    assert deploy_triton(artifact, repository).models == ("clip-text", "clip-vision")
    for name in ("clip-text", "clip-vision"):
        assert parse((repository / name / "config.pbtxt").read_text()).name == name
        assert (repository / name / "1" / "model.onnx.data").is_file()


def test_a_real_export_is_deployed_with_its_tokenizer_and_an_example_that_fits(
    artifact: Path, tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    deploy_triton(artifact, tmp_path / "models", name="docs")
    model = tmp_path / "models" / "docs"
    assert (model / "client" / "tokenizer.json").is_file()
    assert not (model / "client" / "parity.json").exists()
    config = parse((model / "config.pbtxt").read_text())
    assert [(one.name, list(one.dims)) for one in config.input] == [
        ("input_ids", [-1]),
        ("attention_mask", [-1]),
    ]
    readme = (model / "README.md").read_text()
    assert "turns text, pictures or sound into the inputs with the files in `client/`" in readme
    code = readme.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert '("input_ids", encoded.ids), ("attention_mask", encoded.attention_mask)' in code


def test_a_cuda_artifact_runs_on_the_gpu_without_tensor_float_32(
    tiny: Path, parse: Callable[[str], Any]
) -> None:
    edit_manifest(tiny, lambda document: document.update(provider="CUDAExecutionProvider"))
    config = parse(config_of(tiny))
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})

    def halve(document: dict[str, Any]) -> None:
        document["components"]["model"]["precision"] = "fp16"

    edit_manifest(tiny, halve)
    assert not parse(config_of(tiny)).HasField("optimization")


def test_a_decoder_with_a_cache_keeps_its_batch_dimension_and_forms_no_batches(
    tiny: Path, tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    edit_manifest(tiny, lambda document: document.update(caches={"model": CACHE}))
    assert deploy_triton(tiny, tmp_path / "models").max_batch == {"artifact": 0}
    model = tmp_path / "models" / "artifact"
    config = parse((model / "config.pbtxt").read_text())
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 4]
    assert "The KV cache travels with every request" in (model / "README.md").read_text()


def test_tensors_without_a_common_batch_dimension_are_not_batched(
    tiny: Path, tmp_path: Path
) -> None:
    def widen(document: dict[str, Any]) -> None:
        document["components"]["model"]["outputs"][0]["shape"] = ["images", 3]

    edit_manifest(tiny, widen)
    assert deploy_triton(tiny, tmp_path / "models").max_batch == {"artifact": 0}


@pytest.mark.parametrize(
    ("batched", "shape", "dims", "reshaped"),
    [
        (True, ("batch", "sequence", 8), [-1, 8], False),
        (True, ("batch",), [1], True),
        (False, (), [1], True),
        (False, ("past + sequence", 2), [-1, 2], False),
    ],
)
def test_dimensions_are_triton_s(
    tiny: Path,
    parse: Callable[[str], Any],
    batched: bool,
    shape: tuple[int | str, ...],
    dims: list[int],
    reshaped: bool,
) -> None:
    manifest = read_manifest(tiny)
    spec = TensorSpec("x", "int64", shape)
    text = model_config(manifest, "model", "tiny", [spec], max_batch=8 * batched, delay=0)
    (one,) = parse(text).input
    assert list(one.dims) == dims
    assert one.HasField("reshape") == reshaped
    assert list(one.reshape.shape) == []


def test_every_type_that_triton_has_is_one_of_its_schema(
    tiny: Path, parse: Callable[[str], Any]
) -> None:
    manifest = read_manifest(tiny)
    for dtype in deploy._TYPES:
        spec = TensorSpec("x", dtype, ("batch",))
        config = parse(model_config(manifest, "model", "m", [spec], max_batch=0, delay=0))
        assert config.input[0].data_type > 0
    with pytest.raises(InputError, match="of type complex64, which Triton does not have"):
        model_config(
            manifest, "model", "m", [TensorSpec("x", "complex64", (1,))], max_batch=0, delay=0
        )


@pytest.mark.parametrize("name", ['"quoted"', "back\\slash", "line\nbreak", "größe", "\x00"])
def test_names_are_quoted_so_that_they_stay_what_they_are(
    tiny: Path, parse: Callable[[str], Any], name: str
) -> None:
    spec = TensorSpec(name, "int64", ("batch",))
    text = model_config(read_manifest(tiny), "model", "m", [spec], max_batch=0, delay=0)
    assert parse(text).input[0].name == name


def test_inputs_with_a_default_are_left_out(
    tiny: Path, tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    """The factors of swappable adapters: Triton's backend knows only inputs that must be fed."""

    def add_default(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 4)), "lora_A"))

    edit_graph(tiny, add_default)

    def add_input(document: dict[str, Any]) -> None:
        document["components"]["model"]["inputs"].append(
            {"name": "lora_A", "dtype": "float64", "shape": ["rank", 4]}
        )

    (tiny / "a.onnx_adapter").write_bytes(b"x")

    def list_adapter(document: dict[str, Any]) -> None:
        add_input(document)
        document["adapters"] = {"first": {"model": "a.onnx_adapter"}}
        digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
        document["files"]["a.onnx_adapter"] = {"sha256": digest, "size": 1}

    edit_manifest(tiny, list_adapter)
    deploy_triton(tiny, tmp_path / "models")
    config = parse((tmp_path / "models" / "artifact" / "config.pbtxt").read_text())
    assert [one.name for one in config.input] == ["input"]
    assert config.max_batch_size == 32
    assert not (tmp_path / "models" / "artifact" / "client").exists()
    readme = (tmp_path / "models" / "artifact" / "README.md").read_text()
    assert "cannot feed inputs that have a default, which the adapters first are" in readme


def test_a_model_that_is_there_is_replaced_only_with_force(tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "1" / "model.onnx").write_bytes(b"mine")
    deploy_triton(tiny, repository, max_batch=8)
    with pytest.raises(InputError, match="holds an artifact already"):
        deploy_triton(tiny, repository, max_batch=4)
    config = repository / "artifact" / "config.pbtxt"
    assert "max_batch_size: 8" in config.read_text()
    deploy_triton(tiny, repository, max_batch=4, force=True)
    assert "max_batch_size: 4" in config.read_text()
    assert sorted(path.name for path in repository.iterdir()) == ["artifact", "other"]
    assert (repository / "other" / "1" / "model.onnx").read_bytes() == b"mine"


def test_force_replaces_no_model_that_somebody_else_wrote_or_added_to(
    tiny: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    (repository / "artifact" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match=r"lacks config\.pbtxt or mmopt\.json"):
        deploy_triton(tiny, repository, force=True)
    deploy_triton(tiny, repository, name="mine")
    (repository / "mine" / "2").mkdir()
    with pytest.raises(InputError, match="holds 2, so mmopt did not write it"):
        deploy_triton(tiny, repository, name="mine", force=True)
    assert (repository / "mine" / "2").is_dir()


def test_several_models_appear_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tmp_path / "clip", components=("text", "vision"))
    repository = tmp_path / "models"
    deploy_triton(artifact, repository, max_batch=8)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    copy, count = deploy.shutil.copyfile, 0

    def fill_the_disk(source: Path, place: Path) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(28, os.strerror(28))
        copy(source, place)

    monkeypatch.setattr(deploy.shutil, "copyfile", fill_the_disk)
    with pytest.raises(MmoptError, match="no space left") as caught:
        deploy_triton(artifact, repository, max_batch=4, force=True)
    assert caught.value.exit_code == 3
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in repository.iterdir()) == ["clip-text", "clip-vision"]


def test_what_does_not_hold_is_not_deployed(tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    edit_manifest(tiny, lambda document: document.update(status="failed"))
    with pytest.raises(CheckFailedError, match="marked failed"):
        deploy_triton(tiny, repository)
    edit_manifest(tiny, lambda document: document.update(status="verified"))
    (tiny / "model.onnx.data").write_bytes(b"x")
    with pytest.raises(CheckFailedError, match=r"model\.onnx\.data has 1 bytes"):
        deploy_triton(tiny, repository)
    assert not repository.exists()


@pytest.mark.parametrize("options", [{"max_batch": -1}, {"queue_delay": -1}])
def test_negative_numbers_are_refused(tiny: Path, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected no negative number"):
        deploy_triton(tiny, tmp_path / "models", **options)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-o", "a b", "größe"])
def test_a_name_that_triton_does_not_take_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a Triton model"):
        deploy_triton(tiny, tmp_path / "models", name=name)
    assert not (tmp_path / "models").exists()


def test_a_repository_within_the_artifact_is_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match="lies within"):
        deploy_triton(tiny, tiny / "models")


def test_the_command_prints_one_document_and_exits_as_the_contract_says(
    tiny: Path, tmp_path: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mmopt", "deploy", "triton", *arguments, "--json"],
            capture_output=True, text=True,
        )  # fmt: skip

    repository = str(tmp_path / "models")
    done = run(str(tiny), "-o", repository, "--name", "docs")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"] == ["docs"]
    again = run(str(tiny), "-o", repository, "--name", "docs")
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert json.loads(again.stdout)["exit_code"] == 2
    assert run(str(tiny), "-o", repository, "--name", "docs", "--force").returncode == 0
    (tiny / "model.onnx").write_bytes(b"x")
    assert run(str(tiny), "-o", repository, "--name", "other").returncode == 1

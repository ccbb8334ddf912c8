"""Each attack is a real file on disk, and is named before ONNX Runtime is there to fall for it.

`seal` writes the manifest with the right hashes of the changed files: whoever makes such an
artifact also makes its manifest.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt_export import Runner, read_manifest, verify
from mmopt_export.integrity import MOST_GRAPH_BYTES, integrity_errors
from mmopt_export.manifest import record_files
from mmopt_kernels.errors import CheckFailedError, InputError
from tiny_artifacts import (
    edit_graph,
    edit_manifest,
    make_artifact,
    refuse_sessions,
    seal,
    weights,
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_sessions(monkeypatch)


def test_a_sound_artifact_has_no_errors_verifies_and_runs(tiny: Path) -> None:
    assert integrity_errors(tiny, read_manifest(tiny)) == []
    report = verify(tiny)
    assert (report.exit_code, report.files) == (0, 5)
    fed = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(
        Runner(tiny).run({"input": fed})["logits"], fed @ weights() + 1, rtol=1e-5
    )


def test_an_artifact_of_several_graphs_is_checked_and_run_graph_by_graph(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", components=("vision", "text"))
    report = verify(artifact)
    assert report.exit_code == 0
    assert [placement.component for placement in report.placement] == ["text", "vision"]
    assert {stage.component for stage in report.stages} == {"vision", "text"}
    flip_a_bit(artifact, "text/model.onnx.data")
    with pytest.raises(CheckFailedError, match=r"text/model\.onnx\.data has another SHA-256"):
        verify(artifact)


# What changes the folder and not the manifest: transport damage, and clumsy attacks.


def flip_a_bit(folder: Path, name: str = "model.onnx.data") -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)


def flip_a_bit_of_the_graph(folder: Path) -> None:
    flip_a_bit(folder, "model.onnx")


def truncate(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def add(folder: Path) -> None:
    (folder / "custom_ops.so").write_bytes(b"x")


def add_in_a_folder(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x").write_bytes(b"x")


def link_a_file(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def link_to_nothing(folder: Path) -> None:
    (folder / "dangling").symlink_to("/no/such/file")


def link_a_folder(folder: Path) -> None:
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "x").write_bytes(b"x")
    (folder / "inside").symlink_to(folder.parent / "outside", target_is_directory=True)


def link_hard(folder: Path) -> None:
    os.link(folder / "model.onnx.data", folder.parent / "other-name")


def pipe(folder: Path) -> None:
    """Opening it would wait for ever."""
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")


def unix_socket(folder: Path) -> None:
    here = os.getcwd()
    # A socket's path has at most 107 bytes.
    os.chdir(folder)
    try:
        socket.socket(socket.AF_UNIX).bind("socket")
    finally:
        os.chdir(here)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, r"model\.onnx\.data has another SHA-256"),
        (flip_a_bit_of_the_graph, r"model\.onnx has another SHA-256"),
        (truncate, r"model\.onnx\.data has 59 bytes, expected 60"),
        (remove, r"model\.onnx\.data is missing"),
        (add, r"custom_ops\.so is not listed in mmopt\.json"),
        (add_in_a_folder, r"deep/er/x is not listed"),
        (link_a_file, r"model\.onnx\.data is a symbolic link"),
        (link_to_nothing, "dangling is a symbolic link"),
        (link_a_folder, "inside is a symbolic link"),
        (link_hard, r"model\.onnx\.data is a hard link \(2 names\)"),
        (pipe, r"model\.onnx\.data is a pipe, socket or device"),
        (unix_socket, "socket is a pipe, socket or device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_folder_is_named_and_not_opened(
    tiny: Path, change: Callable[[Path], None], message: str
) -> None:
    change(tiny)
    for check in (verify, Runner):
        with pytest.raises(CheckFailedError, match=message) as caught:
            check(tiny)
        assert caught.value.exit_code == 1


# What changes the graph, with a manifest that fits: the file's hash is right.


def tensor(model: onnx.ModelProto) -> onnx.TensorProto:
    (found,) = [one for one in model.graph.initializer if one.name == "w"]
    return found


def external(of: onnx.TensorProto, **entries: str | None) -> None:
    """Set entries of a tensor's external data, or with None remove them."""
    kept = {entry.key: entry.value for entry in of.external_data}
    kept = {key: value for key, value in (kept | entries).items() if value is not None}
    del of.external_data[:]
    for key, value in kept.items():
        of.external_data.add(key=key, value=value)


def at(**entries: str | None) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external(tensor(model), **entries)


def shaped(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor(model).dims[:] = dims

    return change


def foreign_tensor() -> onnx.TensorProto:
    """A tensor whose data is a file of the machine."""
    made = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=[4])
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="location", value="../../../etc/passwd")
    return made


def constant(value: onnx.TensorProto, output: str = "stolen") -> onnx.NodeProto:
    node = helper.make_node("Constant", [], [output], name=f"make_{output}")
    node.attribute.append(helper.make_attribute("value", value))
    return node


def in_a_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(constant(foreign_tensor()))


def in_a_list_of_tensors(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("many", [foreign_tensor()]))


def in_a_subgraph(model: onnx.ModelProto) -> None:
    """Within an If within an If, as an initializer."""
    output = helper.make_tensor_value_info("stolen", TensorProto.UINT8, [4])
    inner = helper.make_graph([], "inner", [], [output], [foreign_tensor()])
    branches = {"then_branch": inner, "else_branch": inner}
    middle = helper.make_graph(
        [helper.make_node("If", ["yes"], ["x"], **branches)], "middle", [], [output]
    )
    branches = {"then_branch": middle, "else_branch": middle}
    model.graph.node.append(helper.make_node("If", ["yes"], ["x"], **branches))


def in_a_function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function(
            "local", "Steal", [], ["stolen"], [constant(foreign_tensor())],
            [helper.make_opsetid("", 20)],
        )
    )  # fmt: skip


def in_a_function_default(model: onnx.ModelProto) -> None:
    in_a_function(model)
    function = model.functions[0]
    del function.node[:]
    function.attribute_proto.append(helper.make_attribute("value", foreign_tensor()))


def in_training_info(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(foreign_tensor())


def sparse(model: onnx.ModelProto) -> None:
    """One value, which ONNX Runtime makes 2^40 of."""
    values = numpy_helper.from_array(np.ones(1, np.float32), "bomb")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "at")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, indices, [1 << 20, 1 << 20])
    )


def sparse_in_a_node(model: onnx.ModelProto) -> None:
    sparse(model)
    made = onnx.SparseTensorProto()
    made.CopyFrom(model.graph.sparse_initializer[0])
    del model.graph.sparse_initializer[:]
    node = helper.make_node("Constant", [], ["bomb"])
    node.attribute.append(helper.make_attribute("sparse_value", made))
    model.graph.node.append(node)


def embedded(raw: bytes, dims: list[int], **fields: Any) -> Callable[[onnx.ModelProto], None]:
    """A tensor with its data inside, which does not have what its shape claims."""

    def change(model: onnx.ModelProto) -> None:
        made = TensorProto(name="bomb", data_type=TensorProto.FLOAT, dims=dims, **fields)
        if raw:
            made.raw_data = raw
        model.graph.initializer.append(made)

    return change


def strings(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(
        TensorProto(name="bomb", data_type=TensorProto.STRING, dims=[1 << 40], string_data=[b"x"])
    )


def raw_strings(model: onnx.ModelProto) -> None:
    strings(model)
    del model.graph.initializer[-1].string_data[:]
    model.graph.initializer[-1].raw_data = b"x"


def inside_and_outside(model: onnx.ModelProto) -> None:
    tensor(model).raw_data = weights().tobytes()


def typed_inside_and_outside(model: onnx.ModelProto) -> None:
    tensor(model).float_data.extend([1.0] * 12)


def outside_unsaid(model: onnx.ModelProto) -> None:
    """External data on a tensor that does not say it is external: readers may differ."""
    tensor(model).data_location = TensorProto.DEFAULT


def said_twice(model: onnx.ModelProto) -> None:
    tensor(model).external_data.add(key="location", value="../outside")


def segment(model: onnx.ModelProto) -> None:
    tensor(model).segment.begin = 0
    tensor(model).segment.end = 1 << 40


def of_type(number: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor(model).data_type = number

    return change


def engine(model: onnx.ModelProto) -> None:
    node = helper.make_node("EPContext", ["input"], ["x"], name="context", domain="com.microsoft")
    node.attribute.append(helper.make_attribute("ep_cache_context", "../../engine.bin"))
    node.attribute.append(helper.make_attribute("embed_mode", 0))
    model.graph.node.append(node)


OUTSIDE = "the tensor 'w' has its data in "
STOLEN = "the tensor 'stolen' has its data in '../../../etc/passwd', which leaves the folder"
ATTACKS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    # Where the data lies.
    "parent": (at(location="../secret"), OUTSIDE + "'../secret', which leaves the folder"),
    "inner-parent": (at(location="a/../../secret"), "which leaves the folder"),
    "there-and-back": (at(location="a/../model.onnx.data"), "which leaves the folder"),
    "absolute": (at(location="/etc/passwd"), "'/etc/passwd', which is an absolute path"),
    "drive": (at(location="C:/secret"), "which is an absolute path"),
    "backslash": (at(location="..\\secret"), "which is no path"),
    "nul": (at(location="model.onnx.data\0.txt"), "which is no path"),
    "nowhere": (at(location=None), "has its data in '', which is no path"),
    "unlisted": (at(location="other.data"), "'other.data', which is no sound file"),
    "manifest": (at(location="mmopt.json"), "'mmopt.json', which is no sound file"),
    # ONNX Runtime reads this name as "the offset is an address in my memory".
    "address": (
        at(location="*/_ORT_MEM_ADDR_/*", offset="140737488355328"),
        r"_ORT_MEM_ADDR_/\*', which is no sound file",
    ),
    "node": (in_a_node, STOLEN),
    "tensor-list": (in_a_list_of_tensors, STOLEN),
    "subgraph": (in_a_subgraph, STOLEN),
    "function": (in_a_function, STOLEN),
    "function-default": (in_a_function_default, STOLEN),
    "training": (in_training_info, STOLEN),
    "engine": (engine, "the node 'context' is an EPContext"),
    # How much there is.
    "beyond": (at(offset="16"), r"claims model\.onnx\.data up to byte 64, which has 60"),
    "huge-offset": (at(offset=str(1 << 62)), r"claims model\.onnx\.data up to byte"),
    "wrapped-offset": (at(offset=str((1 << 64) - 48)), "has the offset '18446744073709551568'"),
    "negative-offset": (at(offset="-16"), "has the offset '-16', expected a count of bytes"),
    "odd-offset": (at(offset="0x10"), "has the offset '0x10'"),
    "spaced-offset": (at(offset=" 0"), "has the offset ' 0'"),
    "no-digits": (at(offset="٣"), "has the offset"),
    "short": (at(length="4"), r"has 4 bytes in model\.onnx\.data, its shape claims 48"),
    "long": (at(length="60"), "has 60 bytes"),
    "negative-length": (at(length="-1"), "has the length '-1'"),
    "no-length": (shaped(1 << 20, 1), "its shape claims 4194304"),
    "no-length-beyond": (
        lambda model: (at(length=None)(model), shaped(100, 3)(model))[0],
        r"claims model\.onnx\.data up to byte 1200",
    ),
    "negative-shape": (shaped(-4, -3), r"has the shape \[-4, -3\], expected no negative"),
    "overflow": (shaped(1 << 32, 1 << 32), "more bytes than there can be"),
    # Its product is 12 in 64 bits.
    "wrapped-shape": (shaped(1 << 62, 4, 3), "more bytes than there can be"),
    "other-type": (of_type(TensorProto.DOUBLE), "has 48 bytes"),
    "unknown-type": (of_type(99), "has the unknown type 99"),
    "no-type": (of_type(0), "has the unknown type 0"),
    "outside-strings": (of_type(TensorProto.STRING), "is of strings, which cannot lie in a file"),
    "embedded": (embedded(b"1234", [1 << 30]), "has 4 bytes, its shape claims 4294967296"),
    "embedded-empty": (embedded(b"", [1 << 30]), "has no data, its shape claims 1073741824"),
    "embedded-typed": (embedded(b"", [9], float_data=[1.0]), "has 1 values, its shape claims 9"),
    "embedded-foreign": (embedded(b"", [1], int64_data=[1]), "expected only what its type has"),
    "embedded-twice": (
        embedded(b"", [1], float_data=[1.0], int32_data=[1]),
        "has float_data and int32_data, expected only what its type has",
    ),
    "embedded-both": (embedded(b"1234", [1], float_data=[1.0]), "has raw data and float_data"),
    "strings": (strings, "has 1 values, its shape claims 1099511627776"),
    "raw-strings": (raw_strings, "has raw data, which strings have not"),
    "sparse": (sparse, "the tensor 'bomb' is sparse"),
    "sparse-node": (sparse_in_a_node, "the tensor 'bomb' is sparse"),
    # What readers may take one way or the other.
    "inside-and-outside": (inside_and_outside, "has data inside as well"),
    "typed-inside-and-outside": (typed_inside_and_outside, "has data inside as well"),
    "outside-unsaid": (outside_unsaid, "says that it lies in a file as well"),
    "twice": (said_twice, "says twice where its data lies"),
    "unknown-key": (at(basepath="/etc"), "has the unknown external data key 'basepath'"),
    "segment": (segment, "is a segment of another"),
}


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("name", ATTACKS)
def test_a_graph_that_reaches_out_or_claims_too_much_is_not_opened(tiny: Path, name: str) -> None:
    change, message = ATTACKS[name]
    edit_graph(tiny, change)
    for check in (verify, Runner):
        with pytest.raises(CheckFailedError, match=message) as caught:
            check(tiny)
        # The hashes are right: it is the content that was found.
        assert "SHA-256" not in str(caught.value)


def test_external_data_may_be_named_from_the_folder_that_the_graph_is_in(tiny: Path) -> None:
    edit_graph(tiny, at(location="./model.onnx.data"))
    assert verify(tiny).exit_code == 0


@pytest.mark.usefixtures("no_session")
def test_external_data_through_a_linked_folder_is_named_and_not_opened(tiny: Path) -> None:
    outside = tiny.parent / "outside"
    outside.mkdir()
    shutil.copy(tiny / "model.onnx.data", outside / "model.onnx.data")
    (tiny / "inside").symlink_to(outside, target_is_directory=True)
    edit_graph(tiny, at(location="inside/model.onnx.data"))
    with pytest.raises(CheckFailedError, match="inside is a symbolic link") as caught:
        verify(tiny)
    assert "'inside/model.onnx.data', which is no sound file" in str(caught.value)


@pytest.mark.usefixtures("no_session")
def test_external_data_in_a_linked_file_that_the_manifest_lists_is_not_opened(tiny: Path) -> None:
    """Its hash would be right: only the link is wrong."""
    secret = tiny.parent / "secret"
    shutil.copy(tiny / "model.onnx.data", secret)
    for link in (Path.symlink_to, Path.hardlink_to):
        (tiny / "model.onnx.data").unlink()
        link(tiny / "model.onnx.data", secret)
        with pytest.raises(CheckFailedError, match=r"model\.onnx\.data is a (symbolic|hard) link"):
            verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("../secret", "lists '../secret', which leaves the folder"),
        ("/etc/passwd", "lists '/etc/passwd', which is an absolute path"),
        ("./model.onnx", "a path not in its shortest form"),
        ("", "lists '', which is no path"),
        ("mmopt.json", "cannot hold its own hash"),
        ("mmopt.json.sig", "cannot hold its own hash"),
    ],
)
def test_a_manifest_that_lists_a_path_outside_is_not_followed(
    tiny: Path, listed: str, message: str
) -> None:
    (tiny.parent / "secret").write_bytes(b"x")
    # The right hash of `secret`, so that following the path would find nothing wrong.
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    record = {"sha256": digest, "size": 1}
    edit_manifest(tiny, lambda document: document["files"].update({listed: record}))
    with pytest.raises(CheckFailedError, match=message):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("file", ["other.onnx", "model.onnx.data", "/tmp/model.onnx", "model.ort"])
def test_a_component_must_be_a_listed_onnx_file(tiny: Path, file: str) -> None:
    edit_manifest(tiny, lambda document: document["components"]["model"].update(file=file))
    with pytest.raises(CheckFailedError, match=r"expected a listed \.onnx file"):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("adapters", "fault"),
    [
        ({"model": "../outside/evil.onnx_adapter"}, r"'\.\./outside/evil\.onnx_adapter' for model"),
        ({"model": "/etc/evil.onnx_adapter"}, "'/etc/evil.onnx_adapter' for model"),
        ({"model": "adapters/absent.onnx_adapter"}, "'adapters/absent.onnx_adapter' for model"),
        ({"model": "model.onnx.data"}, "'model.onnx.data' for model"),
        ({"text": "a.onnx_adapter"}, "is for 'text', which is no graph here"),
    ],
    ids=["outside", "absolute", "absent", "another-kind", "no-graph"],
)
def test_an_adapter_must_be_a_listed_adapter_file_of_a_graph(
    tiny: Path, adapters: dict[str, str], fault: str
) -> None:
    (tiny.parent / "outside").mkdir()
    (tiny.parent / "outside" / "evil.onnx_adapter").write_bytes(b"x")
    edit_manifest(tiny, lambda document: document.update(adapters={"first": adapters}))
    for check in (verify, Runner):
        with pytest.raises(CheckFailedError, match=rf"the adapter first .*{fault}"):
            check(tiny)


@pytest.mark.usefixtures("no_session")
def test_a_file_that_is_no_graph_is_not_opened(tiny: Path) -> None:
    for content in (b"not a model", b"\x3a\xff\xff\xff\xff\x0f"):
        (tiny / "model.onnx").write_bytes(content)
        seal(tiny)
        with pytest.raises(CheckFailedError, match=r"model\.onnx: is no ONNX graph"):
            verify(tiny)


@pytest.mark.usefixtures("no_session")
def test_a_graph_too_large_to_parse_is_not_read(tiny: Path) -> None:
    with (tiny / "model.onnx").open("r+b") as file:
        file.truncate(MOST_GRAPH_BYTES + 1)  # a hole: it takes no space
    seal(tiny)
    with pytest.raises(CheckFailedError, match=r"model\.onnx: has 268435457 bytes, expected at"):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
def test_subgraphs_nested_without_end_are_refused_by_the_parser(tiny: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        """A field of bytes in protobuf's wire format: key, length as a varint, content."""
        size, length = len(content), b""
        while size >= 128:
            length += bytes([size % 128 + 128])
            size //= 128
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(10_000):
        # GraphProto.node, NodeProto.attribute, AttributeProto.g
        graph = field(1, field(5, field(6, graph)))
    (tiny / "model.onnx").write_bytes(field(7, graph))
    seal(tiny)
    with pytest.raises(CheckFailedError, match="is no ONNX graph"):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"schema": 1}', "schema version 1, expected 2"),
        ('{"schema": 2}', "damaged"),
        ('{"schema": 2, "schema": 3}', "the key 'schema' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        ("[" * 100_000, "nested 100000 deep, expected at most 32"),
        ('{"a": "' + "[" * 100 + '", "schema": 9}', "schema version 9"),
        ('{"a": "\\"' + "[" * 100 + '", "schema": 9}', "schema version 9"),
        ('"' + "[" * 100_000, "nested 100000 deep"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"a": "' + "x" * (16 << 20) + '"}', "is larger than 16777216 bytes"),
    ],
    ids=[
        *("cut", "list", "old", "fields", "twice", "inner", "deep", "string", "escaped"),
        *("unended", "nan", "digits", "large"),
    ],
)
def test_a_manifest_that_is_damaged_or_meant_to_hurt_is_refused(
    tiny: Path, text: str, message: str
) -> None:
    (tiny / "mmopt.json").write_text(text)
    for check in (verify, Runner):
        with pytest.raises(InputError, match=message):
            check(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("minimum_onnxruntime", "new"),
        ("precision", "fp8"),
        ("status", "Verified"),
        ("status", None),
        ("components", [1]),
        ("max_length", "x"),
        ("max_length", 0),
        ("adapters", {"a": ["x"]}),
    ],
)
def test_a_manifest_whose_values_mean_nothing_is_damaged(
    tiny: Path, field: str, value: object
) -> None:
    edit_manifest(tiny, lambda document: document.update({field: value}))
    with pytest.raises(InputError, match="is damaged: "):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("parity.json", b"[" * 100_000),
        ("parity.json", b'{"samples": 1}'),
        # A header of 2^60 bytes.
        ("samples.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
    ],
    ids=["deep", "empty", "header"],
)
def test_samples_that_are_meant_to_hurt_are_refused(tiny: Path, name: str, content: bytes) -> None:
    (tiny / name).write_bytes(content)
    seal(tiny)
    with pytest.raises(InputError, match="holds no samples that parity can be checked on"):
        verify(tiny)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_a_tokenizer_that_is_none_is_one_message(tiny: Path, content: bytes) -> None:
    """Its hash is right; sessions, which take longer to open, come after it."""
    (tiny / "tokenizer.json").write_bytes(content)
    read_manifest(tiny).with_files(record_files(tiny)).write(tiny)
    with pytest.raises(InputError, match=r"tokenizer\.json holds no tokenizer \(.+\)\. Export"):
        Runner(tiny)


@pytest.mark.usefixtures("no_session")
def test_a_manifest_that_is_missing_a_link_or_a_pipe_is_refused(tiny: Path) -> None:
    manifest = tiny / "mmopt.json"
    manifest.rename(tiny.parent / "mmopt.json")
    with pytest.raises(InputError, match=r"not an artifact: it has no mmopt\.json"):
        verify(tiny)
    manifest.symlink_to(tiny.parent / "mmopt.json")
    with pytest.raises(InputError, match="is no plain file"):
        verify(tiny)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(InputError, match="not an artifact"):
        verify(tiny)


def test_every_type_of_tensor_that_onnx_can_store_is_measured_right(tiny: Path) -> None:
    """Awkward counts: 7 values of 4 bits take 4 bytes, of 2 bits 2."""

    def change(model: onnx.ModelProto) -> None:
        for name, number in TensorProto.DataType.items():
            # onnxruntime has no 6-bit floats, and a tensor of no type is refused above.
            if name in ("UNDEFINED", "FLOAT6E2M3", "FLOAT6E3M2"):
                continue
            values = [b"x"] * 7 if name == "STRING" else [1] * 7
            model.graph.initializer.append(helper.make_tensor(name, number, [7], values))
            if name != "STRING":
                array = np.ones(7, helper.tensor_dtype_to_np_dtype(number))
                model.graph.initializer.append(numpy_helper.from_array(array, f"{name}_raw"))
        model.graph.initializer.append(TensorProto(name="none", data_type=1, dims=[0, 5]))

    edit_graph(tiny, change)
    assert integrity_errors(tiny, read_manifest(tiny)) == []


def test_a_signature_and_empty_folders_are_no_foreign_files(tiny: Path) -> None:
    (tiny / "mmopt.json.sig").write_bytes(b"x" * 64)
    (tiny / "empty").mkdir()
    assert integrity_errors(tiny, read_manifest(tiny)) == []
    (tiny / "empty" / "mmopt.json").write_bytes(b"x")
    assert integrity_errors(tiny, read_manifest(tiny)) == [
        "empty/mmopt.json is not listed in mmopt.json"
    ]


def test_a_folder_of_far_too_many_files_is_not_walked_to_the_end(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmopt_export.integrity._MOST_ENTRIES", 10)
    for index in range(10):
        (tiny / f"more-{index}").write_bytes(b"")
    errors = integrity_errors(tiny, read_manifest(tiny))
    assert "it holds more than 10 files and folders" in errors


def test_nothing_imports_onnxruntime_before_the_files_are_checked(tiny: Path) -> None:
    edit_graph(tiny, at(location="../secret"))
    code = (
        "import sys; from pathlib import Path\n"
        "from mmopt_export import Runner, verify\n"
        "from mmopt_kernels.errors import CheckFailedError\n"
        "for check in (verify, Runner):\n"
        f"    try: check(Path({str(tiny)!r}))\n"
        "    except CheckFailedError as error: print('leaves the folder' in str(error))\n"
        "print(sorted({'onnxruntime', 'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split("\n")[:3] == ["True", "True", "[]"], result.stderr

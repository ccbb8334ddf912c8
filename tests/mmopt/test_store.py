"""A stored graph: what a fresh process takes from it, and what it refuses to take."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from packaging.version import Version
from torch import nn

import mmopt
from mmopt.compilation import store as stores
from mmopt.compilation.checkpoint import compile_checkpoint
from mmopt.compilation.parity import compare, gradients
from mmopt.compilation.state import ModelState, describe
from mmopt.compilation.trust import key_file
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError

if Version(torch.__version__) < stores.OLDEST_TORCH:
    pytest.skip("this torch cannot store a graph", allow_module_level=True)


def classifier(*, seed=0, **lora):
    torch.manual_seed(seed)
    return optimized(families.bert(**families.ONE), **lora).eval()


def decoder():
    torch.manual_seed(0)
    return optimized(families.llama(**families.ONE, attention_dropout=0.1)).train()


def optimized(base, **lora):
    model = families.with_adapter(base, **lora)
    mmopt.optimize(model)
    return model


def tokens(length, *, labels=False):
    torch.manual_seed(length)
    ids = torch.randint(5, 99, (3, length))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made["attention_mask"][1, length // 2 :] = 0
    return {**made, "labels": ids} if labels else made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user of their own: the signing key does not land in the developer's home."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def stored(home, tmp_path_factory):
    """A store of the classifier in inference mode, and its SHA-256."""
    folder = tmp_path_factory.mktemp("store") / "bert"
    with pytest.MonkeyPatch.context() as patch:
        # Only the graph that is stored goes through Inductor.
        patch.setattr("mmopt.compilation.model.compile_fx", lambda graph, _inputs: graph.forward)
        compiled = mmopt.compile(classifier(), tokens(12), mode="infer")
        return folder, compiled.save(folder, tokens(12))


@pytest.fixture
def copied(stored, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(stored[0], tmp_path / "copy")


def test_a_torch_that_cannot_store_is_said_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "OLDEST_TORCH", Version("99.0"))
    said = r"a store needs torch 99\.0 or newer, and this is 2\."
    compiled = mmopt.CompiledModel(classifier(), mode="infer", dynamic=True)
    with pytest.raises(InputError, match=said):
        compiled.save(tmp_path / "store", tokens(12))
    with pytest.raises(InputError, match=said):
        compile_checkpoint("no-such-model", output=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def fresh_process(code, *, scratch, home):
    """Run `code` where nothing is cached and the C++ compiler tells its version and no more."""
    here = Path(__file__).resolve()
    compiler = scratch / "bin" / "g++"
    compiler.parent.mkdir()
    real = shutil.which("g++")
    # What it says of itself would name the path by which it was called.
    told = subprocess.run([real, "-v"], capture_output=True, text=True, check=True).stderr
    (scratch / "told").write_text(told.replace(f"COLLECT_GCC={real}", "COLLECT_GCC=g++"))
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in\n-v) cat {scratch}/told >&2; exit 0;;\n'
        f'--version|-dump*version) exec {real} "$@";;\nesac\n'
        f'echo "$*" >> {scratch}/compiled\nexit 1\n'
    )
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "cache"),
        "XDG_CONFIG_HOME": str(home),
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)]),
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert not (scratch / "compiled").exists(), (scratch / "compiled").read_text()


def test_a_fresh_process_runs_the_graph_at_every_length_without_compiling(stored, home, tmp_path):
    code = f"""
import torch, mmopt
from test_store import classifier, tokens
torch.set_num_threads({torch.get_num_threads()})
compiled = mmopt.load_compiled({str(stored[0])!r}, classifier())
out = {{length: compiled(**tokens(length)).logits for length in (12, 7, 15)}}
assert compiled.recompiles == () and compiled.graph_breaks == ()
assert not torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    fresh_process(code, scratch=tmp_path, home=home)
    model = classifier()
    with torch.no_grad():
        for length, logits in torch.load(tmp_path / "out.pt").items():
            torch.testing.assert_close(logits, model(**tokens(length)).logits, rtol=1e-4, atol=1e-5)


def test_other_values_of_the_same_model_are_taken_as_they_are(stored):
    """A store holds no weights."""
    model = classifier(seed=5)
    compiled = mmopt.load_compiled(stored[0], model)
    with torch.no_grad():
        expected = model(**tokens(9)).logits
    torch.testing.assert_close(compiled(**tokens(9)).logits, expected, rtol=1e-4, atol=1e-5)
    assert compiled.recompiles == ()


def test_a_call_that_the_graph_does_not_fit_is_compiled_and_counted(stored, monkeypatch):
    """The reason names what changed; once it is changed back, the graph is used again."""
    lowered = []

    def lower(graph, _inputs):
        lowered.append(graph)
        return graph.forward

    monkeypatch.setattr("mmopt.compilation.model.compile_fx", lower)
    model = classifier()
    compiled = mmopt.load_compiled(stored[0], model)
    plain = compiled(**tokens(9)).logits
    with model.disable_adapter():
        without = compiled(**tokens(9)).logits
        torch.testing.assert_close(without, model(**tokens(9)).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, plain)
    (found,) = compiled.recompiles
    assert "adapters_disabled is True, was False" in found.reason
    assert found.file.endswith("peft_model.py")
    torch.testing.assert_close(compiled(**tokens(9)).logits, plain)
    assert len(lowered) == 1

    handle = model.base_model.model.bert.register_forward_hook(lambda *_: None)
    compiled(**tokens(9))
    handle.remove()
    assert re.search(
        r"_forward_hooks is collections.OrderedDict of \d+, was collections.OrderedDict of nothing",
        compiled.recompiles[1].reason,
    )
    compiled(**{**tokens(9), "attention_mask": torch.ones(3, 9)})
    assert "a dtype, size or mode of torch" in compiled.recompiles[2].reason


@torch.no_grad()
def test_what_is_changed_in_place_or_replaced_is_seen(stored):
    """The same object afterwards, so that what it was has to be remembered in words."""
    model = classifier()
    graph = mmopt.load_compiled(stored[0], model)._stored
    layer = model.base_model.model.bert.encoder.layer[0].attention.output.dense
    assert graph.mismatch(model, tokens(9)) is None
    reason = graph.mismatch(model, {"input_ids": tokens(9)["input_ids"]})
    assert reason == "the arguments are ['input_ids'], were ['attention_mask', 'input_ids']"

    layer.base_layer.weight.requires_grad_(True)
    reason = graph.mismatch(model, tokens(9))
    assert re.search(r"weight is torch.float32 .*, trained, was torch.float32 [^t]*$", reason)
    layer.base_layer.weight.requires_grad_(False)

    norm = model.base_model.model.bert.encoder.layer[0].output.LayerNorm
    norm.forward = lambda x: x
    assert "LayerNorm with a forward of its own, was" in graph.mismatch(model, tokens(9))
    with pytest.raises(InputError, match="LayerNorm with a forward of its own, was"):
        mmopt.load_compiled(stored[0], model)
    del norm.forward
    assert graph.mismatch(model, tokens(9)) is None

    model.base_model.model.bert.encoder.layer[0].output.LayerNorm = copy.deepcopy(norm)
    assert graph.mismatch(model, tokens(9)).endswith("LayerNorm was replaced")


@torch.no_grad()
def test_what_was_not_there_is_seen_once_it_is(stored):
    """A method of the instance's own hides the one of its class, which was traced."""
    model = classifier()
    graph = mmopt.load_compiled(stored[0], model)._stored
    layer = model.base_model.model.bert.encoder.layer[0]
    layer.feed_forward_chunk = lambda attention_output: attention_output
    changed = r"layer\.0\.feed_forward_chunk is function .*<lambda>, was not there"
    assert re.search(changed, graph.mismatch(model, tokens(9)))
    with pytest.raises(InputError, match=changed):
        mmopt.load_compiled(stored[0], model)
    del layer.feed_forward_chunk
    assert graph.mismatch(model, tokens(9)) is None


@pytest.mark.parametrize(
    ("asked", "come", "reason"),
    [
        (
            ("model.base_model.model", "._loss_function"),
            lambda model: setattr(model.base_model.model, "loss_function", len),
            "model.base_model.model._loss_function is builtin_function_or_method len",
        ),
        (
            ("model.base_model.__dict__", "['forward']"),
            lambda model: setattr(model.base_model, "forward", len),
            "model.base_model.forward is builtin_function_or_method len",
        ),
        (
            ("model.peft_config", "['second']"),
            lambda model: model.peft_config.update(second=None),
            "model.peft_config['second'] is None",
        ),
    ],
)
def test_an_absence_is_a_fact(asked, come, reason):
    """Of an attribute, also one that a class could have, and of an entry; not of what is there."""
    there = [("model", ".training"), ("model.peft_config", "['default']"), ("model.nowhere", ".x")]
    model = decoder()
    state = ModelState.of([], {}, model, {}, absent=[asked, *there])
    assert state.facts == {"".join(asked): "not there"}
    state.watch(model)
    assert state.difference(model) is state.changed({}) is None
    come(model)
    assert state.difference(model) == state.changed({}) == f"{reason}, was not there"


def own_forward():
    norm = nn.LayerNorm(2)
    norm.forward = len
    return norm


NORM = nn.LayerNorm(2)
# What a part of a model was, and what it is then.
CHANGES = {
    "None": (None, False),
    "flag": (True, False),
    "number": (1.0, 2.0),
    "text": ("sdpa", "eager"),
    "dtype": (torch.float32, torch.float64),
    "device": (torch.device("cpu"), torch.device("meta")),
    "trained tensor": (torch.zeros(2), torch.zeros(2, requires_grad=True)),
    "tensor's dtype": (torch.zeros(2), torch.zeros(2).double()),
    "tensor's shape": (torch.zeros(2), torch.zeros(1, 2)),
    "tensor's device": (torch.zeros(2), torch.zeros(2, device="meta")),
    "keys": ({"a": 1}, {"b": 1}),
    "no keys": ({}, {"b": 1}),
    "length": ([1, 2], [1]),
    "collection": ([1, 2], (1, 2)),
    "function": (tokens, classifier),
    "kind": (object(), SimpleNamespace()),
    "module": (NORM, nn.ReLU()),
    "module's forward": (NORM, own_forward()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_any_kind_is_seen_between_calls_and_by_another_process(case):
    was, then = CHANGES[case]
    model = SimpleNamespace(part=was)
    state = ModelState.of(["model.part"], {}, model, {})
    state.watch(model)
    assert state.difference(model) is state.changed({}) is None
    model.part = then
    changed = f"model.part is {describe(then)}, was {describe(was)}"
    assert state.difference(model) == state.changed({}) == changed
    model.part = was
    assert state.changed({}) is None
    del model.part
    assert state.difference(model) == f"model.part is not there, was {describe(was)}"
    assert re.match("a part of the model is gone: AttributeError: .*'part'", state.changed({}))


def test_a_module_that_gets_a_forward_of_its_own_is_seen():
    """The same module, so that only what it holds can tell."""
    model = SimpleNamespace(part=nn.LayerNorm(2))
    state = ModelState.of(["model.part"], {}, model, {})
    state.watch(model)
    model.part.forward = len
    assert "with a forward of its own, was a torch" in state.changed({})


def test_an_argument_that_was_none_is_not_a_tensor_later():
    names = ["arguments", "arguments['ids']", "arguments['labels']"]
    model = classifier()
    state = ModelState.of(names, {}, model, {"ids": torch.ones(2, 3), "labels": None})
    state.watch(model)
    assert state.changed({"ids": torch.zeros(4, 5), "labels": None}) is None
    given = {"ids": torch.ones(2, 3), "labels": torch.ones(2)}
    assert state.changed(given) == "arguments['labels'] is a tensor, was None"
    assert state.changed({"ids": None, "labels": None}) == "arguments['ids'] is None, was a tensor"
    state = ModelState.of(names[1:], {}, model, {"ids": torch.ones(2, 3), "labels": None})
    state.watch(model)
    assert state.changed({"labels": None}) == "arguments['ids'] is not there, was a tensor"


def test_a_cache_that_cannot_be_written_could_not_run(stored, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        "torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: tmp_path / "file"
    )
    with pytest.raises(
        MmoptError, match=r"cannot be written to .*file, Inductor's cache"
    ) as caught:
        mmopt.load_compiled(stored[0], classifier())
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "store.sig").write_text("0" * 64), "not written by this user"),
        (lambda folder: (folder / "store.json").unlink(), "is no store: No such file"),
        (lambda folder: (folder / "graph.bin").unlink(), r"graph\.bin cannot be read"),
        (
            lambda folder: (folder / "graph.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR."),
            r"graph\.bin was changed after it was stored",
        ),
        (
            lambda folder: next((folder / "kernels").rglob("*.so")).write_bytes(b"other"),
            r"\.so was changed after it was stored",
        ),
    ],
)
def test_a_spoiled_store_is_refused_before_anything_in_it_is_opened(
    copied, spoil, message, monkeypatch
):
    monkeypatch.setattr(stores, "load_function", lambda _content: pytest.fail("was unpickled"))
    monkeypatch.setattr(stores, "place_kernels", lambda _files: pytest.fail("was written"))
    spoil(copied)
    with pytest.raises(InputError, match=message):
        mmopt.load_compiled(copied, classifier())


def test_a_stranger_needs_the_sha256(stored, tmp_path, monkeypatch):
    """Of the record, which holds those of all files."""
    folder, digest = stored
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"not written by this user.*pass the sha256"):
        mmopt.load_compiled(folder, classifier())
    with pytest.raises(InputError, match=r"has SHA-256 [0-9a-f]{64}, expected ffff"):
        mmopt.load_compiled(folder, classifier(), sha256="f" * 64)
    assert not key_file().exists()
    compiled = mmopt.load_compiled(folder, classifier(), sha256=digest.upper())
    assert compiled(**tokens(9)).logits.shape == (3, 3)


def rewritten(folder, change):
    """Change the record and sign it again, as another version would have written it."""
    record = json.loads((folder / "store.json").read_text())
    change(record)
    written = json.dumps(record).encode()
    (folder / "store.json").write_bytes(written)
    (folder / "store.sig").write_text(stores.sign(written))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(schema=0), "has schema 0, expected 1"),
        (lambda record: record.pop("schema"), "is damaged, expected JSON with a schema"),
        (
            lambda record: record["key"].update(torch="2.0.0"),
            r"with torch 2\.0\.0, here it is \d.*, expected the same",
        ),
        (
            lambda record: record["key"].update(device="cuda", GPU="NVIDIA H200"),
            "with device cuda, here it is cpu",
        ),
        (
            lambda record: record["modules"].update({"peft.peft_model": "0" * 64}),
            r"another source of peft\.peft_model",
        ),
        (
            lambda record: record["modules"].update({"no.such.module": "0" * 64}),
            r"another source of no\.such\.module",
        ),
        (
            lambda record: record["key"].update({"C++ compiler": None}),
            "with C.. compiler None, here it is ",
        ),
        (lambda record: record.update({"model": {"class": "x.Y", "tensors": ""}}), "for a x.Y"),
    ],
)
def test_another_version_device_or_source_is_refused_with_the_reason(copied, change, message):
    with pytest.raises(InputError, match=message):
        mmopt.load_compiled(rewritten(copied, change), classifier())


def test_every_field_of_the_key_has_to_be_the_same(copied):
    record = json.loads((copied / "store.json").read_text())
    fields = [
        "mmopt", "python", "machine", "torch", "triton", "transformers", "peft", "device",
        "vector instructions", "CPU threads", "C++ compiler",
    ]  # fmt: skip
    assert list(record["key"]) == fields
    for field in fields:
        was = record["key"][field]
        rewritten(copied, lambda record, field=field: record["key"].update({field: "another"}))
        with pytest.raises(InputError, match=f"with {re.escape(field)} another, here it is "):
            mmopt.load_compiled(copied, classifier())
        rewritten(copied, lambda record, field=field, was=was: record["key"].update({field: was}))


def test_the_digest_of_tensors_tells_all_that_a_graph_is_made_for():
    with_buffer, with_another = nn.Linear(2, 3), nn.Linear(2, 3)
    with_buffer.register_buffer("table", torch.zeros(1))
    with_another.register_buffer("table", torch.zeros(2))
    models = [
        nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Linear(2, 3, device="meta"),
        nn.Linear(2, 3).requires_grad_(False), nn.Sequential(nn.Linear(2, 3)), with_buffer,
        with_another,
    ]  # fmt: skip
    assert len({stores._tensors_sha256(model) for model in models}) == len(models)
    assert stores._tensors_sha256(nn.Linear(2, 3)) == stores._tensors_sha256(models[0])


def test_only_kernels_that_are_missing_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: tmp_path)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "there.so").write_bytes(b"own")
    stores.place_kernels(
        {"kernels/ab/there.so": b"other", "kernels/cd/new.so": b"new", "graph.bin": b"graph"}
    )
    found = {p.relative_to(tmp_path).as_posix(): p for p in tmp_path.rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == {
        "ab/there.so": b"own", "cd/new.so": b"new",
    }  # fmt: skip


def test_what_a_classifier_writes_down_at_its_first_loss_comes_with_the_store(copied):
    """And goes again where the store is refused; what the model says of itself is kept."""
    rewritten(copied, lambda record: record.update(problem_type="multi_label_classification"))
    model = classifier().train()
    with pytest.raises(InputError, match="another state"):
        mmopt.load_compiled(copied, model)
    assert model.config.problem_type is None
    mmopt.load_compiled(copied, model.eval())
    assert model.config.problem_type == "multi_label_classification"


def test_another_model_or_state_is_refused_with_the_reason(stored):
    folder = stored[0]
    with pytest.raises(InputError, match="with other parameters"):
        mmopt.load_compiled(folder, classifier(r=2))
    with pytest.raises(InputError, match=r"another state: model.*training is True, was False"):
        mmopt.load_compiled(folder, classifier().train())
    plain = classifier()
    mmopt.optimize(plain).undo()
    with pytest.raises(InputError, match="in another state"):
        mmopt.load_compiled(folder, plain)
    with pytest.raises(InputError, match="does not say how its model is made"):
        mmopt.load_compiled(folder)


@pytest.mark.usefixtures("without_inductor")
def test_a_store_appears_whole_or_not_at_all(home, tmp_path, monkeypatch):
    model = classifier()
    compiled = mmopt.CompiledModel(model, mode="infer", dynamic=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        compiled.save(tmp_path / "full", tokens(12))

    wrong = stores.StoredGraph(None, ModelState({}, {}), (), {})
    monkeypatch.setattr("mmopt.compilation.model.capture", lambda *_args, **_options: wrong)
    monkeypatch.setattr(
        stores.StoredGraph,
        "__call__",
        lambda self, model, arguments: {"logits": model(**arguments).logits + 1},
    )
    with pytest.raises(CheckFailedError, match=r"other outputs.*logits is off"):
        compiled.save(tmp_path / "new", tokens(12))

    monkeypatch.setattr(
        stores.StoredGraph, "__call__", lambda self, model, arguments: model(**arguments)
    )
    monkeypatch.setattr(stores, "_BUILD", "raise SystemExit('no such op')")
    monkeypatch.setattr(stores, "_pickled", lambda graph, model: b"")
    with pytest.raises(MmoptError, match=r"a fresh process cannot load.*no such op") as caught:
        compiled.save(tmp_path / "new", tokens(12))
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_key_is_private_to_the_user(home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    signature = stores.sign(b"record")
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert stores.sign(b"record") == signature
    assert stores.signed_here(b"record", signature)
    assert not stores.signed_here(b"Record", signature)
    # root can read the key of any user.
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: key_file().stat().st_uid + 1)
        with pytest.raises(InputError, match="of this user"):
            stores.signed_here(b"record", signature)
    for broken in (b"", b"x" * 31):
        key_file().write_bytes(broken)
        with pytest.raises(InputError, match="is not 32 bytes"):
            stores.sign(b"record")
    key_file().write_bytes(b"x" * 32)
    key_file().chmod(0o644)
    with pytest.raises(InputError, match="can be read by others"):
        stores.sign(b"record")


def test_facts_are_the_same_in_every_process_and_skip_what_leads_nowhere():
    names = [
        "model.training",
        "model._modules['base_model'].peft_config['default'].r",
        "model.nowhere",
        "___helper(model)",
        "G['__import_math'].pi",
        # What a class or a module of Python holds in all is not a fact about the model.
        "dict(type(model).__dict__)",
        "list(dict.keys(G['__import_math'].__dict__))[0]",
        "G['__import_math'].__dict__",
    ]
    asked = [("G['__import_math']", ".nowhere")]
    state = ModelState.of(names, {"__import_math": "math"}, classifier(), {}, absent=asked)
    assert state.facts == {
        "model.training": "False",
        "model._modules['base_model'].peft_config['default'].r": "4",
        "G['__import_math'].pi": "3.141592653589793",
    }
    assert state.difference(classifier()) is None
    assert state.difference(classifier(r=2)) == (
        "model.base_model.peft_config['default'].r is 2, was 4"
    )
    assert describe(torch.zeros(2, 3, requires_grad=True)) == "torch.float32 [2, 3] on cpu, trained"
    assert describe({"a": 1, "b": object()}) == "dict of 'a', 'b'"
    assert describe([1, 2]) == "list of 2"
    assert describe(describe) == "function mmopt.compilation.state.describe"
    assert describe(state.watch) == "method mmopt.compilation.state.ModelState.watch"
    assert "0x" not in describe(object())


@pytest.mark.slow
def test_a_fresh_process_trains_on_the_graph(home, tmp_path):
    """Loss and every gradient, with dropout: the seed gives the same masks in both processes."""
    batch = tokens(12, labels=True)
    compiled = mmopt.compile(decoder(), batch, mode="train")
    compiled.save(tmp_path / "store", batch)
    code = f"""
import torch, mmopt
from mmopt.compilation.parity import gradients
from test_store import decoder, tokens
torch.set_num_threads({torch.get_num_threads()})
model = decoder()
compiled = mmopt.load_compiled({str(tmp_path / "store")!r}, model)
found = {{}}
for length in (12, 9):
    torch.manual_seed(7)
    loss = compiled(**tokens(length, labels=True)).loss
    found[length] = loss.detach(), gradients(loss, model)
assert compiled.recompiles == ()
assert not torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters
torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    fresh_process(code, scratch=tmp_path, home=home)
    for length, (loss, found) in torch.load(tmp_path / "found.pt").items():
        torch.manual_seed(7)
        expected = compiled(**tokens(length, labels=True)).loss
        torch.testing.assert_close(loss, expected.detach())
        assert compare("gradients", gradients(expected, compiled.module), found).holds
    # Of a model whose dropout is off, eager is the oracle.
    model = decoder()
    for each in model.modules():
        if hasattr(each, "attention_dropout"):
            each.attention_dropout = 0.0
    loaded = mmopt.load_compiled(tmp_path / "store", decoder())
    assert loaded(**batch).loss.requires_grad
    with pytest.raises(InputError, match=r"attention_dropout is 0\.0, was 0\.1"):
        mmopt.load_compiled(tmp_path / "store", model)
    # A loss of the user's own is seen before and after loading.
    lossy = decoder()
    lossy.base_model.model.loss_function = lambda logits, **_: logits.float().sum()
    with pytest.raises(InputError, match=r"_loss_function is function .*, was not there"):
        mmopt.load_compiled(tmp_path / "store", lossy)
    loaded.module.base_model.model.loss_function = lossy.base_model.model.loss_function
    output = loaded(**batch)
    torch.testing.assert_close(output.loss, output.logits.float().sum())
    assert "_loss_function is function" in loaded.recompiles[0].reason

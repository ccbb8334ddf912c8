"""Adapters as graph inputs: one graph, each adapter's logits those of PEFT's unmerged model."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mmopt_export.adapters.files import AdapterSet, group_rows, read_adapter, write_adapter
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.adapters.swap import (
    Swap,
    SwapAdapter,
    SwapLinear,
    _key,
    add_defaults,
    bind,
    swap_layers,
    swappable,
)
from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.decoder.part import decoder_part
from mmopt_export.decoder.tracing import trace_decoder
from mmopt_export.graph import trace
from mmopt_export.parts import Outputs, Part
from mmopt_export.runtime import Tensors, open_session
from mmopt_kernels.errors import InputError
from peft_oracle import load_plain, logits, unmerged
from tiny_adapters import save_gpt2, save_llama, save_peft, zeroed

CPU = "CPUExecutionProvider"
IDS = np.arange(3, 27, dtype=np.int64).reshape(3, 8)
MASK = np.ones_like(IDS)
MASK[1, 5:] = 0


def lora(**settings: Any) -> LoraConfig:
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    return LoraConfig(**(values | settings))


def text_part(model: Any) -> Part:
    """A causal language model without a cache: ids and mask to logits."""

    def samples() -> Iterator[tuple[str, Tensors]]:
        for rows, length in ((1, 1), (2, 5), (3, 8), (1, 7)):
            yield (
                "random",
                {
                    "input_ids": IDS[:rows, :length],
                    "attention_mask": MASK[:rows, :length],
                },
            )

    return Part(
        name="model",
        module=Outputs(model, {"logits": "logits"}, use_cache=False),
        inputs={"input_ids": torch.from_numpy(IDS[:2]), "attention_mask": torch.ones(2, 8).long()},
        axes={key: {0: "batch", 1: "sequence"} for key in ("input_ids", "attention_mask")},
        outputs=("logits",),
        samples=samples,
        limits={"sequence": 64},
    )


def with_adapters(part: Part, swap: Swap) -> Part:
    return swappable(part, swap, swap.layers([part])[part.name])


@dataclass(frozen=True)
class Exported:
    """A swappable graph on disk, the folders that it came from, and its adapters' files."""

    base: Path
    folders: dict[str, Path]
    graph: Path
    files: dict[str, Path]
    part: Part
    swap: Swap


def export(base: Path, folders: dict[str, Path], output: Path) -> Exported:
    checkpoint = load_checkpoint(
        str(base), adapters=[str(folder) for folder in folders.values()], adapt="swap"
    )
    assert checkpoint.swap is not None
    part = with_adapters(text_part(checkpoint.model), checkpoint.swap)
    output.mkdir()
    graph = output / "model.onnx"
    onnx_ir.save(trace(part, target="cpu"), graph, external_data="model.onnx.data")
    add_defaults(graph)
    files = {}
    for adapter in checkpoint.swap.adapters:
        files[adapter.name] = output / "adapters" / f"{adapter.name}.onnx_adapter"
        write_adapter(files[adapter.name], adapter.arrays)
    return Exported(base, folders, graph, files, part, checkpoint.swap)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Three adapters of the ranks 4, 8 and 2 to 6, on different layers, with different scales."""
    root = tmp_path_factory.mktemp("swap")
    base = save_llama(root / "base")
    configs = {
        "four": lora(target_modules=["q_proj", "v_proj"]),
        "eight": lora(r=8, target_modules=["q_proj", "down_proj", "lm_head"], use_rslora=True),
        "mixed": lora(
            r=6,
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"o_proj": 1},
        ),
    }
    folders = {
        name: save_peft(base, root / name, config, seed=number)
        for number, (name, config) in enumerate(configs.items())
    }
    return export(base, folders, root / "artifact")


def expected(exported: Exported, name: str | None) -> np.ndarray:
    return _logits(exported.base, None if name is None else exported.folders[name])


@cache
def _logits(base: Path, adapter: Path | None) -> np.ndarray:
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    model = load_plain(base) if adapter is None else unmerged(base, adapter)
    return logits(model, **inputs).numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Where no padding is: there the model's values mean nothing."""
    np.testing.assert_allclose(found[MASK != 0], wanted[MASK != 0], atol=2e-5, rtol=0)


NAMES = [None, "four", "eight", "mixed"]


@pytest.mark.parametrize("optimize", [False, True], ids=["as-traced", "optimized"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_onnx_runtime_runs_each_adapter(
    name: str | None, optimize: bool, llama: Exported
) -> None:
    """`LoraAdapter` and `add_active_adapter`; without one the defaults of rank 0."""
    session = open_session(llama.graph, provider=CPU, optimize=optimize)
    options = onnxruntime.RunOptions()
    if name is not None:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(llama.files[name]))
        options.add_active_adapter(adapter)
    (found,) = session.run(None, {"input_ids": IDS, "attention_mask": MASK}, options)
    assert_close(found, expected(llama, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_feeds_gives_the_adapter(name: str | None, llama: Exported) -> None:
    session = open_session(llama.graph, provider=CPU)
    adapters = AdapterSet(session, llama.files)
    feeds = {"input_ids": IDS, "attention_mask": MASK} | adapters.feeds(name)
    (found,) = session.run(None, feeds)
    assert_close(found, expected(llama, name))


def test_one_io_binding_switches_between_adapters(llama: Exported) -> None:
    """Each binding replaces the one before, also where an adapter has no values of its own."""
    session = open_session(llama.graph, provider=CPU)
    adapters = AdapterSet(session, llama.files)
    assert adapters.names == ("four", "eight", "mixed")
    assert [adapters.rank(name) for name in adapters.names] == [4, 8, 6]
    binding = session.io_binding()
    binding.bind_cpu_input("input_ids", IDS)
    binding.bind_cpu_input("attention_mask", MASK)
    for name in ("eight", "four", None, "mixed", "four", "eight", None):
        adapters.bind(binding, name)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        assert_close(binding.copy_outputs_to_cpu()[0], expected(llama, name))


def test_rows_are_grouped_in_the_order_of_their_first() -> None:
    groups = group_rows(["b", None, "a", "b", None])
    assert [(name, rows.tolist()) for name, rows in groups] == [
        ("b", [0, 3]),
        (None, [1, 4]),
        ("a", [2]),
    ]
    assert group_rows([]) == []


def test_adapters_change_the_logits(llama: Exported) -> None:
    plain = expected(llama, None)
    for name in llama.folders:
        assert np.abs(expected(llama, name) - plain).max() > 0.1


@pytest.mark.slow
def test_the_graph_passes_the_full_check_with_one_rank_per_layer(
    llama: Exported, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    # With standard ops only: the checker knows no others.
    onnx_ir.save(trace(llama.part, target="portable"), path)
    add_defaults(path)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path).graph
    ranks = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name.endswith("_lora_a"):
            ranks[value.name.removesuffix("_lora_a")] = dims[1].dim_param
        if value.name.endswith("_lora_b"):
            assert dims[0].dim_param == ranks[value.name.removesuffix("_lora_b")]
    # 2 layers of q, v, o and down, and the head; no two of them need one rank.
    assert len(ranks) == len(set(ranks.values())) == 9
    defaults = {one.name: list(one.dims) for one in graph.initializer if "_lora_" in one.name}
    assert defaults["lm_head_lora_a"] == [32, 0]
    assert defaults["lm_head_lora_b"] == [0, 67]
    assert len(defaults) == 18


def test_the_samples_of_parity_use_no_adapter_and_each_of_them(llama: Exported) -> None:
    used = [feeds["lm_head_lora_a"].shape[1] for _, feeds, *_ in llama.part.samples()]
    first = [
        feeds["model_layers_0_self_attn_q_proj_lora_a"].shape[1]
        for _, feeds, *_ in llama.part.samples()
    ]
    assert used == [0, 0, 8, 0]
    assert first == [0, 4, 8, 2]
    session = open_session(llama.graph, provider=CPU)
    for sample in llama.part.sampled():
        (found,) = session.run(None, dict(sample.feeds))
        valid = sample.feeds["attention_mask"] != 0
        np.testing.assert_allclose(found[valid], sample.expected["logits"][valid], atol=1e-5)


def test_each_adapter_is_sampled_even_where_there_are_few_samples(llama: Exported) -> None:
    part = text_part(llama.swap.model)
    few = Part(**(vars(part) | {"samples": lambda: [("text", {"input_ids": IDS})]}))
    ranks = [
        feeds["model_layers_0_self_attn_q_proj_lora_a"].shape[1]
        for _, feeds in with_adapters(few, llama.swap).samples()
    ]
    assert ranks == [0, 4, 8, 2]


def test_a_part_without_target_layers_is_left_as_it_is(llama: Exported) -> None:
    part = Part(**(vars(text_part(llama.swap.model)) | {"module": torch.nn.Identity()}))
    assert swappable(part, llama.swap, []) is part
    with pytest.raises(InputError, match="no layer that the adapter four changes is in a graph"):
        llama.swap.layers([part])


def test_weights_are_folded_into_the_adapter(llama: Exported) -> None:
    specs = [AdapterSpec(str(llama.folders["four"]), 0.5)]
    halved = load_checkpoint(str(llama.base), adapters=specs, adapt="swap").swap
    assert halved is not None
    (adapter,) = halved.adapters
    whole = llama.swap.adapters[0]
    for name, array in adapter.arrays.items():
        factor = 0.5 if name.endswith("_lora_b") else 1.0
        np.testing.assert_allclose(array, whole.arrays[name] * factor, rtol=1e-6)
    assert adapter.record["weight"] == 0.5
    assert adapter.rank == 4


def test_adapters_run_over_an_int4_base(llama: Exported, tmp_path: Path) -> None:
    """The base's weights are 4-bit, A and B as they were: an adapter moves the logits as before."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(llama.graph)
    # ONNX Runtime's tool takes the defaults for weights, so they are added to what it writes.
    constants = [one for one in model.graph.initializer if "_lora_" not in one.name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    quantizer = MatMulNBitsQuantizer(model, block_size=32)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "int4.onnx"))
    add_defaults(tmp_path / "int4.onnx")
    session = open_session(tmp_path / "int4.onnx", provider=CPU)
    adapters = AdapterSet(session, llama.files)
    found = {
        name: session.run(None, {"input_ids": IDS, "attention_mask": MASK} | adapters.feeds(name))[
            0
        ][MASK != 0]
        for name in NAMES
    }
    operators = [node.op_type for node in onnx.load(tmp_path / "int4.onnx").graph.node]
    assert operators.count("MatMulNBits") >= 9
    assert operators.count("MatMul") >= 18
    for name in NAMES:
        wanted = expected(llama, name)[MASK != 0]
        cosine = (found[name] * wanted).sum() / np.linalg.norm(found[name]) / np.linalg.norm(wanted)
        assert cosine > 0.9
        # A base of 4 bits is off by less than the adapter is away from it.
        if name is not None:
            error = np.linalg.norm(found[name] - wanted)
            assert error < np.linalg.norm(found[None] - wanted)


@pytest.mark.slow
def test_a_decoder_takes_adapters_through_its_extra_inputs(llama: Exported, tmp_path: Path) -> None:
    model = llama.swap.model
    part = with_adapters(decoder_part(model), llama.swap)
    graph = tmp_path / "model.onnx"
    onnx_ir.save(trace_decoder(part, "cpu"), graph)
    add_defaults(graph)
    session = open_session(graph, provider=CPU)
    outputs = [value.name for value in session.get_outputs()]
    ranks = set()
    for sample in part.sampled():
        found = dict(zip(outputs, session.run(None, dict(sample.feeds)), strict=True))
        np.testing.assert_allclose(found["logits"], sample.expected["logits"], atol=2e-5)
        ranks.add(sample.feeds["model_layers_1_self_attn_q_proj_lora_a"].shape[1])
    assert ranks == {0, 4, 6, 8}
    # Prefill without a past, against PEFT.
    adapters = AdapterSet(session, llama.files)
    past = {name: np.zeros((3, 2, 8, 8), np.float32) for name in part.inputs if "past" in name}
    for name in NAMES:
        feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)} | past
        (last,) = session.run(["logits"], feeds | adapters.feeds(name))
        np.testing.assert_allclose(last[0, 0], expected(llama, name)[0, -1], atol=2e-5)


@pytest.mark.slow
def test_gpt2_with_its_conv1d_layers_is_swapped_too(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "base")
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    exported = export(
        base, {"one": save_peft(base, tmp_path / "one", config)}, tmp_path / "artifact"
    )
    session = open_session(exported.graph, provider=CPU)
    adapters = AdapterSet(session, exported.files)
    for name in (None, "one"):
        feeds = {"input_ids": IDS, "attention_mask": MASK} | adapters.feeds(name)
        assert_close(session.run(None, feeds)[0], expected(exported, name))


def test_a_layer_keeps_what_models_look_at() -> None:
    base = torch.nn.Linear(3, 5)
    layer = SwapLinear(base, "x")
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (3, 5)
    assert swap_layers(torch.nn.Sequential(layer)) == [layer]


def test_a_layer_is_its_base_again_after_a_run_that_failed() -> None:
    layer, x = SwapLinear(torch.nn.Linear(3, 5), "x"), torch.ones(2, 3)
    values = {"x_lora_a": torch.ones(3, 1), "x_lora_b": torch.ones(1, 5)}

    def fail() -> None:
        with bind([layer], values):
            torch.testing.assert_close(layer(x), layer.base(x) + 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(layer(x), layer.base(x))


def test_the_warnings_of_every_adapter_are_the_swaps() -> None:
    adapters = tuple(SwapAdapter(name, {}, 1, {}, (f"of {name}",)) for name in "ab")
    assert Swap(None, adapters).warnings == ("of a", "of b")


def test_a_swapped_adapter_that_was_never_trained_gives_a_warning(
    llama: Exported, tmp_path: Path
) -> None:
    config = lora(target_modules=["q_proj"])
    dead = save_peft(llama.base, tmp_path / "dead", config, change=zeroed(".lora_B."))
    adapters = [str(llama.folders["four"]), str(dead)]
    notes = load_checkpoint(str(llama.base), adapters=adapters, adapt="swap").warnings
    assert notes == (f"{dead}: every B is zero, so there it changes nothing. Check its training.",)


def test_an_adapter_is_called_by_its_folder_however_that_is_written(
    llama: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = llama.folders["four"]
    for folder, path in ((four, "."), (four, "../four/"), (four.parent, "mixed/../four")):
        monkeypatch.chdir(folder)
        swap = load_checkpoint(str(llama.base), adapters=[path], adapt="swap").swap
        assert swap is not None
        assert [adapter.name for adapter in swap.adapters] == ["four"]


def test_layers_whose_paths_differ_in_dots_and_case_have_keys_of_their_own() -> None:
    keys: dict[str, str] = {}
    for path in ("a.b", "a_b", "A.b"):
        keys[path] = _key(path, keys)
    assert list(keys.values()) == ["a_b", "a_b_", "a_b__"]


def test_defaults_are_added_once(llama: Exported, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(llama.graph.read_bytes())
    add_defaults(graph)
    assert graph.read_bytes() == llama.graph.read_bytes()


def test_a_head_that_an_adapter_carries_rounded_leaves_the_base_exact(
    llama: Exported, tmp_path: Path
) -> None:
    """PEFT saves a head that it targets beside its A and B, in the adapter's dtype."""
    adapter = save_peft(llama.base, tmp_path / "a", lora(target_modules=["lm_head"]))
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    plain = load_plain(llama.base).lm_head.weight
    rounded = plain.detach().half()
    assert not torch.equal(rounded.float(), plain)
    save_file({**stored, key: rounded}, path, metadata={"format": "pt"})
    model = load_checkpoint(str(llama.base), adapters=[str(adapter)], adapt="swap").model
    assert torch.equal(model.lm_head.weight, plain)
    save_file({**stored, key: rounded + 1}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has lm_head\.weight whole"):
        load_checkpoint(str(llama.base), adapters=[str(adapter)], adapt="swap")


@pytest.mark.parametrize("setting", ["alora_invocation_tokens", "arrow_config"])
def test_what_depends_on_the_input_is_no_adapter_of_a_graph(
    setting: str, llama: Exported, tmp_path: Path
) -> None:
    adapter = save_peft(llama.base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: [3]}))
    with pytest.raises(InputError, match=f"has {setting} and cannot be merged"):
        load_checkpoint(str(llama.base), adapters=[str(adapter)], adapt="swap")


REFUSED = {
    "dora": (lora(target_modules=["q_proj"], use_dora=True), "has DoRA, which scales the base"),
    "modules_to_save": (
        lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "has modules_to_save, which replace modules",
    ),
    "bias": (lora(target_modules=["q_proj"], bias="all"), "has biases of the base"),
    "embedding": (lora(target_modules=["embed_tokens"]), "has model.embed_tokens"),
    "lora_bias": (lora(target_modules=["q_proj"], lora_bias=True), "has lora_bias"),
    "pissa": (
        lora(target_modules=["q_proj"], init_lora_weights="pissa"),
        r"has a start \(pissa\) that changes the base weight",
    ),
    "parameters": (
        lora(target_modules=[], target_parameters=["q_proj.weight"]),
        "has target_parameters, which are no layers",
    ),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("biased") / "model", attention_bias=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_a_and_b_is_refused_by_name(
    case: str, biased: Path, tmp_path: Path
) -> None:
    config, message = REFUSED[case]
    adapter = save_peft(biased, tmp_path / "adapter", config)
    with pytest.raises(InputError, match=rf"{message}.*Merge it with --adapters merge"):
        load_checkpoint(str(biased), adapters=[str(adapter)], adapt="swap")


def test_another_method_is_refused_by_name(llama: Exported, tmp_path: Path) -> None:
    adapter = save_peft(llama.base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(InputError, match="is a LOHA adapter and cannot be swapped, expected LORA"):
        load_checkpoint(str(llama.base), adapters=[str(adapter)], adapt="swap")


def test_two_adapters_of_one_name_are_refused(llama: Exported, tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"])
    folders = [save_peft(llama.base, tmp_path / one / "name", config) for one in ("a", "b")]
    with pytest.raises(InputError, match="two adapters are called name, expected a name of its"):
        load_checkpoint(str(llama.base), adapters=[str(one) for one in folders], adapt="swap")


def test_an_unknown_adapter_names_those_there_are(llama: Exported) -> None:
    adapters = AdapterSet(open_session(llama.graph, provider=CPU), llama.files)
    with pytest.raises(InputError, match="no adapter 'five', expected one of: four, eight, mixed"):
        adapters.feeds("five")


def test_an_adapter_of_another_model_is_refused(llama: Exported, tmp_path: Path) -> None:
    session = open_session(llama.graph, provider=CPU)
    arrays = read_adapter(llama.files["four"])
    name = "model_layers_0_self_attn_q_proj_lora_a"

    def refused(changed: Tensors, message: str) -> None:
        write_adapter(tmp_path / "other.onnx_adapter", changed)
        with pytest.raises(InputError, match=message):
            AdapterSet(session, {"other": tmp_path / "other.onnx_adapter"})

    refused(arrays | {"no_such_layer_lora_a": arrays[name]}, "no_such_layer_lora_a, which the gra")
    refused(arrays | {name: arrays[name][:-1]}, r"float32 \(31, 4\), expected float32 with 32 rows")
    refused(arrays | {name: arrays[name].astype(np.float16)}, r"float16 \(32, 4\), expected float")
    refused(arrays | {name: arrays[name][:, 1:]}, "without a .*_lora_b of the same rank")
    other = name.replace("_lora_a", "_lora_b")
    refused({name: arrays[name]}, f"has {name} without a {other} of the same rank")
    refused({other: arrays[other]}, f"has {other} without a {name} of the same rank")


def test_a_damaged_file_is_refused(llama: Exported, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx_adapter"
    damaged.write_bytes(llama.files["four"].read_bytes()[:100])
    with pytest.raises(InputError, match="is no adapter that ONNX Runtime can read"):
        read_adapter(damaged)
    with pytest.raises(InputError, match="does not exist"):
        read_adapter(tmp_path / "absent.onnx_adapter")


def test_a_graph_without_adapter_inputs_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "plain", [value], [other])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "plain.onnx"
    )
    session = open_session(tmp_path / "plain.onnx", provider=CPU)
    with pytest.raises(InputError, match=r"takes no adapters\. Export the model with --adapters"):
        AdapterSet(session, {})


def test_equal_adapters_give_equal_bytes(llama: Exported, tmp_path: Path) -> None:
    arrays = read_adapter(llama.files["mixed"])
    again = tmp_path / "again.onnx_adapter"
    write_adapter(again, dict(reversed(arrays.items())))
    assert again.read_bytes() == llama.files["mixed"].read_bytes()


def test_the_runtime_side_imports_without_torch() -> None:
    code = (
        "import sys, mmopt_export.adapters.files\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def names(values: Sequence[Any]) -> list[str]:
    return [value.name for value in values]


def test_optional_inputs_are_told_apart_from_needed_ones(llama: Exported) -> None:
    session = open_session(llama.graph, provider=CPU)
    assert names(session.get_inputs()) == ["input_ids", "attention_mask"]
    assert len(session.get_overridable_initializers()) == 18

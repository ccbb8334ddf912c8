"""What is not a model, is damaged, or does not belong together is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mmopt_export.adapters.attach import adapter_scales
from mmopt_export.adapters.merge import merge_adapter
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.checkpoint import TRAIN_RECORD, Adapt, load_checkpoint, weights_sha256
from mmopt_export.files import sha256
from mmopt_kernels.errors import InputError, MmoptError
from tiny_adapters import save_llama, save_peft
from tiny_models import save_adapter, save_classifier


@pytest.fixture
def model(classifier: Path, tmp_path: Path) -> Path:
    """A copy of the classifier that the test may damage."""
    return Path(shutil.copytree(classifier, tmp_path / "model"))


def test_merging_in_fp32_keeps_the_outputs(classifier: Path, adapter: Path) -> None:
    checkpoint = load_checkpoint(str(classifier), adapters=[str(adapter)])
    batch = checkpoint.tokenizer(["a graph", "the sum of two"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = checkpoint.model(**batch).logits
        scales = adapter_scales(checkpoint.model)
        merged = merge_adapter(checkpoint.model)
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=0)
    assert set(scales.values()) == {2.0}
    assert all(name.endswith(("query", "value")) for name in scales)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_path_that_does_not_exist_says_what_to_pass(name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist\. Pass a local folder or a hub id"):
        load_checkpoint(name)


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a model folder: it has no config\.json"):
        load_checkpoint(str(tmp_path))


def test_a_hub_id_without_network_exits_3(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MmoptError, match="could not be downloaded") as caught:
        load_checkpoint("someone/some-model-that-is-not-cached")
    assert caught.value.exit_code == 3


def test_a_name_that_no_hub_id_can_have_is_bad_input() -> None:
    with pytest.raises(InputError, match="neither a local folder nor a valid hub id"):
        load_checkpoint("not a model!")


def test_truncated_weights_are_named(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        load_checkpoint(str(model))


def test_a_tampered_header_is_named(model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[9] ^= 0xFF
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        load_checkpoint(str(model))


def test_weights_with_nan_are_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"NaN or Inf in classifier\.weight"):
        load_checkpoint(str(model))


def test_missing_weights_are_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for classifier\.weight"):
        load_checkpoint(str(model))


def test_weights_of_another_shape_are_bad_input(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(7, 32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"do not fit .*: classifier\.weight \(7, 32\) for \(3, 32\)"
    ):
        load_checkpoint(str(model))


def test_a_pickle_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle that may run code"):
        load_checkpoint(str(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks model-00001-of-00002\.safetensors"):
        load_checkpoint(str(model))


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "mod', "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_list_of_shards_is_bad_input(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json is damaged: .*again"):
        load_checkpoint(str(model))


@pytest.mark.parametrize("text", ['{"model_type": "no-such-type"}', '{"a": ' + "[" * 100_000])
def test_a_damaged_config_is_bad_input(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match="not a configuration that transformers"):
        load_checkpoint(str(model))


def test_keys_of_an_adapter_for_another_architecture_are_named(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    path = other / "adapter_model.safetensors"
    tensors = {key.replace("encoder.layer.1", "encoder.layer.9"): value
               for key, value in load_file(path).items()}  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="trained on another base") as caught:
        load_checkpoint(str(classifier), adapters=[str(other)])
    assert "encoder.layer.9.attention.self.query.lora_A.weight" in str(caught.value)
    assert "the base has no bert.encoder.layer.9.attention.self.query" in str(caught.value)


def test_an_adapter_for_a_wider_base_names_key_and_both_sizes(
    classifier: Path, tmp_path: Path
) -> None:
    wide = save_classifier(tmp_path / "wide", hidden=64)
    other = save_adapter(wide, tmp_path / "other")
    (other / "config.json").unlink()
    with pytest.raises(InputError, match=r"\(4, 64\) \(the base's bert.* has in_features 32\)"):
        load_checkpoint(str(classifier), adapters=[str(other)])


@pytest.mark.parametrize("adapt", ["attach", "merge"])
@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_an_adapter_of_too_few_dimensions_is_named(
    shape: tuple[int, ...], adapt: Adapt, classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    path = other / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file({**tensors, key: torch.ones(shape)}, path, metadata={"format": "pt"})
    message = f"{re.escape(f'{key} {shape}')} .*the base's .* has in_features 32"
    with pytest.raises(InputError, match=message):
        load_checkpoint(str(classifier), adapters=[str(other)], adapt=adapt)


def test_an_adapter_trained_on_other_weights_is_refused(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = save_classifier(tmp_path / "other", seed=7)
    trained = Path(shutil.copytree(adapter, tmp_path / "trained"))
    record = {"base": "original", "base_sha256": weights_sha256(classifier), "files": {}}
    (trained / TRAIN_RECORD).write_text(json.dumps(record))
    load_checkpoint(str(classifier), adapters=[str(trained)])
    with pytest.raises(InputError, match="trained on other weights"):
        load_checkpoint(str(other), adapters=[str(trained)])


def test_a_tampered_adapter_is_named_by_its_record(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(adapter, tmp_path / "trained"))
    weights = trained / "adapter_model.safetensors"
    record = {
        "base": "original",
        "base_sha256": weights_sha256(classifier),
        "files": {weights.name: sha256(weights)},
    }
    (trained / TRAIN_RECORD).write_text(json.dumps(record))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="is not the file that was trained"):
        load_checkpoint(str(classifier), adapters=[str(trained)])


@pytest.mark.parametrize(("adapt", "weight"), [("attach", 1.0), ("merge", 0.5), ("swap", 1.0)])
def test_truncated_weights_of_an_adapter_are_named(
    adapt: Adapt, weight: float, classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    weights = other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spec = AdapterSpec(str(other), weight)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is truncated or damaged"):
        load_checkpoint(str(classifier), adapters=[spec], adapt=adapt)


def test_an_adapter_that_is_not_lora_is_named(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["peft_type"] = "IA3"
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is a IA3 adapter, expected LORA"):
        load_checkpoint(str(classifier), adapters=[str(other)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"a": ' + "[" * 100_000, "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no peft_type, so it is no PEFT adapter"),
    ],
    ids=["cut", "deep", "list", "empty"],
)
def test_a_damaged_config_of_an_adapter_is_bad_input(
    classifier: Path, adapter: Path, tmp_path: Path, text: str, message: str
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    (other / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"adapter_config\.json {message}"):
        load_checkpoint(str(classifier), adapters=[str(other)])


def test_a_folder_that_is_no_adapter_says_so(classifier: Path) -> None:
    with pytest.raises(InputError, match="is not a PEFT adapter"):
        load_checkpoint(str(classifier), adapters=[str(classifier)])


def test_two_adapters_are_merged_not_attached(classifier: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match=r"2 adapters with the weights 1\.0, 1\.0 were given"):
        load_checkpoint(str(classifier), adapters=[str(adapter)] * 2)
    with pytest.raises(InputError, match="expected at most one, of weight 1"):
        load_checkpoint(str(classifier), adapters=[AdapterSpec(str(adapter), 0.5)])


def test_an_adapter_passed_as_the_model_says_how_to_pass_it(adapter: Path) -> None:
    with pytest.raises(InputError, match=r"is an adapter\. Pass its base as MODEL and it as --ad"):
        load_checkpoint(str(adapter))


def test_weights_under_another_name_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"only consolidated\.safetensors\. Pass a complete model"):
        load_checkpoint(str(model))


def test_other_safetensors_in_the_folder_are_not_loaded(model: Path) -> None:
    expected = load_checkpoint(str(model)).model
    save_file({"classifier.weight": torch.ones(3, 32)}, model / "consolidated.safetensors")
    found = load_checkpoint(str(model)).model
    assert torch.equal(found.classifier.weight, expected.classifier.weight)


def test_a_loaded_model_is_what_transformers_loads(tmp_path: Path) -> None:
    """Parameters, buffers, generation settings and names; from shards, in fp16, tied."""
    folder = save_llama(tmp_path / "model", tied=True)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    half.generation_config.update(max_new_tokens=7)
    half.save_pretrained(tmp_path / "half", max_shard_size="10KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", dtype=torch.float32
    )
    found = load_checkpoint(str(tmp_path / "half")).model
    assert found.generation_config.max_new_tokens == 7
    assert found.name_or_path == expected.name_or_path
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.lm_head.weight is found.model.embed_tokens.weight
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        assert torch.equal(value, wanted[name]), name
        assert value.dtype == wanted[name].dtype


MEASURE = """
import sys, torch
from mmopt_export.checkpoint import load_checkpoint
def peak():
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024
load_checkpoint(sys.argv[1])  # imports the architecture
before = peak()
model = load_checkpoint(sys.argv[2]).model
print(peak() - before, sum(x.numel() * 4 for x in model.parameters()),
      max(x.numel() * 4 for x in model.parameters()))
"""


@pytest.mark.slow
def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """fp16 shards to fp32: not the files as well, which would add half of the weights."""
    small = save_llama(tmp_path / "small")
    large = save_llama(
        tmp_path / "large", hidden_size=512, intermediate_size=1024, num_hidden_layers=12
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(large, dtype=torch.float16)
    shutil.rmtree(large)
    model.save_pretrained(large, max_shard_size="5MB")
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    peak, weights, largest = map(int, result.stdout.split())
    assert weights > 100e6
    # Threads of transformers convert up to four tensors side by side.
    assert peak < weights + 4 * largest + 16e6, (peak, weights, largest)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantize(model: Path, folder: Path, **settings: object) -> Path:
    """Save a model as bitsandbytes quantizes it."""
    config = transformers.BitsAndBytesConfig(**settings)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("llama") / "model", hidden_size=64, intermediate_size=96
    )


@pytest.fixture(scope="module")
def nf4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` in NF4; tests that change it copy it first."""
    pytest.importorskip("bitsandbytes", reason="quantizes the base")
    return quantize(llama, tmp_path_factory.mktemp("nf4") / "model", **NF4)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_an_adapter_is_merged_onto_its_dequantized_nf4_base(
    double: bool, llama: Path, nf4: Path, tmp_path: Path
) -> None:
    import bitsandbytes

    base = nf4
    if double:
        base = quantize(llama, tmp_path / "double", **NF4, bnb_4bit_use_double_quant=True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_peft(llama, tmp_path / "adapter", config)
    checkpoint = load_checkpoint(str(base), adapters=[str(adapter)], adapt="merge")
    assert checkpoint.quantized == {
        "method": "nf4",
        "blocksize": 64,
        "double": double,
        "dtype": "bfloat16",
        "weights": 14,
    }
    assert not hasattr(checkpoint.model.config, "quantization_config")
    # The oracle is bitsandbytes' own layer, as it ran in training.
    trained = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{name}"
            packed = trained.get_submodule(path).weight
            expected = bitsandbytes.functional.dequantize_4bit(
                packed.data, packed.quant_state
            ).float()
            if name == "q_proj":
                stored = load_file(adapter / "adapter_model.safetensors")
                a = stored[f"base_model.model.{path}.lora_A.weight"]
                b = stored[f"base_model.model.{path}.lora_B.weight"]
                expected = expected + (b.double() @ a.double() * 2).float()
            found = checkpoint.model.get_submodule(path).weight
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
            assert found.dtype == torch.float32


def test_an_attached_adapter_leaves_its_nf4_base_quantized(
    llama: Path, nf4: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_peft(llama, tmp_path / "adapter", config)
    checkpoint = load_checkpoint(str(nf4), adapters=[str(adapter)])
    layer = checkpoint.model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert checkpoint.quantized is None


def test_an_int8_base_is_dequantized(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantizes the base")
    base = quantize(llama, tmp_path / "int8", load_in_8bit=True)
    checkpoint = load_checkpoint(str(base), adapt="merge")
    assert checkpoint.quantized == {"method": "int8", "weights": 14}
    stored = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    expected = stored[f"{name}.weight"].double() * stored[f"{name}.SCB"].double()[:, None] / 127
    found = checkpoint.model.get_parameter(f"{name}.weight").double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # One scale for all rows would be multiplied with each of them.
    stored[f"{name}.SCB"] = stored[f"{name}.SCB"][:1].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"quantized weight model.layers.0.mlp.up_proj.weight is"):
        load_checkpoint(str(base), adapt="merge")


def test_an_fp4_base_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantizes the base")
    base = quantize(llama, tmp_path / "fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(InputError, match=r"proj\.weight is quantized to fp4, expected nf4"):
        load_checkpoint(str(base), adapt="merge")


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_quantization_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "gptq"))
    edit_config(other, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantized with gptq, expected bitsandbytes' NF4 or int8"):
        load_checkpoint(str(other), adapt="merge")


def test_a_config_that_claims_a_quantization_is_refused(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "claims"))
    edit_config(other, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(InputError, match="says that the model is quantized, but its weights are n"):
        load_checkpoint(str(other), adapt="merge")


def test_damaged_parts_of_a_quantized_weight_are_named(nf4: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(nf4, tmp_path / "nf4"))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[f"{name}.absmax"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"quantized weight model.layers.1.mlp.up_proj.weight is"):
        load_checkpoint(str(base), adapt="merge")


@pytest.mark.parametrize("adapt", ["merge", "attach", "swap"])
def test_an_adapter_whose_base_has_another_name_gives_a_warning(
    llama: Path, tmp_path: Path, adapt: Adapt
) -> None:
    """Names and shapes fit by chance too; the same name elsewhere is the same model."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_peft(llama, tmp_path / "adapter", config)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    for base, count in (("someone/other-8b", 1), (f"someone/{llama.name}", 0)):
        path.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        notes = load_checkpoint(str(llama), adapters=[str(adapter)], adapt=adapt).warnings
        assert [f"was trained on {base}" in note for note in notes] == [True] * count


def test_an_adapter_of_a_quantized_base_on_another_one_gives_a_warning(
    llama: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_peft(llama, tmp_path / "adapter", config)
    shutil.copy(llama / "config.json", adapter)
    edit_config(adapter, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    checkpoint = load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")
    (warning,) = checkpoint.warnings
    assert "was trained on a quantized base, but" in warning
    assert not hasattr(checkpoint.model.config, "quantization_config")

"""What is not a model, is damaged, or does not belong together is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmopt_export.adapters import adapter_scales, merge_adapter
from mmopt_export.checkpoint import TRAIN_RECORD, load_checkpoint, weights_sha256
from mmopt_export.files import sha256
from mmopt_kernels.errors import InputError, MmoptError
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
    with pytest.raises(InputError, match="do not fit BertForSequenceClassification"):
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


def test_a_damaged_config_is_bad_input(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "no-such-type"}')
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


def test_an_adapter_that_is_not_lora_is_named(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["peft_type"] = "IA3"
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is a IA3 adapter, expected LORA"):
        load_checkpoint(str(classifier), adapters=[str(other)])


def test_a_folder_that_is_no_adapter_says_so(classifier: Path) -> None:
    with pytest.raises(InputError, match="is not a PEFT adapter"):
        load_checkpoint(str(classifier), adapters=[str(classifier)])


def test_two_adapters_are_refused(classifier: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="2 adapters were given, expected at most one"):
        load_checkpoint(str(classifier), adapters=[str(adapter)] * 2)

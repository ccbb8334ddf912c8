"""LoRAs of every kind, merged in fp32, against PEFT's unmerged model in fp64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mmopt_export.adapters.attach import attach_adapter
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.checkpoint import load_checkpoint
from mmopt_kernels.errors import CheckFailedError, InputError
from peft_oracle import load_plain, logits, merged_and_unmerged, unmerged
from tiny_adapters import save_convnet, save_gpt2, save_llama, save_peft, zeroed

IDS = torch.arange(3, 21).reshape(2, 9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model", attention_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied") / "model", tied=True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


def lora(**settings: Any) -> LoraConfig:
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    return LoraConfig(**(values | settings))


LLAMA_CASES = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 32}),
    "dora": lora(use_dora=True),
    "dora-rslora": lora(use_dora=True, use_rslora=True),
    "bias-all": lora(bias="all"),
    "bias-lora-only": lora(bias="lora_only"),
    "lora-bias": lora(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "modules-to-save": lora(modules_to_save=["lm_head", "input_layernorm"]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "embeddings-dora": lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "all-linear": lora(target_modules="all-linear"),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "pissa": lora(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_merged_llama_gives_the_logits_of_the_unmerged_one(
    case: str, llama: Path, tmp_path: Path
) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", LLAMA_CASES[case])
    found, expected, without = merged_and_unmerged(llama, [adapter], input_ids=IDS)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_adapter_stored_in_half_precision_is_merged_in_fp32(
    dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora(), dtype=dtype)
    assert dtype in {v.dtype for v in load_file(adapter / "adapter_model.safetensors").values()}
    found, expected, _ = merged_and_unmerged(llama, [adapter], input_ids=IDS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_wanted_in_half_precision_is_rounded_after_the_merge(
    dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    whole = load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge").model
    half = load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge", dtype=dtype).model
    for name, value in half.named_parameters():
        assert value.dtype == dtype
        assert torch.equal(value, whole.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_merged_gpt2_gives_the_logits_of_the_unmerged_one(
    settings: dict[str, Any], gpt2: Path, tmp_path: Path
) -> None:
    config = lora(target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True, **settings)
    adapter = save_peft(gpt2, tmp_path / "adapter", config)
    found, expected, without = merged_and_unmerged(gpt2, [adapter], input_ids=IDS)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_merged_convolutions_give_the_logits_of_the_unmerged_ones(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = save_convnet(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["1"], **settings)
    adapter = save_peft(model, tmp_path / "adapter", config)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, expected, without = merged_and_unmerged(model, [adapter], pixel_values=pixels)
    assert (expected - without).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    ],
    ids=str,
)
def test_an_adapter_of_one_of_two_tied_layers_leaves_the_other_alone(
    settings: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    adapter = save_peft(tied, tmp_path / "adapter", lora(**settings))
    found, expected, without = merged_and_unmerged(tied, [adapter], input_ids=IDS)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def delta(folder: Path, module: str, scale: float) -> torch.Tensor:
    """What a LoRA changes of a weight, from its file alone, in fp64."""
    stored = load_file(folder / "adapter_model.safetensors")
    a = stored[f"base_model.model.{module}.lora_A.weight"].double()
    b = stored[f"base_model.model.{module}.lora_B.weight"].double()
    return scale * (b @ a)


def test_several_adapters_add_up_by_their_weights(llama: Path, tmp_path: Path) -> None:
    first = save_peft(llama, tmp_path / "first", lora(), seed=1)
    second = save_peft(llama, tmp_path / "second", lora(r=8, target_modules=["q_proj"]), seed=2)
    specs = [AdapterSpec(str(first), 0.7), AdapterSpec(str(second), -0.25)]
    checkpoint = load_checkpoint(str(llama), adapters=specs, adapt="merge")
    base = load_plain(llama)
    for name, value in checkpoint.model.named_parameters():
        expected = base.get_parameter(name).detach().double()
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "v_proj", "down_proj")):
            expected = expected + 0.7 * delta(first, module, 8 / 4)
        if module.endswith("q_proj"):
            expected = expected - 0.25 * delta(second, module, 8 / 8)
        # Each of the two additions and products rounds once in fp32.
        torch.testing.assert_close(value.double(), expected, atol=5e-7, rtol=0)
    assert [record["weight"] for record in checkpoint.records] == [0.7, -0.25]
    assert set(checkpoint.records[1]["scale"].values()) == {1.0}


def test_what_adapters_carry_whole_adds_up_as_changes(llama: Path, tmp_path: Path) -> None:
    config = lora(modules_to_save=["lm_head"], bias="all")
    first = save_peft(llama, tmp_path / "first", config, seed=1)
    second = save_peft(llama, tmp_path / "second", config, seed=2)
    specs = [AdapterSpec(str(first), 0.5), AdapterSpec(str(second), 0.25)]
    merged = load_checkpoint(str(llama), adapters=specs, adapt="merge").model
    base = load_plain(llama)
    for name, key in {
        "lm_head.weight": "base_model.model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias": (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
        ),
    }.items():
        start = base.get_parameter(name).detach()
        changes = [
            load_file(folder / "adapter_model.safetensors")[key] - start
            for folder in (first, second)
        ]
        assert changes[0].abs().max() > 0.1
        expected = start + 0.5 * changes[0] + 0.25 * changes[1]
        torch.testing.assert_close(merged.get_parameter(name), expected, atol=1e-6, rtol=0)


def test_an_embedding_that_is_carried_and_adapted_is_weighted_once(
    llama: Path, tmp_path: Path
) -> None:
    """PEFT saves an embedding that it targets: as it was, beside its A and B."""
    config = lora(target_modules=["embed_tokens", "q_proj"])
    adapter = save_peft(llama, tmp_path / "adapter", config)
    stored = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens"
    assert f"{name}.base_layer.weight" in stored
    a, b = (stored[f"{name}.lora_embedding_{one}"].double() for one in "AB")
    base = load_plain(llama).model.embed_tokens.weight.detach().double()
    specs = [AdapterSpec(str(adapter), -0.5)]
    merged = load_checkpoint(str(llama), adapters=specs, adapt="merge").model
    expected = base - 0.5 * (8 / 4) * (b @ a).T
    found = merged.model.embed_tokens.weight.double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_weighted_trainable_tokens_are_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    adapter = save_peft(llama, tmp_path / "adapter", config)
    with pytest.raises(
        InputError, match=r"cannot be weighted by 0\.5: it replaces rows of the emb"
    ):
        load_checkpoint(str(llama), adapters=[AdapterSpec(str(adapter), 0.5)], adapt="merge")


def test_one_dora_takes_plain_loras_beside_it_in_any_order(llama: Path, tmp_path: Path) -> None:
    dora = save_peft(llama, tmp_path / "dora", lora(use_dora=True), seed=1)
    plain = save_peft(llama, tmp_path / "plain", lora(), seed=2)
    base = load_plain(llama)
    alone = load_checkpoint(str(llama), adapters=[str(dora)], adapt="merge").model
    specs = [AdapterSpec(str(plain), 0.5), AdapterSpec(str(dora))]
    both = load_checkpoint(str(llama), adapters=specs, adapt="merge")
    name = "model.layers.0.self_attn.q_proj"
    change = 0.5 * delta(plain, name, 2.0)
    expected = alone.get_parameter(f"{name}.weight").double() + change
    found = both.model.get_parameter(f"{name}.weight").double()
    torch.testing.assert_close(found, expected, atol=5e-7, rtol=0)
    assert (found - base.get_parameter(f"{name}.weight").double()).abs().max() > 0.1
    assert [record["method"] for record in both.records] == ["LORA", "DORA"]


def test_a_weighted_dora_is_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    dora = save_peft(llama, tmp_path / "dora", lora(use_dora=True))
    with pytest.raises(InputError, match=r"DORA adapter and cannot be weighted by 0\.5: DoRA sc"):
        load_checkpoint(str(llama), adapters=[AdapterSpec(str(dora), 0.5)], adapt="merge")


def test_two_doras_are_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    first = save_peft(llama, tmp_path / "first", lora(use_dora=True))
    second = save_peft(llama, tmp_path / "second", lora(use_dora=True), seed=2)
    with pytest.raises(InputError, match=r"second \(DORA\) cannot be merged with .*first \(DORA\)"):
        load_checkpoint(str(llama), adapters=[str(first), str(second)], adapt="merge")


def test_a_start_that_changes_the_base_cannot_be_weighted(llama: Path, tmp_path: Path) -> None:
    pissa = save_peft(llama, tmp_path / "pissa", lora(init_lora_weights="pissa"))
    with pytest.raises(InputError, match=r"cannot be weighted by 2\.0: its start \(pissa\) takes"):
        load_checkpoint(str(llama), adapters=[AdapterSpec(str(pissa), 2.0)], adapt="merge")


def test_two_adapters_with_a_head_that_the_base_has_not_are_refused(
    classifier: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(classifier, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        del tensors[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    # One of them may be weighted: there is no head that its own could be a change of.
    alone = load_checkpoint(
        str(base), adapters=[AdapterSpec(str(adapter), 0.5)], adapt="merge"
    ).model
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(alone.classifier.weight, head)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    with pytest.raises(InputError, match=r"both carry classifier\.bias, which the base has not"):
        load_checkpoint(str(base), adapters=[str(adapter), str(other)], adapt="merge")


def test_an_adapter_that_was_never_trained_gives_a_warning(llama: Path, tmp_path: Path) -> None:
    dead = save_peft(llama, tmp_path / "dead", lora(), change=zeroed(".lora_B."))
    partly = save_peft(llama, tmp_path / "partly", lora(), change=zeroed(".lora_B.", "v_proj"))
    notes = load_checkpoint(str(llama), adapters=[str(dead), str(partly)], adapt="merge").warnings
    assert notes == (
        f"{dead}: every B is zero, so there it changes nothing. Check its training.",
        f"{partly}: 2 of 6 Bs are zero, so there it changes nothing. Check its training.",
    )


def test_an_embeddings_adapter_that_was_never_trained_gives_a_warning(
    llama: Path, tmp_path: Path
) -> None:
    """PEFT starts it with an A of zeros; B is random from the start."""
    config = lora(target_modules=["embed_tokens", "q_proj"])
    dead = save_peft(llama, tmp_path / "dead", config, change=zeroed(".lora_embedding_A."))
    notes = load_checkpoint(str(llama), adapters=[str(dead)], adapt="merge").warnings
    assert notes == (
        f"{dead}: every A of an embedding is zero, so there it changes nothing. "
        "Check its training.",
    )
    alive = save_peft(llama, tmp_path / "alive", config)
    assert load_checkpoint(str(llama), adapters=[str(alive)], adapt="merge").warnings == ()


def test_merging_infinite_values_does_not_hold(llama: Path, tmp_path: Path) -> None:
    def overflow(model: torch.nn.Module) -> None:
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.data.fill_(1e30)

    adapter = save_peft(llama, tmp_path / "adapter", lora(), change=overflow)
    with pytest.raises(CheckFailedError, match=r"q_proj\.weight NaN or Inf"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


def test_a_key_that_peft_does_not_use_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj\.lora_C\.weight \(unused\)"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


def test_an_adapter_that_lacks_a_layer_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.1.mlp" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp.*\(not in the adapter\)"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "has layer_replication: layers share one weight"),
        ({"alora_invocation_tokens": [3]}, "has alora_invocation_tokens and cannot be merged"),
        ({"peft_type": "NO_SUCH_METHOD"}, "is a NO_SUCH_METHOD adapter, whose merge"),
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": ["LORA"]}, "has no peft_type"),
        ({"peft_type": None, "config": {"reduction_factor": 16}}, "bottleneck adapter"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split()[1],
)
def test_an_adapter_that_no_weight_can_stand_for_is_refused(
    change: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_means_nothing_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match="expected a finite number other than 0"):
        AdapterSpec("adapter", weight)


def test_a_weight_is_read_from_behind_the_path(tmp_path: Path) -> None:
    assert AdapterSpec.parse("folder") == AdapterSpec("folder")
    assert AdapterSpec.parse("folder=0.7") == AdapterSpec("folder", 0.7)
    named = tmp_path / "r=8"
    named.mkdir()
    assert AdapterSpec.parse(str(named)) == AdapterSpec(str(named))
    assert AdapterSpec.parse(f"{named}=-1") == AdapterSpec(str(named), -1.0)
    with pytest.raises(InputError, match="has the weight 'much', expected a number"):
        AdapterSpec.parse("folder=much")


def test_an_adapter_of_another_vocabulary_is_named_with_both_sizes(
    llama: Path, tmp_path: Path
) -> None:
    wide = save_llama(tmp_path / "wide", vocab_size=71, attention_bias=True)
    adapter = save_peft(wide, tmp_path / "adapter", lora(target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match=r"_A \(4, 71\) \(the base's .* num_embeddings 67\)\. P"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


def test_an_attached_adapter_has_the_dtype_of_its_base(llama: Path, tmp_path: Path) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    attached = load_checkpoint(str(llama), adapters=[str(adapter)], dtype=torch.bfloat16).model
    assert {value.dtype for value in attached.parameters()} == {torch.bfloat16}


def test_keys_from_before_a_model_was_rearranged_are_mapped_as_peft_maps_them(
    llama: Path, tmp_path: Path
) -> None:
    """A model may say what its parameters were called. PEFT reads that where it makes a model with
    an adapter, not where it adds one.
    """
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    expected = logits(unmerged(llama, adapter), input_ids=IDS)
    path = adapter / "adapter_model.safetensors"
    tensors = {
        key.replace(".model.model.", ".model.decoder."): value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    base = load_plain(llama)
    with pytest.raises(InputError, match=r"decoder\.layers\.0"):
        attach_adapter(base, adapter)
    base = load_plain(llama)
    base._checkpoint_conversion_mapping = {r"^decoder\.": "model."}
    assert torch.equal(logits(attach_adapter(base, adapter).model, input_ids=IDS), expected)


def test_attaching_keeps_the_adapter_apart(llama: Path, tmp_path: Path) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", lora())
    attached = load_checkpoint(str(llama), adapters=[str(adapter)]).model
    expected = logits(unmerged(llama, adapter), input_ids=IDS)
    assert torch.equal(logits(attached, input_ids=IDS), expected)

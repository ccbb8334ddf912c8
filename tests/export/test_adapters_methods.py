"""PEFT's other methods: merged weights give what the unmerged model gives, one at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmopt_export.adapters.merge import METHODS
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.checkpoint import load_checkpoint
from mmopt_kernels.errors import InputError
from peft_oracle import merged_and_unmerged
from tiny_adapters import save_llama, save_peft

# What a method needs besides its target modules, to run on sizes this small.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4, 5]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # PEFT's BEFT trains biases, so there must be some.
    return save_llama(tmp_path_factory.mktemp("methods") / "llama", attention_bias=True)


def config_of(method: str, **settings: Any) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"this version of PEFT has no {method}")
    values = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    values |= SETTINGS.get(method, {}) | settings
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **values)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_gives_what_peft_gives_unmerged(
    method: str, llama: Path, tmp_path: Path
) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", config_of(method))
    ids = torch.arange(3, 21).reshape(2, 9)
    found, expected, without = merged_and_unmerged(llama, [adapter], input_ids=ids)
    assert (expected - without).abs().max() > 0.1
    # The merged weights are rounded to fp32; the computation is in fp64.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_two_methods_that_need_their_base_are_refused(llama: Path, tmp_path: Path) -> None:
    first = save_peft(llama, tmp_path / "first", config_of("IA3"))
    second = save_peft(llama, tmp_path / "second", config_of("LOHA"))
    with pytest.raises(InputError, match=r"second \(LOHA\) cannot be merged with .*first \(IA3\)"):
        load_checkpoint(str(llama), adapters=[str(first), str(second)], adapt="merge")


def test_a_method_that_needs_its_base_cannot_be_weighted(llama: Path, tmp_path: Path) -> None:
    folder = save_peft(llama, tmp_path / "adapter", config_of("IA3"))
    with pytest.raises(InputError, match=r"is a IA3 adapter and cannot be weighted by 0\.5"):
        load_checkpoint(str(llama), adapters=[AdapterSpec(str(folder), 0.5)], adapt="merge")


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_are_refused_because_they_change_no_weight(
    method: str, llama: Path, tmp_path: Path
) -> None:
    shape = {
        "num_virtual_tokens": 4,
        "token_dim": 32,
        "num_transformer_submodules": 1,
        "num_attention_heads": 2,
        "num_layers": 2,
    }
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **shape)
    adapter = save_peft(llama, tmp_path / "adapter", config)
    with pytest.raises(InputError, match=rf"{method} adapter, which cannot be merged or swapped"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")


def test_a_method_that_peft_cannot_merge_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_peft(llama, tmp_path / "adapter", config_of("LILY"))
    with pytest.raises(InputError, match="a LILY adapter, whose merge has not been shown"):
        load_checkpoint(str(llama), adapters=[str(adapter)], adapt="merge")

"""Adapters of every kind over small real models, with random values that change the output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Wider than what the libraries start with, so that an adapter that is lost is seen.
SPREAD = 0.2


def save_llama(folder: Path, *, seed: int = 0, tied: bool = False, **settings: Any) -> Path:
    """Save a random Llama of 2 layers, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": SPREAD,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**(values | settings))).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Save a random GPT-2 of 2 layers: its linear layers are `Conv1D`, its embeddings tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=67,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=SPREAD,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_convnet(folder: Path, *, seed: int = 0) -> Path:
    """Save a random ResNet image classifier of 2 stages."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def save_peft(
    model: Path,
    folder: Path,
    config: Any,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    change: Callable[[nn.Module], None] | None = None,
) -> Path:
    """Save a PEFT adapter of `config` for the model in `model`, every value of it random.

    Args:
        dtype: what its values are stored in.
        change: called with the `PeftModel` before it is saved.
    """
    import peft
    import transformers

    base_config = transformers.AutoConfig.from_pretrained(model)
    base = getattr(transformers, base_config.architectures[0]).from_pretrained(model)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base, config)
    randomize(adapted)
    if change is not None:
        change(adapted)
    for value in adapted.parameters():
        if value.requires_grad:
            value.data = value.data.to(dtype)
    adapted.save_pretrained(folder)
    return folder


def zeroed(*parts: str) -> Callable[[nn.Module], None]:
    """For `save_peft`: zero what has all of these in its name, as if it was never trained."""

    def change(adapted: nn.Module) -> None:
        for name, value in adapted.named_parameters():
            if all(part in name for part in parts):
                nn.init.zeros_(value)

    return change


def randomize(adapted: nn.Module) -> None:
    """Move every trained value away from where its method starts."""
    for value in adapted.parameters():
        if value.requires_grad:
            value.data += SPREAD * torch.randn_like(value)

"""Writes the configuration with which onnxruntime-genai opens an exported decoder."""

import json
from pathlib import Path
from typing import Any

from mmopt_export.decoder.lowering import steady_positions
from mmopt_export.manifest import CacheMap
from mmopt_kernels.errors import InputError

CONFIG_NAME = "genai_config.json"

# transformers' `model_type` to onnxruntime-genai's `model.type`. For all of these genai runs one
# graph named as ours and knows of nothing but the names of its inputs and outputs; the type chooses
# how prompts and positions are made, and ours takes no positions.
_TYPES = {
    "cohere": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "glm": "llama",
    "gpt2": "llama",
    "gpt_neox": "llama",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "olmo2": "olmo",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "llama",
    "starcoder2": "llama",
}


def supports(config: Any) -> bool:
    """Whether onnxruntime-genai knows the architecture of a Hugging Face configuration."""
    return config.get_text_config().model_type in _TYPES


def write_genai_config(
    folder: Path,
    config: Any,
    cache: CacheMap,
    *,
    file: str = "model.onnx",
    provider: str = "CPUExecutionProvider",
    generation: Any = None,
) -> Path:
    """Write `genai_config.json` into `folder`, keys in a fixed order.

    Args:
        folder: of the artifact.
        config: the model's Hugging Face configuration.
        cache: the names and sizes of its KV cache.
        file: the graph, relative to `folder`.
        provider: that genai shall run it on: the CPU's or CUDA's.
        generation: the model's generation configuration, for its special tokens; None takes those
            of `config`.

    Raises:
        InputError: genai has no such architecture, or the model no end-of-sequence token.
    """
    text = config.get_text_config()
    if not supports(config):
        raise InputError(
            f"onnxruntime-genai has no {text.model_type}, expected one of: "
            f"{', '.join(sorted(_TYPES))}."
        )
    tokens = {
        name: _first(getattr(generation, name, None), getattr(text, name, None))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if tokens["eos_token_id"] is None:
        raise InputError(
            "the model has no eos_token_id, which onnxruntime-genai needs. Set it in the model's "
            "generation_config.json."
        )
    first_eos = tokens["eos_token_id"]
    first_eos = first_eos[0] if isinstance(first_eos, list) else first_eos
    length = steady_positions(text)
    options: list[dict[str, Any]] = []
    if provider == "CUDAExecutionProvider":
        options.append({"cuda": {}})
    document = {
        "model": {
            "bos_token_id": _first(tokens["bos_token_id"], first_eos),
            "context_length": length,
            "decoder": {
                "filename": file,
                "head_size": cache.head_size,
                "hidden_size": int(text.hidden_size),
                "inputs": {
                    "attention_mask": "attention_mask",
                    "input_ids": "input_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "num_attention_heads": int(text.num_attention_heads),
                "num_hidden_layers": len(cache.layers),
                "num_key_value_heads": cache.heads,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
            },
            "eos_token_id": tokens["eos_token_id"],
            "pad_token_id": _first(tokens["pad_token_id"], first_eos),
            "type": _TYPES[text.model_type],
            "vocab_size": int(text.vocab_size),
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "num_beams": 1,
            # The buffers are past and present at once, as everywhere in this artifact.
            "past_present_share_buffer": True,
        },
    }
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _first(*values: Any) -> Any:
    return next((one for one in values if one is not None), None)

"""Small random decoders, one for each family that the export is held against."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VOCABULARY = 61

# Wider than the usual 0.02: logits are then far from zero and from each other, so that parity
# means something and greedy tokens differ from step to step.
SPREAD = 0.25

# Shorter than the prompts of the tests, so that windows cut something off.
WINDOW = 6


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def _config(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")(**_sizes(**changes))


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: _config("GPT2", scale_attn_by_inverse_layer_idx=True),
    "llama": lambda: _config("Llama", head_dim=16),
    "llama-tied": lambda: _config("Llama", tie_word_embeddings=True, attention_bias=True),
    "llama3-rope": lambda: _config(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": lambda: _config("Qwen2", num_key_value_heads=1),
    "qwen3": lambda: _config("Qwen3", head_dim=16),
    "gemma2": lambda: _config(
        "Gemma2",
        head_dim=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        query_pre_attn_scalar=11,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: _config(
        "Gemma3Text",
        head_dim=24,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=20,
    ),
    "phi3": lambda: _config("Phi3", partial_rotary_factor=0.5, head_dim=16, sliding_window=WINDOW),
    "phi3-longrope": lambda: _config(
        "Phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.2, 2.4, 2.6],
        },
    ),
    "dynamic-rope": lambda: _config(
        "Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: _config("Mistral", sliding_window=WINDOW),
    "gpt-neox": lambda: _config("GPTNeoX", num_key_value_heads=None),
    "olmo2": lambda: _config("Olmo2"),
    "starcoder2": lambda: _config("Starcoder2", sliding_window=WINDOW),
    "granite": lambda: _config(
        "Granite", logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.7
    ),
    "cohere": lambda: _config("Cohere", logit_scale=0.5, use_qk_norm=True),
    "glm": lambda: _config("Glm", head_dim=16, partial_rotary_factor=0.5),
    "smollm3": lambda: _config("SmolLM3", no_rope_layers=[1, 0]),
    "stablelm": lambda: _config("StableLm", partial_rotary_factor=0.5),
    "opt": lambda: _config(
        "OPT",
        num_key_value_heads=None,
        ffn_dim=56,
        word_embed_proj_dim=32,
        init_std=SPREAD,
    ),
    "bert": lambda: _config("Bert", num_key_value_heads=None, is_decoder=True),
    "biogpt": lambda: _config("BioGpt", num_key_value_heads=None),
    "phi": lambda: _config("Phi", partial_rotary_factor=0.5, num_key_value_heads=4),
}

COMMON = ("llama", "gemma3")
"""Those that differ most; what the others add is held against eager among the slow tests."""


def tiny_decoder(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family: hidden 32, 2 or 3 layers, 61 tokens, 96 positions.

    Args:
        changes: of its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]()
    config.update(changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norms of all ones and biases of zero would hide that one is missing or taken
                # for another.
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def on_4_bit_grid(model: Any, block: int = 32) -> Any:
    """Round the weights of a model's matmuls, in place, to what 4 bits in blocks hold exactly.

    Then a 4-bit graph has the model's own weights, and whatever it is off by is its own doing.
    Random weights suffer from rounding as trained ones do not. Scales are those of fp16.
    """
    import torch

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            for columns in module.weight.split(block, dim=1):
                at = columns.abs().argmax(dim=1, keepdim=True)
                scale = (columns.gather(1, at) / -8).half().float()
                scale[scale == 0] = 1  # of the row of padding
                columns.copy_((columns / scale).round().clamp(-8, 7) * scale)
    return model


def tiny_gpt_oss() -> Any:
    """GPT-OSS with attention sinks, its experts replaced by one: routing is not what is tested."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        **_sizes(head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1),
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config)

    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, hidden: Any) -> Any:
            return torch.tanh(self.linear(hidden)), None

    for layer in model.model.layers:
        layer.mlp = Dense()
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


class Exported:
    """A decoder's part, its graph on disk, and sessions of it."""

    def __init__(self, model: Any, folder: Any, *, target: str = "cpu", **options: Any) -> None:
        import onnx_ir

        from mmopt_export.decoder.part import cache_map, decoder_part
        from mmopt_export.decoder.tracing import trace_decoder

        self.model = model
        self.part = decoder_part(model, **options)
        self.cache = cache_map(self.part)
        self.folder = folder
        self.file = folder / "model.onnx"
        graph = trace_decoder(self.part, target)
        self.nodes = [node.op_type for node in graph.graph]
        onnx_ir.save(graph, self.file, external_data="model.onnx.data")

    def session(self, *, optimize: bool = True) -> Any:
        """A session on one CPU thread."""
        from mmopt_export.runtime import open_session

        return open_session(
            self.file, provider="CPUExecutionProvider", threads=1, optimize=optimize
        )

    def generator(self, **options: Any) -> Any:
        """A generator with the model's limit."""
        from mmopt_export.generation import Generator

        options.setdefault("max_length", self.part.limits["total"])
        return Generator(self.session(), self.cache, **options)


_held: list[TemporaryDirectory[str]] = []


@cache
def traced(family: str) -> Exported:
    """The family's export for the CPU, made once in a process: nobody may change it."""
    # Removed when the process ends.
    _held.append(TemporaryDirectory(prefix=f"{family}-"))
    return Exported(tiny_decoder(family), Path(_held[-1].name))


def eager_tokens(model: Any, ids: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation of one prompt, end-of-sequence tokens ignored."""
    import torch

    with torch.no_grad():
        result = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return [int(one) for one in result[0, len(ids) :]]

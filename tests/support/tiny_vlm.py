"""Small random vision-language models, one for each family that the export is held against."""

from collections.abc import Callable
from typing import Any

VOCABULARY = 97
IMAGE_TOKEN = 90

# Wider than the usual 0.02: logits are then far from zero and from each other, so that parity
# means something and greedy tokens differ from step to step.
SPREAD = 0.2


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": SPREAD,
        **changes,
    }


def smolvlm_config(name: str = "SmolVLM") -> Any:
    """SmolVLM or Idefics3: 4 image tokens for a tile of 32 x 32."""
    import transformers

    return getattr(transformers, f"{name}Config")(
        text_config={"model_type": "llama", **_text()},
        vision_config=_vision(),
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
        scale_factor=2,
        tie_word_embeddings=False,
    )


def llava_config() -> Any:
    """LLaVA with a CLIP tower: 16 image tokens for an image of 32 x 32."""
    from transformers import LlavaConfig

    return LlavaConfig(
        text_config={"model_type": "llama", **_text()},
        vision_config={"model_type": "clip_vision_model", **_vision(projection_dim=32)},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
    )


def qwen_config(name: str = "Qwen2_5_VL") -> Any:
    """Qwen2-VL or Qwen2.5-VL: patches of 4 x 4, merged by 2, windows of 16 x 16 pixels."""
    import transformers

    text = _text(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        }
    )
    vision = {
        "depth": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": SPREAD,
    }
    if name == "Qwen2_5_VL":
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
    else:
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        tie_word_embeddings=False,
    )


def gemma3_config() -> Any:
    """Gemma3: 4 image tokens, sliding windows of 6, blocks that see each other both ways."""
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=_text(
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=_vision(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_id=IMAGE_TOKEN + 1,
        eoi_token_id=IMAGE_TOKEN + 2,
    )


def janus_config() -> Any:
    """Janus: 16 image tokens each way, images of 32 x 32."""
    from transformers import JanusConfig

    return JanusConfig(
        text_config={"model_type": "llama", **_text()},
        vision_config={
            **_vision(projection_dim=32, depth=2, mlp_ratio=1.5),
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 40,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "initializer_range": SPREAD,
        },
        image_token_id=IMAGE_TOKEN,
    )


FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "smolvlm": ("SmolVLMForConditionalGeneration", smolvlm_config),
    "idefics3": ("Idefics3ForConditionalGeneration", lambda: smolvlm_config("Idefics3")),
    "llava": ("LlavaForConditionalGeneration", llava_config),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", lambda: qwen_config("Qwen2VL")),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", qwen_config),
    "gemma3": ("Gemma3ForConditionalGeneration", gemma3_config),
    "janus": ("JanusForConditionalGeneration", janus_config),
}


def make(family: str, *, seed: int = 0) -> Any:
    """A random model of a family, eval mode, fp32."""
    import torch
    import transformers

    architecture, config = FAMILIES[family]
    torch.manual_seed(seed + 2)
    model = getattr(transformers, architecture)(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start at 0 or 1 and biases at 0: one that was lost would not be seen.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "projection_weight" in name:
                parameter.normal_(std=SPREAD)
    if family == "gemma3":
        # Embeddings are scaled up: as wide as the others, each token alone would decide the next.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.05)
    if family == "janus":
        model.generation_config._from_model_config = False
        model.generation_config.generation_kwargs = {"boi_token_id": IMAGE_TOKEN + 1}
        model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.generation_config.guidance_scale = 3.0
    return model


def make_tokenizer() -> Any:
    """A tokenizer of words `t0` to `t96`, of which the last are what images stand for."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    names = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE_TOKEN: "<image>"}
    names |= {IMAGE_TOKEN + 1: "<boi>", IMAGE_TOKEN + 2: "<eoi>"}
    names |= {IMAGE_TOKEN + 3: "<fake_token_around_image>", IMAGE_TOKEN + 4: "<global-img>"}
    names |= {IMAGE_TOKEN + 5: "<row_1_col_1>", IMAGE_TOKEN + 6: "<unk>"}
    for index, name in names.items():
        vocabulary.pop(f"t{index}")
        vocabulary[name] = index
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "row_token": "<row_1_col_1>",
        },
    )


def make_processor(family: str) -> Any:
    """The family's image processor for 32 x 32 pixels, on Pillow."""
    from importlib import import_module

    side = {"height": 32, "width": 32}
    names = {
        "smolvlm": ("smolvlm", "SmolVLM"),
        "idefics3": ("idefics3", "Idefics3"),
        "llava": ("clip", "CLIP"),
        "qwen2-vl": ("qwen2_vl", "Qwen2VL"),
        "qwen2.5-vl": ("qwen2_vl", "Qwen2VL"),
        "gemma3": ("gemma3", "Gemma3"),
        "janus": ("janus", "Janus"),
    }
    settings: dict[str, dict[str, Any]] = {
        "smolvlm": {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        "llava": {"size": {"shortest_edge": 32}, "crop_size": side},
        "qwen2-vl": {
            "size": {"shortest_edge": 64, "longest_edge": 1024},
            "patch_size": 4,
            "merge_size": 2,
        },
        "gemma3": {"size": side},
        "janus": {"size": side, "min_size": 14},
    }
    settings["idefics3"] = settings["smolvlm"]
    settings["qwen2.5-vl"] = settings["qwen2-vl"]
    module, name = names[family]
    source = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(source, f"{name}ImageProcessorPil")(**settings[family])


def save(family: str, folder: Any) -> Any:
    """Save a random model with its tokenizer and image processor; gives the model."""
    model = make(family)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    return model

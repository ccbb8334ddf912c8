"""A tiny model of each family that mmopt promises to compile, and batches of several sizes for it.

Nothing is dropped at random, so that two runs can be compared. What a family is trained on is in
its batches: labels, pairs of text and image, targets of speech.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 99
IMAGE_TOKEN, IMAGE_TOKENS = 97, 4

ONE = {"num_hidden_layers": 1}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
UNGROUPED = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
BOTH_KINDS = ["sliding_attention", "full_attention"]
SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
}
_NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


# --- models -------------------------------------------------------------------------------------


def bert(**changes: Any) -> Any:
    config = hf.BertConfig(**{**UNGROUPED, **_NO_DROPOUT, **changes}, num_labels=3)
    return hf.BertForSequenceClassification(config)


def roberta(**changes: Any) -> Any:
    sizes = {**UNGROUPED, **_NO_DROPOUT, **changes}
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes, max_position_embeddings=40))


def vit(**changes: Any) -> Any:
    sizes = {**VISION, "hidden_dropout_prob": 0.0, **changes}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=3))


def clip(**changes: Any) -> Any:
    text = {**UNGROUPED, "max_position_embeddings": 32, "eos_token_id": 2, **changes}
    vision = {**VISION, **changes}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def siglip(**changes: Any) -> Any:
    text = {**UNGROUPED, "max_position_embeddings": 32, **changes}
    vision = {**VISION, **changes}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))


def whisper(**changes: Any) -> Any:
    sizes = {**SEQUENCE_TO_SEQUENCE, **changes}
    config = hf.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=20)
    return hf.WhisperForConditionalGeneration(config)


def wav2vec2(**changes: Any) -> Any:
    """As it is fine-tuned for speech recognition: of the spectrogram nothing is masked."""
    sizes = {
        **UNGROUPED,
        "vocab_size": 12,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "ctc_loss_reduction": "mean",
    }
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**{**sizes, **changes}))


def gpt2(layers: int = 2) -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=32, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, **changes}))


def qwen3(**changes: Any) -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**TEXT, **changes}, head_dim=8))


def gemma3(vision_layers: int = 2) -> Any:
    vision = {**VISION, "num_hidden_layers": vision_layers, "vision_use_head": False}
    config = hf.Gemma3Config(
        text_config={**GEMMA, "layer_types": BOTH_KINDS},
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_id=IMAGE_TOKEN,
        boi_token_id=95,
        eoi_token_id=96,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl(**changes: Any) -> Any:
    """Its vision tower attends within windows of 2x2 merged patches, in the last layer to all."""
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": False,
        **changes,
    }
    vision = {
        "hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48,
        "out_hidden_size": 32, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=98,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def janus(**changes: Any) -> Any:
    vision = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    vision |= {"mlp_ratio": 1.5, "projection_dim": 32, "num_image_tokens": 16, **changes}
    drawing = {  # a norm's groups are 32 channels at least
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
        "channel_multiplier": (1, 1), "num_res_blocks": 1, "projection_dim": 32,
        "image_token_embed_dim": 32,
    }  # fmt: skip
    text = {**TEXT, **changes}
    config = hf.JanusConfig(
        text_config=text, vision_config=vision, vq_config=drawing, image_token_id=IMAGE_TOKEN
    )
    return hf.JanusForConditionalGeneration(config)


# --- batches ------------------------------------------------------------------------------------


def _generator(rows: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * rows + length)


def token_ids(rows: int, length: int) -> Tensor:
    return torch.randint(5, 95, (rows, length), generator=_generator(rows, length))


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=_generator(rows, 0))


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """Text whose first row is padded at the end, with labels for every real token."""
    ids = token_ids(rows, length)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _classes(rows: int, length: int) -> dict[str, Tensor]:
    return {**tokens(rows, length), "labels": torch.arange(rows) % 3}


def _pictures(rows: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": images(rows), "labels": torch.arange(rows) % 3}


def _pairs(rows: int, length: int) -> dict[str, Any]:
    batch = tokens(rows, length)
    del batch["labels"]
    return {**batch, "pixel_values": images(rows), "return_loss": True}


def _speech_to_text(rows: int, length: int) -> dict[str, Tensor]:
    """Whisper hears 30 seconds, always; the text has any length."""
    sound = torch.randn(rows, 8, 40, generator=_generator(rows, length))
    return {"input_features": sound, "labels": tokens(rows, length)["labels"]}


def _speech(rows: int, length: int) -> dict[str, Tensor]:
    """Some sound of any length, the first row shorter, and what is said, in some letters."""
    samples = 40 * length
    generator = _generator(rows, length)
    mask = torch.ones(rows, samples, dtype=torch.int64)
    mask[0, -samples // 4 :] = 0
    said = torch.randint(1, 12, (rows, 5), generator=generator)
    said[0, -2:] = -100
    return {
        "input_values": torch.randn(rows, samples, generator=generator) * mask,
        "attention_mask": mask,
        "labels": said,
    }


def with_image(rows: int, length: int, count: int = IMAGE_TOKENS) -> dict[str, Tensor]:
    """Text around an image in each row."""
    batch = tokens(rows, length + count)
    batch["input_ids"][:, 3 : 3 + count] = IMAGE_TOKEN
    batch["labels"][:, 3 : 3 + count] = -100
    return {**batch, "pixel_values": images(rows)}


def _image_blocks(rows: int, length: int) -> dict[str, Tensor]:
    batch = with_image(rows, length)
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def _images_of_any_size(rows: int, length: int) -> dict[str, Tensor]:
    """An image in each row, all of different shapes, as Qwen2.5-VL's processor hands them over."""
    shapes = [(1, 4 + 2 * (row % 3), 4 + 2 * (row % 2)) for row in range(rows)]
    counts = [height * width // 4 for _, height, width in shapes]
    batch = tokens(rows, length + max(counts))
    for row, count in enumerate(counts):
        batch["input_ids"][row, 3 : 3 + count] = IMAGE_TOKEN
        batch["labels"][row, 3 : 3 + count] = -100
    patches = sum(height * width for _, height, width in shapes)
    patch = 3 * 2 * 4 * 4  # channels, frames, height, width
    return {
        **batch,
        "pixel_values": torch.randn(patches, patch, generator=_generator(rows, length)),
        "image_grid_thw": torch.tensor(shapes),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int(),
    }


@dataclass(frozen=True)
class Family:
    """How to build the model and its batches.

    Attributes:
        build: a new model; seed torch before.
        make: a batch of so many rows, and tokens (or whatever is as long as the caller likes).
    """

    build: Callable[[], Any]
    make: Callable[[int, int], dict[str, Any]]

    def model(self, seed: int = 0) -> Any:
        """Random weights, wider than usual: scores far from zero, so that masks matter."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        return model

    def batch(self, size: int) -> dict[str, Any]:
        """One of the `SIZES`, each with another number of rows and another length."""
        return self.make(*SIZES[size])


# Three rows beside three colours: sizes that are equal by chance must not be taken for one.
SIZES = ((3, 13), (2, 11), (5, 17))

# One layer, because each takes seconds to trace; two where they are of different kinds.
FAMILIES = {
    "bert": Family(lambda: bert(**ONE), _classes),
    "roberta": Family(lambda: roberta(**ONE), tokens),
    "vit": Family(lambda: vit(**ONE), _pictures),
    "clip": Family(lambda: clip(**ONE), _pairs),
    "siglip": Family(lambda: siglip(**ONE), _pairs),
    "whisper": Family(lambda: whisper(encoder_layers=1, decoder_layers=1), _speech_to_text),
    "wav2vec2": Family(lambda: wav2vec2(**ONE), _speech),
    "gpt2": Family(lambda: gpt2(layers=1), tokens),
    "llama": Family(lambda: llama(**ONE), tokens),
    "qwen3": Family(lambda: qwen3(**ONE), tokens),
    "gemma3": Family(lambda: gemma3(vision_layers=1), _image_blocks),
    "qwen2.5-vl": Family(lambda: qwen2_5_vl(**ONE), _images_of_any_size),
    "janus": Family(lambda: janus(**ONE), lambda rows, length: with_image(rows, length, 16)),
}


def with_adapter(model: Any, *, r: int = 4) -> Any:
    """The model with a LoRA adapter, whose B is not zero, on every linear layer."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted

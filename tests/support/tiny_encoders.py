"""Small random encoders of many architectures on disk, with their tokenizers and processors."""

import json
import math
import string
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_models import LABELS, save_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_LABELS: dict[str, Any] = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}
_TEXT = {**SIZES, "max_position_embeddings": 64}
# What each family of text encoders says otherwise. RoBERTa's positions start behind the padding
# id, so its table has one row more than positions.
_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "Roberta": {**_TEXT, "max_position_embeddings": 66, "pad_token_id": 0, "type_vocab_size": 1},
    "XLMRoberta": {
        **_TEXT,
        "max_position_embeddings": 66,
        "pad_token_id": 0,
        "type_vocab_size": 1,
    },
    "DistilBert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
    },
    "ModernBert": {
        **_TEXT,
        "num_hidden_layers": 3,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "Electra": {**_TEXT, "embedding_size": 16},
    "DebertaV2": {
        **_TEXT,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
    },
    "MPNet": {**_TEXT, "max_position_embeddings": 66, "pad_token_id": 1},
    "Albert": {**_TEXT, "embedding_size": 16},
    "BigBird": {**_TEXT, "block_size": 4, "num_random_blocks": 1},
}
IMAGE = {"image_size": 32, "patch_size": 8}
_VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "ViT": {**SIZES, **IMAGE},
    "DeiT": {**SIZES, **IMAGE},
    "Dinov2": {**SIZES, "image_size": 40, "patch_size": 8, "mlp_ratio": 2},
    "Dinov2WithRegisters": {**SIZES, "image_size": 40, "patch_size": 8, "mlp_ratio": 2},
    "DINOv3ViT": {**SIZES, **IMAGE, "num_register_tokens": 2},
    "SiglipVision": {**SIZES, **IMAGE},
    "CLIPVision": {**SIZES, **IMAGE},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "ConvNextV2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "Swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
}


def make(model_class: Any, config: Any, *, seed: int) -> Any:
    """A random model in eval mode, the same for the same seed, with weights of some size."""
    import torch

    torch.manual_seed(seed)
    return widen(model_class(config), seed=seed)


def widen(model: Any, *, seed: int = 0) -> Any:
    """Give every weight a size at which outputs differ between inputs, so that parity means much.

    A fresh model's weights are near 0.02: its outputs hardly depend on what it reads.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "embedding" not in name:
                fan = math.prod(value.shape[1:])
                value.normal_(std=1.2 / math.sqrt(fan), generator=generator)
            elif value.ndim > 1:
                value.normal_(std=0.7, generator=generator)
            elif value.ndim == 1 and "logit" not in name and "lambda" not in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def save_text_encoder(
    folder: Path,
    family: str,
    head: str = "Model",
    *,
    seed: int = 0,
    padding_side: str = "right",
    **changes: Any,
) -> Path:
    """Save a random text encoder such as `BertForSequenceClassification` with its tokenizer."""
    import transformers

    tokenizer = save_tokenizer(folder)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = padding_side
    if family == "MPNet":  # counts positions from behind id 1
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(folder)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(
        vocab_size=len(tokenizer), **{**_TEXT_CONFIGS[family], **_LABELS, **changes}
    )
    model = make(getattr(transformers, f"{family}{head}"), config, seed=seed)
    model.save_pretrained(folder)
    return folder


def save_vision_encoder(
    folder: Path, family: str, head: str, *, seed: int = 0, **changes: Any
) -> Path:
    """Save a random image encoder such as `ViTForImageClassification` with its processor."""
    import transformers

    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**_VISION_CONFIGS[family], **_LABELS, **changes})
    model = make(getattr(transformers, f"{family}{head}"), config, seed=seed)
    model.save_pretrained(folder)
    side = _VISION_CONFIGS[family].get("image_size", 64)
    save_image_processor(folder, family, side)
    return folder


def save_image_processor(folder: Path, family: str, side: int) -> None:
    """Write the `preprocessor_config.json` that the hub has for such a model, but smaller."""
    common: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": side, "width": side},
        "resample": 2,
        "image_processor_type": "ViTImageProcessor",
    }
    crop = {
        "size": {"shortest_edge": side + side // 8},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "resample": 3,
    }
    changes: dict[str, Any] = {}
    if family.startswith("Dinov2"):
        changes = {"image_processor_type": "BitImageProcessor", **crop}
    elif family.startswith("CLIP"):
        changes = {
            "image_processor_type": "CLIPImageProcessor",
            **crop,
            "size": {"shortest_edge": side},
        }
    elif family.startswith("Siglip"):
        changes = {
            "image_processor_type": "SiglipImageProcessor",
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    elif family.startswith(("ResNet", "ConvNext")):
        changes = {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": side},
            "crop_pct": 0.875,
            "resample": 3,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **changes}))


def save_dual_encoder(
    folder: Path, family: str, *, seed: int = 0, text: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Save a random `CLIPModel` or `SiglipModel` with its tokenizer and processor."""
    import torch
    import transformers

    tokenizer = save_tokenizer(folder)
    end = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    sizes = {**SIZES, "max_position_embeddings": 16, "vocab_size": len(tokenizer)}
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    if family == "Siglip":
        # Its tokenizer gives no mask: the model was trained with padding up to the full length.
        path = folder / "tokenizer_config.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "model_input_names": ["input_ids"]}))
    config = getattr(transformers, f"{family}Config")(
        text_config={**sizes, **end, **(text or {})},
        vision_config={**SIZES, **IMAGE},
        **({"projection_dim": 24} if family == "CLIP" else {}),
        **changes,
    )
    model = make(getattr(transformers, f"{family}Model"), config, seed=seed)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
        if family == "Siglip":
            model.logit_bias.fill_(-7)
    model.save_pretrained(folder)
    save_image_processor(folder, family, IMAGE["image_size"])
    return folder


def save_speech_encoder(
    folder: Path, family: str, head: str = "ForCTC", *, norm: str = "group", seed: int = 0
) -> Path:
    """Save a random speech encoder such as `Wav2Vec2ForCTC` with its processor.

    Args:
        norm: `feat_extract_norm`: with `layer` it was trained with an attention mask, with `group`
            without one.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase, "'"]
    if head == "ForCTC":
        (folder / "vocab.json").write_text(
            json.dumps({token: index for index, token in enumerate(vocabulary)})
        )
        transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=16_000,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=norm == "layer",
    )
    extractor.save_pretrained(folder)
    config = getattr(transformers, f"{family}Config")(
        **SIZES,
        vocab_size=len(vocabulary),
        pad_token_id=0,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
        apply_spec_augment=False,
        layerdrop=0.0,
        **({} if head == "ForCTC" else _LABELS),
    )
    model = make(getattr(transformers, f"{family}{head}"), config, seed=seed)
    model.save_pretrained(folder)
    return folder


def save_pooling(
    folder: Path,
    pooling: dict[str, Any],
    *,
    normalize: bool = False,
    dense: Sequence[dict[str, Any]] = (),
    longest: int | None = None,
) -> Path:
    """Make a text encoder's folder one of sentence-transformers, with the modules given."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [(f"{index}_Dense", "Dense") for index in range(2, 2 + len(dense))]
    modules += [(f"{2 + len(dense)}_Normalize", "Normalize")] if normalize else []
    document = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(document))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for index, config in enumerate(dense, start=2):
        (folder / f"{index}_Dense").mkdir(exist_ok=True)
        (folder / f"{index}_Dense" / "config.json").write_text(json.dumps(config))
    settings = {"max_seq_length": longest, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def picture(height: int, width: int, *, seed: int = 0, channels: int = 3) -> Any:
    """A smooth picture with edges and noise, uint8 `[height, width, channels]`."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        127 + 90 * np.sin(x * generator.uniform(0.02, 0.5) + y * generator.uniform(0.02, 0.5))
        for _ in range(channels)
    ]
    image = np.stack(waves, -1)
    image[height // 4 : height // 2, width // 3 :] = generator.uniform(0, 255, channels)
    image += generator.normal(0, 12, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def save_sound(path: Path, samples: Any, *, rate: int = 16_000) -> Path:
    """Write float samples in [-1, 1] as a 16-bit mono wav file."""
    data = np.clip(np.asarray(samples) * 32767, -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path

"""Made-up batches for models that read text, images or speech, and what any batch holds."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmopt_kernels.errors import InputError

IGNORED = -100
"""The label that transformers' losses leave out."""

# Hertz. Every Whisper and Wav2Vec2 hears this; a checkpoint's feature extractor says so as well.
SPEECH_RATE = 16000
# Whisper's feature extractor: one frame of the spectrogram is 160 samples.
SPECTROGRAM_HOP = 160

Head = Literal["next token", "token", "token class", "class", "target", "transcript"]


@dataclass(frozen=True)
class Contents:
    """What one batch holds; None of what the model does not read.

    Attributes:
        tokens: without padding.
        images: pictures.
        audio_seconds: without padding.
    """

    tokens: int | None = None
    images: int | None = None
    audio_seconds: float | None = None


def example_batch(
    base: Any, *, batch: int, length: int, train: bool, seed: int = 0
) -> dict[str, Any]:
    """Random inputs that fit the model's config.

    Args:
        base: a `PreTrainedModel`.
        batch: sequences, images or recordings.
        length: tokens per sequence, of a decoder at most as many as it has positions; of raw speech
            the frames that its convolutions make. Every second sequence is padded to it at the
            right, so that masks are at work.
        train: add labels, where the model's head is one whose labels are known.
        seed: of the random numbers.

    Returns:
        Keyword arguments of the model's forward, whichever it reads: int64 `input_ids` and
        `attention_mask` `[B, L]`, float32 `pixel_values` `[B, C, H, W]`, `input_values`
        `[B, samples]` and `input_features` `[B, bins, frames]`, int64 `decoder_input_ids` or
        `labels`.

    Raises:
        InputError: the model reads something that cannot be made up, or not so many tokens.
    """
    reads = parameters_of(base)
    if places_images(base):
        raise InputError(
            f"{type(base).__name__} reads images at the places that its processor marks in the "
            "text; such inputs cannot be made up. Pass --data FILE, JSON Lines with a text and an "
            "image in each row."
        )
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    if "input_ids" in reads:
        made |= _made_text(base, batch, length, generator)
    if "pixel_values" in reads:
        made |= _made_images(base, batch, generator)
    if "input_values" in reads or "input_features" in reads:
        made |= _made_speech(base, batch, length, generator)
    if base.main_input_name not in made:
        raise InputError(
            f"{type(base).__name__} reads {base.main_input_name}, which cannot be made up for it; "
            "expected token ids, images of a fixed size, or the speech of a Whisper or Wav2Vec2. "
            "Pass --data FILE, or call mmopt.compile with your own batch."
        )
    if "input_ids" in made and "use_cache" in reads:
        made["use_cache"] = False
    made |= _made_targets(base, made, batch, length, train, generator)
    if train and "return_loss" in reads:
        made["return_loss"] = True
    return made


def contents_of(inputs: Mapping[str, Any]) -> Contents:
    """Count tokens, images and seconds of speech of a batch that `example_batch` made up."""
    mask = inputs.get("attention_mask")
    audio = None
    if "input_features" in inputs:
        rows, _, frames = inputs["input_features"].shape
        audio = rows * frames * SPECTROGRAM_HOP / SPEECH_RATE
    elif "input_values" in inputs:
        samples = inputs["input_values"].numel() if mask is None else int(mask.sum())
        audio = samples / SPEECH_RATE
    images = inputs.get("pixel_values")
    return Contents(tokens_of(inputs), None if images is None else images.shape[0], audio)


def tokens_of(inputs: Mapping[str, Any]) -> int | None:
    """The tokens of `input_ids` that are no padding; None without token ids."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        return None
    return int(ids.numel() if mask is None else mask.sum())


def parameters_of(base: Any) -> frozenset[str]:
    """The names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(base.forward).parameters)


def places_images(base: Any) -> bool:
    """Whether the model puts what it sees of an image in place of tokens of the text."""
    reads = parameters_of(base)
    marks = ("image_token_id", "image_token_index")
    return (
        "input_ids" in reads
        and "pixel_values" in reads
        and any(getattr(base.config, mark, None) is not None for mark in marks)
    )


def head_of(base: Any) -> Head | None:
    """What the labels of this model are; None where that is not known."""
    from transformers.models.auto import modeling_auto as auto

    if "labels" not in parameters_of(base):
        return None
    name = type(base).__name__
    if base.config.is_encoder_decoder:
        return "target" if name.endswith(("ForConditionalGeneration", "LMHeadModel")) else None
    for head, mappings in (
        ("next token", (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
        ("next token", (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,)),
        ("token", (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,)),
        ("token class", (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,)),
        ("transcript", (auto.MODEL_FOR_CTC_MAPPING_NAMES,)),
        (
            "class",
            (
                auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
                auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            ),
        ),
    ):
        if any(name in _class_names(mapping) for mapping in mappings):
            return head  # type: ignore[return-value]
    return None


def is_regression(base: Any) -> bool:
    """Whether a model whose head is `"class"` predicts numbers rather than classes."""
    kind = base.config.problem_type
    return bool(kind == "regression" or (kind is None and base.config.num_labels == 1))


def class_labels(base: Any, values: Sequence[float]) -> Tensor:
    """Labels of a model whose head is `"class"`, in the form that its kind of problem wants.

    Args:
        base: the model.
        values: the class of each row, or what a regression is to predict.
    """
    count = base.config.num_labels
    if is_regression(base):
        numbers = torch.tensor(values, dtype=torch.float32)
        # transformers squeezes the logits where there is one label.
        return numbers if count == 1 else numbers[:, None].repeat(1, count)
    classes = torch.tensor([int(value) for value in values])
    if base.config.problem_type == "multi_label_classification":
        return torch.nn.functional.one_hot(classes, count).float()
    return classes


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _class_names(mapping: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names |= {value} if isinstance(value, str) else set(value)
    return names


def _made_text(base: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    text = base.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or length
    if not 2 <= length <= most:
        raise InputError(
            f"the length is {length}, expected 2 to {most}, the positions that "
            f"{type(base).__name__} has. Pass another --length."
        )
    return {
        "input_ids": _made_ids(text.vocab_size, batch, length, generator),
        "attention_mask": _every_second_padded(batch, length),
    }


def _made_images(base: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(base.config, "vision_config", base.config)
    size = getattr(vision, "image_size", None)
    if not size:
        return {}
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}


def _made_speech(base: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    config = base.config
    positions = getattr(config, "max_source_positions", None)
    if "input_features" in parameters_of(base) and positions and hasattr(config, "num_mel_bins"):
        # Whisper hears 30 seconds, whatever was said; its second convolution halves the frames.
        frames = 2 * positions
        features = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
        return {"input_features": features}
    if "input_values" not in parameters_of(base) or not hasattr(config, "conv_stride"):
        return {}
    samples = length
    for kernel, stride in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        samples = (samples - 1) * stride + kernel
    made = {"input_values": torch.randn(batch, samples, generator=generator)}
    # The others were trained without a mask, and their extractors return none.
    if getattr(config, "feat_extract_norm", None) == "layer":
        keep = _every_second_padded(batch, samples)
        made = {"input_values": made["input_values"] * keep, "attention_mask": keep}
    return made


def _made_targets(
    base: Any,
    made: Mapping[str, Any],
    batch: int,
    length: int,
    train: bool,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Labels, or what a decoder starts from."""
    head = head_of(base)
    config = base.config
    if config.is_encoder_decoder:
        text = config.get_text_config(decoder=True)
        most = getattr(config, "max_target_positions", None) or length
        ids = _made_ids(text.vocab_size, batch, min(length, most), generator)
        if head == "target" and train:
            return {"labels": ids}
        return {"decoder_input_ids": ids} if "decoder_input_ids" in parameters_of(base) else {}
    if not train or head is None:
        return {}
    if head in ("next token", "token"):
        return {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORED)}
    if head == "transcript":
        # An alignment needs more frames than letters, and one more between equal letters.
        return {"labels": _made_ids(config.vocab_size, batch, max(1, length // 4), generator)}
    shape = tuple(made["input_ids"].shape) if head == "token class" else (batch,)
    classes = torch.randint(0, config.num_labels, shape, generator=generator)
    if head == "token class":
        return {"labels": classes.masked_fill(made["attention_mask"] == 0, IGNORED)}
    return {"labels": class_labels(base, classes.tolist())}


def _made_ids(vocabulary: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    # The low ids are special tokens (padding, start, end) in most vocabularies.
    first = min(5, vocabulary - 1)
    return torch.randint(first, vocabulary, (batch, length), generator=generator)


def _every_second_padded(batch: int, length: int) -> Tensor:
    keep = torch.ones(batch, length, dtype=torch.int64)
    keep[1::2, max(1, length * 3 // 4) :] = 0
    return keep

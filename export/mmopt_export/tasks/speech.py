"""Speech encoders on raw samples: letters per frame (CTC), or one label per sound."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mmopt_export.checkpoint import Checkpoint, resolve
from mmopt_export.parity import RANDOM
from mmopt_export.parts import Outputs, Part, Plan
from mmopt_export.preprocessing import frames_of, process_sounds
from mmopt_export.records import Record, read_sounds
from mmopt_export.runtime import MODEL, Tensors
from mmopt_export.tasks import processors
from mmopt_export.texts import class_names, read_class_labels
from mmopt_kernels.errors import InputError

AUDIO_COLUMN = "audio"
_FILES = (
    *processors.FILES,
    *("vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
_AXES = {0: "batch", 1: "samples"}
_BATCH = 4
_MAX_SOUNDS = 32
# Frames of the random batches, with what is padded of the shorter sounds of a batch: one frame,
# several, odd counts. A trace sees no fewer than `_LEAST_FRAMES`.
_GRID = ((1, 1), (1, 13), (3, 37), (2, 64))
_LEAST_FRAMES = 2


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for `logits` `[B, frames, tokens]` of CTC, or `[B, labels]` of a classifier.

    `input_values` is `[B, samples]`; an `attention_mask` is there where the model was trained with
    one, which its processor says.

    Raises:
        InputError: no feature extractor or another kind of it, no vocabulary, or calibration data
            without sounds or with other labels.
    """
    model = checkpoint.model
    config = model.config
    name = type(model).__name__
    recognizes = name.endswith("ForCTC")
    if not hasattr(config, "conv_kernel") or model.main_input_name != "input_values":
        raise InputError(f"{name} does not read raw samples, expected a relative of Wav2Vec2.")
    if getattr(config, "add_adapter", False):
        raise InputError(f"{name} has an adapter behind its encoder, expected none.")
    folder = resolve(checkpoint.source)
    audio = _audio(folder, config)
    labels = () if recognizes else class_names(config)
    preprocessing: dict[str, Any] = {"audio": audio}
    if recognizes:
        preprocessing["ctc"] = _vocabulary(folder, config)
    records = (
        read_sounds(
            calibration, AUDIO_COLUMN, limit=_MAX_SOUNDS, sampling_rate=audio["sampling_rate"]
        )
        if calibration is not None
        else []
    )
    right = (
        read_class_labels(calibration, labels, limit=_MAX_SOUNDS)
        if calibration is not None and not recognizes
        else None
    )
    example = _random(audio, 2, 16)
    inputs = list(example)

    def valid(feeds: Tensors) -> Tensors:
        lengths = frames_of(feeds["attention_mask"].sum(axis=1), audio)
        frames = int(frames_of(np.array(feeds["input_values"].shape[1]), audio))
        return {"logits": np.arange(frames)[None, :] < lengths[:, None]}

    return Plan(
        task="automatic-speech-recognition" if recognizes else "audio-classification",
        kind="encoder",
        parts=(
            Part(
                name=MODEL,
                module=Outputs(model, {"logits": "logits"}),
                inputs={key: torch.from_numpy(value) for key, value in example.items()},
                axes=dict.fromkeys(inputs, _AXES),
                outputs=("logits",),
                samples=lambda: _samples(audio, records, right),
                minimums={"samples": _samples_for(_LEAST_FRAMES, audio)},
                scores=("logits",),
                valid=valid if recognizes and audio["mask"] else None,
            ),
        ),
        write=lambda place: processors.copy_files(folder, place, _FILES),
        labels=labels,
        preprocessing=preprocessing,
    )


def _audio(folder: Path, config: Any) -> dict[str, Any]:
    """The constants of `mmopt_export.preprocessing.process_sounds`."""
    extractor = processors.load_processor(
        "feature extractor", transformers.AutoFeatureExtractor, folder
    )
    if not isinstance(extractor, transformers.Wav2Vec2FeatureExtractor):
        raise InputError(
            f"{folder} has a {type(extractor).__name__}, expected a Wav2Vec2FeatureExtractor."
        )
    if extractor.feature_size != 1 or extractor.padding_side != "right":
        raise InputError(
            f"{folder} pads {extractor.feature_size} features on the {extractor.padding_side}, "
            "expected one feature, padded on the right."
        )
    constants: dict[str, Any] = {
        "sampling_rate": int(extractor.sampling_rate),
        "normalize": bool(extractor.do_normalize),
        "padding_value": float(extractor.padding_value),
        "mask": bool(extractor.return_attention_mask),
        "convolutions": [
            [int(kernel), int(stride)]
            for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)
        ],
    }
    constants["shortest"] = _samples_for(1, constants)
    return constants


def _vocabulary(folder: Path, config: Any) -> dict[str, Any]:
    """The constants of `mmopt_export.preprocessing.decode_ctc`."""
    tokenizer = processors.load("vocabulary", transformers.AutoTokenizer, folder)
    if not isinstance(tokenizer, transformers.Wav2Vec2CTCTokenizer):
        raise InputError(
            f"{folder} has a {type(tokenizer).__name__}, expected a Wav2Vec2CTCTokenizer."
        )
    if tokenizer.target_lang is not None:
        raise InputError(
            f"{folder} has a vocabulary for each language, expected one. Save the model and its "
            "processor with one language set (target_lang) and its words alone in vocab.json."
        )
    by_token = tokenizer.get_vocab()
    tokens = [""] * config.vocab_size
    for token, index in by_token.items():
        if index < len(tokens):
            tokens[index] = token
    return {
        "tokens": tokens,
        "blank": int(tokenizer.pad_token_id),
        "delimiter": tokenizer.word_delimiter_token,
        "lower": bool(tokenizer.do_lower_case),
    }


def _samples_for(frames: int, audio: dict[str, Any]) -> int:
    """The fewest samples that give so many frames."""
    count = frames
    for kernel, stride in reversed(audio["convolutions"]):
        count = (count - 1) * stride + kernel
    return count


def _random(audio: dict[str, Any], batch: int, frames: int) -> Tensors:
    """Seeded sounds with different lengths, the first with so many frames and some samples more."""
    generator = np.random.default_rng((batch, frames))
    longest = _samples_for(frames, audio) + 3
    lengths = [longest, *generator.integers(audio["shortest"], longest + 1, batch - 1)]
    sounds = []
    for length in lengths:
        time = np.arange(length, dtype=np.float32)
        tone = np.sin(time * generator.uniform(0.01, 0.8)) * generator.uniform(0.1, 0.6)
        sounds.append((tone + 0.1 * generator.standard_normal(length)).astype(np.float32))
    return process_sounds(sounds, audio)


def _samples(
    audio: dict[str, Any], records: Sequence[Record], labels: Sequence[int] | None
) -> Iterator[tuple[str, Tensors, Tensors]]:
    """The batches of parity: tones in noise of several lengths, then real sounds.

    Args:
        labels: of each sound the index of its label, or -1, for the output `logits`.
    """
    for batch, frames in _GRID:
        yield RANDOM, _random(audio, batch, frames), {}
    # Sorted by length, so that little of a batch is padding.
    sounds = [record.values[AUDIO_COLUMN] for record in records]
    order = sorted(range(len(sounds)), key=lambda index: len(sounds[index]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        right = {"logits": np.array([labels[index] for index in chosen])} if labels else {}
        yield AUDIO_COLUMN, process_sounds([sounds[index] for index in chosen], audio), right

"""Encoder-decoder models from speech to text: Whisper, which reads log-mel features of windows of
30 seconds, and Moonshine, which reads samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from mmopt_export.checkpoint import Checkpoint, resolve
from mmopt_export.encoder_decoder.features import log_mel
from mmopt_export.encoder_decoder.part import Encoder, encoder_decoder_parts
from mmopt_export.encoder_decoder.proof import expect, proof
from mmopt_export.encoder_decoder.rules import read_rules, start_token
from mmopt_export.encoder_decoder.seq2seq import DECODER, Floats
from mmopt_export.encoder_decoder.speech import encoder_inputs
from mmopt_export.parity import RANDOM
from mmopt_export.parts import Plan, Proof
from mmopt_export.preprocessing import frames_of, process_sounds
from mmopt_export.records import read_sounds
from mmopt_export.runtime import Tensors
from mmopt_export.tasks import text
from mmopt_export.tasks.text2text import decoder_positions
from mmopt_kernels.errors import InputError, one_line

FEATURES = "input_features"
SAMPLES = "input_values"
AUDIO_COLUMN = "audio"
_BATCH = 4
_MAX_SOUNDS = 32
# transformers' extractor computes in fp32 and ours in fp64; the logarithm of what is nearly silent
# makes 1e-3 of that, and another window, filter or scale makes 1e-1.
_SAME = 5e-3


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a model that writes down speech.

    Raises:
        InputError: it has no tokenizer or feature extractor, sounds are made into features in
            another way than ours, an architecture or a setting cannot be exported, or calibration
            data without sounds.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    text.require_tokenizer(model, tokenizer)
    extractor = _extractor(checkpoint)
    whisper = model.main_input_name == FEATURES
    audio = _log_mel(model, extractor) if whisper else _samples(model, extractor)
    real = _real_sounds(calibration, audio)
    encoder = _whisper(audio, real) if whisper else _moonshine(audio, real)
    positions = decoder_positions(model)
    rules, start = read_rules(model), start_token(model)
    speech = _prompts(model, audio) if whisper else None
    prompt = _example_prompt(start, speech)
    parts, cache = encoder_decoder_parts(model, encoder, prompt=prompt, longest=positions)

    def prove() -> Proof:
        cases = [
            expect(
                model,
                rules,
                kind=kind,
                feeds=encoder_inputs(sounds, audio),
                prompts=[prompt] * len(sounds),
                positions=positions,
            )
            for kind, sounds in ((RANDOM, _sounds(3, audio)), (AUDIO_COLUMN, real[:3]))
            if sounds
        ]
        return proof(cases, rules, cache, positions)

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        extractor.save_pretrained(folder)

    return Plan(
        task="automatic-speech-recognition",
        kind="decoder",
        parts=parts,
        write=write,
        preprocessing={
            "audio": audio,
            "generation": {
                "rules": rules.to_dict(),
                "start": start,
                "positions": positions,
                "speech": speech,
            },
        },
        caches={DECODER: cache},
        proof=prove,
    )


def _extractor(checkpoint: Checkpoint) -> Any:
    name = type(checkpoint.model).__name__
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(resolve(checkpoint.source))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the {name} has no feature extractor that can be read: {one_line(error)} Save one "
            "beside it with save_pretrained."
        ) from error


# -------------------------------------------------------------------- Whisper


def _log_mel(model: Any, extractor: Any) -> dict[str, Any]:
    """The constants of `features.log_mel`, held against the model's own extractor."""
    name = type(model).__name__
    audio = {
        "sampling_rate": int(extractor.sampling_rate),
        "bins": int(extractor.feature_size),
        "fft": int(extractor.n_fft),
        "hop": int(extractor.hop_length),
        "window": int(extractor.n_samples),
    }
    frames = model.config.max_source_positions * 2
    if audio["window"] // audio["hop"] != frames or audio["bins"] != model.config.num_mel_bins:
        raise InputError(
            f"the feature extractor of {name} gives {audio['bins']} bins of "
            f"{audio['window'] // audio['hop']} frames, expected {model.config.num_mel_bins} of "
            f"{frames}. Save the one that belongs to the model."
        )
    sound = _sounds(1, audio)[0]
    wanted = extractor(sound, sampling_rate=audio["sampling_rate"], return_tensors="np")
    difference = float(np.abs(log_mel([sound], audio) - wanted[FEATURES]).max())
    if difference > _SAME:
        raise InputError(
            f"the {type(extractor).__name__} of {name} makes other features than Whisper's "
            f"log-mel (they differ by {difference:.2g}), expected its usual settings."
        )
    return audio


def _whisper(audio: dict[str, Any], real: list[Floats]) -> Encoder:
    bins, frames = audio["bins"], audio["window"] // audio["hop"]
    return Encoder(
        inputs={FEATURES: torch.zeros(2, bins, frames)},
        axes={FEATURES: {0: "batch"}},
        samples=lambda: _batches(audio, real),
    )


def _prompts(model: Any, audio: dict[str, Any]) -> dict[str, Any]:
    """What a prompt may hold, from the generation settings; see `speech.Speech.prompt`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    settings = model.generation_config
    multilingual = getattr(settings, "is_multilingual", None) is not False
    tokens = getattr(settings, "lang_to_id", None) if multilingual else None
    languages = {token.strip("<|>"): int(one) for token, one in (tokens or {}).items()}
    tasks = (getattr(settings, "task_to_id", None) if multilingual else None) or {}
    silent = getattr(settings, "no_timestamps_token_id", None)
    language = getattr(settings, "language", None)
    if language is not None:
        language = language.lower().strip("<|>")
        language = TO_LANGUAGE_CODE.get(language, language)
    forced = getattr(settings, "forced_decoder_ids", None) or []
    if [place for place, _ in forced] != list(range(1, len(forced) + 1)):
        raise InputError(
            f"the generation settings of {type(model).__name__} force the tokens {forced}, "
            "expected those after the first, without gaps. Remove forced_decoder_ids."
        )
    return {
        "languages": languages,
        "language_names": {
            name: code for name, code in TO_LANGUAGE_CODE.items() if code in languages
        },
        "tasks": {name: int(one) for name, one in tasks.items()},
        "no_timestamps": silent,
        "first_time": None if silent is None else silent + 1,
        "time_step": audio["window"] / audio["sampling_rate"] / model.config.max_source_positions,
        "latest_first_time": getattr(settings, "max_initial_timestamp_index", None),
        "forced": [one for _, one in forced],
        "language": language,
        "task": getattr(settings, "task", None),
    }


def _example_prompt(start: int, speech: dict[str, Any] | None) -> list[int]:
    """Start, a language, a task, no times: as far as the model has them."""
    if speech is None:
        return [start]
    languages, tasks = speech["languages"], speech["tasks"]
    parts = (
        languages.get("en", next(iter(languages.values()), None)),
        tasks.get("transcribe"),
        speech["no_timestamps"],
    )
    return [start, *(one for one in parts if one is not None)]


# -------------------------------------------------------------------- Moonshine


def _samples(model: Any, extractor: Any) -> dict[str, Any]:
    """The constants of `preprocessing.process_sounds`, held against the model's own extractor."""
    encoder = model.get_encoder()
    convolutions = [
        [int(one.kernel_size[0]), int(one.stride[0])]
        for one in encoder.children()
        if isinstance(one, nn.Conv1d)
    ]
    if not convolutions:
        raise InputError(f"the encoder of {type(model).__name__} has no convolutions over samples.")
    shortest = 2  # frames: see minimums below
    for kernel, stride in reversed(convolutions):
        shortest = (shortest - 1) * stride + kernel
    audio = {
        "sampling_rate": int(extractor.sampling_rate),
        "normalize": bool(extractor.do_normalize),
        "padding_value": float(extractor.padding_value),
        "mask": True,
        "shortest": shortest,
        "convolutions": convolutions,
    }
    sounds = _sounds(3, audio)
    wanted = extractor(
        sounds,
        sampling_rate=audio["sampling_rate"],
        padding=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    for name, value in process_sounds(sounds, audio).items():
        if not np.allclose(value, wanted[name], atol=_SAME):
            raise InputError(
                f"the {type(extractor).__name__} of {type(model).__name__} makes other {name} "
                "than ours, expected its usual settings."
            )
    return audio


def _moonshine(audio: dict[str, Any], real: list[Floats]) -> Encoder:
    def frames(feeds: Tensors) -> Any:
        """The model takes every n-th sample's mask for that of a frame."""
        stride = int(np.prod([one for _, one in audio["convolutions"]]))
        count = int(frames_of(np.asarray(feeds[SAMPLES].shape[1]), audio))
        return feeds["attention_mask"][:, ::stride][:, :count] != 0

    example = process_sounds(_sounds(2, audio), audio)
    return Encoder(
        inputs={name: torch.from_numpy(value) for name, value in example.items()},
        axes={name: {0: "batch", 1: "samples"} for name in example},
        samples=lambda: _batches(audio, real),
        # A size of 1 is one that a trace is not proven for, and so is one frame.
        minimums={"samples": audio["shortest"]},
        frames=frames,
    )


def _batches(audio: dict[str, Any], real: list[Floats]) -> Iterator[tuple[str, Tensors]]:
    """The encoder's batches of parity: tones of several lengths, then real sounds."""
    sounds = _sounds(3, audio)
    yield RANDOM, encoder_inputs(sounds[:1], audio)
    yield RANDOM, encoder_inputs(sounds[1:], audio)
    for start in range(0, len(real), _BATCH):
        yield AUDIO_COLUMN, encoder_inputs(real[start : start + _BATCH], audio)


def _real_sounds(calibration: Path | None, audio: dict[str, Any]) -> list[Floats]:
    """The first sounds of a calibration file, as much of each as a window holds."""
    if calibration is None:
        return []
    records = read_sounds(
        calibration, AUDIO_COLUMN, limit=_MAX_SOUNDS, sampling_rate=audio["sampling_rate"]
    )
    sounds = [record.values[AUDIO_COLUMN][: audio.get("window")] for record in records]
    # Sorted by length, so that little of a batch is padding.
    return sorted(sounds, key=len)


def _sounds(count: int, audio: dict[str, Any]) -> list[Floats]:
    """Sweeps of tones in noise, of different lengths: the same ones every time."""
    generator = np.random.default_rng(0)
    rate = audio["sampling_rate"]
    # Whisper's window, or two seconds.
    longest = audio.get("window", 2 * rate)
    sounds = []
    for share in (1.0, 0.3, 0.6)[:count]:
        length = max(int(longest * share), audio.get("shortest", 1))
        time = np.arange(length) / rate
        pitch = generator.uniform(100, 400, size=3)
        tones = sum(np.sin(2 * np.pi * one * time * (1 + 0.2 * time)) for one in pitch)
        noise = generator.normal(scale=0.01, size=length)
        sounds.append((0.2 * tones + noise).astype(np.float32))
    return sounds

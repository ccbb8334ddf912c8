"""What an encoder-decoder artifact does around its graphs, held against transformers' own code."""

import copy
import dataclasses
import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

import tiny_seq2seq as tiny
from mmopt_export.encoder_decoder.features import log_mel, mel_filters
from mmopt_export.encoder_decoder.rules import Rules, read_rules, start_token
from mmopt_export.encoder_decoder.speech import Speech, Times
from mmopt_export.tasks.speech_to_text import _prompts
from mmopt_kernels.errors import InputError

VOCABULARY = 30


# -------------------------------------------------------------------- features


@pytest.mark.parametrize(("bins", "seconds"), [(80, 30), (128, 5), (40, 1)])
def test_log_mel_is_that_of_whispers_extractor(bins: int, seconds: int) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    constants = {
        "sampling_rate": 16000,
        "bins": bins,
        "fft": extractor.n_fft,
        "hop": extractor.hop_length,
        "window": extractor.n_samples,
    }
    sounds = [*tiny.sounds(0.3 * seconds, seconds), np.zeros(1000, np.float32)]
    sounds.append(np.random.default_rng(0).normal(size=16000 * seconds).astype(np.float32))
    expected = extractor(sounds, sampling_rate=16000, return_tensors="np").input_features
    features = log_mel(sounds, constants)
    assert features.shape == expected.shape
    # transformers computes in fp32 and the logarithm is steep where it is nearly silent: the
    # filled part of the first sound is silence, where both are at the floor.
    np.testing.assert_allclose(features, expected, atol=2e-3, rtol=0)
    assert np.abs(features - expected).mean() < 1e-5


def test_mel_filters_are_slaneys() -> None:
    from transformers.audio_utils import mel_filter_bank

    expected = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(80, 400, 16000), expected, atol=1e-12, rtol=1e-9)


def test_sounds_that_have_no_features_are_refused() -> None:
    constants = {"sampling_rate": 16000, "bins": 80, "fft": 400, "hop": 160, "window": 16000}
    with pytest.raises(InputError, match="no sounds were given"):
        log_mel([], constants)
    with pytest.raises(InputError, match=r"sound 0 has the shape \(16001,\)"):
        log_mel([np.zeros(16001, np.float32)], constants)


# -------------------------------------------------------------------- rules


class _Model:
    """As much of a model as transformers' choice of logits processors looks at."""

    def __init__(self, **settings: Any) -> None:
        self.generation_config = transformers.GenerationConfig(
            eos_token_id=settings.pop("eos_token_id", 1),
            pad_token_id=0,
            decoder_start_token_id=2,
            **settings,
        )


def expected_scores(
    settings: transformers.GenerationConfig, logits: np.ndarray, rows: list[list[int]], prompt: int
) -> np.ndarray:
    """What transformers' own list of processors makes of logits."""
    mixin = transformers.GenerationMixin()
    mixin.config = transformers.PretrainedConfig(is_encoder_decoder=True)
    eos = settings.eos_token_id
    settings._eos_token_tensor = torch.tensor(eos if isinstance(eos, list) else [eos])
    processors = mixin._get_logits_processor(
        generation_config=settings,
        input_ids_seq_length=prompt,
        encoder_input_ids=torch.tensor([[1]]),
        device="cpu",
        logits_processor=transformers.LogitsProcessorList(),
        model_kwargs={},
    )
    return processors(torch.tensor(rows), torch.from_numpy(logits.copy())).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[4], [5, 6], [7, 8, 9], [1]]},
        {"min_length": 5},
        {"min_new_tokens": 4, "eos_token_id": [1, 3]},
        {"forced_bos_token_id": 9},
        {"forced_eos_token_id": 1},
        {"suppress_tokens": [3, 4], "begin_suppress_tokens": [5]},
        {"forced_bos_token_id": 9, "begin_suppress_tokens": [5]},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 2, "min_length": 8}
        | {"bad_words_ids": [[2]], "suppress_tokens": [11]},
    ],
    ids=lambda settings: "+".join(settings) or "none",
)
def test_rules_give_the_scores_of_transformers_processors(settings: dict[str, Any]) -> None:
    model = _Model(max_length=10, **settings)
    rules = read_rules(model)
    generator = np.random.default_rng(0)
    for prompt, length in itertools.product((1, 3), range(1, 10)):
        if length < prompt:
            continue
        for _ in range(3):
            # Few ids, so that they repeat.
            rows = generator.integers(0, 8, (4, length)).tolist()
            rows[0][-2:] = [7, 8][-len(rows[0][-2:]) :]
            logits = generator.normal(size=(4, VOCABULARY)).astype(np.float32)
            expected = expected_scores(model.generation_config, logits, rows, prompt)
            np.testing.assert_array_equal(rules.apply(logits, rows, prompt, 10), expected)


def test_rules_survive_the_manifest_and_refuse_other_fields() -> None:
    import json

    rules = Rules(
        eos=(1, 2), pad=0, bad_words=((3, 4), (5,)), suppress=(6,), forced_bos=7, max_new_tokens=3
    )
    document = json.loads(json.dumps(rules.to_dict()))
    assert Rules.from_dict(document) == rules
    del document["pad"]
    with pytest.raises(InputError, match="Export the model again"):
        Rules.from_dict(document)


def test_limits_are_those_of_the_call_then_of_the_settings_then_of_the_positions() -> None:
    rules = Rules(eos=(1,), pad=0, max_length=20)
    assert rules.limit(4, None, None) == 20
    assert rules.limit(4, 30, None) == 34
    assert rules.limit(4, 30, 25) == 25
    assert dataclasses.replace(rules, max_new_tokens=5).limit(4, None, None) == 9


def test_settings_that_cannot_be_read_are_refused() -> None:
    model = _Model()
    model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="no eos_token_id"):
        read_rules(model)
    with pytest.raises(InputError, match="guidance_scale=2"):
        read_rules(_Model(guidance_scale=2.0))
    model = _Model()
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(InputError, match="no decoder_start_token_id"):
        start_token(model)


# -------------------------------------------------------------------- Whisper's prompts and times


@functools.cache
def _weights() -> Any:
    return tiny.tiny_seq2seq("whisper")


def whisper(**settings: Any) -> Any:
    """One model with generation settings of its own."""
    model = copy.copy(_weights())
    model.generation_config = copy.deepcopy(model.generation_config)
    values = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": tiny.ENGLISH, "<|de|>": tiny.GERMAN, "<|fr|>": tiny.FRENCH},
        "task_to_id": {"transcribe": tiny.TRANSCRIBE, "translate": tiny.TRANSLATE},
        "no_timestamps_token_id": tiny.SILENT,
        "forced_decoder_ids": None,
        **settings,
    }
    for name, value in values.items():
        if value is not ...:
            setattr(model.generation_config, name, value)
    return model


class _Graphs:
    """Stands for the two graphs: the model itself says what comes after the start."""

    def __init__(self, model: Any, features: torch.Tensor) -> None:
        self.model = model
        self.features = features
        self.rules = read_rules(model)

    def first(self, encoded: Any, prompts: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            ids = torch.tensor(prompts)
            logits = self.model(self.features, decoder_input_ids=ids, use_cache=False).logits
        return logits[:, -1].numpy()


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("task", [None, "transcribe", "translate"])
@pytest.mark.parametrize("language", [None, "de", "french"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"forced_decoder_ids": [[1, None], [2, tiny.TRANSCRIBE]]},
        {"forced_decoder_ids": [[1, tiny.FRENCH], [2, tiny.TRANSLATE], [3, tiny.SILENT]]},
        {"language": "german", "task": "transcribe"},
        {"lang_to_id": ..., "task_to_id": ..., "is_multilingual": False},
        {"lang_to_id": ..., "task_to_id": ..., "no_timestamps_token_id": ...},
    ],
    ids=["multilingual", "detected", "forced", "set", "english", "bare"],
)
def test_prompts_are_those_of_whispers_own_generate(
    settings: dict[str, Any], language: str | None, task: str | None, timestamps: bool
) -> None:
    model = whisper(**settings)
    audio = {"sampling_rate": 16000, "window": 16000}
    features = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(0))
    speech = Speech(
        _Graphs(model, features), {"start": tiny.START, "speech": _prompts(model, audio)}, audio
    )
    wanted = model.generation_config
    try:
        wanted.return_timestamps = timestamps
        model._set_return_timestamps(timestamps, True, wanted)
        model._set_language_and_task(language, task, None, wanted)
        expected = model._retrieve_init_tokens(
            features,
            batch_size=2,
            generation_config=wanted,
            config=model.config,
            num_segment_frames=100,
            kwargs={},
        ).tolist()
    except ValueError:  # it has no such language, task or times, and neither do we
        with pytest.raises(InputError):
            speech.prompt({}, 2, language, task, timestamps)
        return
    assert speech.prompt({}, 2, language, task, timestamps) == expected


@pytest.mark.parametrize("latest", [None, 3])
def test_times_are_ruled_as_in_transformers(latest: int | None) -> None:
    first, eos, silent, prompt = 20, 15, 19, 2
    settings = transformers.GenerationConfig(eos_token_id=eos)
    settings.no_timestamps_token_id = silent
    settings.max_initial_timestamp_index = latest
    theirs = WhisperTimeStampLogitsProcessor(settings, begin_index=prompt)
    ours = Times(first=first, silent=silent, eos=eos, prompt=prompt, latest=latest)
    generator = np.random.default_rng(0)
    compared = 0
    for length in range(prompt, 8):
        for _ in range(40):
            rows = generator.integers(0, VOCABULARY, (3, length))
            rows[:, prompt:] = np.where(
                generator.random((3, length - prompt)) < 0.5,
                np.sort(generator.integers(first, VOCABULARY, (3, length - prompt))),
                generator.integers(0, eos, (3, length - prompt)),
            )
            scores = generator.normal(scale=2, size=(3, VOCABULARY)).astype(np.float32)
            expected = theirs(torch.from_numpy(rows), torch.from_numpy(scores)).numpy()
            np.testing.assert_array_equal(ours(scores, rows.tolist()), expected)
            compared += np.isinf(expected).sum()
    assert compared > 1000


# -------------------------------------------------------------------- what a runtime needs


def test_the_runtime_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import mmopt_export.encoder_decoder.speech, mmopt_export.encoder_decoder.text\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{root}:{root}/kernels:{root}/export", "PATH": ""},
    )
    assert result.returncode == 0, result.stderr

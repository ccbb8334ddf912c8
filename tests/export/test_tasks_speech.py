"""Speech encoders on raw samples, held against PyTorch from a wav file on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmopt_export import Runner, export, load_checkpoint
from mmopt_export.preprocessing import decode_ctc, frames_of, open_sound, process_sounds
from mmopt_export.tasks import make_plan
from mmopt_kernels.errors import InputError
from tiny_encoders import save_sound, save_speech_encoder

RECOGNIZERS = [
    ("Wav2Vec2", "group"),
    pytest.param("Wav2Vec2", "layer", marks=pytest.mark.slow),
    pytest.param("Hubert", "group", marks=pytest.mark.slow),
    pytest.param("WavLM", "layer", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


def sound(samples: int, *, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    time = np.arange(samples)
    tone = 0.4 * np.sin(time * generator.uniform(0.02, 0.4) * (1 + time / samples))
    return np.asarray(tone + generator.normal(0, 0.05, samples), np.float32)


def save_lines(folder: Path) -> Path:
    lines = []
    for index, samples in enumerate((400, 950, 3001)):
        save_sound(folder / f"{index}.wav", sound(samples, seed=index))
        lines.append(json.dumps({"audio": f"{index}.wav"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def logits_of(folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder).eval()
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    return np.asarray(result.logits)


@pytest.mark.parametrize(("family", "norm"), RECOGNIZERS)
def test_letters_of_sounds_are_pytorchs(family: str, norm: str, tmp_path: Path) -> None:
    import transformers

    model = save_speech_encoder(tmp_path / "model", family, norm=norm)
    data = save_lines(tmp_path)
    report = export(str(model), tmp_path / "out", precision="fp32", calibration=data)
    assert report.exit_code == 0
    assert {stage.kind for stage in report.stages} == {"grid", "audio"}
    assert all(stage.holds for stage in report.stages)
    runner = Runner(tmp_path / "out")
    assert runner.manifest.task == "automatic-speech-recognition"
    assert runner.manifest.inputs[0].shape == ("batch", "samples")
    audio = runner.manifest.preprocessing["audio"]
    sounds = [open_sound(tmp_path / f"{i}.wav", sampling_rate=16_000) for i in range(3)]
    feeds = process_sounds(sounds, audio)
    assert ("attention_mask" in feeds) == (norm == "layer")
    logits = runner.run(feeds)["logits"]
    expected = logits_of(model, feeds)
    assert logits.shape == expected.shape
    lengths = frames_of(np.array([len(one) for one in sounds]), audio)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = decode_ctc(logits, runner.manifest.preprocessing["ctc"], lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=5e-5)
        assert texts[row] == tokenizer.decode(expected[row, :length].argmax(-1))
    assert np.ptp(expected[:, : min(lengths)], axis=1).max() > 0.05
    # The fewest samples there are, and one more than a frame needs.
    for samples in (audio["shortest"], audio["shortest"] + 1, 777):
        feeds = process_sounds([sound(samples, seed=7)], audio)
        np.testing.assert_allclose(runner.run(feeds)["logits"], logits_of(model, feeds), atol=5e-5)


@pytest.mark.slow
def test_what_lies_behind_a_mask_has_no_part_in_the_letters(tmp_path: Path) -> None:
    model = save_speech_encoder(tmp_path / "model", "Wav2Vec2", "ForSequenceClassification",
                                norm="layer")  # fmt: skip
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 0
    runner = Runner(tmp_path / "out")
    assert runner.manifest.task == "audio-classification"
    assert runner.manifest.labels == ("class", "function", "method")
    audio = runner.manifest.preprocessing["audio"]
    feeds = process_sounds([sound(900), sound(400, seed=1)], audio)
    logits = runner.run(feeds)["logits"]
    np.testing.assert_allclose(logits, logits_of(model, feeds), atol=5e-5)
    assert logits.shape == (2, 3)
    without = {**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])}
    seen = runner.run(without)["logits"]
    np.testing.assert_allclose(seen[0], logits[0], atol=1e-5)
    assert np.abs(seen[1] - logits[1]).max() > 1e-3


def test_sounds_of_calibration_have_the_labels_of_their_lines(tmp_path: Path) -> None:
    model = save_speech_encoder(tmp_path / "model", "Wav2Vec2", "ForSequenceClassification")
    data = save_lines(tmp_path)
    # The longest first: batches are sorted by length.
    rows = [json.loads(line) for line in data.read_text().splitlines()][::-1]
    labels = ("method", "function", "class")
    lines = [json.dumps({**row, "label": one}) for row, one in zip(rows, labels, strict=True)]
    data.write_text("\n".join(lines))
    (part,) = make_plan(load_checkpoint(str(model)), calibration=data).parts
    found = [sample.labels for sample in part.sampled() if sample.kind == "audio"]
    assert [one["logits"].tolist() for one in found] == [[0, 1, 2]]
    data.write_text(json.dumps({**rows[0], "label": "module"}))
    with pytest.raises(InputError, match="line 1: the model has no label 'module', expected one"):
        make_plan(load_checkpoint(str(model)), calibration=data)


def test_another_feature_extractor_and_other_models_are_refused(tmp_path: Path) -> None:
    model = save_speech_encoder(tmp_path / "model", "Wav2Vec2")
    path = model / "preprocessor_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "padding_side": "left"}))
    with pytest.raises(InputError, match="pads 1 features on the left, expected one feature"):
        export(str(model), tmp_path / "out", precision="fp32")
    path.write_text(
        json.dumps({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80})
    )
    with pytest.raises(InputError, match="has a WhisperFeatureExtractor, expected a Wav2Vec2"):
        export(str(model), tmp_path / "out", precision="fp32")
    path.unlink()
    with pytest.raises(InputError, match="has no feature extractor"):
        export(str(model), tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_for_each_language_is_refused(tmp_path: Path) -> None:
    model = save_speech_encoder(tmp_path / "model", "Wav2Vec2")
    letters = json.loads((model / "vocab.json").read_text())
    (model / "vocab.json").write_text(json.dumps({"eng": letters, "deu": letters}))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_lang": "eng"}))
    with pytest.raises(InputError, match="has a vocabulary for each language, expected one"):
        export(str(model), tmp_path / "out", precision="fp32")


def test_a_sound_of_another_rate_is_refused_with_its_line(tmp_path: Path) -> None:
    model = save_speech_encoder(tmp_path / "model", "Wav2Vec2")
    save_sound(tmp_path / "a.wav", sound(900))
    save_sound(tmp_path / "b.wav", sound(900), rate=44_100)
    data = tmp_path / "data.jsonl"
    data.write_text('{"audio": "a.wav"}\n{"audio": "b.wav"}\n')
    with pytest.raises(InputError, match=r"line 2: .*44100 samples a second, expected 16000"):
        export(str(model), tmp_path / "out", calibration=data)
    assert not (tmp_path / "out").exists()

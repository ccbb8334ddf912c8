"""Batches for `mmopt compile`: made up, or of the user's examples through the model's processor."""

import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from mmopt.compilation.examples import ExampleBatches, read_examples, read_wav
from mmopt.compilation.inputs import Contents, contents_of, example_batch, head_of
from mmopt_export.checkpoint import load_checkpoint
from mmopt_kernels.errors import InputError, MmoptError
from tiny_models import LABELS, save_tokenizer

TEXT = {
    "vocab_size": 70,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
SPEECH_TO_TEXT = hf.WhisperConfig(
    vocab_size=70,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    num_mel_bins=8,
    max_source_positions=50,
    max_target_positions=20,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=2,
)
RAW_SPEECH = hf.Wav2Vec2Config(
    vocab_size=70,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8, 8),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    feat_extract_norm="layer",
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
    pad_token_id=0,
    num_labels=3,
)
SEQUENCES = hf.BartConfig(
    vocab_size=70,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)


def bert(kind: Any = hf.BertForSequenceClassification, **changes: Any) -> Any:
    return kind(hf.BertConfig(**{**TEXT, "num_labels": 3, **changes})).eval()


def clip() -> Any:
    config = hf.CLIPConfig(text_config={**TEXT, "eos_token_id": 3}, vision_config=VISION)
    return hf.CLIPModel(config).eval()


MODELS: dict[str, tuple[Any, str | None]] = {
    "bert": (bert, "class"),
    "bert-regression": (lambda: bert(num_labels=1), "class"),
    "bert-multi-label": (lambda: bert(problem_type="multi_label_classification"), "class"),
    "bert-tokens": (lambda: bert(hf.BertForTokenClassification), "token class"),
    "bert-masked": (lambda: bert(hf.BertForMaskedLM), "token"),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=70, n_embd=16, n_layer=1, n_head=2)),
        "next token",
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)), "class"),
    "clip": (clip, None),
    "bart": (lambda: hf.BartForConditionalGeneration(SEQUENCES), "target"),
    "whisper": (lambda: hf.WhisperForConditionalGeneration(SPEECH_TO_TEXT), "target"),
    "wav2vec2": (lambda: hf.Wav2Vec2ForCTC(RAW_SPEECH), "transcript"),
    "wav2vec2-class": (lambda: hf.Wav2Vec2ForSequenceClassification(RAW_SPEECH), "class"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_made_up_batch_runs_and_gives_the_models_own_loss(name: str) -> None:
    """In training the head's labels are there; inference has none, and a decoder its ids."""
    make, head = MODELS[name]
    model = make().eval()
    assert head_of(model) == head
    for train in (False, True):
        batch = example_batch(model, batch=3, length=12, train=train)
        output = model(**batch)
        assert (getattr(output, "loss", None) is not None) == train
        if train:
            assert bool(torch.isfinite(output.loss))
        else:
            assert "labels" not in batch


def test_what_a_made_up_batch_holds_is_counted_without_padding() -> None:
    """Every second row is padded, so that masks are at work."""
    batch = example_batch(bert(), batch=4, length=8, train=False)
    assert batch["attention_mask"].sum(1).tolist() == [8, 6, 8, 6]
    assert contents_of(batch) == Contents(tokens=28)

    assert contents_of(example_batch(clip(), batch=2, length=8, train=False)) == Contents(14, 2)

    speech = hf.WhisperForConditionalGeneration(SPEECH_TO_TEXT)
    batch = example_batch(speech, batch=3, length=8, train=False)
    assert batch["input_features"].shape == (3, 8, 100)
    assert contents_of(batch) == Contents(audio_seconds=pytest.approx(3.0))

    # 12 frames of two convolutions; a quarter of every second recording is padding.
    batch = example_batch(hf.Wav2Vec2ForCTC(RAW_SPEECH), batch=2, length=12, train=False)
    samples = (12 - 1) * 2 + 3
    samples = (samples - 1) * 5 + 10
    assert batch["input_values"].shape == (2, samples)
    kept = samples + samples * 3 // 4
    assert contents_of(batch) == Contents(audio_seconds=pytest.approx(kept / 16000))
    assert float(batch["input_values"][1, samples * 3 // 4 :].abs().max()) == 0.0


class Odd(hf.PreTrainedModel):
    config_class = hf.PreTrainedConfig
    main_input_name = "x"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_what_cannot_be_made_up_asks_for_data() -> None:
    """Never a batch that only looks right."""
    with pytest.raises(InputError, match=r"length is 1000, expected 2 to 32"):
        example_batch(bert(), batch=4, length=1000, train=False)
    with pytest.raises(InputError, match=r"Odd reads x, which cannot be made up.*--data FILE"):
        example_batch(Odd(hf.PreTrainedConfig()), batch=4, length=8, train=False)
    text = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = hf.Gemma3ForConditionalGeneration(config)
    with pytest.raises(InputError, match=r"marks in the text.*Pass --data FILE.*an image in each"):
        example_batch(model, batch=4, length=8, train=False)


# --- the user's examples --------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def save(folder: Path, model: Any, *parts: Any) -> Path:
    save_tokenizer(folder)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def batches(folder: Path, data: Path, *, train: bool = True) -> ExampleBatches:
    return ExampleBatches(data, load_checkpoint(str(folder)), train=train)


BAD_ROWS = {
    "not json": (['{"text": "a"}', "{"], "line 2: not JSON"),
    "no object": (["[1]"], "line 1: expected an object"),
    "unknown field": ([{"text": "a", "txet": "b"}], 'line 1: unknown field "txet", expected some'),
    "not a string": ([{"text": 3}], 'line 1: "text" is 3, expected a string'),
    "label": ([{"text": "a", "label": [1]}], r'line 1: "label" is \[1\], expected a string or'),
    "no input": ([{"label": "a"}], "line 1: no input, expected one or more of: text, image"),
    "no file": ([{"image": "x.png"}], r"line 1: the image .*x\.png does not exist. Paths are"),
    "another kind": (
        [{"text": "a"}, "", {"audio": "here.wav"}],
        "line 3: has audio, expected text as in line 1",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    rows, said = BAD_ROWS[case]
    (tmp_path / "here.wav").touch()
    with pytest.raises(InputError, match=rf"rows\.jsonl, {said}"):
        read_examples(write(tmp_path / "rows.jsonl", *rows))
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        read_examples(tmp_path / "none.jsonl")


def test_texts_are_read_cut_and_labelled(classifier: Path, texts: Path) -> None:
    """Two batches of different rows and lengths; labels by name, and only where one trains."""
    (first, held), (second, _) = batches(classifier, texts).pair(batch=4, length=7)
    assert first["input_ids"].shape == (4, 7)
    assert first["labels"].tolist() == [0, 1, 2, 0]
    assert held == Contents(tokens=int(first["attention_mask"].sum()))
    assert second["input_ids"].shape == (4, 4)
    assert second["labels"].tolist() == [1, 2, 0, 1]
    (first, _), _ = batches(classifier, texts, train=False).pair(batch=4, length=64)
    assert "labels" not in first
    assert first["input_ids"].shape[1] <= 64


def test_rows_that_do_not_fit_the_model_are_refused(classifier: Path, tmp_path: Path) -> None:
    """One message: the file, the line, what was expected."""
    data = tmp_path / "rows.jsonl"
    write(data, *[{"text": "a graph", "label": "class"}] * 3)
    with pytest.raises(InputError, match=r"has 3 rows, expected at least 4, the batch"):
        batches(classifier, data).pair(batch=4, length=8)
    write(data, {"text": "a", "label": "class"}, {"text": "a", "label": "verb"})
    with pytest.raises(
        InputError, match=rf'rows.jsonl, line 2: the model has no class "verb".*{LABELS[0]}'
    ):
        batches(classifier, data).pair(batch=2, length=8)
    write(data, {"text": "a", "label": 1}, {"text": "a"})
    with pytest.raises(InputError, match=r'line 2: no "label", which other rows have'):
        batches(classifier, data).pair(batch=2, length=8)
    (tmp_path / "x.wav").touch()
    write(data, {"text": "a", "audio": "x.wav"})
    with pytest.raises(InputError, match=r"BertForSequenceClassification reads no audio"):
        batches(classifier, data)
    write(data, "")
    with pytest.raises(InputError, match=r"rows\.jsonl has no lines"):
        batches(classifier, data)


def test_without_labels_a_classifier_trains_on_no_loss_of_its_own(
    classifier: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"text": "the sum of a"}] * 2)
    (first, _), (second, _) = batches(classifier, data).pair(batch=2, length=8)
    assert "labels" not in first
    assert first["input_ids"].shape[1] != second["input_ids"].shape[1]


def test_a_decoder_without_a_padding_token_gets_one(tmp_path: Path) -> None:
    """As for Llama; the labels leave padding out."""
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=1)
    folder = save(tmp_path / "llama", hf.LlamaForCausalLM(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    data = write(tmp_path / "rows.jsonl", {"text": "a graph of the sum"}, {"text": "a"})
    (first, _), _ = batches(folder, data).pair(batch=2, length=8)
    assert first["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert first["labels"][1].tolist() == [*first["input_ids"][1, :3].tolist(), *[-100] * 4]
    assert first["use_cache"] is False


def test_translations_take_the_label_as_the_text_to_write(tmp_path: Path) -> None:
    folder = save(tmp_path / "bart", hf.BartForConditionalGeneration(SEQUENCES))
    rows = [{"text": "a graph", "label": "the sum of a node"}, {"text": "a", "label": "a"}]
    data = write(tmp_path / "rows.jsonl", *rows)
    (first, _), _ = batches(folder, data).pair(batch=2, length=8)
    assert first["labels"][1, -1] == -100
    model = load_checkpoint(str(folder)).model
    assert bool(torch.isfinite(model(**first).loss))
    (first, _), _ = batches(folder, data, train=False).pair(batch=2, length=8)
    assert first["decoder_input_ids"].shape == (2, 7)
    write(data, *[{"text": "a graph"}] * 2)
    with pytest.raises(InputError, match=r'line 1: no "label", the text that BartForConditional'):
        batches(folder, data).pair(batch=2, length=8)


def record(path: Path, seconds: float, *, rate: int = 16000, width: int = 2) -> Path:
    samples = np.round(10000 * np.sin(np.arange(int(seconds * rate)) / 9)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def test_speech_is_read_from_wav_and_its_words_are_labels(tmp_path: Path) -> None:
    """Raw for Wav2Vec2, as a spectrogram for Whisper; seconds are those of the recordings."""
    record(tmp_path / "long.wav", 0.1)
    record(tmp_path / "short.wav", 0.06)
    rows = [{"audio": "long.wav", "text": "the sum"}, {"audio": "short.wav", "text": "a"}]
    data = write(tmp_path / "rows.jsonl", *rows)

    raw = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    folder = save(tmp_path / "wav2vec2", hf.Wav2Vec2ForCTC(RAW_SPEECH), raw)
    (first, held), (second, _) = batches(folder, data).pair(batch=2, length=8)
    assert first["input_values"].shape == (2, 1600)
    assert first["attention_mask"].sum(1).tolist() == [1600, 960]
    assert second["input_values"].shape == (2, 801)
    assert first["labels"].shape == (2, 4)
    assert held == Contents(audio_seconds=pytest.approx(0.16))
    model = load_checkpoint(str(folder)).model
    assert bool(torch.isfinite(model(**first).loss))

    # 100 frames, whatever was said; the processor is made of the two parts.
    heard = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    whisper = hf.WhisperForConditionalGeneration(SPEECH_TO_TEXT)
    folder = save(tmp_path / "whisper", whisper, heard)
    (first, held), (second, _) = batches(folder, data).pair(batch=2, length=8)
    assert first["input_features"].shape == (2, 8, 100)
    assert held == Contents(audio_seconds=pytest.approx(0.16))
    assert first["labels"].shape[1] != second["labels"].shape[1]
    assert bool(torch.isfinite(whisper.eval()(**first).loss))


def test_a_recording_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", hf.Wav2Vec2ForCTC(RAW_SPEECH), hf.Wav2Vec2FeatureExtractor())
    record(tmp_path / "a.wav", 0.1, rate=8000)
    data = write(tmp_path / "rows.jsonl", *[{"audio": "a.wav"}] * 2)
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: .*a.wav is at 8000 Hz, expected 16"):
        batches(folder, data).pair(batch=2, length=8)
    (tmp_path / "a.wav").write_bytes(b"ID3 something else")
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: .*a.wav is no readable wav file"):
        batches(folder, data).pair(batch=2, length=8)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r'has no processor .*which "audio" needs. Save the one'):
        batches(folder, data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_samples_of_every_width_become_the_same_numbers(width: int, tmp_path: Path) -> None:
    """Two channels are averaged; 8 bits are unsigned."""
    left = np.array([0.0, 0.5, -0.5, -1.0])
    both = np.stack([left, np.zeros(4)], 1).reshape(-1)
    whole = np.round(both * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    raw = b"".join(int(x).to_bytes(width, "little", signed=width > 1) for x in whole)
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(raw)
    samples, rate = read_wav(tmp_path / "x.wav")
    assert rate == 8000
    np.testing.assert_allclose(samples, left / 2, atol=2.0 ** -(8 * width - 1))
    assert samples.dtype == np.float32


def test_images_need_pillow_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is missing is no fault of the file: exit 3."""
    folder = save(tmp_path / "vit", hf.ViTForImageClassification(hf.ViTConfig(**VISION)))
    (tmp_path / "a.png").touch()
    data = write(tmp_path / "rows.jsonl", {"image": "a.png"})
    monkeypatch.setattr("mmopt.compilation.examples.find_spec", lambda _name: None)
    with pytest.raises(MmoptError, match=r"needs Pillow.*pip install pillow") as caught:
        batches(folder, data)
    assert caught.value.exit_code == 3
    write(data, {"text": "a"})
    with pytest.raises(InputError, match=r"ViTForImageClassification reads no text"):
        batches(folder, data)


def test_images_and_texts_go_through_the_models_processor(tmp_path: Path) -> None:
    """Resized as the processor says; images alone, and with the text beside them."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        image.new("RGB", (20, 30), colour).save(tmp_path / f"{name}.png")
    pixels = {"size": {"height": 16, "width": 16}, "image_processor_type": "ViTImageProcessor"}
    model = hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))
    folder = save(tmp_path / "vit", model)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    rows = [{"image": "red.png", "label": 0}, {"image": "blue.png", "label": "LABEL_2"}]
    data = write(tmp_path / "rows.jsonl", *rows)
    (first, held), _ = batches(folder, data).pair(batch=2, length=8)
    assert first["pixel_values"].shape == (2, 3, 16, 16)
    assert first["labels"].tolist() == [0, 2]
    assert held == Contents(images=2)

    folder = save(tmp_path / "clip", clip())
    parts = {
        "processor_class": "CLIPProcessor",
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
        },
    }
    (folder / "processor_config.json").write_text(json.dumps(parts))
    rows = [{"image": "red.png", "text": "the sum of a"}, {"image": "blue.png", "text": "graph"}]
    write(data, *rows)
    (first, held), (second, _) = batches(folder, data).pair(batch=2, length=6)
    assert first["pixel_values"].shape == (2, 3, 16, 16)
    assert held == Contents(tokens=9, images=2)
    assert first["return_loss"] is True
    assert second["input_ids"].shape[1] == 4
    assert bool(torch.isfinite(load_checkpoint(str(folder)).model(**first).loss))
    (tmp_path / "red.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: .*red.png is no readable image"):
        batches(folder, data).pair(batch=2, length=6)


def test_texts_with_images_in_them_are_padded_rather_than_cut(tmp_path: Path) -> None:
    """A cut might take the places of an image away, so the second batch is a longer one."""
    (tmp_path / "a.png").touch()
    base = SimpleNamespace(
        config=SimpleNamespace(image_token_id=9, is_encoder_decoder=False),
        main_input_name="input_ids",
        forward=lambda input_ids, attention_mask, pixel_values, labels: None,
    )
    asked = []

    class Processor:
        def __call__(self, text: Any, images: Any, **options: Any) -> Any:
            asked.append(options)
            length = options.get("max_length", 5)
            ids = torch.full((len(text), length), 9)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "extra": 1}

    made = object.__new__(ExampleBatches)
    made._base, made._train, made._head = base, True, "next token"
    made._path, made._processor, made._tokenizer = tmp_path, Processor(), None
    data = write(tmp_path / "rows.jsonl", *[{"text": "a", "image": "a.png"}] * 2)
    made._examples = read_examples(data)
    made._read = lambda *_: "picture"  # type: ignore[method-assign]
    (first, held), (second, _) = made.pair(batch=2, length=3)
    assert [options.get("truncation") for options in asked] == [None, None, None]
    assert (first["input_ids"].shape, second["input_ids"].shape) == ((2, 5), (2, 8))
    assert "extra" not in first
    assert first["labels"].tolist() == [[-100] * 5] * 2
    assert held == Contents(tokens=10, images=2)

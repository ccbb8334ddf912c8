"""Images and sounds without torch, held against transformers' own processors."""

import io
import json
import struct
import subprocess
import sys
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmopt_export.preprocessing import (
    decode_ctc,
    frames_of,
    on_white,
    open_image,
    open_sound,
    process_images,
    process_sounds,
)
from mmopt_export.records import read_images, read_sounds
from mmopt_export.tasks.image import ImageProcessing
from mmopt_export.tasks.speech import _audio, _vocabulary
from mmopt_kernels.errors import InputError
from tiny_encoders import picture, save_image_processor, save_sound, save_speech_encoder

PIL = pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

# A processor's file, and one step of uint8 in what it gives.
FAMILIES = ("ViT", "CLIP", "Dinov2", "Siglip", "ConvNext")
SIZES = ((31, 47), (200, 90), (64, 64), (33, 300))


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def steps_allowed(processor: Any) -> float:
    """Steps of uint8: beside edges torchvision's bicubic filter clips otherwise than Pillow's."""
    return 1.01 if type(processor).__name__.endswith("Pil") else 20.0


def processor_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_the_processor_to_one_step_of_uint8(
    family: str, tmp_path: Path
) -> None:
    save_image_processor(tmp_path, family, 40)
    constants = ImageProcessing(tmp_path, channels=3).constants
    processor = processor_of(tmp_path)
    step = constants["rescale"] / min(constants["std"])
    for seed, (height, width) in enumerate(SIZES):
        image = Image.fromarray(picture(height, width, seed=seed))
        expected = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
        actual = process_images([open_image(encoded(image))], constants)
        assert actual.dtype == np.float32
        assert actual.shape == expected.shape == (1, 3, 40, 40)
        assert np.abs(actual - expected).max() <= steps_allowed(processor) * step
        assert np.abs(actual).max() > 10 * step


def test_convnext_from_384_on_warps_without_a_crop(tmp_path: Path) -> None:
    save_image_processor(tmp_path, "ConvNext", 384)
    constants = ImageProcessing(tmp_path, channels=3).constants
    assert (constants["resize"], constants["crop"]) == ({"height": 384, "width": 384}, None)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16"])
def test_other_kinds_of_pictures_become_what_the_processor_makes_of_them(
    mode: str, tmp_path: Path
) -> None:
    save_image_processor(tmp_path, "CLIP", 24)
    constants = ImageProcessing(tmp_path, channels=3).constants
    image = Image.fromarray(picture(50, 40))
    if mode == "LA":
        image.putalpha(Image.fromarray(picture(50, 40, seed=3)[..., 0]))
    elif mode == "I;16":
        image = Image.fromarray(picture(50, 40)[..., 0].astype(np.uint16) * 100)
    else:
        image = image.convert(mode)
    processor = processor_of(tmp_path)
    expected = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    actual = process_images([image], constants)
    np.testing.assert_allclose(actual, expected, atol=steps_allowed(processor) / 255 / 0.224)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    save_image_processor(tmp_path, "ViT", 8)
    constants = ImageProcessing(tmp_path, channels=3).constants
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    np.testing.assert_array_equal(
        process_images([clear], constants), process_images([white], constants)
    )


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_a_color_that_stands_for_transparency_is_white(mode: str) -> None:
    """Palettes and pictures without an alpha channel name a color that is clear."""
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (200, 100, 50))
    key: Any = (10, 20, 30)
    if mode == "P":
        image = image.quantize(2)
        key = image.getpixel((0, 0))
    opened = open_image(encoded(image, transparency=key))
    assert opened.mode == mode
    found = np.asarray(on_white(opened).convert("RGB"))
    np.testing.assert_array_equal(found[0], [(255, 255, 255), (200, 100, 50)])


@pytest.mark.parametrize("size", [(5, 12), (12, 5), (4, 7), (12, 12)], ids=str)
def test_a_crop_is_transformers_also_where_the_picture_is_smaller(size: tuple[int, int]) -> None:
    from transformers.image_transforms import center_crop

    constants = {"channels": "RGB", "resize": None, "crop": {"height": 8, "width": 9}}
    constants |= {"rescale": None, "mean": None}
    pixels = picture(*size)
    expected = center_crop(pixels.transpose(2, 0, 1), (8, 9), input_data_format="channels_first")
    found = process_images([Image.fromarray(pixels)], constants)
    np.testing.assert_array_equal(found[0], expected)


def test_a_picture_is_turned_upright() -> None:
    image = Image.fromarray(picture(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the right side is the top
    turned = open_image(encoded(image, exif=exif))
    assert turned.size == (20, 30)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_blue_before_red_and_gray(tmp_path: Path) -> None:
    save_image_processor(tmp_path, "ViT", 16)
    constants = {**ImageProcessing(tmp_path, channels=3).constants, "mean": None, "std": None}
    image = Image.fromarray(picture(16, 16))
    rgb = process_images([image], constants)
    bgr = process_images([image], {**constants, "channels": "BGR"})
    np.testing.assert_array_equal(bgr, rgb[:, ::-1])
    gray = process_images([image], {**constants, "channels": "L"})
    assert gray.shape == (1, 1, 16, 16)


def test_pictures_of_two_sizes_are_no_batch(tmp_path: Path) -> None:
    save_image_processor(tmp_path, "CLIP", 16)
    constants = {**ImageProcessing(tmp_path, channels=3).constants, "crop": None}
    images = [Image.fromarray(picture(20, 40)), Image.fromarray(picture(20, 20))]
    with pytest.raises(InputError, match=r"become 16 x 16, 16 x 32 after resizing"):
        process_images(images, constants)


def test_a_processor_that_does_more_is_refused_by_name(tmp_path: Path) -> None:
    save_image_processor(tmp_path, "ViT", 16)
    path = tmp_path / "preprocessor_config.json"
    document = json.loads(path.read_text())
    # Shifts the values by 1 after rescaling, which the constants do not tell.
    document |= {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"EfficientNetImageProcessor.* does more than"):
        ImageProcessing(tmp_path, channels=3)


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no image processor"):
        ImageProcessing(tmp_path, channels=3)


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    # The second is above twice Pillow's own limit, at which Pillow raises what is no OSError.
    for side in (9_000, 40_000):
        with pytest.raises(InputError, match=r"pixels, expected at most|exceeds limit"):
            open_image(huge_png(side))
    assert open_image(encoded(Image.new("RGB", (9, 9))), max_pixels=81).size == (9, 9)
    with pytest.raises(InputError, match="9 x 9 pixels, expected at most 80"):
        open_image(encoded(Image.new("RGB", (9, 9))), max_pixels=80)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_picture_is_refused(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture(60, 60)), kind)
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut cannot be decoded"):
        open_image(tmp_path / "cut")
    for junk in (b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(InputError, match="is no picture that can be read"):
            open_image(junk)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width_and_several_channels_are_read(width: int) -> None:
    expected = np.array([0.5, -0.5, 0.25, -1.0])
    left_and_right = np.stack([expected + 0.125, expected - 0.125], -1).clip(-1, 0.99)
    scale = 2 ** (8 * width - 1)
    values = np.round(left_and_right * scale).astype(np.int64).ravel()
    if width == 1:
        data = (values + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(x).to_bytes(width, "little", signed=True) for x in values)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16_000)
        file.writeframes(data)
    samples = open_sound(buffer.getvalue(), sampling_rate=16_000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, left_and_right.mean(-1), atol=2 / scale)


def test_bad_sounds_are_refused(tmp_path: Path) -> None:
    good = save_sound(tmp_path / "good.wav", np.sin(np.arange(400) * 0.1))
    with pytest.raises(InputError, match="16000 samples a second, expected 8000"):
        open_sound(good, sampling_rate=8_000)
    with pytest.raises(InputError, match="400 samples, expected at most 399"):
        open_sound(good, sampling_rate=16_000, max_samples=399)
    with pytest.raises(InputError, match="cut off"):
        open_sound(good.read_bytes()[:-100], sampling_rate=16_000)
    for junk in (b"RIFFjunk", b""):
        with pytest.raises(InputError, match="no PCM wav file"):
            open_sound(junk, sampling_rate=16_000)
    silent = save_sound(tmp_path / "none.wav", np.zeros(0))
    with pytest.raises(InputError, match=r"none\.wav has 0 bytes of sound.* empty or cut off"):
        open_sound(silent, sampling_rate=16_000)


@pytest.mark.parametrize("bits", [40, 64, 128])
def test_samples_of_more_than_32_bits_are_refused(bits: int) -> None:
    """`wave` reads them; NumPy has no integers of 5 bytes."""
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 2_000 * bits, bits // 8, bits)
    data = bytes(bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data))
    sound = b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(data)) + b"WAVE" + chunks + data
    with pytest.raises(InputError, match=f"has {bits} bits a sample, expected at most 32"):
        open_sound(sound, sampling_rate=16_000)


def test_the_samples_of_all_channels_count_to_the_limit() -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(4)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(4 * 2 * 10))
    sound = buffer.getvalue()
    assert open_sound(sound, sampling_rate=16_000, max_samples=40).shape == (10,)
    with pytest.raises(InputError, match="has 40 samples, expected at most 39"):
        open_sound(sound, sampling_rate=16_000, max_samples=39)


def test_silence_is_zero_and_padding_is_the_constants() -> None:
    """A sound without any variance is not divided by it."""
    constants = {"normalize": True, "padding_value": -2.0, "mask": True, "shortest": 1}
    feeds = process_sounds([np.zeros(3, np.float32), np.full(2, 0.5, np.float32)], constants)
    assert feeds["input_values"].tolist() == [[0, 0, 0], [0, 0, -2]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_sound_values_are_those_of_the_feature_extractor(norm: str, tmp_path: Path) -> None:
    import transformers

    save_speech_encoder(tmp_path, "Wav2Vec2", norm=norm)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    sounds = [generator.normal(0.1, 0.3, n).astype(np.float32) for n in (500, 811)]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    feeds = process_sounds(sounds, _audio(tmp_path, config))
    if norm == "layer":
        expected = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="np")
        np.testing.assert_array_equal(feeds["attention_mask"], expected["attention_mask"])
        np.testing.assert_allclose(feeds["input_values"], expected["input_values"], atol=1e-5)
        return
    # Trained without a mask: each sound by itself, then zeros, as the model card says.
    assert set(feeds) == {"input_values"}
    for row, sound in zip(feeds["input_values"], sounds, strict=True):
        alone = extractor(sound, sampling_rate=16_000, return_tensors="np")["input_values"][0]
        np.testing.assert_allclose(row[: len(sound)], alone, atol=1e-5)
        assert not row[len(sound) :].any()


def test_frames_are_those_of_the_model(tmp_path: Path) -> None:
    import transformers

    save_speech_encoder(tmp_path, "Wav2Vec2")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path)
    audio = _audio(tmp_path, model.config)
    for samples in (30, 31, 49, 50, 1234):
        expected = int(model._get_feat_extract_output_lengths(samples))
        assert frames_of(np.array([samples]), audio).tolist() == [expected]
    assert frames_of(np.array([0, 1]), audio).tolist() == [0, 0]
    with pytest.raises(InputError, match="sound 1 has 29 samples, expected at least 30"):
        process_sounds([np.zeros(30, np.float32), np.zeros(29, np.float32)], audio)
    with pytest.raises(InputError, match="no sounds were given"):
        process_sounds([], audio)


def test_ctc_texts_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    import transformers

    save_speech_encoder(tmp_path, "Wav2Vec2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    constants = _vocabulary(tmp_path, config)
    generator = np.random.default_rng(0)
    # Few tokens, so that there are repetitions and blanks between equal letters.
    ids = generator.choice([0, 0, 4, 5, 6, 7, 31], (6, 40))
    logits = np.eye(config.vocab_size, dtype=np.float32)[ids]
    lengths = [40, 1, 17, 40, 3, 29]
    expected = [tokenizer.decode(row[:n]) for row, n in zip(ids, lengths, strict=True)]
    assert decode_ctc(logits, constants, lengths) == expected
    assert any("'" in text and " " in text for text in expected)
    small = decode_ctc(logits, {**constants, "lower": True}, lengths)
    assert small == [text.lower() for text in expected] != expected
    # The blank is any token, and there may be none between words.
    other = {"tokens": ["A", "B", "-"], "blank": 2, "delimiter": None, "lower": False}
    spoken = np.eye(3, dtype=np.float32)[[[0, 2, 0, 0, 1, 2]]]
    assert decode_ctc(spoken, other, [6]) == ["AAB"]


def test_the_lines_of_a_file_are_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(9, 8)).save(tmp_path / "images" / "a.png")
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "images/a.png", "text": "a graph"}\n\n' * 3)
    records = read_images(data, "image", limit=2, text="text")
    assert [(one.line, one.values["text"]) for one in records] == [(1, "a graph"), (3, "a graph")]
    assert records[0].values["image"].size == (8, 9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', r'line 2: expected an object with a string "image"'),
        ('{"image": 3, "text": "a"}', r'line 2: expected an object with a string "image"'),
        ('{"image": "a.png"}', r'line 2: expected an object with a string "text"'),
        ('{"image": "none.png", "text": "a"}', r"line 2: .*none.png does not exist"),
        ('{"image": "bad.png", "text": "a"}', r"line 2: .*bad.png is no picture"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    Image.fromarray(picture(9, 8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"image": "a.png", "text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        read_images(data, "image", limit=9, text="text")


def test_a_sound_of_another_rate_is_named_with_its_line(tmp_path: Path) -> None:
    save_sound(tmp_path / "a.wav", np.zeros(100), rate=8_000)
    data = tmp_path / "data.jsonl"
    data.write_text('{"audio": "a.wav"}\n')
    with pytest.raises(InputError, match=r"line 1: .*8000 samples a second, expected 16000"):
        read_sounds(data, "audio", limit=9, sampling_rate=16_000)
    data.write_text("\n")
    with pytest.raises(InputError, match="has no lines"):
        read_sounds(data, "audio", limit=9, sampling_rate=16_000)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys\n"
        "from mmopt_export.preprocessing import open_image, process_sounds\n"
        "from mmopt_export.records import read_images\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_photographs_come_out_as_the_processors_make_them(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs")
    save_image_processor(tmp_path, "CLIP", 96)
    constants = ImageProcessing(tmp_path, channels=3).constants
    processor = processor_of(tmp_path)
    for name in ("astronaut", "coffee", "chelsea", "camera"):
        image = Image.fromarray(getattr(data, name)())
        expected = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
        actual = process_images([image], constants)
        assert np.abs(actual - expected).max() <= steps_allowed(processor) / 255 / 0.224

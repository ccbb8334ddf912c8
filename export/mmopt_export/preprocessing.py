"""Turns images and sounds into what a graph takes, by the constants of an artifact's manifest.

NumPy and Pillow only: neither torch nor transformers. The constants are under `image`, `audio` and
`ctc` in `manifest.preprocessing`; `mmopt export` has held these functions against the model's own
processor.
"""

import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError, MmoptError

if TYPE_CHECKING:
    from PIL import Image

# 64 megapixels, 192 MB as RGB: more than cameras of phones give, and too little for a small file
# that claims a huge picture to fill a server's memory.
MAX_PIXELS = 1 << 26
# What ships with every Pillow. Others, such as EPS, call programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# 10 minutes at 48 kHz in stereo, 230 MB as float32.
MAX_SAMPLES = 57_600_000
_WIDEST = 4  # bytes of a sample: more than any recorder writes as integers

Array = npt.NDArray[Any]


def open_image(source: bytes | Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """Decode a picture and turn it upright, as its EXIF orientation says.

    Args:
        source: the file's bytes, its path, or an open file.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InputError: no picture, one of a format that is not read, damaged, or too large.
        MmoptError: Pillow is not installed (exit 3).
    """
    image_module = _pillow()
    from PIL import ImageOps, UnidentifiedImageError

    name = str(source) if isinstance(source, Path) else "the image"
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image: Image.Image = image_module.open(file, formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise InputError(
                f"{name} has {image.width} x {image.height} pixels, expected at most {max_pixels}."
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is no picture that can be read, expected one of: {', '.join(_FORMATS)}."
        ) from error
    # Decoders raise what they like for damaged files: SyntaxError and ValueError are Pillow's own.
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be decoded: {error}") from error


def process_images(
    images: Sequence["Image.Image"], constants: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    """Pictures as `pixel_values`, float32 `[B, C, H, W]`.

    Args:
        images: at least one. Transparency is laid on white.
        constants: `manifest.preprocessing["image"]`: `channels` (`RGB`, `BGR` or `L`); `resize`
            (`{"height", "width"}`, `{"shortest_edge"}` or null); `resample`; `crop`
            (`{"height", "width"}` of the middle, or null); `rescale` (a factor or null); `mean` and
            `std` per channel, or null.

    Raises:
        InputError: pictures that do not come out equally large cannot be one batch.
    """
    pixels = [_process_image(image, constants) for image in images]
    shapes = {one.shape for one in pixels}
    if len(shapes) != 1:
        sizes = ", ".join(sorted(f"{height} x {width}" for _, height, width in shapes))
        raise InputError(
            f"the images become {sizes or 'nothing'} after resizing, expected one size for a "
            "batch. Run them one by one."
        )
    return np.stack(pixels)


def _process_image(image: "Image.Image", constants: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    image_module = _pillow()
    gray = constants["channels"] == "L"
    image = image.convert("L") if gray else on_white(image).convert("RGB")
    if constants["resize"] is not None:
        height, width = _target_size(image.height, image.width, constants["resize"])
        resample = image_module.Resampling[constants["resample"].upper()]
        image = image.resize((width, height), resample=resample)
    values = np.asarray(image)
    values = values[None] if gray else values.transpose(2, 0, 1)
    if constants["channels"] == "BGR":
        values = values[::-1]
    if constants["crop"] is not None:
        values = _center_crop(values, constants["crop"]["height"], constants["crop"]["width"])
    pixels: npt.NDArray[np.float32] = values.astype(np.float32)
    if constants["rescale"] is not None:
        pixels = pixels * np.float32(constants["rescale"])
    if constants["mean"] is not None:
        mean = np.asarray(constants["mean"], np.float32)[:, None, None]
        pixels = (pixels - mean) / np.asarray(constants["std"], np.float32)[:, None, None]
    return pixels


def on_white(image: "Image.Image") -> "Image.Image":
    """A picture without transparency: where it is clear, it is white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    image = image.convert("RGBA")
    white = _pillow().new("RGBA", image.size, (255, 255, 255, 255))
    return _pillow().alpha_composite(white, image)


def _target_size(height: int, width: int, resize: Mapping[str, int]) -> tuple[int, int]:
    if "height" in resize:
        return resize["height"], resize["width"]
    short = resize["shortest_edge"]
    long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _center_crop(values: Array, height: int, width: int) -> Array:
    """The middle of `[C, H, W]`, with zeros around where it is smaller."""
    out = np.zeros((values.shape[0], height, width), values.dtype)
    take, put = [], []
    for size, wanted in zip(values.shape[1:], (height, width), strict=True):
        start = (size - wanted) // 2
        take.append(slice(max(start, 0), min(start + wanted, size)))
        put.append(slice(max(-start, 0), max(-start, 0) + min(size, wanted)))
    out[:, put[0], put[1]] = values[:, take[0], take[1]]
    return out


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MmoptError(
            f"Pillow cannot be imported ({error}); images need it. Run `pip install pillow`."
        ) from error
    return Image


def resample_name(value: int) -> str:
    """The name of one of Pillow's filters, which processors store as a number."""
    return _RESAMPLES[int(value)]


def open_sound(
    source: bytes | Path, *, sampling_rate: int, max_samples: int = MAX_SAMPLES
) -> npt.NDArray[np.float32]:
    """Decode a wav file into samples in [-1, 1], float32 `[samples]`; channels are averaged.

    Args:
        source: the file's bytes or its path.
        sampling_rate: what the model was trained on; a file of another rate is refused.
        max_samples: over all channels; a longer file is refused before it is decoded.

    Raises:
        InputError: no PCM wav file, damaged, empty, too long, or of another sampling rate.
    """
    name = str(source) if isinstance(source, Path) else "the sound"
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            frames = file.getnframes()
            if width > _WIDEST:
                raise InputError(
                    f"{name} has {8 * width} bits a sample, expected at most {8 * _WIDEST}. "
                    "Save it as PCM of 16 bits."
                )
            if rate != sampling_rate:
                raise InputError(
                    f"{name} has {rate} samples a second, expected {sampling_rate}. Resample it."
                )
            if frames * channels > max_samples:
                raise InputError(
                    f"{name} has {frames * channels} samples, expected at most {max_samples}."
                )
            data = file.readframes(frames)
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{name} is no PCM wav file that can be read: {error}") from error
    if not data or len(data) != frames * channels * width:
        raise InputError(
            f"{name} has {len(data)} bytes of sound, expected {frames * channels * width}: "
            "it is empty or cut off."
        )
    samples: npt.NDArray[np.float32] = _pcm(data, width).reshape(-1, channels).mean(axis=1)
    return samples


def _pcm(data: bytes, width: int) -> npt.NDArray[np.float32]:
    """Little-endian integer samples of `width` bytes as floats; 8 bits are unsigned."""
    if width == 1:
        unsigned = np.frombuffer(data, np.uint8).astype(np.float32)
        return (unsigned - np.float32(128)) / np.float32(128)
    if width == 3:
        # As the upper three bytes of an int32, so that the sign is where it belongs.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    scale = 2.0 ** (8 * width - 1)
    return (np.frombuffer(data, f"<i{width}") / scale).astype(np.float32)


def process_sounds(
    sounds: Sequence[npt.NDArray[np.float32]], constants: Mapping[str, Any]
) -> Tensors:
    """Sounds as `input_values`, float32 `[B, S]`, and `attention_mask`, int64, where it is used.

    Args:
        sounds: samples `[n]` of the model's sampling rate, at least one sound.
        constants: `manifest.preprocessing["audio"]`: `normalize` (to mean 0 and variance 1, each
            sound by itself), `padding_value`, `mask`, and `shortest`, the fewest samples that give
            a frame.

    Raises:
        InputError: no sound, or one that is too short to give a frame.
    """
    if not sounds:
        raise InputError("no sounds were given, expected at least one.")
    for index, sound in enumerate(sounds):
        if len(sound) < constants["shortest"]:
            raise InputError(
                f"sound {index} has {len(sound)} samples, expected at least "
                f"{constants['shortest']}, which give the model one frame."
            )
    longest = max(len(sound) for sound in sounds)
    values = np.full((len(sounds), longest), constants["padding_value"], np.float32)
    mask = np.zeros((len(sounds), longest), np.int64)
    for index, sound in enumerate(sounds):
        if constants["normalize"]:
            sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
        values[index, : len(sound)] = sound
        mask[index, : len(sound)] = 1
    feeds: Tensors = {"input_values": values}
    if constants["mask"]:
        feeds["attention_mask"] = mask
    return feeds


def frames_of(samples: Array, constants: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """How many frames the model's convolutions give for so many samples.

    Args:
        samples: counts, any shape.
        constants: `manifest.preprocessing["audio"]`: `convolutions`, kernel and stride of each.
    """
    count = np.asarray(samples, np.int64)
    for kernel, stride in constants["convolutions"]:
        count = (count - kernel) // stride + 1
    return np.maximum(count, 0)


def decode_ctc(
    logits: npt.NDArray[np.float32], constants: Mapping[str, Any], lengths: Sequence[int]
) -> list[str]:
    """What was said: the best token of each frame, repetitions joined, blanks left out.

    Args:
        logits: `[B, frames, tokens]`.
        constants: `manifest.preprocessing["ctc"]`: `tokens` by index, `blank`, `delimiter` (the
            token between words, or null) and `lower` (whether letters become lower case).
        lengths: for each sound the frames that count; the others are padding.
    """
    texts = []
    for frames, length in zip(logits.argmax(axis=-1), lengths, strict=True):
        best = frames[:length]
        changed = np.ones(len(best), bool)
        changed[1:] = best[1:] != best[:-1]
        spoken = best[changed][best[changed] != constants["blank"]]
        tokens = [constants["tokens"][index] for index in spoken]
        words = [" " if token == constants["delimiter"] else token for token in tokens]
        text = "".join(words).strip()
        texts.append(text.lower() if constants["lower"] else text)
    return texts

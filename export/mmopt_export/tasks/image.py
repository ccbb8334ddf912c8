"""What the tasks that read images share: the processor's constants, its files, and samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mmopt_export.parity import RANDOM
from mmopt_export.parts import Samples
from mmopt_export.preprocessing import process_images, resample_name
from mmopt_export.records import Record, read_images
from mmopt_export.runtime import Tensors
from mmopt_export.tasks import processors
from mmopt_export.texts import read_class_labels
from mmopt_kernels.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_COLUMN = "image"
_BATCH = 8
_MAX_IMAGES = 64  # that parity reads of the calibration file: 8 batches
# Pillow gives the same values to one step of uint8 (and what float32 rounds). torchvision, which
# transformers takes where it is installed, has bicubic weights of fewer bits.
_STEPS = 2.02
# Sides of what our preprocessing is held against the processor on: upright, across, odd.
_PROBES = ((97, 131), (150, 64))


class ImageProcessing:
    """A model's image processor as constants, held against the processor itself.

    Attributes:
        constants: `manifest.preprocessing["image"]`.
        size: height and width of what the graph gets; None where they depend on the picture.
    """

    def __init__(self, folder: Path, *, channels: int) -> None:
        """Read the processor of a model folder.

        Raises:
            InputError: none there, or one that does more than resize, crop, rescale and normalize;
                the message names it.
            MmoptError: transformers lacks a library that it needs (exit 3).
        """
        self._folder = folder
        processor = load_processor(folder)
        name = type(processor).__name__
        self.constants = _constants(processor, name, channels)
        shapes = set()
        for height, width in _PROBES:
            image = _probe(height, width, gray=channels == 1)
            expected = processor(images=image, return_tensors="np")
            if set(expected) != {"pixel_values"}:
                raise InputError(
                    f"{name} gives {', '.join(sorted(expected))}, expected pixel_values alone: "
                    "this model cannot be exported."
                )
            _require_equal(name, self.constants, image, np.asarray(expected["pixel_values"]))
            shapes.add(np.asarray(expected["pixel_values"]).shape[2:])
        self.size: tuple[int, int] | None = shapes.pop() if len(shapes) == 1 else None

    def write(self, folder: Path) -> None:
        """Copy the processor's files into an artifact."""
        processors.copy_files(self._folder, folder)

    def batches(
        self, records: Sequence[Record], labels: Sequence[int] | None
    ) -> Iterator[tuple[str, Tensors, Tensors]]:
        """The pictures of a calibration file in batches of one size, as samples of parity."""
        size = _BATCH if self.size is not None else 1
        for start in range(0, len(records), size):
            images = [record.values[IMAGE_COLUMN] for record in records[start : start + size]]
            right = {"logits": np.array(labels[start : start + size])} if labels else {}
            yield IMAGE_COLUMN, {"pixel_values": process_images(images, self.constants)}, right


def calibration_images(path: Path | None, *, text: str | None = None) -> list[Record]:
    """The first pictures of a calibration file, with the column `text`; none without a file."""
    return [] if path is None else read_images(path, IMAGE_COLUMN, limit=_MAX_IMAGES, text=text)


def calibration_labels(path: Path | None, names: Sequence[str]) -> list[int] | None:
    """Of each of those pictures the index of its label, or -1; None where there are no labels.

    Raises:
        InputError: a label is none of `names`.
    """
    return read_class_labels(path, names, limit=_MAX_IMAGES) if path is not None else None


def example_images(channels: int, height: int, width: int) -> dict[str, Tensor]:
    """Pixels to trace with, float32 `[2, C, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}


def random_images(
    channels: int, sizes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[str, Tensors]]:
    """Seeded normal pixels, for each `(batch, height, width)` a batch."""
    generator = np.random.default_rng(0)
    for batch, height, width in sizes:
        pixels = generator.standard_normal((batch, channels, height, width), np.float32)
        yield RANDOM, {"pixel_values": pixels}


def random_pixels(shape: Sequence[int], *, seed: int) -> np.ndarray[Any, Any]:
    """Seeded normal values, float32."""
    return np.random.default_rng(seed).standard_normal(tuple(shape), np.float32)


def image_samples(
    processing: ImageProcessing,
    channels: int,
    sizes: Sequence[tuple[int, int, int]],
    records: Sequence[Record],
    labels: Sequence[int] | None = None,
) -> Samples:
    """The batches of parity: random pixels, then real pictures.

    Args:
        labels: of each picture the index of its label, or -1, for the output `logits`.
    """

    def samples() -> Iterator[tuple[str, Tensors] | tuple[str, Tensors, Tensors]]:
        yield from random_images(channels, sizes)
        yield from processing.batches(records, labels)

    return samples


def load_processor(folder: Path, **options: Any) -> Any:
    """The image processor of a model folder; raises as `processors.load_processor` does."""
    auto = transformers.AutoImageProcessor
    return processors.load_processor("image processor", auto, folder, **options)


def _constants(processor: Any, name: str, channels: int) -> dict[str, Any]:
    """What a processor does, as `mmopt_export.preprocessing.process_images` takes it."""
    if channels not in (1, 3):
        raise InputError(f"the model takes {channels} channels, expected pictures in RGB or gray.")
    order = "BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB"
    crops = getattr(processor, "do_center_crop", False)
    resize = edges(processor.size) if getattr(processor, "do_resize", False) else None
    crop = edges(processor.crop_size) if crops else None
    if name.startswith("ConvNext") and resize is not None:
        # Shortest edge over crop_pct, then the middle; from 384 on no crop, but a warp.
        side = resize["shortest_edge"]
        resize = {"height": side, "width": side}
        if side < 384:
            resize, crop = {"shortest_edge": int(side / processor.crop_pct)}, resize
    for what in (resize, crop):
        if what is not None and set(what) not in ({"height", "width"}, {"shortest_edge"}):
            raise InputError(
                f"{name} resizes to {what}, expected a height and a width or a shortest edge."
            )
    return {
        "channels": "L" if channels == 1 else order,
        "resize": resize,
        "resample": resample_name(_number(processor.resample)) if resize is not None else None,
        "crop": crop,
        **scaling(processor, channels),
    }


def scaling(processor: Any, channels: int) -> dict[str, Any]:
    """What a processor does with the values of pixels: `rescale`, `mean` and `std`."""
    rescale = getattr(processor, "do_rescale", False)
    normalize = getattr(processor, "do_normalize", False)
    return {
        "rescale": float(processor.rescale_factor) if rescale else None,
        "mean": per_channel(processor.image_mean, channels) if normalize else None,
        "std": per_channel(processor.image_std, channels) if normalize else None,
    }


def edges(size: Any) -> dict[str, int]:
    """A size without what it leaves open, however the processor stores it."""
    if size is None:
        return {}
    items = size.items() if hasattr(size, "items") else vars(size).items()
    return {str(key): int(edge) for key, edge in items if edge is not None}


def _number(resample: Any) -> int:
    """Pillow's number of a filter; torchvision has names for the same ones."""
    if hasattr(resample, "name") and not isinstance(resample, int):
        from PIL import Image

        return int(Image.Resampling[resample.name.replace("_EXACT", "")])
    return int(resample)


def per_channel(value: Any, channels: int) -> list[float]:
    """One number for each channel, of a processor that may store one for all."""
    values = [value] * channels if isinstance(value, int | float) else list(value)
    return [float(one) for one in values]


def _probe(height: int, width: int, *, gray: bool) -> "Image.Image":
    """A picture of slopes and of waves 5 pixels long, with neither edges nor noise.

    Beside edges bicubic filters overshoot, and where they clip that is a matter of the library.
    """
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    waves = 25 * np.sin(x * 1.3) * np.sin(y * 1.1)
    pixels = np.stack([x / width, y / height, (x + y) / (height + width)], axis=-1)
    values = np.round(50 + 150 * pixels + waves[..., None]).astype(np.uint8)
    return Image.fromarray(values[..., 0] if gray else values)


def _require_equal(
    name: str, constants: dict[str, Any], image: "Image.Image", expected: np.ndarray[Any, Any]
) -> None:
    """Raise InputError unless our pixels are the processor's, but for how a filter rounds."""
    actual = process_images([image], constants)
    step = (constants["rescale"] or 1.0) / min(constants["std"] or [1.0])
    if actual.shape == expected.shape and np.abs(actual - expected).max() <= _STEPS * step:
        return
    raise InputError(
        f"{name} does more than resize, crop, rescale and normalize: its pixels "
        f"{list(expected.shape)} are not those that an artifact would compute "
        f"{list(actual.shape)}. This model cannot be exported."
    )

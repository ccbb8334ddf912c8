"""Pictures as a vision-language model's tower takes them, and as what its prompt says of them.

NumPy and Pillow only. The constants are `manifest.preprocessing["image"]`: those of
`preprocessing.process_images`, and `layout`:

whole     one picture, resized
padded    one picture, resized to fit and put in the middle of a square: `side`, `least`,
          `background`
tiles     a picture cut into squares and one of the whole: `longest`, `side`, `split`
patches   a picture of any size in patches: `least`, `most` (pixels), `patch`, `merge`, `temporal`,
          `window` (tokens on a side; 0 without windows)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmopt_export.preprocessing import on_white, process_images
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]

# What SmolVLM's and Idefics3's processors never exceed.
_MOST_SIDE = 4096
# What Qwen's processors refuse, longest over shortest side.
_MOST_ASPECT = 200


@dataclass(frozen=True)
class Picture:
    """A picture for the tower.

    Attributes:
        pixels: float32 `[tiles, 3, height, width]`, or `[tokens, patches, values]`.
        grid: rows and columns of tiles (0, 0 without), or of patches.
    """

    pixels: npt.NDArray[np.float32]
    grid: tuple[int, int]


def lay_out(image: "Image.Image", constants: Mapping[str, Any]) -> Picture:
    """A picture as `constants["layout"]` says; transparency is laid on white.

    Raises:
        InputError: a picture so narrow that the model's own processor refuses it.
    """
    image = on_white(image).convert("RGB")
    layout = constants["layout"]
    if layout == "whole":
        return Picture(process_images([image], constants), (0, 0))
    if layout == "padded":
        return Picture(process_images([_padded(image, constants)], _as_is(constants)), (0, 0))
    if layout == "tiles":
        tiles, grid = _tiles(image, constants)
        return Picture(process_images(tiles, _as_is(constants)), grid)
    return _patches(image, constants)


def tower_inputs(pictures: Sequence[Picture], constants: Mapping[str, Any]) -> Tensors:
    """The tower's inputs for at least one picture."""
    pixels = np.concatenate([one.pixels for one in pictures])
    if constants["layout"] == "tiles":
        mask = np.ones((len(pixels), *pixels.shape[2:]), dtype=np.int64)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}
    if constants["layout"] == "patches":
        grids = np.asarray([(1, *one.grid) for one in pictures], dtype=np.int64)
        layout = patch_layout(grids, merge=constants["merge"], window=constants["window"])
        return {"pixel_values": pixels, **layout}
    return {"pixel_values": pixels}


def _as_is(constants: Mapping[str, Any]) -> dict[str, Any]:
    return {**constants, "resize": None, "crop": None}


def _resized(image: "Image.Image", height: int, width: int, constants: Mapping[str, Any]) -> Any:
    from PIL import Image

    return image.resize((width, height), Image.Resampling[constants["resample"].upper()])


def _padded(image: "Image.Image", constants: Mapping[str, Any]) -> "Image.Image":
    from PIL import Image

    side, least = constants["side"], constants["least"]
    scale = side / max(image.height, image.width)
    height, width = (max(round(one * scale), least) for one in (image.height, image.width))
    resized = _resized(image, height, width, constants)
    square = Image.new("RGB", (max(height, width),) * 2, tuple(constants["background"]))
    square.paste(resized, ((square.width - width) // 2, (square.height - height) // 2))
    return square


def _tiles(
    image: "Image.Image", constants: Mapping[str, Any]
) -> tuple[list["Image.Image"], tuple[int, int]]:
    side = constants["side"]
    height, width = _fit(image.height, image.width, constants["longest"])
    image = _resized(image, height, width, constants)
    if not constants["split"]:
        return [_resized(image, side, side, constants)], (0, 0)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / aspect) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * aspect) / side) * side
    image = _resized(image, height, width, constants)
    if height <= side and width <= side:
        return [image], (0, 0)
    rows, columns = height // side, width // side
    tiles = [
        image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(rows)
        for x in range(columns)
    ]
    return [*tiles, _resized(image, side, side, constants)], (rows, columns)


def _fit(height: int, width: int, longest: int) -> tuple[int, int]:
    """Sides with the longest as said, the other even, and neither beyond what there may be."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MOST_SIDE:
        width, height = _MOST_SIDE, int(_MOST_SIDE / aspect)
    elif height > width and height > _MOST_SIDE:
        height, width = _MOST_SIDE, int(_MOST_SIDE * aspect)
    return max(height, 1), max(width, 1)


def _patches(image: "Image.Image", constants: Mapping[str, Any]) -> Picture:
    patch, merge, temporal = (constants[name] for name in ("patch", "merge", "temporal"))
    height, width = _multiple(image.height, image.width, patch * merge, constants)
    resize = {"height": height, "width": width}
    pixels = process_images([image], {**constants, "resize": resize, "crop": None})[0]
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(
        len(pixels), rows // merge, merge, patch, columns // merge, merge, patch
    ).transpose(1, 4, 2, 5, 0, 3, 6)
    # [token rows, token columns, merge, merge, channels, frames, patch, patch]: a picture is a
    # film that stands still.
    still = np.repeat(blocks[:, :, :, :, :, None], temporal, axis=5)
    tokens = rows * columns // (merge * merge)
    return Picture(still.reshape(tokens, merge * merge, -1), (rows, columns))


def _multiple(
    height: int, width: int, factor: int, constants: Mapping[str, Any]
) -> tuple[int, int]:
    """Sides that are multiples of `factor`, with as many pixels as there may be."""
    if max(height, width) > _MOST_ASPECT * min(height, width):
        raise InputError(
            f"an image has {height} x {width} pixels, expected one side at most {_MOST_ASPECT} "
            "times the other."
        )
    least, most = constants["least"], constants["most"]
    high, wide = (round(one / factor) * factor for one in (height, width))
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        high, wide = (
            max(factor, math.floor(one / scale / factor) * factor) for one in (height, width)
        )
    elif high * wide < least:
        scale = math.sqrt(least / (height * width))
        high, wide = (math.ceil(one * scale / factor) * factor for one in (height, width))
    return high, wide


# ------------------------------------------------------------------------ prompts


def image_text(grid: tuple[int, int], prompt: Mapping[str, Any], tokens: int) -> str:
    """What stands in a prompt for one picture.

    Args:
        grid: of the picture.
        prompt: `manifest.preprocessing["prompt"]`: `image`, the text of one image token, and
            `before` and `after`; with `tile` and `row_end` where pictures are cut.
        tokens: of one tile.
    """
    many = prompt["image"] * tokens
    if "tile" not in prompt:
        return f"{prompt['before']}{many}{prompt['after']}"
    rows, columns = grid
    text = ""
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            text += prompt["tile"].format(row=row, column=column) + many
        text += prompt["row_end"]
    first = prompt["row_end"] if rows else ""
    return f"{text}{first}{prompt['before']}{many}{prompt['after']}"


# ------------------------------------------------------------------------ patches


def patch_layout(grids: Array, *, merge: int, window: int = 0) -> Tensors:
    """What a tower of patches needs to know about its images.

    Patches come merged block by merged block: the `merge * merge` patches that become one token
    stand together, tokens go by rows.

    Args:
        grids: int64 `[images, 3]`, frames, rows and columns of patches of each image.
        merge: patches on each side of a token.
        window: tokens on each side of an attention window; 0 without windows.

    Returns:
        `patch_positions` int64 `[tokens, merge * merge, 2]`, the row and column of each patch;
        `frames` int64 `[frames, longest]`, the patches of each frame, -1 behind its last. With
        windows the tower first takes the tokens in `window_order` int64 `[tokens]`; `frames` and
        `windows` int64 `[windows, most]` then hold patches in that order.
    """
    positions: list[Array] = []
    order: list[Array] = []
    windows: list[Array] = []
    frames: list[Array] = []
    tokens = ordered = 0
    for count, high, wide in grids.tolist():
        rows, columns = np.meshgrid(np.arange(high), np.arange(wide), indexing="ij")
        blocks = (high // merge, merge, wide // merge, merge)
        place = np.stack(
            [one.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for one in (rows, columns)], -1
        )
        for _ in range(count):
            positions.append(place)
            frames.append(np.arange(high * wide) + tokens * merge * merge)
            if window:
                index = np.arange(high // merge * (wide // merge)).reshape(high // merge, -1)
                for one in _windows(index, window):
                    order.append(one + tokens)
                    windows.append(np.arange(len(one) * merge * merge) + ordered * merge * merge)
                    ordered += len(one)
            tokens += high * wide // (merge * merge)
    places = np.concatenate(positions).reshape(-1, merge * merge, 2)
    layout = {"patch_positions": places, "frames": _rows(frames)}
    if window:
        layout |= {"windows": _rows(windows), "window_order": np.concatenate(order)}
    return {name: value.astype(np.int64) for name, value in layout.items()}


def _windows(index: Array, window: int) -> Iterator[Array]:
    """The tokens of each window of a frame, by rows of windows."""
    for top in range(0, index.shape[0], window):
        for left in range(0, index.shape[1], window):
            yield index[top : top + window, left : left + window].reshape(-1)


def _rows(parts: list[Array]) -> Array:
    rows = np.full((len(parts), max(map(len, parts))), -1, dtype=np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows


def rope_positions(
    ids: Sequence[int], grids: Sequence[tuple[int, int]], *, image_token: int, merge: int
) -> Array:
    """Positions of a prompt's tokens, int64 `[3, n]`: temporal, row and column.

    Text counts on; an image's tokens all stand where it begins, by their row and column, and text
    goes on after the longer of its sides.

    Args:
        ids: of a row, without padding.
        grids: rows and columns of patches, one for each run of image tokens.
        image_token: their id.
        merge: patches on each side of a token.

    Raises:
        InputError: an image token that belongs to no picture, or a picture without its tokens.
    """
    array = np.asarray(ids, dtype=np.int64)
    positions = np.empty((3, len(array)), dtype=np.int64)
    at = place = 0
    left = list(grids)
    while at < len(array):
        if array[at] != image_token:
            positions[:, at] = place
            at, place = at + 1, place + 1
            continue
        if not left:
            raise InputError("the prompt has more image tokens than its images have features.")
        rows, columns = (one // merge for one in left.pop(0))
        end = at + rows * columns
        if end > len(array) or (array[at:end] != image_token).any():
            raise InputError(
                f"an image has {rows * columns} tokens, the prompt has another number. Pass text "
                "with one placeholder for each image, or ids with as many image tokens."
            )
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[:, at:end] = place + np.stack((np.zeros_like(row), row, column))
        at, place = end, place + max(rows, columns)
    if left:
        raise InputError(f"{len(left)} images have no tokens in the prompt.")
    return positions


def block_ends(ids: Sequence[int], *, image_token: int) -> Array:
    """How far each token of a prompt sees, int64 `[n]`: to itself, or to its image's end."""
    inside = np.asarray(ids, dtype=np.int64) == image_token
    ends = np.arange(1, len(inside) + 1)
    for at in range(len(inside) - 2, -1, -1):
        if inside[at] and inside[at + 1]:
            ends[at] = ends[at + 1]
    return ends

"""Pictures and positions as the runtime computes them, against transformers' own code."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmopt_export.image_layouts import (
    _fit,
    _multiple,
    block_ends,
    image_text,
    lay_out,
    patch_layout,
    rope_positions,
    tower_inputs,
)
from mmopt_export.tasks.vision_language import image_constants
from mmopt_kernels.errors import InputError
from tests.support import tiny_vlm
from tests.support.exported_vlm import picture
from tests.support.tiny_vlm import IMAGE_TOKEN

# Upright, across, square, odd, smaller than a tile, and far from square.
SIZES = [(97, 131), (150, 64), (32, 32), (33, 31), (7, 90), (200, 17)]
LAYOUTS = {
    "smolvlm": "tiles",
    "idefics3": "tiles",
    "qwen2.5-vl": "patches",
    "gemma3": "whole",
    "llava": "whole",
    "janus": "padded",
}


@pytest.fixture(scope="module")
def constants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The constants of each family's processor."""
    found = {}
    for family, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(family)
        tiny_vlm.make_processor(family).save_pretrained(folder)
        configured = SimpleNamespace(config=tiny_vlm.FAMILIES[family][1]())
        found[family] = image_constants(configured, folder, layout, tokens=4)
    return found


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("family", LAYOUTS)
def test_pixels_equal_the_processors(
    constants: dict[str, dict[str, Any]], family: str, height: int, width: int
) -> None:
    """Also how many tiles or patches there are; Pillow on both sides, so to rounding."""
    image = picture(height, width)
    expected = tiny_vlm.make_processor(family)(images=[image], return_tensors="np")
    laid = lay_out(image, constants[family])
    actual = laid.pixels
    if LAYOUTS[family] == "patches":
        actual = actual.reshape(-1, actual.shape[2])
        assert (1, *laid.grid) == tuple(expected["image_grid_thw"][0])
    pixels = np.asarray(expected["pixel_values"]).reshape(-1, *actual.shape[1:])
    assert pixels.shape == actual.shape
    assert np.abs(pixels - actual).max() < 1e-5


@pytest.mark.parametrize("longest", [64, 80])
def test_tiles_of_any_size_are_the_processors(
    constants: dict[str, dict[str, Any]], longest: int
) -> None:
    """Where a side falls a little behind a multiple of a tile's, one more or less is at stake."""
    made = type(tiny_vlm.make_processor("smolvlm"))
    processor = made(size={"longest_edge": longest}, max_image_size={"longest_edge": 32})
    sizes = np.random.default_rng(0).integers(20, 120, (30, 2)).tolist()
    for height, width in [*sizes, (80, 54), (54, 80)]:
        image = picture(height, width)
        rows = processor(images=[image], return_tensors="np", return_row_col_info=True)
        laid = lay_out(image, {**constants["smolvlm"], "longest": longest})
        assert laid.grid == (rows["rows"][0][0], rows["cols"][0][0])


def test_a_picture_that_is_not_split_is_one_tile(constants: dict[str, dict[str, Any]]) -> None:
    processor = tiny_vlm.make_processor("smolvlm")
    processor.do_image_splitting = False
    image = picture(40, 70)
    laid = lay_out(image, {**constants["smolvlm"], "split": False})
    expected = processor(images=[image], return_tensors="np")["pixel_values"][0]
    assert laid.grid == (0, 0)
    assert laid.pixels.shape == expected.shape == (1, 3, 32, 32)
    assert np.abs(laid.pixels - expected).max() < 1e-5


@pytest.mark.parametrize("longest", [64, 1537, 5000])
def test_sides_are_those_of_the_processors_of_tiles(longest: int) -> None:
    """Also of a picture that is one pixel wide, and beyond what there may be."""
    source = import_module("transformers.models.smolvlm.image_processing_pil_smolvlm")
    sizes = np.random.default_rng(1).integers(1, 3000, (50, 2)).tolist()
    for height, width in [*sizes, (1, 2000), (6000, 1), (1, 6000), (7, 7)]:
        expected = source.get_resize_output_image_size(np.empty((height, width)), longest)
        assert _fit(height, width, longest) == expected


@pytest.mark.parametrize(("least", "most"), [(4096, 16384), (256, 2048)])
def test_sides_are_those_of_the_processors_of_patches(least: int, most: int) -> None:
    """Small pictures grow, large ones shrink, to not less than one token."""
    source = import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    generator = np.random.default_rng(2)
    sizes = [*generator.integers(8, 400, (60, 2)).tolist(), (3, 600), (600, 3), (1, 200), (8, 1000)]
    grown = shrunk = 0
    for height, width in sizes:
        expected = source.smart_resize(height, width, 8, least, most)
        found = _multiple(height, width, 8, {"least": least, "most": most})
        assert found == expected, (height, width)
        grown += found[0] * found[1] > 2 * height * width
        shrunk += found[0] * found[1] < height * width / 2
    assert grown > 0
    assert shrunk > 3


def test_a_picture_in_tiles_has_no_padding(constants: dict[str, dict[str, Any]]) -> None:
    """Every pixel of every tile counts, of two pictures in one batch."""
    pictures = [lay_out(picture(*size), constants["smolvlm"]) for size in ((20, 60), (60, 60))]
    feeds = tower_inputs(pictures, constants["smolvlm"])
    assert len(feeds["pixel_values"]) == 3 + 5
    assert (feeds["pixel_attention_mask"] == 1).all()


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_clear_is_white(constants: dict[str, dict[str, Any]], family: str) -> None:
    """Not black, nor what lies hidden under the transparency."""
    clear, white = Image.new("RGBA", (40, 60), (9, 99, 0, 0)), Image.new("RGB", (40, 60), "white")
    actual, expected = (lay_out(one, constants[family]).pixels for one in (clear, white))
    np.testing.assert_array_equal(actual, expected)


def test_a_picture_that_is_too_narrow_is_refused(constants: dict[str, dict[str, Any]]) -> None:
    """As Qwen's own processor refuses it."""
    with pytest.raises(InputError, match="at most 200 times the other"):
        lay_out(picture(1, 402), constants["qwen2.5-vl"])


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 2)])
def test_text_of_tiles_equals_the_processors(grid: tuple[int, int]) -> None:
    """What SmolVLM's processor writes for a picture."""
    source = import_module("transformers.models.smolvlm.processing_smolvlm")
    from mmopt_export.tasks.vision_language import FAMILIES

    prompt = FAMILIES["SmolVLMForConditionalGeneration"].prompt(
        tiny_vlm.make_tokenizer(), "<image>"
    )
    expected = source.get_image_prompt_string(
        *grid, 5, "<fake_token_around_image>", "<image>", "<global-img>"
    )
    assert image_text(grid, prompt, 5) == expected


# ------------------------------------------------------------------- positions


@pytest.mark.parametrize("window", [0, 2, 3])
@pytest.mark.parametrize(
    "grids",
    [[(1, 2, 2)], [(1, 4, 6)], [(1, 10, 6), (1, 2, 8), (2, 8, 8)], [(3, 6, 14), (1, 12, 12)]],
)
def test_the_layout_of_patches_equals_transformers(
    grids: list[tuple[int, int, int]], window: int
) -> None:
    """Positions, frames, and windows with their order, for images and films of any size."""
    vision = import_module("transformers.vision_utils")
    grid = torch.tensor(grids)
    layout = patch_layout(grid.numpy(), merge=2, window=window)
    expected = vision.get_vision_position_ids(grid, 2).numpy()
    np.testing.assert_array_equal(layout["patch_positions"].reshape(-1, 2), expected)
    lengths = np.diff(vision.get_vision_cu_seqlens(grid).numpy())
    _assert_rows(layout["frames"], lengths)
    if not window:
        assert set(layout) == {"patch_positions", "frames"}
        return
    order, bounds = vision.get_vision_window_index(grid, 2, window * 2 * 4, 4)
    np.testing.assert_array_equal(layout["window_order"], order.numpy())
    _assert_rows(layout["windows"], np.diff(bounds.numpy()))


def _assert_rows(rows: Any, lengths: Any) -> None:
    """Rows count on, each as long as it should be, with -1 behind."""
    np.testing.assert_array_equal((rows >= 0).sum(axis=1), lengths)
    np.testing.assert_array_equal(rows[rows >= 0], np.arange(lengths.sum()))


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen2-vl"])
def qwen(request: pytest.FixtureRequest) -> Any:
    """A model whose positions are those of images."""
    return tiny_vlm.make(request.param).model


@pytest.mark.parametrize(
    "grids", [[], [(4, 6)], [(2, 2), (10, 4)], [(2, 8), (8, 2), (4, 4)]], ids=len
)
def test_rope_positions_equal_get_rope_index(qwen: Any, grids: list[tuple[int, int]]) -> None:
    """Text before, between and after images, of two rows with padding on the left."""
    ids: list[int] = [1, 4, 5]
    for rows, columns in grids:
        ids += [IMAGE_TOKEN] * (rows * columns // 4) + [6, 7]
    expected, delta = qwen.get_rope_index(
        torch.tensor([[0] * 3 + ids]),
        mm_token_type_ids=(torch.tensor([[0] * 3 + ids]) == IMAGE_TOKEN).int(),
        image_grid_thw=torch.tensor([(1, *one) for one in grids]) if grids else None,
        attention_mask=torch.tensor([[0] * 3 + [1] * len(ids)]),
    )
    actual = rope_positions(ids, grids, image_token=IMAGE_TOKEN, merge=2)
    np.testing.assert_array_equal(actual, expected[:, 0, 3:].numpy())
    assert actual.max() + 1 - len(ids) == int(delta)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([4, IMAGE_TOKEN], [], "more image tokens"),
        ([4, IMAGE_TOKEN, 5], [(4, 4)], "an image has 4 tokens"),
        ([4, IMAGE_TOKEN, IMAGE_TOKEN], [(4, 4)], "an image has 4 tokens"),
        ([4, 5], [(4, 4)], "1 images have no tokens"),
    ],
)
def test_image_tokens_that_fit_no_picture_are_refused(
    ids: list[int], grids: list[tuple[int, int]], message: str
) -> None:
    """Positions would be wrong, and nothing would say so."""
    with pytest.raises(InputError, match=message):
        rope_positions(ids, grids, image_token=IMAGE_TOKEN, merge=2)


def test_block_ends_equal_gemmas_mask() -> None:
    """Which keys a token sees is what Gemma3's own mask function says."""
    source = import_module("transformers.models.gemma3.modeling_gemma3")
    generator = np.random.default_rng(0)
    for _ in range(20):
        ids = np.where(generator.random(17) < 0.6, IMAGE_TOKEN, 5)
        groups = source.get_block_sequence_ids_for_mask(torch.tensor(ids == IMAGE_TOKEN)[None])[0]
        groups = groups.numpy()
        keys = np.arange(17)
        causal = keys <= keys[:, None]
        block = (groups[:, None] == groups) & (groups >= 0)
        seen = keys < block_ends(ids.tolist(), image_token=IMAGE_TOKEN)[:, None]
        np.testing.assert_array_equal(seen, causal | block)

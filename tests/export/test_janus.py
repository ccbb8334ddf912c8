"""Janus both ways: text of text and images, and images of text, through one decoder."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.multimodal import (
    DECODER,
    EMBEDDING,
    GENERATION_EMBEDDING,
    GENERATION_HEAD,
    IMAGE_DECODER,
    TEXT_HEAD,
    VISION,
)
from mmopt_export.tasks import janus, make_plan
from mmopt_kernels.errors import InputError
from tests.support import tiny_vlm
from tests.support.exported_vlm import exported, picture
from tests.support.tiny_vlm import IMAGE_TOKEN

PARTS = [
    *(VISION, EMBEDDING, DECODER, TEXT_HEAD),
    *(GENERATION_HEAD, GENERATION_EMBEDDING, IMAGE_DECODER),
]
BEGIN = IMAGE_TOKEN + 1


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


@pytest.mark.slow
def test_every_part_equals_the_model_with_optimizations_and_without() -> None:
    """Seven graphs, of dynamic batch and length."""
    result = exported("janus")
    assert [part.name for part in result.plan.parts] == PARTS
    assert {(one.component, one.stage) for one in result.stages} == {
        (part, stage) for part in PARTS for stage in ("fp32-unoptimized", "fp32")
    }
    for stage in result.stages:
        assert stage.holds, stage
    for part in PARTS:
        onnx.checker.check_model(result.file(part), full_check=True)


@pytest.mark.slow
def test_tokens_of_text_and_of_images_equal_transformers() -> None:
    """Two rows of different lengths: 32 words of each, and every token of each image."""
    stages = {(one.kind, one.output): one for one in exported("janus").proof}
    assert set(stages) == {
        *((kind, "tokens") for kind in ("text", "images", "mixed", "drawing")),
        ("drawing", "pixels"),
    }
    for (kind, output), stage in stages.items():
        assert stage.gates, stage
        assert stage.holds, stage
        assert stage.note is None, stage
        if output == "tokens":
            assert stage.rows == (32 if kind == "drawing" else 64), stage
    pixels = stages["drawing", "pixels"]
    assert pixels.max_abs is not None
    assert pixels.max_abs < 1e-4


@pytest.mark.slow
def test_the_decoder_holds_its_weights_once_and_no_head() -> None:
    """Text and images go through the same graph, which has neither vocabulary."""
    result = exported("janus")
    graph = onnx.load(result.file(DECODER), load_external_data=False).graph
    vocabularies = {tiny_vlm.VOCABULARY, result.model.config.vq_config.num_embeddings}
    for tensor in graph.initializer:
        assert not vocabularies & set(tensor.dims), tensor.name
    layers = result.model.model.language_model.layers
    expected = sum(one.numel() for one in layers.parameters())
    tensors = [one for one in graph.initializer if not one.name.startswith("rotary.")]
    stored = sum(int(np.prod(one.dims)) for one in tensors)
    assert expected <= stored < 1.05 * expected


@pytest.mark.slow
def test_a_drawing_equals_generate_from_text() -> None:
    """Text gets the token that begins an image; bytes are those of the image processor."""
    result = exported("janus")
    drawing = result.generator().draw(["t4 t5 t6"])
    ids = torch.tensor([[1, 4, 5, 6, BEGIN]])
    expected = result.model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False
    )
    np.testing.assert_array_equal(drawing.tokens, expected.numpy())
    with torch.no_grad():
        pixels = result.model.decode_image_tokens(expected)
    assert np.abs(drawing.pixels - pixels.numpy()).max() < 1e-4
    # transformers' processor of Pillow takes channels first, whatever `decode_image_tokens` gives.
    planes = list(pixels.permute(0, 3, 1, 2).numpy())
    processed = tiny_vlm.make_processor("janus").postprocess(planes)["pixel_values"]
    images = np.stack([np.asarray(one).transpose(1, 2, 0) for one in processed])
    assert drawing.images.shape == images.shape
    # Truncated to bytes, so a difference of rounding may be one step.
    assert np.abs(drawing.images.astype(int) - images.astype(int)).max() <= 1


@pytest.mark.slow
def test_guidance_and_words_decide_what_is_drawn() -> None:
    """Otherwise equal tokens would prove nothing of the second row of each prompt."""
    generator = exported("janus").generator()
    prompts = [[1, 4, 5, 6, BEGIN], [1, 40, 50, 60, 70, BEGIN]]
    own = generator.draw(prompts).tokens
    assert (own[0] != own[1]).any()
    assert (own != generator.draw(prompts, guidance=1.0).tokens).any()
    np.testing.assert_array_equal(own, generator.draw(prompts, guidance=3.0).tokens)
    np.testing.assert_array_equal(own[:1], generator.draw(prompts[:1]).tokens)


@pytest.mark.slow
def test_guidance_below_one_is_refused() -> None:
    """It would draw what the words do not say."""
    with pytest.raises(InputError, match=r"guidance is 0\.5, expected 1 or more"):
        exported("janus").generator().draw(["t4"], guidance=0.5)
    with pytest.raises(InputError, match="no prompts"):
        exported("janus").generator().draw([])


@pytest.mark.slow
def test_a_string_is_no_list_of_prompts() -> None:
    with pytest.raises(InputError, match="prompts is the string 't4'"):
        exported("janus").generator().draw("t4")


def test_an_image_is_understood() -> None:
    """Another picture gives other words; placeholders become all of an image's tokens."""
    generator = exported("janus").generator()
    prompts = ["t4 <image> t6"] * 2
    pictures = [[picture(40, 70)], [picture(40, 70, seed=1)]]
    first, second = generator.generate(prompts, pictures, max_new_tokens=24, eos=()).tokens
    assert first != second
    ids = [1, 4, BEGIN, *[IMAGE_TOKEN] * 16, IMAGE_TOKEN + 2, 6]
    assert generator.generate([ids], pictures[:1], max_new_tokens=24, eos=()).tokens == [first]


# ------------------------------------------------------------------- refusals


def test_a_model_whose_settings_lack_the_beginning_of_an_image_is_refused(tmp_path: Path) -> None:
    """transformers itself would fail in the middle of drawing."""
    shutil.copytree(exported("janus").source, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    settings = json.loads(file.read_text())
    del settings["generation_kwargs"]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"has None for generation_kwargs\.boi_token_id"):
        make_plan(load_checkpoint(str(tmp_path)))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    """`--task any-to-any` of a model that does not draw."""
    tiny_vlm.save("smolvlm", tmp_path)
    with pytest.raises(InputError, match="SmolVLMForConditionalGeneration cannot be exported"):
        janus.plan(load_checkpoint(str(tmp_path)), None)


@pytest.mark.parametrize("token", [5, 6], ids=["equal", "near-tie"])
def test_a_drawing_of_nan_fails_whatever_its_tokens(token: int) -> None:
    drawn = janus._Drawn([[1]], [[5]], [[(3.0, 3.0)]], np.zeros((1, 2, 2, 3), np.float32))
    for pixel, held in ((np.nan, [True, False]), (0.0, [True, True] if token == 5 else [True])):
        drawing = SimpleNamespace(tokens=np.array([[token]]), pixels=drawn.pixels + pixel)
        generator: Any = SimpleNamespace(draw=lambda rows, drawing=drawing: drawing)
        stages = janus._drawing_stages(generator, drawn, "fp32")
        assert [stage.holds for stage in stages] == held

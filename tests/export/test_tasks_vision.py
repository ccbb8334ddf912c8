"""Image encoders, held against PyTorch from the bytes of a picture on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmopt_export import Runner, export, load_checkpoint
from mmopt_export.preprocessing import open_image, process_images
from mmopt_export.tasks import make_plan
from mmopt_kernels.errors import InputError
from tiny_encoders import picture, save_vision_encoder

pytest.importorskip("PIL", reason="image processors need Pillow")

# By family the head and how many tokens or pixels of a state there are.
FAST = (("ViT", "ForImageClassification"), ("Dinov2", "Model"), ("SiglipVision", "Model"))
SLOW = (
    *(("DeiT", "ForImageClassification"), ("Swin", "ForImageClassification")),
    *(("Dinov2WithRegisters", "ForImageClassification"), ("CLIPVision", "ModelWithProjection")),
)
ENCODERS = [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
CONVOLUTIONAL = [
    ("ResNet", "ForImageClassification"),
    pytest.param("ConvNext", "ForImageClassification", marks=pytest.mark.slow),
    pytest.param("ConvNextV2", "Model", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


def outputs_of(folder: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    with torch.no_grad():
        result = model(torch.from_numpy(pixels))
    return {name: np.asarray(value) for name, value in result.items() if torch.is_tensor(value)}


def file_of(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int) -> list[bytes]:
    from PIL import Image

    return [
        file_of(Image.fromarray(picture(50 + 21 * index, 80, seed=index))) for index in range(count)
    ]


def save_lines(folder: Path, count: int) -> Path:
    """Pictures with a line each, in a folder beside the file."""
    (folder / "images").mkdir()
    lines = []
    for index, data in enumerate(pictures(count)):
        (folder / "images" / f"{index}.png").write_bytes(data)
        lines.append(json.dumps({"image": f"images/{index}.png", "text": f"a graph {index}"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


@pytest.mark.parametrize(("family", "head"), ENCODERS)
def test_an_encoder_gives_pytorchs_outputs_from_the_bytes_of_pictures(
    family: str, head: str, tmp_path: Path
) -> None:
    import transformers
    from PIL import Image

    model = save_vision_encoder(tmp_path / "model", family, head)
    data = save_lines(tmp_path, 5)
    report = export(str(model), tmp_path / "out", precision="fp32", calibration=data)
    assert report.exit_code == 0
    assert {stage.kind for stage in report.stages} == {"grid", "image"}
    assert all(stage.holds for stage in report.stages)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    runner = Runner(tmp_path / "out")
    shape = runner.manifest.inputs[0].shape
    assert (shape[0], shape[1]) == ("batch", 3)
    assert all(isinstance(side, int) for side in shape[2:])
    constants = runner.manifest.preprocessing["image"]
    images = [open_image(one) for one in pictures(3)]
    got = runner.run({"pixel_values": process_images(images, constants)})
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    opened = [Image.open(io.BytesIO(one)) for one in pictures(3)]
    pixels = np.asarray(processor(images=opened, return_tensors="np")["pixel_values"])
    expected = outputs_of(model, pixels)
    classifies = "Classification" in head
    assert runner.manifest.task == (
        "image-classification" if classifies else "image-feature-extraction"
    )
    assert len(runner.manifest.labels) == (3 if classifies else 0)
    for name, value in got.items():
        # One step of uint8 in a few pixels is what the two may differ by.
        np.testing.assert_allclose(value, expected[name], atol=0.05)
        same = runner.run({"pixel_values": pixels})[name]
        np.testing.assert_allclose(same, expected[name], atol=5e-5)
        assert np.ptp(expected[name], axis=0).max() > 0.05


@pytest.mark.parametrize(("family", "head"), CONVOLUTIONAL)
def test_a_convolutional_model_takes_pictures_of_any_size(
    family: str, head: str, tmp_path: Path
) -> None:
    model = save_vision_encoder(tmp_path / "model", family, head)
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 0
    assert all(stage.holds for stage in report.stages)
    runner = Runner(tmp_path / "out")
    assert runner.manifest.inputs[0].shape == ("batch", 3, "height", "width")
    generator = np.random.default_rng(0)
    for size in ((1, 64, 64), (2, 75, 130), (3, 224, 67)):
        pixels = generator.standard_normal((size[0], 3, *size[1:]), np.float32)
        expected = outputs_of(model, pixels)
        for name, value in runner.run({"pixel_values": pixels}).items():
            scale = max(1.0, float(np.sqrt(np.mean(np.square(expected[name])))))
            np.testing.assert_allclose(value, expected[name], atol=1e-4 * scale)


def test_pictures_of_another_size_than_the_models_are_refused(tmp_path: Path) -> None:
    model = save_vision_encoder(tmp_path / "model", "ViT", "Model")
    path = model / "preprocessor_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "size": {"height": 24, "width": 24}}))
    with pytest.raises(InputError, match="ViTModel does not take the 24 x 24 pixels that its"):
        export(str(model), tmp_path / "out", precision="fp32")
    path.write_text(json.dumps({**document, "size": {"shortest_edge": 32}}))
    with pytest.raises(InputError, match="ViTModel gives pictures of any size, expected one size"):
        export(str(model), tmp_path / "out", precision="fp32")
    path.unlink()
    with pytest.raises(InputError, match="has no image processor"):
        export(str(model), tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_pictures_of_calibration_have_the_labels_of_their_lines(tmp_path: Path) -> None:
    model = save_vision_encoder(tmp_path / "model", "ViT", "ForImageClassification")
    data = save_lines(tmp_path, 2)
    first, second = map(json.loads, data.read_text().splitlines())
    data.write_text(json.dumps({**first, "label": "method"}) + "\n" + json.dumps(second))
    (part,) = make_plan(load_checkpoint(str(model)), calibration=data).parts
    labels = [sample.labels for sample in part.sampled() if sample.kind == "image"]
    assert [one["logits"].tolist() for one in labels] == [[2, -1]]
    data.write_text(json.dumps({**first, "label": "module"}))
    with pytest.raises(InputError, match="line 1: the model has no label 'module', expected one"):
        make_plan(load_checkpoint(str(model)), calibration=data)


def test_calibration_data_without_pictures_is_refused_with_its_line(
    tmp_path: Path, texts: Path
) -> None:
    model = save_vision_encoder(tmp_path / "model", "ViT", "ForImageClassification")
    with pytest.raises(InputError, match='line 1: expected an object with a string "image"'):
        export(str(model), tmp_path / "out", calibration=texts)
    assert not (tmp_path / "out").exists()

"""CLIP and SigLIP as two towers, held against the whole model's scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmopt_export import ExportReport, Runner, export
from mmopt_export.parity import StageParity
from mmopt_export.preprocessing import open_image, process_images
from mmopt_kernels.errors import InputError
from tiny_encoders import picture, save_dual_encoder

pytest.importorskip("PIL", reason="image processors need Pillow")
from PIL import Image

TEXTS = ["a graph", "the sum of two numbers", "x", "class method function node"]


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


@pytest.fixture(scope="module", params=["CLIP", pytest.param("Siglip", marks=pytest.mark.slow)])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, ExportReport]:
    """A model, its artifact and the report on it, with pictures and texts as data."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_dual_encoder(folder / "model", request.param)
    lines = []
    for index, text in enumerate(TEXTS):
        Image.fromarray(picture(40 + index, 60, seed=index)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "text": text}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    report = export(str(model), folder / "out", precision="fp32", calibration=folder / "data.jsonl")
    return model, folder / "out", report


def scores_of(runner: Runner, feeds: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Scores per image from the artifact alone."""
    texts = runner.run(feeds, "text")["embeddings"]
    images = runner.run({"pixel_values": pixels}, "vision")["embeddings"]
    for rows in (texts, images):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-5)
    constants = runner.manifest.preprocessing["scores"]
    return np.asarray(constants["scale"] * images @ texts.T + constants["bias"])


def test_both_towers_and_their_scores_hold(exported: tuple[Path, Path, ExportReport]) -> None:
    _, _, report = exported
    assert report.exit_code == 0
    held: set[tuple[str, str, str]] = set()
    for stage in report.stages:
        assert isinstance(stage, StageParity)
        assert stage.holds
        held.add((stage.component, stage.stage, stage.kind))
    assert {("text", "fp32", "grid"), ("text", "fp32", "text")} <= held
    assert {("vision", "fp32", "grid"), ("vision", "fp32", "image")} <= held
    assert ("model", "scores", "grid") in held


def test_scores_of_texts_and_pictures_are_the_models(
    exported: tuple[Path, Path, ExportReport],
) -> None:
    import transformers

    folder, artifact, _ = exported
    runner = Runner(artifact)
    constants = runner.manifest.preprocessing["image"]
    pixels = process_images(
        [open_image(artifact.parent / f"{index}.png") for index in range(3)], constants
    )
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    siglip = type(model).__name__ == "SiglipModel"
    feeds = tokenizer(
        TEXTS, padding="max_length" if siglip else True, max_length=16, return_tensors="np"
    )
    feeds = {name: feeds[name].astype(np.int64) for name in tokenizer.model_input_names}
    with torch.no_grad():
        expected = model(
            pixel_values=torch.from_numpy(pixels),
            **{name: torch.from_numpy(value) for name, value in feeds.items()},
        ).logits_per_image.numpy()
    tokens = runner.tokenize(TEXTS, "text")
    assert set(tokens) == ({"input_ids"} if siglip else {"input_ids", "attention_mask"})
    for name, value in tokens.items():
        np.testing.assert_array_equal(value, feeds[name])
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(scores_of(runner, tokens, pixels), expected, atol=1e-4)


def test_a_text_scores_alone_as_in_a_batch(exported: tuple[Path, Path, ExportReport]) -> None:
    _, artifact, _ = exported
    runner = Runner(artifact)
    together = runner.run(runner.tokenize(TEXTS, "text"), "text")["embeddings"]
    for index, text in enumerate(TEXTS):
        alone = runner.run(runner.tokenize([text], "text"), "text")["embeddings"]
        np.testing.assert_allclose(alone[0], together[index], atol=1e-5)


def test_each_tower_has_its_own_weights_and_no_others(
    exported: tuple[Path, Path, ExportReport],
) -> None:
    import onnx

    _, artifact, _ = exported
    for tower, other in (("text", "vision_model"), ("vision", "text_model")):
        graph = onnx.load(artifact / tower / "model.onnx", load_external_data=False).graph
        names = [weight.name for weight in graph.initializer]
        assert names
        assert not [name for name in names if other in name]


@pytest.mark.slow
def test_scores_that_differ_from_the_models_fail_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SiglipModel

    model = save_dual_encoder(tmp_path / "model", "Siglip")
    forward = SiglipModel.forward

    def shifted(self: SiglipModel, **inputs: torch.Tensor) -> object:
        result = forward(self, **inputs)
        result.logits_per_image = result.logits_per_image + 0.01
        return result

    monkeypatch.setattr(SiglipModel, "forward", shifted)
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 1
    assert [stage.stage for stage in report.stages if not stage.holds] == ["scores"]


def test_data_without_a_text_or_a_picture_is_refused_with_its_line(tmp_path: Path) -> None:
    model = save_dual_encoder(tmp_path / "model", "CLIP")
    Image.fromarray(picture(9, 9)).save(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    for line, column in (('{"text": "a"}', "image"), ('{"image": "a.png"}', "text")):
        data.write_text('{"image": "a.png", "text": "a"}\n' + line)
        with pytest.raises(
            InputError, match=f'line 2: expected an object with a string "{column}"'
        ):
            export(str(model), tmp_path / "out", calibration=data)

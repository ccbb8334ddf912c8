"""Adapters as inputs of several graphs: each graph takes those of the layers that it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from mmopt_export import (
    MultimodalGenerator,
    Runner,
    TextGenerator,
    Transcriber,
    export,
    read_manifest,
    verify,
)
from mmopt_kernels.errors import InputError
from peft_oracle import unmerged
from tests.support import exported_vlm, tiny_vlm
from tiny_adapters import save_peft
from tiny_encoders import save_dual_encoder
from tiny_seq2seq import save_seq2seq

pytest.importorskip("PIL", reason="image processors need Pillow")


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Runner]:
    """CLIP, adapters of both towers and of the text tower alone, and the artifact."""
    folder = tmp_path_factory.mktemp("towers")
    model = save_dual_encoder(folder / "model", "CLIP")
    adapters = [
        save_peft(model, folder / name, LoraConfig(target_modules=targets), seed=seed)
        for seed, (name, targets) in enumerate({"both": ["v_proj"], "text": "text.*q_proj"}.items())
    ]
    output = folder / "out"
    assert export(str(model), output, adapters=list(map(str, adapters)), swap=True).exit_code == 0
    return model, adapters, Runner(output)


def random_images(runner: Runner, count: int) -> np.ndarray:
    shape = runner.manifest.components["vision"].inputs[0].shape[1:]
    values: np.ndarray = np.random.default_rng(0).standard_normal((count, *shape))
    return values.astype(np.float32)


def test_two_towers_take_the_adapters_of_their_own_layers(
    towers: tuple[Path, list[Path], Runner],
) -> None:
    """Held against PEFT's own model."""
    model, adapters, runner = towers
    assert runner.manifest.adapters == {
        name: {graph: f"adapters/{graph}/{name}.onnx_adapter" for graph in ("text", "vision")}
        for name in ("both", "text")
    }
    ids, images = runner.tokenize(["the sum of two numbers"], "text"), random_images(runner, 2)
    for adapter in adapters:
        oracle = unmerged(model, adapter).get_base_model()
        with torch.no_grad():
            outputs = oracle(
                pixel_values=torch.from_numpy(images).double(),
                **{name: torch.from_numpy(value) for name, value in ids.items()},
            )
        for graph, feeds, expected in (
            ("text", ids, outputs.text_embeds),
            ("vision", {"pixel_values": images}, outputs.image_embeds),
        ):
            found = runner.run(feeds, graph, adapter=adapter.name)["embeddings"]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
            plain = runner.run(feeds, graph)["embeddings"]
            changed = (adapter.name, graph) != ("text", "vision")
            assert (np.abs(found - plain).max() > 1e-3) == changed


def test_rows_of_a_batch_each_get_their_adapter(towers: tuple[Path, list[Path], Runner]) -> None:
    """One run for each adapter that is asked for, and rows come back in their order."""
    _, _, runner = towers
    feeds = {"pixel_values": random_images(runner, 5)}
    wanted = ["both", None, "text", "both", None]
    found = runner.run(feeds, "vision", adapter=wanted)["embeddings"]
    for row, name in enumerate(wanted):
        alone = runner.run(feeds, "vision", adapter=name)["embeddings"][row]
        np.testing.assert_allclose(found[row], alone, atol=1e-6)
    assert np.abs(found - runner.run(feeds, "vision")["embeddings"]).max() > 1e-3
    for names, message in (
        (["both"], "pixel_values has 5 rows and 1 adapters are given"),
        ([], "pixel_values has 5 rows and 0 adapters are given"),
        (["none"] * 5, "no adapter 'none', expected one of: both, text"),
    ):
        with pytest.raises(InputError, match=message):
            runner.run(feeds, "vision", adapter=names)


def test_feeds_are_those_of_the_graph_and_unknown_names_are_refused(
    towers: tuple[Path, list[Path], Runner],
) -> None:
    _, _, runner = towers
    assert runner.adapter_feeds(None, "text") == {}
    images = {"pixel_values": random_images(runner, 2)}
    given = runner.adapter_feeds("both", "vision")
    found = runner.session("vision").run(None, {**images, **given})[0]
    expected = runner.run(images, "vision", adapter="both")["embeddings"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for name in ("none", ["both"]):
        with pytest.raises(InputError, match=r"there is no adapter .*none|both.*, expected one of"):
            runner.adapter_feeds(name, "text")  # type: ignore[arg-type]


def t5(folder: Path) -> Any:
    return save_seq2seq(folder, "t5")


def whisper(folder: Path) -> Any:
    return save_seq2seq(folder, "whisper")


def smolvlm(folder: Path) -> Any:
    return tiny_vlm.save("smolvlm", folder)


def qwen(folder: Path) -> Any:
    """Positions are an input of its decoder already."""
    return tiny_vlm.save("qwen2.5-vl", folder)


def said(artifact: Path, adapter: str | None = None) -> Any:
    """What the model of an artifact generates, by the class that is for it."""
    components = read_manifest(artifact).components
    if "vision" in components:
        generator = MultimodalGenerator.open(artifact)
        placeholder = generator.preprocessing["prompt"]["placeholder"]
        prompts = [f"t4 {placeholder} t5", "t6 t7 t8"]
        pictures = [[exported_vlm.picture(40, 70)], []]
        answer = generator.generate(prompts, pictures, max_new_tokens=16, eos=(), adapter=adapter)
        return answer.tokens
    if "audio" in read_manifest(artifact).preprocessing:
        sound = 0.4 * np.sin(np.arange(4000) * 0.05)
        return Transcriber(artifact).transcribe([sound], max_new_tokens=16, adapter=adapter)
    texts = ["translate this", "the quick brown fox"]
    return TextGenerator(artifact).generate(texts, max_new_tokens=16, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "targets", "graphs"),
    [
        (t5, ["q", "v"], ("decoder", "encoder")),
        (t5, r"encoder.*\.q", ("encoder",)),
        (whisper, ["q_proj", "v_proj"], ("decoder", "encoder")),
        (smolvlm, ["q_proj"], ("decoder", "vision")),
        (smolvlm, "model.vision_model.*q_proj", ("vision",)),
        (qwen, ["qkv", "q_proj"], ("decoder", "vision")),
    ],
    ids=["t5", "t5-encoder", "whisper", "smolvlm", "smolvlm-vision", "qwen"],
)
def test_graphs_take_the_adapters_of_the_layers_they_run(
    save: Callable[[Path], Any], targets: Any, graphs: tuple[str, ...], tmp_path: Path
) -> None:
    """Every graph is held against PyTorch without the adapter and with it; what is generated with
    it is what an artifact says that has it merged."""
    save(tmp_path / "model")
    adapter = save_peft(tmp_path / "model", tmp_path / "a", LoraConfig(target_modules=targets))
    report = export(
        str(tmp_path / "model"),
        tmp_path / "out",
        adapters=[str(adapter)],
        swap=True,
        precision="fp32",
    )
    assert report.exit_code == 0
    assert verify(tmp_path / "out").exit_code == 0
    runner = Runner(tmp_path / "out")
    manifest = runner.manifest
    assert tuple(sorted(manifest.adapters["a"])) == graphs
    for name, component in manifest.components.items():
        taken = [spec.name for spec in component.inputs if "_lora_" in spec.name]
        assert bool(taken) == (name in graphs)
    merged = tmp_path / "merged"
    export(str(tmp_path / "model"), merged, adapters=[str(adapter)], precision="fp32")
    found = said(tmp_path / "out", "a")
    assert found == said(merged)
    assert found != said(tmp_path / "out")
    with pytest.raises(InputError, match="there is no adapter 'b', expected one of: a"):
        said(tmp_path / "out", "b")
    with pytest.raises(InputError, match=r"takes no adapters\. Export the model with --adapters"):
        said(merged, "a")

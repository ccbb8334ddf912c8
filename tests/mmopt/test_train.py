"""A recipe is checked whole, a run leaves a complete adapter or nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mmopt.train import read_recipe, run_recipe
from mmopt.train.trainer import _reads_number_of_items
from mmopt_export import load_checkpoint
from mmopt_kernels.errors import CheckFailedError, InputError


@pytest.fixture
def recipe(classifier: Path, texts: Path, tmp_path: Path) -> Path:
    """A recipe of a few steps on the tiny classifier."""
    document: dict[str, Any] = {
        "model": str(classifier),
        "task": "text-classification",
        "data": {"train": str(texts), "test": str(texts), "max_length": 16},
        "output": str(tmp_path / "adapter"),
        "adapter": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
        "training": {"epochs": 12, "batch_size": 8, "learning_rate": 0.02},
        "compile": False,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_run_learns_and_saves_what_export_can_load(
    recipe: Path, classifier: Path, texts: Path, tmp_path: Path
) -> None:
    """The label is the first word of each text: a working run must learn it."""
    report = run_recipe(read_recipe(recipe))
    assert report.test_accuracy > 0.9
    assert report.attached > 0
    output = tmp_path / "adapter"
    record = json.loads((output / "mmopt-train.json").read_text())
    assert record["result"]["test_accuracy"] == report.test_accuracy
    assert "adapter_model.safetensors" in record["files"]

    checkpoint = load_checkpoint(str(classifier), adapters=[str(output)])
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    batch = checkpoint.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = checkpoint.model(**batch).logits.argmax(-1)
    names = checkpoint.model.config.id2label
    right = [names[int(i)] == row["label"] for i, row in zip(predicted, rows, strict=True)]
    assert sum(right) / len(right) == report.test_accuracy


def test_every_text_of_the_test_counts(recipe: Path, tmp_path: Path) -> None:
    """One text is less than a batch, which training would drop."""
    data = tmp_path / "test.jsonl"
    row = read_recipe(recipe).data.test.read_text().splitlines()[0]
    data.write_text(row + "\n")
    report = run_recipe(read_recipe(recipe, [f"data.test={data}", "training.epochs=0.5"]))
    assert report.test_examples == 1
    assert report.test_accuracy in (0, 1)


def test_only_a_loss_that_reads_the_number_of_labels_is_given_it() -> None:
    """Trainer then leaves the mean over micro-batches to the loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss

    assert _reads_number_of_items(ForCausalLMLoss)
    assert not _reads_number_of_items(ForSequenceClassificationLoss)
    assert not _reads_number_of_items(None)


def test_optimized_and_plain_runs_reach_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = []
    for name, optimize in (("on", "true"), ("off", "false")):
        output = tmp_path / name
        overrides = [f"output={output}", f"optimize={optimize}", "training.epochs=1"]
        # Dropout draws differ in order between the two; without it the runs are comparable.
        overrides += ["config.hidden_dropout_prob=0.0"]
        run_recipe(read_recipe(recipe, overrides))
        weights.append(load_file(output / "adapter_model.safetensors"))
    on, off = weights
    assert on.keys() == off.keys()
    for key in on:
        torch.testing.assert_close(on[key], off[key], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_compiled_step_is_one_graph_and_learns(recipe: Path) -> None:
    report = run_recipe(read_recipe(recipe, ["compile=true"]))
    assert report.recompiles == 0
    assert report.test_accuracy > 0.9


def test_every_fault_of_a_recipe_is_named_at_once(recipe: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_recipe(recipe, ["training.epochs=-1", "adapter.rnak=8", "task=poetry"])
    message = str(caught.value)
    assert "training.epochs" in message
    assert "adapter.rnak" in message
    assert "task" in message
    assert "text-classification" in message


@pytest.mark.parametrize("number", [".inf", ".nan"])
@pytest.mark.parametrize(
    "key", ["training.learning_rate", "adapter.alpha", "config.initializer_range"]
)
def test_a_number_of_a_recipe_that_is_not_finite_is_refused(
    recipe: Path, key: str, number: str
) -> None:
    with pytest.raises(InputError, match="finite number"):
        read_recipe(recipe, [f"{key}={number}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "expected key=value"),
        ("model.name=x", "model is not a section"),
        ("model=[", "not valid YAML"),
        ("output=2026-02-30", "not valid YAML"),
        ("training.seed=" + "1" * 5000, "not valid YAML"),
        ("model=" + "[" * 5000, "not valid YAML"),
    ],
    ids=["no-value", "no-section", "open", "no-such-day", "digits", "deep"],
)
def test_a_malformed_set_says_what_is_expected(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(recipe, [override])


@pytest.mark.parametrize(
    "text", ["model: [", "- model", "output: 2026-02-30", "model: " + "[" * 5000, b"model: \xff"]
)
def test_a_recipe_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"recipe\.yaml (is not valid YAML|holds no mapping)"):
        read_recipe(path)
    with pytest.raises(InputError, match=r"other\.yaml does not exist, expected a YAML recipe"):
        read_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("data.max_length", 1, 0),
        ("adapter.rank", 1, 0),
        ("adapter.alpha", 0.1, 0),
        ("adapter.dropout", 0, -0.1),
        ("adapter.dropout", 0.9, 1),
        ("training.epochs", 0.1, 0),
        ("training.batch_size", 1, 0),
        ("training.learning_rate", 0.1, 0),
        ("training.weight_decay", 0, -0.1),
        ("training.warmup", 0, -0.1),
        ("training.warmup", 0.9, 1),
        ("training.seed", 0, -1),
        ("training.seed", 2**32 - 1, 2**32),
    ],
)
def test_the_bounds_of_a_recipe(recipe: Path, key: str, inside: float, outside: float) -> None:
    section, _, name = key.partition(".")
    assert getattr(getattr(read_recipe(recipe, [f"{key}={inside}"]), section), name) == inside
    with pytest.raises(InputError, match=rf"{key}: Input should be (greater|less) than"):
        read_recipe(recipe, [f"{key}={outside}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=/no/such/model", "does not exist"),
        ("data.train=/no/such.jsonl", "does not exist, expected a JSON Lines file"),
        ("data.label=kind", 'expected a "kind"'),
        ("adapter.targets=[qery]", "no module called qery"),
        ("adapter.targets=qery.*", "'qery.*' .* cannot be used .* No modules were targeted"),
        ("adapter.targets=(", "cannot be used .* unterminated"),
        ("adapter.targets=[]", "cannot be used .* No modules were targeted"),
        ("adapter.targets=[LayerNorm]", "cannot be used .* LayerNorm.* is not supported"),
        ("adapter.train_whole=[bert]", r"train_whole \['bert'\] cannot be used"),
        ("adapter.train_whole=[layer]", r"train_whole \['layer'\] cannot be used"),
        ("config.no_such_setting=1", "config.no_such_setting is not a setting of BertConfig"),
        ("config.hidden_act=nope", "no BertForSequenceClassification can be built .*nope"),
        ("config.hidden_size=wide", "expected int, got str"),
        ("training.batch_size=64", "expected at least one batch of 64"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    recipe: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_recipe(read_recipe(recipe, [override]))
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def decoder(classifier: Path, tmp_path: Path) -> Path:
    """A model folder of a tiny Llama whose config has no padding token."""
    folder = tmp_path / "decoder"
    shutil.copytree(classifier, folder)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_decoder_takes_the_padding_token_of_its_tokenizer(
    recipe: Path, decoder: Path, tmp_path: Path
) -> None:
    overrides = [f"model={decoder}", "adapter.targets=all-linear", "training.epochs=1"]
    run_recipe(read_recipe(recipe, overrides))
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    assert saved.pad_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_a_padding_token_is_refused(recipe: Path, decoder: Path) -> None:
    path = decoder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no padding token"):
        run_recipe(read_recipe(recipe, [f"model={decoder}"]))


def test_a_model_without_a_tokenizer_is_refused(recipe: Path, decoder: Path) -> None:
    for path in decoder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"decoder has no tokenizer\. Save one beside it"):
        run_recipe(read_recipe(recipe, [f"model={decoder}"]))


def test_texts_of_one_label_are_refused(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text('{"text": "a", "label": "one"}\n' * 8)
    with pytest.raises(InputError, match=r"same\.jsonl has 1 label, expected two or more"):
        run_recipe(read_recipe(recipe, [f"data.train={data}", f"data.test={data}"]))


def test_an_output_that_is_not_empty_is_refused_first(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        run_recipe(read_recipe(recipe, ["model=/no/such/model", "data.train=/no/such.jsonl"]))


def test_a_test_label_that_was_never_trained_is_named(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text('{"text": "a", "label": "module"}\n')
    with pytest.raises(InputError, match="'module'"):
        run_recipe(read_recipe(recipe, [f"data.test={data}"]))


def test_an_adapter_without_gradient_fails_loudly(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def detached(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            hidden = self.bert(kwargs["input_ids"], attention_mask=kwargs["attention_mask"])
        logits = self.classifier(hidden.pooler_output)
        output = forward(self, *args, **kwargs)
        output.loss = torch.nn.functional.cross_entropy(logits, kwargs["labels"])
        return output

    monkeypatch.setattr(BertForSequenceClassification, "forward", detached)
    with pytest.raises(
        CheckFailedError, match=r"adapters got no gradient, first .*query \(default\)"
    ):
        run_recipe(read_recipe(recipe))
    assert not (tmp_path / "adapter").exists()


def test_a_run_that_diverges_names_the_weight_and_leaves_no_adapter(
    recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckFailedError, match=r"query\.lora_A\.default\.weight holds NaN or Inf"):
        run_recipe(read_recipe(recipe, ["training.learning_rate=1e+38", "training.epochs=2"]))
    assert not (tmp_path / "adapter").exists()

"""What the options of an export make of a small decoder and a small classifier."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig
from rich.console import Console

import mmopt_export.pipeline
from mmopt_export import (
    AdapterSpec,
    Generator,
    Runner,
    export,
    load_checkpoint,
    read_manifest,
    verify,
)
from mmopt_export.checkpoint import weights_sha256
from mmopt_export.files import same_artifact
from mmopt_export.parity import GENERATED, read_samples, write_parity
from mmopt_export.quantization import blockwise, read_options
from mmopt_export.tasks import make_plan
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError
from tiny_adapters import save_peft
from tiny_artifacts import seal, watch_weights
from tiny_decoders import on_4_bit_grid, tiny_decoder
from tiny_models import save_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 4]]
TOKENS = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny_decoder("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ("the sum of two numbers", "a graph", "return the class of a node")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def decoder(llama: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("decoder") / "fp32"
    assert export(str(llama), output, calibration=prompts).exit_code == 0
    return output


@pytest.fixture(scope="module")
def again(
    llama: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The same export a second time, and the weights that were there as its graph was opened."""
    output = tmp_path_factory.mktemp("again") / "fp32"
    with pytest.MonkeyPatch.context() as patch:
        held = watch_weights(patch)
        export(str(llama), output, calibration=prompts)
    return output, held


def save_lora(model: Path, folder: Path, *, rank: int) -> Path:
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return save_peft(model, folder, config, seed=rank)


def generated(runner: Runner, adapter: str | None = None) -> list[list[int]]:
    generator = Generator.open(runner)
    return generator.generate(PROMPTS, max_new_tokens=TOKENS, adapter=adapter).tokens


def expected(model: Any) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        with torch.no_grad():
            found = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
            )
        rows.append(found[0, len(prompt) :].tolist())
    return rows


def test_a_decoder_is_one_graph_that_generates_what_transformers_does(
    llama: Path, decoder: Path
) -> None:
    manifest = read_manifest(decoder)
    assert manifest.task == "text-generation"
    assert list(manifest.components) == ["model"]
    assert manifest.preprocessing["eos_token_ids"] == [2]
    assert generated(Runner(decoder)) == expected(load_checkpoint(str(llama)).model)


def test_a_decoder_is_held_on_real_prompts_and_on_greedy_tokens(decoder: Path) -> None:
    stages = json.loads((decoder / "parity.json").read_text())["stages"]
    kinds = {stage["kind"] for stage in stages if stage["stage"] == "fp32"}
    assert "text" in kinds
    assert len(kinds) > 5
    (greedy,) = [stage for stage in stages if stage["output"] == "tokens"]
    assert greedy["gates"]
    assert greedy["holds"]
    assert greedy["rows"] >= 32


def test_a_decoder_is_found_sound_by_verify_and_by_onnx(decoder: Path) -> None:
    """Verify generates again what the export compared, without torch."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from mmopt_export import verify\n"
        f"report = verify(Path({str(decoder)!r}))\n"
        "report = report.to_dict() | {'torch': 'torch' in sys.modules}\n"
        "print(json.dumps(report))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    report = json.loads(result.stdout or result.stderr)
    assert (report["holds"], report["torch"]) == (True, False)
    exported = json.loads((decoder / "parity.json").read_text())["stages"]
    (first, second) = (
        [stage for stage in stages if stage["output"] == "tokens"]
        for stages in (exported, report["stages"])
    )
    assert first == second != []
    onnx.checker.check_model(str(decoder / "model.onnx"), full_check=True)


def test_verify_finds_that_other_tokens_are_generated(decoder: Path, tmp_path: Path) -> None:
    """One token of one row is another: every other stage holds."""
    copy = tmp_path / "copy"
    shutil.copytree(decoder, copy)
    samples = read_samples(copy)
    (stored,) = [sample for sample in samples if sample.kind == GENERATED]
    best = stored.expected["best"].copy()
    best[1, 5, :2] = best[1, 5, 1::-1].copy()
    stored.expected["best"] = best
    write_parity(copy, [], samples)
    seal(copy)
    report = verify(copy)
    assert report.exit_code == 1
    (wrong,) = [stage for stage in report.stages if not stage.holds]
    assert (wrong.stage, wrong.gates) == ("greedy", True)
    assert wrong.note is not None
    assert "row 1 step 5 gives" in wrong.note


def test_two_exports_of_a_decoder_are_byte_identical(
    decoder: Path, again: tuple[Path, list[int]]
) -> None:
    assert same_artifact(decoder, again[0]) == []


def test_the_decoder_is_let_go_before_its_graph_is_opened(again: tuple[Path, list[int]]) -> None:
    assert again[1] == [0]


def test_adapters_are_chosen_per_run_over_a_4_bit_base(llama: Path, tmp_path: Path) -> None:
    a, b = (save_lora(llama, tmp_path / name, rank=rank) for name, rank in (("a", 2), ("b", 5)))
    # int4 of random weights is far from them: the adapters are what is looked at.
    export(
        str(llama),
        tmp_path / "out",
        adapters=[str(a), AdapterSpec(str(b), 0.5)],
        swap=True,
        precision="int4",
        allow_drift=True,
    )
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    runner = Runner(tmp_path / "out")
    assert runner.adapters().names == ("a", "b")
    recorded = [
        (record["name"], record["path"], record["sha256"], record["weight"], record["rank"])
        for record in runner.manifest.source.adapters
    ]
    assert recorded == [
        ("a", str(a), weights_sha256(a), 1.0, 2),
        ("b", str(b), weights_sha256(b), 0.5, 5),
    ]
    assert f"- adapter: {b}" in (tmp_path / "out" / "README.md").read_text()
    ops = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert "MatMulNBits" in ops
    answers = [generated(runner, name) for name in (None, "a", "b")]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    with pytest.raises(InputError, match="'c'"):
        generated(runner, "c")
    with pytest.raises(InputError, match="model has a cache and takes one adapter for all rows"):
        runner.run({}, adapter=["a", "b"])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"algorithm": "gptq"}, id="gptq"),
        pytest.param({"algorithm": "hqq", "symmetric": False}, id="hqq", marks=pytest.mark.slow),
        pytest.param({"embeddings": False}, id="embeddings"),
    ],
)
def test_weights_become_integers_as_options_say(
    llama: Path,
    prompts: Path,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blockwise, "_MIN_TABLE", 1)
    report = export(
        str(llama),
        tmp_path / "out",
        precision="int4",
        options={"block": 16, **options},
        calibration=prompts,
        allow_drift=True,  # int4 of random weights is far from them
    )
    assert report.exit_code == 0
    record = read_manifest(tmp_path / "out").components["model"].quantization
    assert record is not None
    recipe = record["recipe"]
    assert {name: recipe[name] for name in options} == options
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    blocks = {
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "block_size"
    }
    assert blocks == {16}
    assert bool(record["embeddings"]["tables"]) is recipe["embeddings"]


@pytest.mark.slow
def test_weights_that_4_bits_hold_come_out_as_they_are(tmp_path: Path) -> None:
    """Integers, scales and their layout: with float activations nothing else is left to be off."""
    on_4_bit_grid(tiny_decoder("llama")).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    report = export(
        str(tmp_path / "model"),
        tmp_path / "out",
        precision="int4",
        options={"accuracy_level": 0, "symmetric": True},
    )
    errors = [stage.max_abs for stage in report.stages if stage.stage in ("int4", "greedy")]
    assert len(errors) > 1
    assert all(error is not None and error < 1e-4 for error in errors)
    (tokens,) = (stage for stage in report.stages if stage.output == "tokens")
    assert tokens.argmax_agreement == 1


def test_an_option_that_nothing_heeds_is_refused(
    llama: Path, classifier: Path, tmp_path: Path
) -> None:
    for model, options, message in (
        (llama, {"calibration": "entropy"}, "--set calibration is for .* method static"),
        (classifier, {"block": 16}, "--set block is for the quantization of method weights"),
        (llama, {"bits": 4}, "the option bits is not one of: accuracy_level, algorithm"),
        (llama, {"block": 5}, "a recipe has block 5, expected one of: 16, 32"),
        (llama, {"embeddings": "yes"}, "a recipe has embeddings 'yes', expected one of: True"),
        (llama, {"algorithm": "hqq"}, "goes with symmetric=False only"),
    ):
        with pytest.raises(InputError, match=message):
            export(str(model), tmp_path / "out", precision="int8", options=options)
        assert list(tmp_path.iterdir()) == []


def test_an_option_that_nests_too_deep_is_a_word() -> None:
    word = "[" * 100_000
    assert read_options([f"algorithm={word}"]) == {"algorithm": word}


def test_options_are_read_from_words() -> None:
    words = ["block=64", "symmetric=false", "algorithm=hqq"]
    assert read_options(words) == {"block": 64, "symmetric": False, "algorithm": "hqq"}
    for word in ("block", "bits=4", "=4"):
        with pytest.raises(InputError, match=f"--set {word}: expected key=value with one of"):
            read_options([word])


@pytest.mark.slow
def test_swapped_adapters_give_what_peft_gives(llama: Path, tmp_path: Path) -> None:
    adapter = save_lora(llama, tmp_path / "a", rank=3)
    export(str(llama), tmp_path / "out", adapters=[str(adapter)], swap=True)
    runner = Runner(tmp_path / "out")
    assert generated(runner, "a") == expected(
        load_checkpoint(str(llama), adapters=[str(adapter)]).model
    )
    assert generated(runner) == expected(load_checkpoint(str(llama)).model)


@pytest.mark.slow
def test_auto_takes_the_narrowest_that_meets_the_budget(
    llama: Path, prompts: Path, tmp_path: Path
) -> None:
    strict = export(
        str(llama), tmp_path / "strict", precision="auto", max_drop=1e-7, calibration=prompts
    )
    assert strict.precision == "fp32"
    loose = export(
        str(llama), tmp_path / "loose", precision="auto", max_drop=0.1, calibration=prompts
    )
    assert loose.precision in ("int8", "int4")
    record = loose.quantization["model"]
    assert record is not None
    assert record["auto"]["met"]
    assert record["auto"]["measure"] == "relative output error"
    chosen = [trial for trial in record["auto"]["trials"] if trial["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["metric_drop"] <= 0.1


@pytest.mark.slow
def test_auto_takes_nothing_that_parity_refuses(llama: Path, tmp_path: Path) -> None:
    """A budget of 1 keeps 4 bits of random weights, whose cosine is too small."""
    report = export(str(llama), tmp_path / "out", precision="auto", max_drop=1)
    assert report.status == "verified"
    record = report.quantization["model"]
    assert record is not None
    assert record["auto"]["trials"][0]["parity"] is False


@pytest.mark.slow
def test_two_exports_with_auto_are_byte_identical_and_report_the_time(
    classifier: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / parent / "out" for parent in "ab"]
    reports = [export(str(classifier), output, precision="auto") for output in outputs]
    assert same_artifact(*outputs) == []
    for report in reports:
        record = report.quantization["model"]
        assert record is not None
        assert all(trial["milliseconds"] > 0 for trial in record["auto"]["trials"])
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(report.render())
        assert re.search(r"auto of model: int8, .* MB, .* ms a batch, loses", console.export_text())


def test_a_target_that_is_not_here_is_refused_or_marked(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmopt_export.pipeline, "has_provider", lambda provider: False)
    with pytest.raises(MmoptError, match="no CUDAExecutionProvider") as caught:
        export(str(classifier), tmp_path / "out", target="cuda")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    report = export(str(classifier), tmp_path / "out", target="cuda", unproven=True)
    assert report.exit_code == 0
    assert (report.status, report.precision) == ("unproven", "fp16")
    assert read_manifest(tmp_path / "out").provider == "CUDAExecutionProvider"
    with pytest.raises(CheckFailedError, match="never run on CUDAExecutionProvider"):
        Runner(tmp_path / "out")


def test_bf16_is_refused_before_anything_is_read_where_nothing_can_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmopt_export.pipeline, "has_provider", lambda provider: False)
    with pytest.raises(InputError, match="bf16 needs CUDAExecutionProvider") as caught:
        export("nowhere", tmp_path / "out", target="cuda", precision="bf16", unproven=True)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_nothing_but_an_artifact(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(InputError, match="mine"):
        export(str(classifier), tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


def test_the_output_may_not_be_the_model(classifier: Path) -> None:
    before = sorted(path.name for path in classifier.iterdir())
    for output in (classifier, classifier / "out"):
        with pytest.raises(InputError, match="is read"):
            export(str(classifier), output, force=True)
    assert sorted(path.name for path in classifier.iterdir()) == before


def test_the_card_says_what_it_is_and_what_was_measured(decoder: Path) -> None:
    card = (decoder / "README.md").read_text()
    assert "LlamaForCausalLM for text-generation, fp32" in card
    assert "| in | input_ids | int64 | batch, sequence |" in card
    assert "| model | fp32 | text | logits |" in card
    assert "Parity with the PyTorch model holds." in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "translation"}, "--task translation is not known"),
        ({"task": "image-classification"}, "cannot be exported for image-classification"),
        ({"precision": "int4"}, "not available for a model of kind encoder on cpu"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    classifier: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(str(classifier), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_long_calibration_texts_are_cut_where_a_decoders_positions_end(
    llama: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "a b " * 300}) + "\n")
    (part,) = make_plan(load_checkpoint(str(llama)), calibration=data).parts
    widths = [feeds["input_ids"].shape[1] for kind, feeds in part.samples() if kind == "text"]
    assert widths == [96]


def test_calibration_without_the_column_is_refused_with_its_line(
    classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n{"label": "class"}\n')
    with pytest.raises(InputError, match="line 2"):
        export(str(classifier), tmp_path / "out", calibration=data)
    assert not (tmp_path / "out").exists()


def test_calibration_with_a_label_that_the_model_has_not_is_refused_with_its_line(
    classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "class"}\n{"text": "a", "label": "module"}\n')
    message = "line 2: the model has no label 'module', expected one of: class, function, method"
    with pytest.raises(InputError, match=message):
        export(str(classifier), tmp_path / "out", calibration=data)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accuracy_is_measured_where_calibration_has_labels(
    classifier: Path, texts: Path, tmp_path: Path
) -> None:
    report = export(str(classifier), tmp_path / "out", calibration=texts)
    (stage,) = [one for one in report.stages if one.stage == "fp32" and one.kind == "text"]
    assert stage.accuracy == stage.expected_accuracy
    labels = np.array([json.loads(line)["label"] for line in texts.read_text().splitlines()])
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    runner = Runner(tmp_path / "out")
    winners = np.array(runner.manifest.labels)[runner.classify(rows).argmax(1)]
    assert stage.accuracy == pytest.approx((winners == labels).mean())

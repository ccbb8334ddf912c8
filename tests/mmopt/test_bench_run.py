"""`mmopt bench run`: what it measures, what it reports, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mmopt.cli.bench import bench_app
from mmopt.measure import bench
from mmopt.measure.bench import GridPoint, bench_run, parse_grid
from mmopt_export.pipeline import export
from mmopt_kernels.errors import InputError, MmoptError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POINT = GridPoint(batch=2, length=8)

app = typer.Typer()
app.add_typer(bench_app, name="bench")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved two-layer BERT classifier with random weights and a vocabulary of 40."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = [*SPECIAL, *(f"word{i}" for i in range(35))]
    words = Tokenizer(WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter of the checkpoint."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    base = BertForSequenceClassification.from_pretrained(checkpoint)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def artifact(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint, exported."""
    folder = tmp_path_factory.mktemp("artifact") / "onnx"
    assert export(checkpoint, folder).exit_code == 0
    return str(folder)


def test_every_fitting_backend_is_measured_at_every_point(checkpoint: str, artifact: str) -> None:
    grid = parse_grid(["batch=1,2", "length=8"])
    report = bench_run([checkpoint, artifact], grid=grid, rounds=3)
    variants = [(m.source, m.backend, m.batch, m.length) for m in report.measurements]
    assert variants == [
        (source, backend, batch, 8)
        for batch in (1, 2)
        for source, backend in (
            (checkpoint, "eager"),
            (checkpoint, "compile"),
            (checkpoint, "mmopt"),
            (artifact, "ort"),
        )
    ]
    for measurement in report.measurements:
        assert len(measurement.samples) == 3
        assert all(sample > 0 for sample in measurement.samples)
        assert measurement.interval.low <= measurement.median <= measurement.interval.high
        assert measurement.throughput == measurement.batch / measurement.median
        assert measurement.p95 is None  # three samples do not make one
        assert measurement.memory is None  # not asked for
    assert report.exit_code == 0


def test_every_backend_gets_the_same_ids_and_computes_the_same_logits(
    checkpoint: str, artifact: str
) -> None:
    variants = bench._open(checkpoint, ["eager", "compile", "mmopt"], None)
    variants += bench._open(artifact, ["ort"], None)
    ids = bench._token_ids(POINT, vocabulary=40, seed=1)
    expected = variants[0].prepare(ids)().logits
    for variant in variants[1:]:
        answer = variant.prepare(ids)()
        logits = torch.from_numpy(answer["logits"]) if variant.backend == "ort" else answer.logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_token_ids_depend_on_the_seed_and_stay_in_the_vocabulary() -> None:
    one, again, other = (bench._token_ids(GridPoint(8, 64), 40, seed) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert one.min() >= 0
    assert one.max() == 39


def test_an_adapter_rides_on_the_checkpoint_unmerged(checkpoint: str, adapter: str) -> None:
    (variant,) = bench._open(checkpoint, ["eager"], adapter)
    assert variant.longest == 32
    report = bench_run([checkpoint], backends=["eager"], grid=[POINT], rounds=2, adapter=adapter)
    assert report.to_dict()["adapter"] == adapter


def test_memory_is_the_peak_of_a_process_that_loaded_and_ran_the_variant(checkpoint: str) -> None:
    report = bench_run([checkpoint], backends=["eager"], grid=[POINT], rounds=2, memory=True)
    peak = report.measurements[0].memory
    assert peak is not None
    assert peak.process_bytes is not None
    assert peak.process_before_bytes is not None
    assert peak.process_bytes > peak.process_before_bytes
    assert report.to_dict()["measurements"][0]["memory"]["process_bytes"] == peak.process_bytes


def test_the_command_prints_one_document_and_writes_the_same_to_a_file(
    artifact: str, tmp_path: Path
) -> None:
    written = tmp_path / "bench.json"
    arguments = ["bench", "run", artifact, "--grid", "batch=1", "--grid", "length=8"]
    arguments += ["--rounds", "2", "--json", "-o", str(written)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document == json.loads(written.read_text())
    assert document["fingerprint"]["onnxruntime"]
    (measurement,) = document["measurements"]
    assert (measurement["backend"], len(measurement["samples_seconds"])) == ("ort", 2)
    assert list(tmp_path.iterdir()) == [written]  # no staging file is left


def test_the_table_names_backend_grid_point_and_machine(artifact: str) -> None:
    arguments = ["bench", "run", artifact, "--grid", "batch=2", "--grid", "length=8"]
    ran = CliRunner().invoke(app, [*arguments, "--rounds", "2"], env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.output
    for word in ("ort", "median", "95% CI", "seq/s", "onnxruntime", "it needs 130 samples"):
        assert word in ran.stdout


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["size=1"], "expected batch=... or length=..."),
        (["batch"], "expected batch=... or length=..."),
        (["batch=1,two"], "'1,two' is no list of whole numbers above 0"),
        (["batch=0"], "'0' is no list of whole numbers above 0"),
        (["length="], "'' is no list of whole numbers above 0"),
        (["batch=1", "batch=2"], "batch was given before"),
    ],
)
def test_malformed_grid_error_quotes_the_axis(axes: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_grid(axes)
    assert said in str(caught.value)
    assert axes[-1] in str(caught.value)
    assert "Pass --grid batch=1,8 --grid length=16,128." in str(caught.value)


def test_grid_is_every_combination_and_axes_not_given_keep_their_default() -> None:
    assert parse_grid(["length=4,2", "batch=3"]) == (GridPoint(3, 4), GridPoint(3, 2))
    assert parse_grid([]) == bench.DEFAULT_GRID
    assert {point.batch for point in parse_grid(["length=4"])} == {1, 8}


def test_unknown_backend_error_lists_the_known_ones(checkpoint: str) -> None:
    with pytest.raises(InputError, match=r"--backends tpu: unknown.*eager,compile,mmopt,ort"):
        bench_run([checkpoint], backends=["eager", "tpu"])


def test_backend_that_fits_no_model_is_named(checkpoint: str, artifact: str) -> None:
    with pytest.raises(InputError, match=r"none of them runs .*onnx, which is an artifact.*ort"):
        bench_run([artifact], backends=["eager"])
    with pytest.raises(InputError, match=r"--backends ort: no model given fits.*an artifact"):
        bench_run([checkpoint], backends=["eager", "ort"])


def test_length_beyond_the_model_is_refused_before_anything_runs(
    checkpoint: str, artifact: str
) -> None:
    for source in (checkpoint, artifact):
        with pytest.raises(InputError, match=r"--grid length=64: .* takes at most 32 tokens"):
            bench_run([source], grid=[GridPoint(1, 64)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere/model"], "/nowhere/model does not exist"),
        (["a", "a"], "a was given twice"),
        (["a", "--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["a", "-o", "/nowhere/b.json"], "the folder /nowhere does not exist"),
        (["a", "-o", "/tmp"], "-o /tmp is a folder, expected a file"),
    ],
)
def test_bad_input_exits_2_with_one_message(arguments: list[str], said: str) -> None:
    ran = CliRunner().invoke(app, ["bench", "run", *arguments, "--json"])
    assert ran.exit_code == 2
    assert said in json.loads(ran.stdout)["error"]["message"]


def test_adapter_without_a_checkpoint_is_refused(artifact: str, adapter: str) -> None:
    with pytest.raises(InputError, match="they carry their adapters already"):
        bench_run([artifact], adapter=adapter)


def test_a_backend_that_cannot_run_is_an_error_not_a_number(
    artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(bench, "time_variants", lambda *_, **__: broken())
    with pytest.raises(MmoptError, match=r"batch 2, 8 tokens could not run .not enough memory"):
        bench_run([artifact], grid=[POINT], rounds=2)

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
from mmopt.measure import bench, timing
from mmopt.measure.bench import GridPoint, bench_run, parse_grid
from mmopt.measure.timers import TIMERS
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_every_call_gets_other_ids_and_all_variants_the_same_sets(
    artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as the vocabulary has, so that its rows do not stay in the caches."""
    sets = bench._rotation(POINT, vocabulary=40, seed=0)
    assert len(sets) == 3  # 16 tokens each
    assert len({ids.tobytes() for ids in sets}) == 3
    assert (sets[0] == bench._token_ids(POINT, 40, seed=0)).all()
    assert len(bench._rotation(GridPoint(1, 1), vocabulary=10**6, seed=0)) == bench.MOST_INPUTS
    assert len(bench._rotation(GridPoint(8, 64), vocabulary=40, seed=0)) == 2

    fed: list[bytes] = []
    run = bench.Runner.run

    def recording(self: object, feeds: dict[str, object]) -> object:
        fed.append(feeds["input_ids"].tobytes())  # type: ignore[attr-defined]
        return run(self, feeds)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.Runner, "run", recording)
    bench_run([artifact], grid=[POINT], rounds=2)
    turns = [ids.tobytes() for ids in sets]
    assert fed == [turns[index % 3] for index in range(len(fed))]


@pytest.mark.slow
def test_memory_is_the_peak_of_a_process_that_loaded_and_ran_the_variant(
    checkpoint: str, artifact: str
) -> None:
    report = bench_run(
        [checkpoint, artifact], backends=["eager", "ort"], grid=[POINT], rounds=2, memory=True
    )
    peak, of_artifact = (measurement.memory for measurement in report.measurements)
    assert of_artifact is not None
    assert of_artifact.tensor_bytes is None
    # ONNX Runtime before 1.32 records neither.
    assert (of_artifact.ort_arena_bytes is None) == (of_artifact.ort_in_use_bytes is None)
    assert peak is not None
    assert peak.process_bytes is not None
    assert peak.process_before_bytes is not None
    assert peak.process_bytes > peak.process_before_bytes
    assert (peak.torch_allocated_bytes, peak.device_bytes, peak.ort_arena_bytes) == (None,) * 3
    # At the least the widest activation, of 2 x 8 tokens and 64 features in float32.
    assert peak.tensor_bytes is not None
    assert peak.tensor_bytes >= 2 * 8 * 64 * 4
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
    for word in ("ort", "median", "95% CI", "seq/s", "onnxruntime", "No p95: "):
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


def test_timer_device_and_conditions_are_in_the_report(artifact: str) -> None:
    document = bench_run([artifact], grid=[POINT], rounds=2).to_dict()
    assert (document["device"], document["timer"]) == ("cpu", "wall")
    assert document["conditions"]["seconds"] > 0
    assert document["measurements"][0]["timer"] == "wall"


def test_cold_caches_are_swept_before_every_sample(
    artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[None] = []
    monkeypatch.setattr(timing, "CacheSweep", lambda: lambda: swept.append(None))
    report = bench_run([artifact], grid=[POINT], rounds=3, timer="wall-cold-cache")
    (measurement,) = report.measurements
    assert (measurement.timer, measurement.calls) == ("wall-cold-cache", 1)
    assert len(swept) >= 3


def test_instructions_are_kept_where_they_can_be_counted(
    artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((900, 100, 500))
    monkeypatch.setattr(bench, "instructions_available", lambda: None)
    monkeypatch.setattr(bench, "count_instructions", lambda call: (call(), next(counts))[1])
    report = bench_run([artifact], grid=[POINT], rounds=2)
    assert report.measurements[0].instructions == 500
    monkeypatch.setattr(bench, "instructions_available", lambda: "not here")
    assert bench_run([artifact], grid=[POINT], rounds=2).measurements[0].instructions is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "--device tpu: unknown, expected one of: cpu, cuda"),
        ({"timer": "sundial"}, "--timer sundial: on cpu expected one of: wall, wall-cold-cache"),
        ({"timer": "kernel-only"}, "It is a timer of --device cuda"),
        ({"device": "cuda", "timer": "wall"}, "on cuda expected one of: host-inclusive"),
    ],
)
def test_unknown_device_or_timer_is_refused_before_a_model_is_loaded(
    options: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        bench_run(["/nowhere/model"], **options)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_an_artifact_cannot_be_measured_on_a_gpu(artifact: str) -> None:
    with pytest.raises(InputError, match=r"--device cuda: .*onnx is an artifact.*without --device"):
        bench_run([artifact], device="cuda")


def test_a_gpu_that_is_not_there_is_an_error_of_exit_code_3(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MmoptError, match="nothing can be timed on a GPU") as caught:
        bench_run([checkpoint], device="cuda")
    assert caught.value.exit_code == 3


@pytest.mark.gpu
@pytest.mark.parametrize("timer", TIMERS["cuda"])
def test_a_checkpoint_is_measured_on_the_gpu(checkpoint: str, timer: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    report = bench_run(
        [checkpoint],
        backends=["eager"],
        grid=[POINT],
        rounds=3,
        device="cuda",
        timer=timer,
        memory=True,
    )
    (measurement,) = report.measurements
    assert measurement.timer == timer
    assert all(sample > 0 for sample in measurement.samples)
    assert measurement.memory is not None
    assert measurement.memory.torch_allocated_bytes is not None


def test_a_backend_that_cannot_run_is_an_error_not_a_number(
    artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(bench, "time_variants", lambda *_, **__: broken())
    with pytest.raises(MmoptError, match=r"batch 2, 8 tokens could not run .not enough memory"):
        bench_run([artifact], grid=[POINT], rounds=2)

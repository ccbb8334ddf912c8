"""`mmopt compile`: one report, in text and JSON, and the right exit code."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers as hf
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers.models.bert.modeling_bert import BertPooler
from typer.testing import CliRunner

import mmopt
from mmopt.cli.compile import compile_command
from mmopt.cli.output import command
from mmopt.compilation import (
    CompileReport,
    GraphBreak,
    Recompile,
    compile_checkpoint,
    device,
)
from mmopt.compilation.inputs import Contents
from mmopt.compilation.parity import Parity
from mmopt.compilation.report import ATTACHED, COMPILED, EAGER, Variant
from mmopt.measure import timing
from mmopt_kernels.errors import InputError, MmoptError
from tiny_models import LABELS, save_tokenizer

VARIANTS = {EAGER, COMPILED, ATTACHED}


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not asked for here; graphs of earlier tests count towards Dynamo's limit."""
    monkeypatch.setattr(timing, "WARM_UP_MOST_SECONDS", 0.01)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of one layer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=70,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = hf.BertForSequenceClassification(config)
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    return folder / "model", adapted(model, folder / "adapter", ["query", "value"])


def adapted(model: Any, folder: Path, targets: list[str] | str) -> Path:
    whole = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder of one layer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    return folder / "model", adapted(model, folder / "adapter", "all-linear")


def run(model: Path, *arguments: object, rounds: int = 2) -> Any:
    app = typer.Typer()
    app.command()(command(compile_command))
    sizes = ("--batch", 2, "--length", 8, "--rounds", rounds)
    given = [model, *(() if "--batch" in arguments else sizes), *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in given])


def document(result: Any, exit_code: int = 0) -> Any:
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def flat(text: str) -> str:
    return " ".join(text.split())


# --- what is reported -----------------------------------------------------------------------------


@pytest.mark.usefixtures("without_inductor")
def test_one_json_document_has_every_figure_with_its_unit(bert: tuple[Path, Path]) -> None:
    """Attached, one graph at two lengths, equal; three variants, measured in turns."""
    model, adapter = bert
    found = document(run(model, "--adapter", adapter, "--json", rounds=3))
    assert found["optimization"]["attached"] == 3
    assert found["graph_breaks"] == found["recompiles"] == found["dead_adapters"] == []
    assert [(group["group"], group["holds"]) for group in found["parity"]] == [
        ("outputs", True),
        ("outputs, other length", True),
    ]
    assert (found["holds"], found["worst"], found["loss"]) == (True, None, None)
    assert [shape["input_ids"] for shape in found["shapes"]] == [[2, 8], [2, 5]]
    assert (found["dtype"], found["timer"], found["data"]) == ("float32", "wall", None)
    assert found["step_tokens"] == 8 + 6

    assert set(found["seconds"]) == VARIANTS
    for name, figures in found["seconds"].items():
        assert len(figures["samples"]) == 3
        assert found["tokens_per_second"][name] == pytest.approx(14 / figures["median"])
        assert found["step_peak_bytes"][name] > 0
        ratio = found["ratio_to_torch_compile"][name]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["ratio_to_torch_compile"][COMPILED] == {"median": 1, "low": 1, "high": 1}
    assert found["images_per_second"][EAGER] is None
    assert found["first_call_seconds"][EAGER] is None
    assert all(found["first_call_seconds"][name] > 0 for name in (COMPILED, ATTACHED))


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_training_on_own_examples_compares_gradients_and_shows_tables(
    bert: tuple[Path, Path], texts: Path
) -> None:
    """The loss is the classifier's own, on labels from the file."""
    model, adapter = bert
    result = run(model, "--adapter", adapter, "--mode", "train", "--data", texts)
    assert result.exit_code == 0, result.output
    shown = flat(result.stdout)
    for part in (
        "0 graph breaks",
        "loss: match eager",
        "gradients: match eager; worst of 4 is",
        "gradients, other length: match eager",
        "forward + backward, float32",
        "labels 2",
        "tokens/s",
        "peak MB",
        "first call s",
    ):
        assert part in shown
    assert "images/s" not in shown


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_half_precision_is_held_against_float32_of_the_same_weights(
    bert: tuple[Path, Path],
) -> None:
    """What mmopt is off may be twice what eager in that dtype is off; both are reported."""
    model, adapter = bert
    found = document(run(model, "--adapter", adapter, "--dtype", "bfloat16", "--json"))
    assert found["dtype"] == "bfloat16"
    assert found["optimization"]["attached"] == 3
    for group in found["parity"]:
        assert group["error"] <= group["tolerance"]
        assert group["tolerance"] >= 2 * max(group["eager_error"], 2**-7)
        assert 0 < group["eager_error"] < 0.1


def report(**changes: Any) -> CompileReport:
    """What a run that holds would give."""
    shapes = {"pixel_values": (2, 3, 16, 16)}
    plain: dict[str, Any] = {
        "model": "m",
        "mode": "infer",
        "dtype": "float32",
        "device": "2 CPU threads",
        "batch": 2,
        "length": 8,
        "data": None,
        "shapes": (shapes, shapes),
        "contents": Contents(images=2),
        "loss": None,
        "optimization": mmopt.OptimizationReport(rows=()),
        "graph_breaks": (),
        "recompiles": (),
        "parity": (Parity("outputs", 1, "logits", 1e-6),),
        "dead_adapters": (),
        "variants": {
            EAGER: Variant([0.5, 0.5, 5.0], None, 3_000_000),
            COMPILED: Variant([0.4, 0.4, 4.0], 9.5, 2_000_000),
            ATTACHED: Variant([0.2, 0.2, 2.0], 8.5, 1_000_000),
        },
        "timer": "wall",
    }
    return CompileReport(**{**plain, **changes})


def shown(of: CompileReport) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(of.render())
    return flat(console.export_text())


def test_rates_are_of_what_the_batch_holds() -> None:
    """Images here; what the model does not read is null, and has no column."""
    found = report().to_dict()
    assert found["images_per_second"] == {EAGER: 4.0, COMPILED: 5.0, ATTACHED: 10.0}
    assert set(found["tokens_per_second"].values()) == {None}
    assert found["step_images"] == 2
    assert "images/s" in shown(report())
    assert "tokens/s" not in shown(report())
    spoken = report(contents=Contents(audio_seconds=3.0))
    assert spoken.to_dict()["audio_seconds_per_second"][ATTACHED] == pytest.approx(15.0)
    assert "│ 10.0 │" not in shown(spoken)
    assert "0.500x (0.500 to 0.500)" in shown(report())
    assert "│ 1.0 │ 8.5 │" in shown(report())


def test_any_fault_makes_the_exit_code_1_and_is_shown() -> None:
    """A break, a recompile, an adapter without a gradient, a tensor that is off."""
    place = GraphBreak("/x.py", 3, "a reason [with brackets]")
    again = Recompile("/x.py", 4, "0/0: size")
    off = Parity("loss", 1, "loss", 0.5)
    lost = Parity("gradients", 7, "a.weight", None)
    assert report().exit_code == 0
    for changes, said in (
        ({"graph_breaks": (place,)}, "1 graph break /x.py:3: a reason [with brackets]"),
        ({"recompiles": (again,)}, "1 recompile /x.py:4: 0/0: size"),
        ({"dead_adapters": ("q (default)",)}, "1 adapters got NO GRADIENT: q (default)"),
        ({"parity": (off,)}, "loss: DO NOT MATCH eager; worst of 1 is loss: 5.0e-01"),
        ({"parity": (lost,)}, "worst of 7 is a.weight: not finite or missing"),
    ):
        assert report(**changes).exit_code == 1
        assert report(**changes).to_dict()["holds"] is False
        assert said in shown(report(**changes))
    assert report(parity=(off, lost)).to_dict()["worst"] == {"group": "loss", "tensor": "loss"}


def test_remedies_are_shown_when_asked_for() -> None:
    place = GraphBreak("/x.py", 3, "Dynamic shape operator")
    asked = report(graph_breaks=(place,), explained=True)
    assert "number of results depends" in shown(asked)
    assert "Pass --explain" not in shown(asked)
    assert "number of results" in asked.to_dict()["graph_breaks"][0]["remedy"]
    plain = report(graph_breaks=(place,))
    assert "Pass --explain" in shown(plain)
    assert set(plain.to_dict()["graph_breaks"][0]) == {"file", "line", "reason"}


def test_the_ratio_is_taken_round_by_round() -> None:
    """A slow round slows both; the ratio of their medians would show it as a difference."""
    base = Variant([1.0, 1.0, 10.0, 10.0, 1.0], None, 0)
    head = Variant([0.9, 0.9, 9.0, 9.0, 9.0], None, 0)
    ratio, interval = head.ratio_to(base)
    assert ratio == pytest.approx(0.9)
    assert interval.low == pytest.approx(0.9)


# --- what does not hold ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_unequal_results_exit_1_name_the_worst_tensor_and_store_nothing(
    bert: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The verdict comes from the numbers."""
    monkeypatch.setattr(
        "mmopt.compilation.checkpoint.tensors_of",
        lambda output: {"logits": output.logits + torch.rand(()) * 10},
    )
    found = document(run(bert[0], "-o", tmp_path / "store", "--json"), 1)
    assert found["worst"] == {"group": "outputs", "tensor": "logits"}
    assert found["holds"] is False
    assert found["store"] is found["store_sha256"] is None
    assert not any(tmp_path.iterdir())
    shown = run(bert[0], "-o", tmp_path / "store")
    assert "NOT STORED" in shown.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_an_adapter_that_does_not_train_exits_1_with_its_name(
    classifier: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off the graph, it computes what eager does and learns nothing."""

    def cut(model: Any) -> mmopt.OptimizationReport:
        for name, layer in model.named_modules():
            if name.endswith("0.attention.self.query"):
                forward: Callable[[Any], Any] = layer.forward
                layer.forward = lambda x, forward=forward: forward(x).detach()
        return mmopt.OptimizationReport(rows=())

    monkeypatch.setattr("mmopt.compilation.checkpoint.optimize", cut)
    found = document(run(classifier, "--adapter", adapter, "--mode", "train", "--json"), 1)
    (dead,) = found["dead_adapters"]
    assert dead.endswith("0.attention.self.query (default)")
    assert found["worst"]["group"] == "gradients"


def broken_pooler(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    first = hidden_states[:, 0]
    scale = first.abs().max().item()  # the deliberate break
    return self.activation(self.dense(first / scale))


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_break_exits_1_and_is_explained(
    bert: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and line, the code there, and the remedy."""
    monkeypatch.setattr(BertPooler, "forward", broken_pooler)
    result = run(bert[0], "--explain")
    assert result.exit_code == 1
    assert f"{Path(__file__).name}:" in flat(result.stdout)
    assert "in broken_pooler: scale = first.abs().max().item()" in flat(result.stdout)
    assert "remedy: A tensor's value becomes a Python number" in flat(result.stdout)


# --- what cannot be used --------------------------------------------------------------------------


def test_bad_input_exits_2_with_one_message(classifier: Path, tmp_path: Path) -> None:
    """The same in JSON; no traceback."""
    found = document(run(tmp_path, "--json"), 2)
    assert found["exit_code"] == 2
    assert "no config.json" in found["error"]["message"]
    assert run(classifier, "--batch", 1).exit_code == 2
    for option in ("--mode", "--dtype", "--device"):
        assert run(classifier, option, "other").exit_code == 2
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a graph"}\n{"text": "a", "colour": 1}\n')
    found = document(run(classifier, "--data", data, "--json"), 2)
    assert "rows.jsonl, line 2: unknown field" in found["error"]["message"]
    assert "Traceback" not in run(classifier, "--data", tmp_path / "none.jsonl").output
    result = run(classifier, "--batch", 2, "--length", 100)
    assert result.exit_code == 2
    assert "the length is 100, expected 2 to 64" in flat(result.output)


def test_options_of_the_library_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"the batch is 1, expected at least 2"):
        compile_checkpoint("/no/such/model", batch=1)
    with pytest.raises(InputError, match=r"the length is 1, expected at least 2"):
        compile_checkpoint("/no/such/model", length=1)
    with pytest.raises(InputError, match=r"the mode is 'fast', expected 'train' or 'infer'"):
        compile_checkpoint("/no/such/model", mode="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the dtype is 'int4', expected one of: float32, bfl"):
        compile_checkpoint("/no/such/model", dtype="int4")
    with pytest.raises(InputError, match=r"the device is 'tpu', expected one of: auto, cpu, cuda"):
        compile_checkpoint("/no/such/model", device="tpu")


def test_a_checkpoint_of_another_kind_is_refused(classifier: Path, tmp_path: Path) -> None:
    """A class that transformers has, and that is no model."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Trainer"]}))
    found = document(run(tmp_path, "--json"), 2)
    assert "names the architecture 'Trainer', which is no model" in found["error"]["message"]


def test_a_batch_that_the_model_rejects_is_bad_input(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmopt.compilation.checkpoint.example_batch",
        lambda *_, **__: {"input_ids": torch.full((2, 8), 10_000)},
    )
    found = document(run(classifier, "--json"), 2)
    assert "rejects the example batch (input_ids (2, 8)): IndexError" in found["error"]["message"]


# --- devices --------------------------------------------------------------------------------------


def test_cuda_without_a_gpu_could_not_run(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message and exit 3, before anything is loaded; auto takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = document(run(classifier, "--device", "cuda", "--json"), 3)
    assert found["exit_code"] == 3
    said = found["error"]["message"]
    assert said.startswith("no CUDA GPU is usable here: torch ")
    assert said.endswith("pass --device cpu.")
    assert device.pick_device("auto") == torch.device("cpu")


def test_a_gpu_that_fails_when_used_is_no_usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees it, and its first kernel does not run: too old, or its driver is."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(MmoptError, match=r"first operation on it failed \(CUDA error: no kernel"):
        device.pick_device("cuda")
    assert device.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    assert device.pick_device("auto") == torch.device("cuda")


def test_peak_memory_on_a_gpu_is_counted_from_what_the_weights_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A first step fills workspaces; the peak is reset between it and the one that counts."""
    seen: list[str] = []
    for name, answer in (
        ("synchronize", None),
        ("memory_allocated", 1000),
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 5000),
    ):

        def noted(_device: object, name: str = name, answer: Any = answer) -> Any:
            seen.append(name)
            return answer

        monkeypatch.setattr(torch.cuda, name, noted)
    peak = device.step_peak_bytes(lambda: seen.append("step"), torch.device("cuda"))
    assert peak == 4000
    assert seen == [
        *("step", "synchronize", "memory_allocated", "reset_peak_memory_stats"),
        *("step", "synchronize", "max_memory_allocated"),
    ]


def test_a_gpu_is_timed_with_its_own_timer_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    timer = SimpleNamespace(name="host-inclusive")
    monkeypatch.setattr(device, "gpu_timer", lambda name: asked.append(name) or timer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    assert device.timer_for(torch.device("cuda")) is timer
    assert asked == ["host-inclusive"]
    assert device.timer_for(torch.device("cpu")).name == "wall"
    assert device.describe(torch.device("cuda")) == "A GPU"
    assert device.describe(torch.device("cpu")).endswith(("CPU thread", "CPU threads"))


def test_too_little_memory_on_a_gpu_could_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message that says what to lower, exit 3."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    with (
        pytest.raises(MmoptError, match=r"memory of A GPU does not suffice: .*--batch") as caught,
        device.memory_shortage_said(torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert caught.value.exit_code == 3


def test_only_floating_inputs_take_the_models_dtype() -> None:
    batch = {"ids": torch.ones(2, dtype=torch.int64), "x": torch.ones(2), "use_cache": False}
    there = device.moved(batch, torch.device("cpu"), torch.bfloat16)
    assert there["ids"].dtype == torch.int64
    assert there["x"].dtype == torch.bfloat16
    assert there["use_cache"] is False


# --- with Inductor --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fused_loss_is_held_against_eager_without_logits(llama: tuple[Path, Path]) -> None:
    """Loss and gradients stand for the logits that are never formed."""
    model, adapter = llama
    found = document(run(model, "--adapter", adapter, "--mode", "train", "--json"))
    (loss,) = (row for row in found["optimization"]["rows"] if row["kind"] == "loss")
    assert loss["became"] == "mmopt::linear_cross_entropy"
    assert found["graph_breaks"] == found["recompiles"] == found["dead_adapters"] == []
    tensors = {group["group"]: group["tensors"] for group in found["parity"]}
    assert tensors["outputs"] == tensors["loss"] == 1
    assert tensors["gradients"] == 14
    assert found["loss"] == "the model's own"


@pytest.mark.slow
def test_images_and_speech_are_made_up_and_hold(tmp_path: Path) -> None:
    """A vision tower and a speech model; rates are of images, and of seconds of speech."""
    families.vit(**families.ONE).save_pretrained(tmp_path / "vit")
    found = document(run(tmp_path / "vit", "--mode", "train", "--json"))
    assert found["step_images"] == 2
    assert all(rate > 0 for rate in found["images_per_second"].values())
    families.whisper(encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path / "whisper")
    for mode in ("infer", "train"):
        found = document(run(tmp_path / "whisper", "--mode", mode, "--json"))
        assert found["step_audio_seconds"] == pytest.approx(2 * 40 * 160 / 16000)  # rows, frames


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_whole_command_holds_with_inductor_and_stores_a_warm_start(
    mode: str, bert: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As users run it; the store finds its model by itself and runs without compiling."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    model, adapter = bert
    store = tmp_path / "store"
    arguments = ("--adapter", adapter, "--mode", mode, "-o", store, "--json")
    found = document(run(model, *arguments))
    assert found["graph_breaks"] == found["recompiles"] == found["dead_adapters"] == []
    assert found["holds"] is True
    assert found["store"] == str(store)
    loaded = mmopt.load_compiled(store, sha256=found["store_sha256"])
    assert loaded.module.training is (mode == "train")
    ids = torch.randint(5, 60, (3, 11))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mode == "train":
        given["labels"] = torch.tensor([0, 1, 2])
    output = loaded(**given)
    assert loaded.recompiles == ()
    if mode == "train":
        output.loss.backward()
        assert any(x.grad is not None and x.grad.any() for x in loaded.module.parameters())
    else:
        torch.testing.assert_close(
            output.logits, loaded.module(**given).logits, rtol=1e-4, atol=1e-5
        )
    assert run(model, "-o", store).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_holds_with_inductor(dtype: str, llama: tuple[Path, Path]) -> None:
    """Inductor keeps what it fuses in float32, so it is nearer than eager, not further."""
    model, adapter = llama
    arguments = ("--adapter", adapter, "--mode", "train", "--dtype", dtype, "--json")
    found = document(run(model, *arguments))
    assert found["optimization"]["attached"] == 9
    assert all(group["holds"] for group in found["parity"])
    (errors,) = (group for group in found["parity"] if group["group"] == "gradients")
    assert 0 < errors["eager_error"] < 0.1

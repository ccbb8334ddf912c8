"""bench/step_cases.py: peers of a case take the same step, or their times mean nothing."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import step_cases
import step_processes
import torch
from gpu_peers import Unavailable
from step_cases import (
    ALONE,
    BOS,
    CLIP_CPU,
    CPU,
    CPU_PEERS,
    GPU,
    GPU_PEERS,
    GPU_SLOW,
    IGNORED,
    IMAGE,
    LLAMA_CPU,
    NAME,
    RANK,
    TARGETS,
    Case,
    Measured,
    adapted_model,
    base_model,
    batch,
    disagreement,
    drawn,
    edges,
    measure,
    pictures,
    save_for_unsloth,
    tiny,
    twin,
    weight_bytes,
    work,
)
from step_processes import measured_apart

import mmopt
from mmopt.measure.timing import Timing

BENCH = Path(__file__).resolve().parent.parent / "bench"
CASES = [*CPU, *GPU, *GPU_SLOW]
PACKED = [case for case in CASES if case.documents > 1]
PACKED_NF4 = [case for case in PACKED if case.base == "nf4"]
# Of cases that are the same at tiny sizes, the first.
TINY = list({replace(tiny(case), name=""): case for case in reversed(CASES)}.values())[::-1]
# Those that may share a process with this test.
TOGETHER = {peer: build for peer, build in GPU_PEERS.items() if peer not in ALONE}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes for each peer; what is computed is the same."""
    monkeypatch.setattr(torch, "compile", lambda model, **_options: model)


def require_base(case: Case) -> None:
    if case.base == "nf4":
        pytest.importorskip("bitsandbytes")


def agree(found: dict[str, Any]) -> None:
    """PEFT, PEFT compiled and mmopt were measured, and took one step."""
    for peer in CPU_PEERS:
        assert isinstance(found[peer], Measured), f"{peer}: {found[peer]}"
        assert disagreement(found, peer, relative=1e-4) is None
    assert found["peft"].loss > 0
    assert all(norm > 0 for norm in found["peft"].norms)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=pytest.mark.slow if one in PACKED_NF4 else ()) for one in TINY],
    ids=NAME,
)
def test_peers_take_the_same_step(case: Case) -> None:
    require_base(case)
    found = measure(tiny(case), TOGETHER, device="cpu", rounds=0)
    agree(found)
    reason = found["peft-compiled-flex"]
    refused = "CLIP's masks are no blocks" if case.family == "clip" else "backward on CPU"
    assert isinstance(reason, str)
    assert refused in reason
    assert reason.startswith("failed: ") is (case.family != "clip")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in TINY if case.documents > 1 or case is CLIP_CPU], ids=NAME
)
def test_peers_take_the_same_step_compiled(case: Case) -> None:
    require_base(case)
    found = measure(tiny(case), CPU_PEERS, device="cpu", rounds=2)
    agree(found)
    assert all(len(found[peer].timing.samples) == 2 for peer in CPU_PEERS)


@pytest.mark.parametrize("case", TINY, ids=NAME)
def test_mmopt_leaves_nothing_of_a_case_alone(case: Case) -> None:
    require_base(case)
    report = mmopt.optimize(adapted_model(tiny(case)))
    assert [row for row in report.rows if row.became is None] == []
    kinds = {row.kind for row in report.rows if row.kind != "graph"}
    assert kinds == (
        {"attention", "lora"} if case.family == "clip" else {"attention", "lora", "loss"}
    )


def test_models_have_the_sizes_that_they_are_named_for() -> None:
    millions = {
        "llama-124m": (123.7, 84),
        "llama-1b": (1236, 112),
        "gemma3-4b": (4300, 238),
        "clip-b32": (151, 144),
        "clip-l14": (428, 216),
    }
    for case in {case.model: case for case in CASES}.values():
        with torch.device("meta"):
            model = base_model(case)
        size, adapted = millions.pop(case.model)
        assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(size, rel=2e-3)
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and matches(TARGETS[case.family], name)
        ]
        assert len(layers) == adapted
    assert millions == {}


def matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def test_adapters_are_float32_of_rank_16_and_alone_are_trained() -> None:
    model = adapted_model(replace(tiny(LLAMA_CPU), dtype=torch.bfloat16))
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert all(x.dtype is torch.float32 and RANK in x.shape for x in trained.values())
    assert len(trained) == 2 * 7 * 2
    assert all(bool(x.any()) for x in trained.values())
    assert model.get_base_model().model.embed_tokens.weight.dtype is torch.bfloat16


def test_an_nf4_base_is_quantized_where_there_is_an_adapter_and_nowhere_else() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    case = tiny(next(case for case in GPU if case.name == "gemma3-4b-packed-nf4"))
    model, dense = adapted_model(case), adapted_model(replace(case, base="dense"))
    quantized = [name for name, x in model.named_modules() if isinstance(x, bnb.nn.Linear4bit)]
    assert len(quantized) == 2 * 7
    assert all("language_model" in name for name in quantized)
    assert weight_bytes(model) < weight_bytes(dense)
    shared = twin(model)
    for name in quantized:
        one, other = model.get_submodule(name).weight, shared.get_submodule(name).weight
        assert one is other
        assert one.quant_state is other.quant_state


def test_without_bitsandbytes_an_nf4_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    case = tiny(next(case for case in GPU if case.base == "nf4"))
    found = measure(case, CPU_PEERS, device="cpu", rounds=0)
    assert found == dict.fromkeys(CPU_PEERS, "bitsandbytes is not installed")


def test_unsloth_is_given_the_weights_of_the_others(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    case = tiny(LLAMA_CPU)
    save_for_unsloth(case, tmp_path, torch.device("cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = drawn(case, "cpu").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PACKED, ids=NAME)
def test_packed_documents_fill_a_row_and_begin_at_position_zero(case: Case) -> None:
    for one in (case, tiny(case)):
        ends = edges(one)
        assert ends[0] == 0
        assert ends[-1] == one.length
        assert len(ends) == one.documents + 1
        assert all(begin < end for begin, end in itertools.pairwise(ends))
    made = batch(tiny(case))
    begins = torch.tensor(edges(tiny(case))[:-1])
    assert torch.equal((made["position_ids"][0] == 0).nonzero()[:, 0], begins)
    assert bool((made["labels"][:, begins] == IGNORED).all())


@pytest.mark.parametrize("case", [case for case in CASES if case.family == "gemma3"], ids=NAME)
def test_every_document_has_a_picture_and_no_picture_is_in_two(case: Case) -> None:
    for one in (case, tiny(case)):
        tokens = step_cases.GEMMA3[one.model][2]
        blocks = [(at - 1, at + tokens) for at in pictures(one)]
        inside = [
            [block for block in blocks if begin < block[0] and block[1] < end]
            for begin, end in itertools.pairwise(edges(one))
        ]
        assert all(inside)
        assert sum(map(len, inside)) == len(blocks)
        assert work(one)["images"] == one.rows * len(blocks)
    small = tiny(case)
    made = batch(small)
    is_image = made["input_ids"] == IMAGE
    assert int(is_image.sum()) == len(made["pixel_values"]) * step_cases.GEMMA3[small.model][2]
    assert torch.equal(made["token_type_ids"] == 1, is_image)
    assert bool((made["labels"][is_image] == IGNORED).all())
    assert bool((made["input_ids"][:, edges(small)[:-1]] == BOS).all())


def test_captions_end_with_their_last_token_and_are_padded_to_different_lengths() -> None:
    made = batch(CLIP_CPU)
    lengths = made["attention_mask"].sum(1)
    assert lengths.tolist() == sorted(set(lengths.tolist()), reverse=True)
    assert (int(lengths[0]), int(lengths[-1])) == (77, 38)
    ends = made["input_ids"] == step_cases.CLIP["clip-b32"][0]["eos_token_id"]
    assert torch.equal(ends.int().argmax(1), lengths - 1)
    assert work(CLIP_CPU) == {"tokens": 8 * 77, "images": 8}


@pytest.mark.parametrize("peer", ["peft", "mmopt"])
def test_a_packed_step_is_that_of_its_documents_apart(peer: str, uncompiled: None) -> None:
    """Or documents would see each other, and the case would measure another mask."""
    case = tiny(next(case for case in GPU if case.name == "llama-1b-packed"))
    model = adapted_model(case)
    run, made = GPU_PEERS[peer](case, model), batch(case)
    apart, tokens = 0.0, 0
    for begin, end in itertools.pairwise(edges(case)):
        ids = made["input_ids"][:, begin:end]
        counted = (end - begin - 1) * len(ids)
        if counted:
            apart += float(run(input_ids=ids, labels=ids).loss.detach()) * counted
            tokens += counted
    assert float(run(**made).loss.detach()) == pytest.approx(apart / tokens, rel=1e-5)


# --- measuring ------------------------------------------------------------------------------------


def test_a_peer_that_breaks_down_is_a_line_and_the_others_are_measured() -> None:
    def out_of_memory(_case: Case, _model: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee more")

    def absent(_case: Case, _model: Any) -> Any:
        raise Unavailable("it is not installed")

    def other(_case: Case, model: Any) -> Any:
        with torch.no_grad():
            model.get_base_model().model.norm.weight = torch.nn.Parameter(
                model.get_base_model().model.norm.weight * 3
            )
        return model

    peers = {
        "large": out_of_memory, "peft": step_cases.peft, "absent": absent, "other": other,
    }  # fmt: skip
    heard: list[str] = []
    found = measure(tiny(LLAMA_CPU), peers, device="cpu", rounds=2, starts=heard.append)
    assert heard == list(peers)
    assert found["large"] == (
        "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    )
    assert found["absent"] == "it is not installed"
    assert len(found["peft"].timing.samples) == 2
    assert found["peft"].first_step > 0
    assert found["peft"].peak_bytes > 0
    assert disagreement(found, "peft", relative=1e-4) is None
    assert "its loss is" in str(disagreement(found, "other", relative=1e-4))
    kept = json.loads(json.dumps(found["peft"].to_dict()))
    assert Measured.from_dict(kept) == found["peft"]


def made_up(loss: float = 1.0, norms: tuple[float, ...] = (3.0, 4.0)) -> Measured:
    return Measured(Timing([0.5, 0.25, 1.0], 1, 9.0, True), 7.0, 10, 100, loss, list(norms))


def test_gradients_that_differ_or_are_not_numbers_are_another_step() -> None:
    found = {
        "peft": made_up(),
        "same": made_up(1.001, (3.0, 4.01)),
        "off": made_up(norms=(3.0, 6.0)),
        "fewer": made_up(norms=(5.0,)),
        "nan": made_up(float("nan")),
        "nan-gradient": made_up(norms=(float("nan"), 4.0)),
        "gone": "failed: x",
    }
    said = {peer: disagreement(found, peer, relative=2e-3) for peer in found}
    assert {peer for peer, reason in said.items() if reason is None} == {"peft", "same", "gone"}
    assert "norms of its gradients" in str(said["off"])
    assert "trains 1 tensors" in str(said["fewer"])


@pytest.mark.slow
def test_a_process_of_its_own_measures_and_answers() -> None:
    found = measured_apart(LLAMA_CPU, ["peft"], device="cpu", rounds=1, small=True)
    assert isinstance(found["peft"], Measured)
    here = measure(tiny(LLAMA_CPU), {"peft": step_cases.peft}, device="cpu", rounds=0)["peft"]
    assert isinstance(here, Measured)
    assert found["peft"].loss == pytest.approx(here.loss, rel=1e-6)
    assert len(found["peft"].timing.samples) == 1


def test_who_ends_the_process_is_named_and_the_others_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that dies at its second peer, and those of Liger and Unsloth apart from it."""
    ran: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> Any:
        order = json.loads(command[2])
        ran.append(order["peers"])
        lines: list[dict[str, Any]] = []
        for peer in order["peers"]:
            lines.append({"starts": peer})
            if peer == "peft-compiled":
                break
        else:
            results = {peer: made_up().to_dict() for peer in order["peers"]}
            results |= {"unsloth": "unsloth is not installed"} if "unsloth" in results else {}
            results |= {"mmopt": made_up(2.0).to_dict()} if "mmopt" in results else {}
            lines.append({"found": results})
        Path(order["log"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        died = "found" not in lines[-1]
        return SimpleNamespace(returncode=-6 * died, stderr="noise\nCUDA error: assert\n" * died)

    monkeypatch.setattr(subprocess, "run", run)
    found = measured_apart(GPU[0], list(GPU_PEERS), device="cuda", rounds=1)
    together = [peer for peer in GPU_PEERS if peer not in ALONE]
    assert ran == [
        together, [peer for peer in together if peer != "peft-compiled"], ["liger"], ["unsloth"],
    ]  # fmt: skip
    assert set(found) == set(GPU_PEERS)
    assert found["peft-compiled"] == (
        "failed: its process ended with status -6: CUDA error: assert"
    )
    assert found["unsloth"] == "unsloth is not installed"
    assert found["peft"] == made_up()
    assert found["liger"] == made_up()
    assert "its loss is 2.0" in str(found["mmopt"])


def test_a_process_that_never_began_fails_all_of_its_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_a, **_k: SimpleNamespace(returncode=1, stderr="MemoryError\n")
    )
    found = measured_apart(GPU[0], ["peft", "mmopt"], device="cuda", rounds=1)
    assert found == dict.fromkeys(
        ["peft", "mmopt"], "failed: its process ended with status 1: MemoryError"
    )


# --- bench_training_step.py, all but the GPU ------------------------------------------------------


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The suite, which finds on "the GPU" what is made up here."""
    path = BENCH / "bench_training_step.py"
    spec = importlib.util.spec_from_file_location("loaded_bench_training_step", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    found = {"peft": made_up(), "mmopt": made_up(), "liger": "failed: out of memory"}
    monkeypatch.setattr(loaded, "measured_apart", lambda *_a, **_k: found)
    monkeypatch.setattr(loaded, "measure", lambda *_a, **_k: found)
    return loaded


def replayed(suite: ModuleType, function: Any, case: Case, peer: str) -> Any:
    benchmark = SimpleNamespace(extra_info={}, group=None)
    benchmark.pedantic = lambda call, rounds, iterations: [
        call() for _ in range(rounds * iterations)
    ]
    before = suite.CLOCK()
    function(benchmark, case, peer)
    assert suite.CLOCK() - before == pytest.approx(1.75)
    return benchmark


def test_a_gpu_case_reports_throughput_memory_and_first_step(suite: ModuleType) -> None:
    case = next(case for case in GPU if case.name == "gemma3-4b-packed")
    benchmark = replayed(suite, suite.bench_gpu_training_step, case, "mmopt")
    assert benchmark.group == "gpu training step gemma3-4b-packed"
    facts = benchmark.extra_info
    assert facts["tokens_per_s"] == 4096 / 0.5
    assert facts["images_per_s"] == len(pictures(case)) / 0.5
    assert (facts["peak_bytes"], facts["weight_bytes"], facts["first_step_s"]) == (10, 100, 7.0)
    with pytest.raises(pytest.skip.Exception, match="failed: out of memory"):
        suite.bench_gpu_training_step(benchmark, case, "liger")


def test_a_cpu_case_fails_where_a_peer_was_not_measured_or_took_another_step(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = replayed(suite, suite.bench_training_step, CLIP_CPU, "mmopt")
    assert benchmark.group == "training step clip-b32"
    assert benchmark.extra_info["images_per_s"] == 8 / 0.5
    with pytest.raises(AssertionError, match="out of memory"):
        suite.bench_training_step(benchmark, CLIP_CPU, "liger")
    monkeypatch.setattr(
        suite, "measured", lambda _case: {"peft": made_up(), "mmopt": made_up(1.01)}
    )
    with pytest.raises(AssertionError):
        suite.bench_training_step(benchmark, CLIP_CPU, "mmopt")


def test_every_model_of_the_issue_is_measured_with_lora_and_qlora_in_bfloat16() -> None:
    assert {(case.model, case.base) for case in GPU} == set(
        itertools.product(("llama-1b", "gemma3-4b", "clip-l14"), ("dense", "nf4"))
    )
    assert all(case.dtype is torch.bfloat16 for case in (*GPU, *GPU_SLOW))
    assert all(case.documents > 1 for case in GPU if case.family != "clip")
    assert len({case.name for case in CASES}) == len(CASES)
    assert set(step_processes.CASES) == {case.name for case in CASES}

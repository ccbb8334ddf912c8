"""Two processes that optimize, wrap and compile train as one eager process on the whole batch.

`torchrun` on gloo and the CPU; `distributed_step` is what each process runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import distributed_step
import pytest
import torch
from distributed_step import LENGTHS, batch_of

from mmopt.compilation import parity

SCRIPT = Path(distributed_step.__file__)


def torchrun(kind, folder, *options, script=SCRIPT):
    """What two processes found."""
    output = folder / "result.pt"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(script, kind, output, *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(output)


def expected_step(model, *batches):
    """Losses and summed gradients of one process, eager, nothing attached."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), distributed_step.gradients(model)


def check(result, *, adapter, layers=1):
    """Loss and gradients of the steps at two lengths, and of two batches accumulated."""
    model = distributed_step.build(adapter=adapter, layers=layers)
    steps = [
        (batch_of(LENGTHS[0]),),
        (batch_of(LENGTHS[1]),),
        (batch_of(LENGTHS[0], seed=2), batch_of(LENGTHS[1], seed=3)),
    ]
    if len(result["steps"]) > len(steps):
        steps.append((batch_of(LENGTHS[0]),))
    for index, (found, batches) in enumerate(zip(result["steps"], steps, strict=True)):
        if index == 3:
            model.set_adapter("second")
        loss, gradients = expected_step(model, *batches)
        torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
        same = parity.compare(f"step {index}", gradients, found["gradients"])
        assert same.holds, same
        assert found["fused_loss"]
    assert result["breaks"] == []
    assert result["recompiles"] == 0
    assert all(became for _, became, _ in result["rows"])


def sources(result, step):
    return result["steps"][step]["sources"]


FUSED = ["mmopt/attach/attention.py", "mmopt/attach/lora.py"]


@pytest.mark.slow
def test_ddp_on_half_batches_is_one_process_on_the_whole(tmp_path):
    """One graph per process, at two lengths, and gradients that wait for the last micro-batch."""
    result = torchrun("ddp", tmp_path)
    check(result, adapter=True)
    assert result["graphs"] == 1
    assert sources(result, 0) == FUSED


@pytest.mark.slow
def test_ddp_lowered_by_inductor_checkpointed_and_switched(tmp_path):
    """Checkpointing is in the graph; another adapter trains once the model is wrapped anew."""
    result = torchrun("ddp", tmp_path, "--inductor", "--checkpointing", "--switch")
    check(result, adapter=True)
    assert result["graphs"] == 1
    assert sources(result, 3) == FUSED


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_ddp_of_a_whole_model_in_several_buckets(checkpointing, tmp_path):
    """Dynamo splits the graph at DDP's buckets, so that they are reduced during backward."""
    options = ("--whole", "--layers", 2, "--buckets", 0.01)
    result = torchrun("ddp", tmp_path, *options, *(["--checkpointing"] if checkpointing else []))
    check(result, adapter=False, layers=2)
    assert result["graphs"] > 2


@pytest.mark.slow
def test_trainer_accumulates_and_checkpoints_under_ddp(tmp_path):
    """torchrun makes Trainer wrap the model; the weights go where plain Trainer moves them."""
    script = SCRIPT.with_name("distributed_trainer.py")
    result = torchrun(tmp_path, tmp_path, script=script)
    plain, ours = ({n: x for n, x in moved.items() if x.any()} for moved in result["moved"])
    same = parity.compare("weights", plain, ours)
    assert same.tensors == 6
    assert same.holds, same
    assert result["wrapper"] == "DistributedDataParallel"
    assert result["recompiles"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--shard-first",), ("--checkpointing",)], ids=str)
def test_fsdp_compiles_each_sharded_block(options, tmp_path):
    """Hooks gather and reduce between the graphs; the ops are attached before or after."""
    result = torchrun("fsdp", tmp_path, "--layers", 2, "--switch", *options)
    check(result, adapter=True, layers=2)
    assert sources(result, 0) == FUSED
    assert sources(result, 3) == FUSED


@pytest.mark.slow
def test_fsdp_of_the_model_alone_is_one_graph(tmp_path):
    """Its hooks run around the one graph."""
    result = torchrun("fsdp-root", tmp_path)
    check(result, adapter=True)
    assert result["graphs"] == 1


@pytest.mark.slow
def test_fsdp_of_a_whole_model_lowered_by_inductor(tmp_path):
    """All weights sharded and trained; the second block runs the graph of the first."""
    result = torchrun("fsdp", tmp_path, "--inductor", "--whole", "--layers", 2)
    check(result, adapter=False, layers=2)
    assert result["graphs"] == 1

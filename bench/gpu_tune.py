"""What `bench/gpu.py tune` tunes: a launch of every kernel that has tiles to choose from.

Each is timed alone, with a cold L2 cache, by every candidate of `mmopt_kernels.candidates`. What
wins is written to a table of its own: point MMOPT_TABLES at its folder to use it, and move the
entries that are clearly ahead, with the file of their timings, to the package's tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_peers
import torch
from gpu_peers import TIMER, seeded
from torch import Tensor

from mmopt.measure.statistics import median
from mmopt.measure.timing import time_variants
from mmopt_kernels import candidates, tuning
from mmopt_kernels.attention import Intervals

# 15 rounds of up to a millisecond, and a warm-up of as much, for each of some 200 candidates.
ROUNDS = 15


@dataclass(frozen=True)
class Launch:
    """One kernel at one size.

    Attributes:
        make: on a device, a call that launches the kernel, with what it leads to.
    """

    kernel: str
    name: str
    make: Callable[[str], Callable[[], object]]


def _drawn(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=seeded(device, 0), device=device).to(dtype)


def lora(kernel: str, M: int, K: int, N: int, R: int, dropout_p: float = 0.0) -> Launch:
    """A step of a layer with bfloat16 activations and float32 factors."""

    def make(device: str) -> Callable[[], object]:
        from mmopt_kernels.lora_linear import kernel as forward
        from mmopt_kernels.lora_linear import kernel_backward as backward

        x, dy, s = _drawn(device, M, K), _drawn(device, M, N), _drawn(device, M, R)
        weight = _drawn(device, N, K)
        a, b = (_drawn(device, *shape, dtype=torch.float32) for shape in ((R, K), (N, R)))
        seed = torch.ones(1, dtype=torch.int64, device=device) if dropout_p else None
        calls: dict[str, Callable[[], object]] = {
            "lora_linear_forward": lambda: forward.up(x, weight, s, b, None, 0.5),
            "lora_linear_down": lambda: forward.down(x, a, seed, dropout_p),
            "lora_linear_up_backward": lambda: backward.up_backward(dy, s, b, 0.5),
            "lora_linear_down_backward": lambda: backward.down_backward(s, x, seed, dropout_p),
            "lora_linear_input_backward": lambda: backward.input_backward(
                dy, weight, s, a, seed, dropout_p
            ),
            "lora_linear_add": lambda: backward.add_masked_(x, s, a, seed, dropout_p),
        }
        return calls[kernel]

    suffix = "-dropout" if dropout_p else ""
    return Launch(kernel, f"{M}x{K}x{N}-r{R}{suffix}", make)


def attention(kernel: str, S: int, D: int, mask: str, heads: int = 16) -> Launch:
    """One sequence; a mask of packed documents, or none but causal."""

    def make(device: str) -> Callable[[], object]:
        # The functions of the package have the names of its modules.
        forward = importlib.import_module("mmopt_kernels.attention.kernel")
        backward = importlib.import_module("mmopt_kernels.attention.kernel_backward")
        q, k, v, grad = (_drawn(device, 1, heads, S, D) for _ in range(4))
        lo = hi = None
        if mask == "packed":
            lengths = torch.tensor([0, S // 2, S * 3 // 4, S], dtype=torch.int32, device=device)
            packed = Intervals.packed(lengths, S)
            lo, hi = packed.lo, packed.hi
        rest = (lo, hi, None, None, True, D**-0.5, None, 0.0)
        if kernel == "attention_forward":
            return lambda: forward.launch(q, k, v, *rest)
        out, lse = forward.launch(q, k, v, *rest)
        return lambda: backward.launch_backward(grad, None, q, k, v, out, lse, *rest)

    return Launch(kernel, f"{mask}-{S}-d{D}", make)


def cross_entropy(rows: int, vocabulary: int) -> Launch:
    def make(device: str) -> Callable[[], object]:
        from mmopt_kernels.linear_cross_entropy import kernel
        from mmopt_kernels.linear_cross_entropy.chunked import Options

        logits = _drawn(device, rows, vocabulary)
        labels = torch.arange(rows, device=device) % vocabulary
        options = Options(-100, None, 0.0, 0.0)
        weights = torch.ones(rows, device=device)
        return lambda: kernel.launch(logits, labels, weights, options, logits.shape[1])

    return Launch("cross_entropy", f"{rows}x{vocabulary}", make)


def launches() -> list[Launch]:
    """Those of Llama-8B's layers, and masks at lengths where tiles decide."""
    found = [
        lora(kernel, M, 4096, 4096, R)
        for kernel in (
            "lora_linear_down",
            "lora_linear_up_backward",
            "lora_linear_down_backward",
            "lora_linear_forward",
            "lora_linear_input_backward",
        )
        for M in (2048, 8192)
        for R in (16, 64)
    ]
    found += [
        lora(kernel, 8192, 4096, 4096, 16, 0.1)
        for kernel in ("lora_linear_down", "lora_linear_down_backward", "lora_linear_add")
    ]
    found.append(cross_entropy(1024, 128256))
    # One pass after the two whose place it takes: it is timed against the best of them.
    for kernel in (
        "attention_forward",
        "attention_backward_dkdv",
        "attention_backward_dq",
        "attention_backward_one_pass",
    ):
        found += [attention(kernel, S, D, "packed") for S in (4096, 16384) for D in (64, 128)]
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """By mmopt's own timer: the cache holds nothing of the call before."""
    from mmopt.measure.gpu_timing import gpu_timer

    timing = time_variants({"call": call}, rounds=ROUNDS, timer=gpu_timer(TIMER))["call"]
    return median(timing.samples) * 1e3


def tune(
    launch: Launch,
    folder: Path,
    device: str = gpu_peers.DEVICE,
    clock: Callable[[Callable[[], object]], float] = milliseconds,
    gpu: str | None = None,
) -> tuning.Tuned:
    """Time what there is to try, and write what wins to the table in the folder."""
    return tuning.tune(
        launch.kernel, None, launch.make(device), folder=folder, clock=clock, gpu=gpu
    )


# --- compiling beforehand, see gpu_warm.py --------------------------------------------------------


def run(index: int, device: str = gpu_peers.DEVICE) -> list[str]:
    """Launch the index-th of `launches` by every candidate once; why not, where one could not."""
    launch = launches()[index]
    call = launch.make(device)
    with tuning.forcing({}) as asked:
        call()
    reasons = []
    for config in candidates.candidates(launch.kernel, asked[launch.kernel].width)[1:]:
        try:
            with tuning.forcing({launch.kernel: config}):
                call()
        except Exception as reason:  # noqa: BLE001 - of one candidate: tuning will say so
            reasons.append(f"{type(reason).__name__}: {reason}")
    return reasons

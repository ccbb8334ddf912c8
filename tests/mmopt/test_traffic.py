"""`operand_bytes` against counts by hand."""

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: kernels that were decorated for the interpreter cannot be recorded.
COUNTED = """
import json
import torch
from torch.nn.functional import linear
from mmopt.measure.traffic import operand_bytes
from mmopt_kernels import linear_cross_entropy, lora_linear
from mmopt_kernels.lora_linear.kernel_backward import add_masked_
import mmopt_kernels.dropout.ops

def meta(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)

M, N, K, R = 512, 256, 128, 16
x, weight, a, b = meta(M, K), meta(N, K), meta(R, K), meta(N, R)
wide_a, wide_b = meta(R, K, dtype=torch.float32), meta(N, R, dtype=torch.float32)
seed = meta(1, dtype=torch.int64)

def adapted(impl):
    return lambda: lora_linear(x, weight, a, b, scale=1.0, impl=impl)

def trained():
    hidden, wide = meta(256, K, grad=True), meta(1000, K)
    labels = meta(256, dtype=torch.int64)
    linear_cross_entropy(hidden, wide, labels, reduction="sum").backward()

def evaluated():
    labels = meta(256, dtype=torch.int64)
    linear_cross_entropy(x[:256], meta(1000, K), labels, reduction="none")

calls = {
    "linear": lambda: linear(x, weight),
    "views": lambda: x.view(K, M).t().unsqueeze(0).expand(9, M, K),
    "expanded": lambda: x.t()[:1].expand(7, M).contiguous(),
    "in place": lambda: x.add_(x),
    "filled": lambda: torch.zeros_like(x),
    "into out": lambda: torch.mm(x, weight.t(), out=meta(M, N)),
    "library": adapted("addmm"),
    "casts": lambda: lora_linear(x, weight, wide_a, wide_b, scale=1.0, impl="addmm"),
    "kernel": lambda: torch.ops.mmopt.dropout(x, seed, 0.5, "auto"),
    "kernel in place": lambda: add_masked_(x, meta(M, R), a, None, 0.0),
    "loss": evaluated,
    "loss and gradient": trained,
}
print(json.dumps({name: operand_bytes(call) for name, call in calls.items()}))
"""


@pytest.fixture(scope="module")
def counted():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, env=env, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


M, N, K, R, V = 512, 256, 128, 16, 1000
X, WEIGHT, Y, A, B, S = M * K, N * K, M * N, R * K, N * R, M * R
# Of 256 rows, which are one chunk.
LOGITS, HIDDEN, TABLE, LABELS, ROW = 256 * V * 2, 256 * K * 2, V * K * 2, 256 * 8, 256 * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 2 * (X + WEIGHT + Y)),
        ("views", 0),
        # One column read, seven written.
        ("expanded", 2 * (M + 7 * M)),
        ("in place", 2 * (X + X)),
        ("filled", 2 * X),
        ("into out", 2 * (X + WEIGHT + Y)),
        # x weightᵀ, x aᵀ, and y += s bᵀ, which reads y and writes it.
        ("library", 2 * ((X + WEIGHT + Y) + (X + A + S) + (S + B + Y + Y))),
        # The factors are read in float32 and written in 16 bits before.
        ("casts", 2 * ((X + WEIGHT + Y) + (X + A + S) + (S + B + Y + Y)) + 6 * (A + B)),
        ("kernel", 2 * (X + X) + 8),
        ("kernel in place", 2 * (X + S + A + X)),
    ],
)
def test_bytes_are_those_counted_by_hand(counted, name, expected):
    assert counted[name] == expected


def test_a_loss_reads_its_logits_and_with_a_gradient_writes_them(counted):
    product = HIDDEN + TABLE + LOGITS
    assert counted["loss"] >= product + LOGITS
    assert counted["loss"] < product + LOGITS + 16 * (LABELS + ROW)
    # Logits, their gradient in place, and the product with it.
    least = product + 2 * LOGITS + (LOGITS + TABLE + HIDDEN)
    assert least <= counted["loss and gradient"] < least + HIDDEN * 3 + TABLE + 64 * (LABELS + ROW)


def test_interpreted_kernels_are_refused(monkeypatch):
    from mmopt.measure.traffic import operand_bytes
    from mmopt_kernels import MmoptError

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(MmoptError, match="TRITON_INTERPRET is set"):
        operand_bytes(lambda: None)

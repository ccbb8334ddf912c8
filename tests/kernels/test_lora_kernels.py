"""The Triton launchers of the LoRA linear layer, each against float64 PyTorch.

Small tiles take the place of the shipped ones, so that short inputs still span several of them, and
sums are split over several programs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")

from described import descriptors_made, on_sm_90
from mmopt_kernels import tuning
from mmopt_kernels.dropout.reference import keep_mask
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.lora_linear import kernel, kernel_backward
from program_order import last_program_first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
SEED = -(3 << 40) + 12345  # negative, and wider than 32 bits
SCALE = 0.75
# Outputs of the dtype itself: one rounding, or two units where Triton's interpreter cuts bfloat16
# off. float32 sums of at most 150 terms.
TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}
TERMS = 2e-6


@dataclass(frozen=True)
class Case:
    M: int = 43
    K: int = 101
    N: int = 70
    R: int = 5
    dropout: float = 0.0
    adapters: int = 0
    dtype: torch.dtype = FP32
    factors: torch.dtype | None = None  # as x where None
    aligned: bool = False  # to 16 bytes, as a descriptor wants it

    def __str__(self) -> str:
        sizes = f"M{self.M}-K{self.K}-N{self.N}-R{self.R}"
        words = [NAMES[self.dtype], sizes]
        words += [f"p{self.dropout}"] * (self.dropout > 0)
        words += [f"E{self.adapters}"] * (self.adapters > 0)
        words += ["factors32"] * (self.factors is FP32)
        return "-".join(words)


CASES = [
    Case(),
    Case(M=1, K=64, N=33, R=1, dropout=0.5),
    Case(M=16, K=32, N=16, R=16, dtype=BF16),
    Case(M=50, K=17, N=90, R=8, dropout=0.3, dtype=FP16, factors=FP32),
    Case(M=37, K=130, N=40, R=21, dropout=0.1, adapters=3, dtype=BF16, factors=FP32),
    Case(M=70, K=33, N=35, R=80, adapters=2),
    Case(M=19, K=21, N=18, R=256, dropout=0.2, dtype=FP16),
    Case(M=20, K=40, N=20, R=70, dropout=0.4, adapters=4),
]
# Of each launcher its first call's tile: rows and columns of the activation, and of the sum.
SMALL = {
    "lora_linear_forward": {
        "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2, "TMA": False,
    },
    "lora_linear_down": {"BLOCK_M": 16, "BLOCK_K": 16},
    "lora_linear_up_backward": {"BLOCK_M": 16, "BLOCK_N": 16},
    "lora_linear_down_backward": {"BLOCK_M": 16, "BLOCK_K": 16},
    "lora_linear_input_backward": {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "TMA": False,
    },
    "lora_linear_add": {"BLOCK_M": 16, "BLOCK_K": 16},
}  # fmt: skip


@contextmanager
def tiles(**changes: int) -> Iterator[None]:
    """Launches inside take small tiles, on a GPU too, with these fields changed."""
    launch = {"num_warps": 4, "num_stages": 1}
    forced = {
        name: {field: changes.get(field, value) for field, value in (tile | launch).items()}
        for name, tile in SMALL.items()
    }
    with tuning.forcing(forced):
        yield


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tiles():
        yield


@dataclass
class Inputs:
    """Views of rows in buffers of NaN; weight is stored either way."""

    case: Case
    buffers: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        case, dtype = self.case, self.case.dtype
        g = torch.Generator().manual_seed(1)
        M, K, N, R = case.M, case.K, case.N, case.R

        def draw(rows: int, columns: int, to: torch.dtype = dtype) -> Tensor:
            x = torch.randn(rows, columns, generator=g).to(DEVICE, to)
            return self.poisoned(x)

        self.x, self.dy, self.s, self.ds = (draw(M, n) for n in (K, N, R, R))
        self.weight, self.turned = draw(N, K), draw(K, N).t()
        self.a, self.b = draw(R, K, case.factors or dtype), draw(N, R, case.factors or dtype)
        self.dx = draw(M, K)
        self.bias = torch.randn(N, generator=g).to(DEVICE, dtype)
        self.seed = torch.tensor([SEED], device=DEVICE)
        self.index = self.owner = None
        if case.adapters:
            self.index = torch.randint(-1, case.adapters, (M,), generator=g).to(DEVICE)
            owner = torch.arange(R, dtype=torch.int32) * case.adapters // R
            self.owner = owner.to(DEVICE)

    def poisoned(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        left, right = (8, 8 + -columns % 8) if self.case.aligned else (2, 3)
        size = (rows + 3, left + columns + right)
        buffer = torch.full(size, float("nan"), dtype=x.dtype, device=DEVICE)
        view = buffer[1 : rows + 1, left : left + columns]
        view.copy_(x)
        self.buffers.append(buffer)
        return view

    @property
    def drawn(self) -> tuple[Tensor | None, float]:
        return (self.seed if self.case.dropout else None), self.case.dropout

    # The oracle's parts, float64.

    def wide(self, name: str) -> Tensor:
        x: Tensor = getattr(self, name)
        # A factor is rounded to the activations' dtype first.
        return x.to(self.case.dtype).double()

    @property
    def keep(self) -> Tensor:
        """dropout's factor of each activation."""
        case = self.case
        kept = keep_mask(self.seed, case.dropout, case.M, case.K)
        return kept.double() / (1 - case.dropout)

    @property
    def own(self) -> Tensor:
        """1 where the row's adapter has the column."""
        if self.index is None or self.owner is None:
            return torch.ones(self.case.M, self.case.R, dtype=torch.float64, device=DEVICE)
        return (self.index[:, None] == self.owner).double()


def down(x: Inputs) -> dict[str, Tensor]:
    return {"s": kernel.down(x.x, x.a, *x.drawn, x.index, x.owner)}


def down_wanted(x: Inputs) -> dict[str, Tensor]:
    return {"s": x.own * ((x.keep * x.wide("x")) @ x.wide("a").T)}


def up(x: Inputs) -> dict[str, Tensor]:
    return {
        "y": kernel.up(x.x, x.weight, x.s, x.b, x.bias, SCALE),
        "turned": kernel.up(x.x, x.turned, x.s, x.b, None, SCALE),
    }


def up_wanted(x: Inputs) -> dict[str, Tensor]:
    adapter = SCALE * x.wide("s") @ x.wide("b").T
    return {
        "y": x.wide("x") @ x.wide("weight").T + adapter + x.wide("bias"),
        "turned": x.wide("x") @ x.wide("turned").T + adapter,
    }


def up_backward(x: Inputs) -> dict[str, Tensor]:
    ds, db = kernel_backward.up_backward(x.dy, x.s, x.b, SCALE, x.index, x.owner)
    alone, none = kernel_backward.up_backward(x.dy, x.s, x.b, SCALE, x.index, x.owner, need_b=False)
    assert none is None
    assert torch.equal(alone, ds)
    assert db is not None
    return {"ds": ds, "db": db}


def up_backward_wanted(x: Inputs) -> dict[str, Tensor]:
    dy = x.wide("dy")
    return {
        "ds": x.own * (SCALE * dy @ x.wide("b")),
        "db": SCALE * dy.T @ x.wide("s"),
    }


def down_backward(x: Inputs) -> dict[str, Tensor]:
    return {"da": kernel_backward.down_backward(x.ds, x.x, *x.drawn)}


def down_backward_wanted(x: Inputs) -> dict[str, Tensor]:
    return {"da": x.wide("ds").T @ (x.keep * x.wide("x"))}


def input_backward(x: Inputs) -> dict[str, Tensor]:
    return {
        name: kernel_backward.input_backward(x.dy, weight, x.ds, x.a, *x.drawn)
        for name, weight in (("dx", x.weight), ("turned", x.turned))
    }


def input_backward_wanted(x: Inputs) -> dict[str, Tensor]:
    adapter = x.keep * (x.wide("ds") @ x.wide("a"))
    return {
        "dx": x.wide("dy") @ x.wide("weight") + adapter,
        "turned": x.wide("dy") @ x.wide("turned") + adapter,
    }


def add_masked(x: Inputs) -> dict[str, Tensor]:
    dx = x.poisoned(x.dx)
    around = x.buffers[-1].isnan()
    kernel_backward.add_masked_(dx, x.ds, x.a, *x.drawn)
    assert torch.equal(x.buffers.pop().isnan(), around)
    return {"dx": dx}


def add_masked_wanted(x: Inputs) -> dict[str, Tensor]:
    return {"dx": x.wide("dx") + x.keep * (x.wide("ds") @ x.wide("a"))}


Step = Callable[[Inputs], dict[str, Tensor]]
STEPS: dict[str, tuple[Step, Step]] = {
    "down": (down, down_wanted),
    "up": (up, up_wanted),
    "up_backward": (up_backward, up_backward_wanted),
    "down_backward": (down_backward, down_backward_wanted),
    "input_backward": (input_backward, input_backward_wanted),
    "add_masked_": (add_masked, add_masked_wanted),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launcher_matches_the_float64_oracle(case: Case, step: str) -> None:
    """Within the rounding of the result; nothing reads the NaN around the inputs or writes there.

    da and db come in float32, whatever the activations are.
    """
    x = Inputs(case)
    before = [b.clone() for b in x.buffers]
    run, wanted = STEPS[step]
    got = run(x)
    for name, want in wanted(x).items():
        value = got[name]
        in_full = name in ("da", "db")
        assert value.dtype == (FP32 if in_full else case.dtype), name
        assert value.shape == want.shape
        assert value.isfinite().all(), name
        limit = (TERMS if in_full else TOLERANCE[case.dtype]) * max(want.abs().max().item(), 1.0)
        assert (value.double() - want).abs().max().item() <= limit, name
    for now, then in zip(x.buffers, before, strict=True):
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own order")
@pytest.mark.parametrize("step", STEPS)
def test_no_program_writes_into_the_place_of_another(step: str) -> None:
    """Tails of every size, with sums in one part and in several, whichever program comes last."""
    run, _ = STEPS[step]
    for case in (Case(M=19, K=21, N=23, R=3), Case(M=35, K=101, N=70, R=5, adapters=2)):
        want = run(Inputs(case))
        with last_program_first():
            got = run(Inputs(case))
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    "case",
    [
        Case(M=43, K=104, N=72, R=5, dtype=BF16, factors=FP32, aligned=True),
        Case(M=19, K=40, N=24, R=80, dropout=0.3, dtype=FP16, aligned=True),
        Case(M=1, K=36, N=20, R=16, aligned=True),
    ],
    ids=str,
)
def test_descriptors_and_pointers_give_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NaN around the inputs, which a descriptor must not read, would show in any result.

    The interpreter multiplies by BLAS, which adds float32 in another order when weight is turned.
    """
    x = Inputs(case)
    if case.M == 1:
        # Nobody steps from a row that is alone, whatever its stride.
        x.x, x.dy = (t.as_strided(t.shape, (5, 1), t.storage_offset()) for t in (x.x, x.dy))
    made = descriptors_made(monkeypatch)
    y = kernel.up(x.x, x.weight, x.s, x.b, x.bias, SCALE)
    dx = kernel_backward.input_backward(x.dy, x.weight, x.ds, x.a, *x.drawn)
    assert made == []
    with on_sm_90(), tiles(TMA=True):
        y_described = kernel.up(x.x, x.weight, x.s, x.b, x.bias, SCALE)
        dx_described = kernel_backward.input_backward(x.dy, x.weight, x.ds, x.a, *x.drawn)
    for got, want in ((y_described, y), (dx_described, dx)):
        limit = TERMS * want.abs().max().item() if case.dtype == FP32 else 0.0
        assert (got - want).abs().max().item() <= limit
    M, K, N = case.M, case.K, case.N
    # x, weight and y; dy, weight and dx.
    assert made == [(M, K), (N, K), (M, N), (M, N), (N, K), (M, K)]
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("wrong", ["base", "rows", "weight turned", "result"])
def test_what_cannot_be_described_is_refused_where_descriptors_are_forced(wrong: str) -> None:
    """A table's entry with TMA is then passed over, see `tuning.Entry.fits`."""
    x = Inputs(Case(M=20, K=40, N=24, R=4, dtype=BF16, aligned=True))
    rows, weight, s, b = x.x, x.weight, x.s, x.b
    if wrong == "base":
        rows = torch.zeros(20 * 40 + 1, dtype=BF16, device=DEVICE)[1:].view(20, 40)
    elif wrong == "rows":
        rows = torch.zeros(20, 44, dtype=BF16, device=DEVICE)[:, :40]
    elif wrong == "weight turned":
        weight = x.turned
    else:
        weight, b = weight[:20], b[:20]
    with on_sm_90(), tiles(TMA=True), pytest.raises(KernelInputError, match="TMA is forced"):
        kernel.up(rows, weight, s, b, None, SCALE)
    with on_sm_90():
        assert kernel.up(rows, weight, s, b, None, SCALE).isfinite().all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=NAMES.values())
def test_shipped_tiles_match_the_oracle(dtype: torch.dtype, step: str) -> None:
    """What a launch takes where nothing is forced: larger tiles than the tensors."""
    x = Inputs(Case(M=67, K=70, N=66, R=12, dropout=0.25, adapters=2, dtype=dtype, factors=FP32))
    run, wanted = STEPS[step]
    with tuning.forcing({}):
        got = run(x)
    for name, want in wanted(x).items():
        limit = TOLERANCE[FP32 if name in ("da", "db") else dtype] * want.abs().max().item()
        assert (got[name].double() - want).abs().max().item() <= limit, name


@pytest.mark.parametrize("step", STEPS)
def test_results_are_bitwise_equal_between_runs(step: str) -> None:
    x = Inputs(CASES[4])
    run, _ = STEPS[step]
    first, second = run(x), run(x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_every_step_draws_the_mask_of_the_reference_whatever_the_tile(
    tile: tuple[int, int],
) -> None:
    """With ones and identities for all that dropout does not touch, results are the mask."""
    M, K = 35, 37
    want = keep_mask(torch.tensor([SEED], device=DEVICE), 0.4, M, K)
    seed, ones = torch.tensor([SEED], device=DEVICE), torch.ones(M, K, device=DEVICE)
    eye_k, eye_m = torch.eye(K, device=DEVICE), torch.eye(M, device=DEVICE)
    zeros = torch.zeros(M, K, device=DEVICE)
    with tiles(BLOCK_M=tile[0], BLOCK_K=tile[1]):
        s = kernel.down(ones, eye_k, seed, 0.4)
        da = kernel_backward.down_backward(eye_m, ones, seed, 0.4)
        dx = kernel_backward.input_backward(zeros[:, :1], zeros[:1], eye_m, ones, seed, 0.4)
        kernel_backward.add_masked_(zeros, eye_m, ones, seed, 0.4)
    for got in (s, da, dx, zeros):
        assert torch.equal(got != 0, want)
        torch.testing.assert_close(got[want], torch.full_like(got[want], 1 / 0.6))


def test_dropped_activations_do_not_reach_the_sums() -> None:
    """Not a product with zero: a dropped infinity or NaN is nothing."""
    case = Case(M=20, K=40, dropout=0.5)
    x = Inputs(case)
    dropped = x.keep == 0
    x.x[dropped] = float("nan")
    s = kernel.down(x.x, x.a, *x.drawn)
    da = kernel_backward.down_backward(x.ds, x.x, *x.drawn)
    assert s.isfinite().all()
    assert da.isfinite().all()


def test_another_adapters_infinity_stays_with_its_rows() -> None:
    """Masked, not multiplied by zero; and rows of -1 are of no adapter."""
    # No padding: zero times infinity in rows that are not there would only warn.
    x = Inputs(Case(M=48, K=96, N=64, R=16, adapters=2))
    assert x.index is not None
    x.a[8:] = float("inf")
    x.b[:, 8:] = float("inf")
    x.x.fill_(1.0)
    x.dy.fill_(1.0)
    s = kernel.down(x.x, x.a, None, 0.0, x.index, x.owner)
    ds, _ = kernel_backward.up_backward(x.dy, s.clone(), x.b, 1.0, x.index, x.owner, need_b=False)
    for value in (s, ds):
        assert value[x.index == 0].isfinite().all()
        assert value[x.index == 1][:, 8:].isinf().all()
        assert not value[x.index == -1].any()
        assert not value[x.index == 1][:, :8].any()


def test_rows_whose_partial_sums_pass_the_limit_are_added_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ds stays the same bits; db is the same sum, grouped otherwise."""
    x = Inputs(Case(M=75, R=9, adapters=2))
    whole = up_backward(x)
    monkeypatch.setattr(kernel_backward, "MOST_PARTS", 4 * x.case.N * x.case.R * 2)
    turns = up_backward(x)
    assert torch.equal(turns["ds"], whole["ds"])
    torch.testing.assert_close(turns["db"], whole["db"], atol=2e-6, rtol=1e-6)


def test_sums_are_split_where_tiles_are_few_and_nowhere_else() -> None:
    """At least two blocks to a program, and about as many programs as keep a GPU busy."""
    assert kernel.splits(1, 64) == 32
    assert kernel.splits(100, 64) == 2
    assert kernel.splits(kernel.PROGRAMS, 64) == 1
    assert kernel.splits(10**6, 64) == 1
    assert kernel.splits(1, 1) == 1
    assert kernel.splits(1, 0) == 1


@pytest.mark.parametrize("splits", [1, 3, 11])
def test_split_sums_equal_whole_ones(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Both ways to write a result, with several adapters."""
    x = Inputs(Case(M=20, K=100, R=7, dropout=0.3, adapters=2, dtype=FP16))
    for module in (kernel, kernel_backward):
        monkeypatch.setattr(module, "splits", lambda programs, blocks: splits)
    for step in ("down", "up_backward", "down_backward"):
        run, wanted = STEPS[step]
        got = run(x)
        for name, want in wanted(x).items():
            limit = TOLERANCE[FP32 if name in ("da", "db") else FP16] * want.abs().max().item()
            assert (got[name].double() - want).abs().max().item() <= limit, name


@pytest.mark.parametrize("step", STEPS)
def test_no_rows_give_no_rows_and_zero_sums(step: str) -> None:
    x = Inputs(Case(M=0, dropout=0.5, adapters=2))
    run, wanted = STEPS[step]
    for name, want in wanted(x).items():
        got = run(x)[name]
        assert got.shape == want.shape
        assert not got.any()


def test_expanded_gradients_are_read_right() -> None:
    """The gradient of a sum has strides of 0."""
    x = Inputs(Case())
    dy = torch.ones((), device=DEVICE).expand(x.dy.shape)
    ds, db = kernel_backward.up_backward(dy, x.s, x.b, 1.0)
    want, want_db = kernel_backward.up_backward(dy.contiguous(), x.s, x.b, 1.0)
    assert torch.equal(ds, want)
    assert torch.equal(db, want_db)
    dx = kernel_backward.input_backward(dy, x.weight, x.ds, x.a, None, 0.0)
    assert torch.equal(
        dx, kernel_backward.input_backward(dy.contiguous(), x.weight, x.ds, x.a, None, 0.0)
    )


def test_rows_beyond_2_to_the_31_elements_are_found() -> None:
    """The last row starts 2**31 + 2**28 elements after the first; the rest is never touched."""
    M, K, step = 19, 24, 2**27
    buffer = torch.empty((M - 1) * step + K, dtype=FP16, device=DEVICE)
    x = buffer.as_strided((M, K), (step, 1))
    g = torch.Generator().manual_seed(0)
    x.copy_(torch.randn(M, K, generator=g))
    near = x.contiguous()
    seed = torch.tensor([SEED], device=DEVICE)
    a, b, w = (torch.randn(n, K, generator=g).to(DEVICE, FP16) for n in (4, 4, 9))
    s = kernel.down(near, a, seed, 0.2)
    assert torch.equal(kernel.down(x, a, seed, 0.2), s)
    up_b = torch.randn(9, 4, generator=g).to(DEVICE, FP16)
    assert torch.equal(kernel.up(x, w, s, up_b, None, 2.0), kernel.up(near, w, s, up_b, None, 2.0))
    far, close = (kernel_backward.down_backward(s, one, seed, 0.2) for one in (x, near))
    assert torch.equal(far, close)
    far_ds, far_db = kernel_backward.up_backward(x, s, b.t(), 2.0)
    ds, db = kernel_backward.up_backward(near, s, b.t(), 2.0)
    assert torch.equal(far_ds, ds)
    assert torch.equal(far_db, db)
    far, close = (
        kernel_backward.input_backward(one, w.t(), s, a[:, :9], None, 0.0) for one in (x, near)
    )
    assert torch.equal(far, close)
    kernel_backward.add_masked_(x, s, a, seed, 0.2)
    kernel_backward.add_masked_(near, s, a, seed, 0.2)
    assert torch.equal(x, near)


KEYS = """
import json
from mmopt_kernels.inspection import TARGETS, cases
from mmopt_kernels.inspection.capture import capture

found = []
for rows in (4096, 4097, 5003, 16384):
    for make in (cases._lora_down, cases._lora_backward):
        case = make("bf16", rows, 16, "dropout-adapters", frozenset())
        for one in capture(case, TARGETS["sm_90"]):
            source = one.source
            kept = [source.signature, source.constants, source.attrs, one.options]
            found.append([rows, one.kernel, str(kept)])
print(json.dumps(found))
"""


def test_one_compiled_kernel_serves_any_number_of_rows(tmp_path: Path) -> None:
    """What Triton compiles for depends on the number of rows in no launch, odd or even.

    In a process of its own, where kernels are compiled rather than interpreted.
    """
    script = tmp_path / "keys.py"
    script.write_text(KEYS)
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2] / "kernels")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=env, check=True
    )
    variants: dict[str, set[str]] = {}
    for _, name, made in json.loads(done.stdout):
        variants.setdefault(name, set()).add(made)
    # The parts of s, ds, da and db differ in layout or dtype; one more for a result whole at once.
    limits = {"lora_linear_reduce": 4, "lora_linear_down": 2, "lora_linear_up_backward": 2}
    assert len(variants) == 6
    for name, made in variants.items():
        assert len(made) <= limits.get(name, 1), name

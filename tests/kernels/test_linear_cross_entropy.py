"""mmopt::linear_cross_entropy against its float64 oracle, and the promises of its docstring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from covering import covering
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from mmopt_kernels import KernelInputError, LoraFactors, linear_cross_entropy
from mmopt_kernels.linear_cross_entropy import api, chunked, ops
from mmopt_kernels.linear_cross_entropy.reference import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "chunked", "reference"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """M rows of H features, V labels; R is the adapter's rank, 0 for none."""

    M: int = 13
    H: int = 20
    V: int = 37
    R: int = 0
    bias: bool = False
    softcap: float | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    weighted: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"M{self.M}-H{self.H}-V{self.V}-R{self.R}", self.reduction]
        words += ["bias"] * self.bias + ["weighted"] * self.weighted
        words += ["softcap"] * (self.softcap is not None) + ["smooth"] * bool(self.smoothing)
        words += ["z"] * bool(self.z_loss) + [str(self.dtype).removeprefix("torch.")]
        return "-".join(words)

    def options(self) -> dict[str, Any]:
        return {
            "softcap": self.softcap,
            "label_smoothing": self.smoothing,
            "z_loss": self.z_loss,
            "reduction": self.reduction,
        }


CASES = [
    Case(**row)
    for row in covering(
        {
            "M": (1, 13, 64),
            "H": (20, 33),
            "V": (5, 37, 130),
            "R": (0, 3, 16),
            "bias": (False, True),
            "softcap": (None, 2.0),
            "smoothing": (0.0, 0.1),
            "z_loss": (0.0, 1e-2),
            "reduction": ("mean", "sum", "none"),
            "weighted": (False, True),
            "dtype": tuple(TOLERANCE),
        }
    )
]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    token_weights: Tensor | None

    def leaves(self) -> list[Tensor]:
        found = (self.hidden, self.weight, self.bias, self.a, self.b, self.token_weights)
        return [x for x in found if x is not None]

    def wide(self) -> Inputs:
        def widen(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().double().requires_grad_()

        return Inputs(
            *(widen(x) for x in (self.hidden, self.weight)),
            self.labels,
            *(widen(x) for x in (self.bias, self.a, self.b, self.token_weights)),
        )


def inputs(case: Case) -> Inputs:
    """Everything requires a gradient; about a third of several labels are ignored."""
    g = torch.Generator().manual_seed(1)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return x.to(DEVICE, case.dtype).requires_grad_()

    labels = torch.randint(case.V, (case.M,), generator=g)
    labels[1::3] = -100
    weights = torch.rand(case.M, generator=g) + 0.5
    return Inputs(
        make(case.M, case.H),
        make(case.V, case.H, scale=case.H**-0.5),
        labels.to(DEVICE),
        make(case.V) if case.bias else None,
        make(case.R, case.H, scale=case.H**-0.5) if case.R else None,
        make(case.V, case.R) if case.R else None,
        weights.to(DEVICE).requires_grad_() if case.weighted else None,
    )


def call(x: Inputs, case: Case, impl: str = "auto") -> Tensor:
    lora = None if x.a is None else LoraFactors(x.a, x.b, 0.5)
    return linear_cross_entropy(
        x.hidden,
        x.weight,
        x.labels,
        bias=x.bias,
        token_weights=x.token_weights,
        lora=lora,
        impl=impl,
        **case.options(),
    )


def oracle(x: Inputs, case: Case) -> Tensor:
    b = None if x.b is None else x.b * 0.5
    losses = reference(
        x.hidden, x.weight, x.labels, x.bias, x.a, b, -100, case.softcap, case.smoothing,
        case.z_loss,
    )  # fmt: skip
    counts = (x.labels != -100).to(losses.dtype)
    if x.token_weights is not None:
        losses, counts = losses * x.token_weights, counts * x.token_weights
    if case.reduction == "none":
        return losses
    return losses.sum() / (counts.sum() if case.reduction == "mean" else 1.0)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    limit = tolerance * max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max().item() <= limit


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_the_float64_oracle(case: Case, impl: str) -> None:
    """Every argument's gradient, in its own dtype, over a pairwise covering of the features."""
    x = inputs(case)
    wide = x.wide()
    loss, want = call(x, case, impl), oracle(wide, case)
    assert loss.dtype == torch.float32
    assert loss.shape == want.shape
    tolerance = TOLERANCE[case.dtype]
    assert_close(loss, want, tolerance)
    upstream = torch.rand_like(loss) + 0.5
    grads = torch.autograd.grad(loss, x.leaves(), upstream)
    wanted = torch.autograd.grad(want, wide.leaves(), upstream.double())
    for got, expected, leaf in zip(grads, wanted, x.leaves(), strict=True):
        assert got.dtype == leaf.dtype
        assert_close(got, expected, tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_plain_call_is_pytorchs_cross_entropy(impl: str) -> None:
    """The oracle's own conventions, against the function that users replace."""
    case = Case(smoothing=0.2)
    x = inputs(case)
    want = cross_entropy(linear(x.hidden, x.weight), x.labels, label_smoothing=0.2)
    torch.testing.assert_close(call(x, case, impl), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_chunks_change_nothing_but_rounding(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 rows, the last one of 1."""
    case = Case(R=3, bias=True, softcap=2.0)
    x = inputs(case)

    def both() -> list[Tensor]:
        loss = call(x, case, impl)
        return [loss, *torch.autograd.grad(loss, x.leaves())]

    want = both()
    for name in ("CPU_ELEMENTS", "GPU_ELEMENTS"):
        monkeypatch.setattr(chunked, name, 4 * case.V)
    assert chunked.chunk_rows(case.M, case.V, x.hidden.device) == 4
    for got, expected in zip(both(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by columns in PyTorch too."""
    for module in (api, ops):
        monkeypatch.setattr(module, "by_columns", lambda weight, impl: True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_gradients_by_columns_are_as_right_as_those_of_eager(
    impl: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trained bfloat16 weight, 64 columns at a time, the last chunk of 2: every gradient."""
    case = Case(M=33, H=40, V=130, R=3, bias=True, softcap=2.0, smoothing=0.1, z_loss=1e-2,
                reduction=reduction, weighted=True, dtype=torch.bfloat16)  # fmt: skip
    monkeypatch.setattr(chunked, "COLUMN_ELEMENTS", 64 * case.M)
    as_on_a_gpu(monkeypatch)
    asked = []
    columns = ops.gradients_by_columns
    monkeypatch.setattr(
        ops, "gradients_by_columns", lambda *args: asked.append(args) or columns(*args)
    )
    x, eager = inputs(case), inputs(case)
    wide = x.wide()
    got = torch.autograd.grad(call(x, case, impl).sum(), x.leaves())
    assert len(asked) == 1
    want = torch.autograd.grad(oracle(wide, case).sum(), wide.leaves())
    logits = linear(eager.hidden, eager.weight, eager.bias)
    logits = logits + 0.5 * linear(linear(eager.hidden, eager.a), eager.b)
    logits = case.softcap * torch.tanh(logits / case.softcap)
    losses = cross_entropy(logits.float(), eager.labels, reduction="none", label_smoothing=0.1)
    counts = (eager.labels != -100) * eager.token_weights
    losses = (losses + logits.float().logsumexp(1).square() * case.z_loss) * counts
    losses = losses / counts.sum() if reduction == "mean" else losses
    plain = torch.autograd.grad(losses.sum(), eager.leaves())
    names = ("hidden", "weight", "bias", "a", "b", "token_weights")
    for name, one, exact, other in zip(names, got, want, plain, strict=True):
        error, usual = ((g.double() - exact).norm() / exact.norm() for g in (one, other))
        assert error <= 2.0 * usual + 1e-6, f"{name}: {error} of {usual} in eager"


@pytest.mark.parametrize("triton", [True, False])
def test_small_gradients_by_columns_are_not_rounded_to_16_bits(triton: bool) -> None:
    """Adapters and biases may be float32 over a bfloat16 weight; by rows they are summed so."""
    case = Case(M=33, H=40, V=130, R=3, bias=True, dtype=torch.bfloat16)
    x = inputs(case)
    args = chunked.Arguments(
        *(t.detach() for t in (x.hidden, x.weight, x.labels, x.bias, x.a, x.b))
    )
    options, needs = chunked.Options(-100, None, 0.0, 0.0), [True] * 5
    weights = torch.ones(case.M, device=DEVICE)
    _, lse, by_rows = chunked.run(args, weights, options, needs, triton)
    found = chunked.gradients_by_columns(args, weights, lse, options, needs, triton)
    wide, narrow = torch.float32, torch.bfloat16
    assert [g.dtype for g in found] == [narrow, narrow, wide, wide, wide]
    for got, want in zip(found, by_rows, strict=True):
        torch.testing.assert_close(got.float(), want.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what torch's CPU allocator hands out")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
def test_trained_bfloat16_weight_needs_its_gradient_and_little_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing else has its size: no float32 sum, no copy scaled in backward."""
    from mmopt.measure.memory import peak_tensor_bytes

    case = Case(M=64, H=64, V=4000, dtype=torch.bfloat16)
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 2 * case.V)
    monkeypatch.setattr(chunked, "COLUMN_ELEMENTS", 64 * case.M)
    as_on_a_gpu(monkeypatch)
    x = inputs(case)

    def step() -> None:
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, impl="chunked")
        torch.autograd.grad(loss * 2.0, (x.hidden, x.weight))

    # oneDNN packs weights, which no GPU does.
    with torch.backends.mkldnn.flags(enabled=False):
        assert peak_tensor_bytes(step) < 1.25 * x.weight.numel() * x.weight.element_size()


def test_chunk_has_a_bounded_number_of_logits() -> None:
    for device, limit in (("cpu", chunked.CPU_ELEMENTS), ("meta", chunked.GPU_ELEMENTS)):
        for V in (2, 1000, 32_000, 128_256, 10**9):
            rows = chunked.chunk_rows(10**6, V, torch.device(device))
            assert rows >= 1
            assert rows == 1 or rows * V <= limit
            columns = chunked.chunk_columns(V, 10**6)
            assert columns == 1 or columns * V <= chunked.COLUMN_ELEMENTS
    assert chunked.chunk_rows(3, 32_000, torch.device("cpu")) == 3
    assert chunked.chunk_columns(8192, 128_256) == 4096
    assert chunked.chunk_columns(8, 128_256) == 128_256
    on_gpu = torch.device("meta")
    assert chunked.chunk_rows(8192, 128_256, on_gpu) == 1024
    # Of few rows the chunk is a part, and memory stays a small part of eager's.
    assert chunked.chunk_rows(2048, 128_256, on_gpu) == 512
    assert chunked.chunk_rows(300, 128_256, on_gpu) == 256
    # A trained weight's gradient is larger than the chunk, and passed over once for each.
    assert chunked.chunk_rows(10**6, 128_256, on_gpu, trained=True) >= 1024
    assert chunked.chunk_rows(2048, 128_256, on_gpu, trained=True) == 1024


@pytest.mark.parametrize("impl", IMPLS)
def test_adapter_of_the_output_layer_is_trained(impl: str) -> None:
    """Other fused losses leave it without a gradient, silently (trl#4612)."""
    case = Case(R=4)
    x = inputs(case)
    weight = x.weight.detach()
    lora = LoraFactors(x.a, x.b, torch.tensor(0.5, requires_grad=True))
    hidden = x.hidden.detach()  # nothing below the output layer is trained
    linear_cross_entropy(hidden, weight, x.labels, lora=lora, impl=impl).backward()
    a, b, scale = (t.detach().requires_grad_() for t in lora)
    logits = linear(hidden, weight) + scale * linear(linear(hidden, a), b)
    cross_entropy(logits, x.labels).backward()
    for got, want in ((x.a, a), (x.b, b), (lora.scale, scale)):
        assert want.grad.abs().max() > 1e-3
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-4)
    assert weight.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_token_weights_make_accumulated_batches_equal_to_one(impl: str) -> None:
    """Unequal parts, summed and divided by the tokens of all of them."""
    case = Case(M=13)
    x = inputs(case)
    whole = linear_cross_entropy(x.hidden, x.weight, x.labels, impl=impl)
    want = torch.autograd.grad(whole, (x.hidden, x.weight))
    tokens = (x.labels != -100).sum()
    for rows in (slice(0, 5), slice(5, 13)):
        part = linear_cross_entropy(
            x.hidden[rows], x.weight, x.labels[rows], reduction="sum", impl=impl
        )
        (part / tokens).backward()
    torch.testing.assert_close(x.hidden.grad, want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.weight.grad, want[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_label_gives_nan_as_in_pytorch_and_a_sum_of_zero(impl: str) -> None:
    x = inputs(Case())
    labels = torch.full_like(x.labels, -100)
    mean = linear_cross_entropy(x.hidden, x.weight, labels, impl=impl)
    assert mean.isnan()
    # One batch without a label must not make NaN of the parameters.
    for leaf, grad in zip(
        (x.hidden, x.weight), torch.autograd.grad(mean, (x.hidden, x.weight)), strict=True
    ):
        assert torch.equal(grad, torch.zeros_like(leaf))
    total = linear_cross_entropy(x.hidden, x.weight, labels, reduction="sum", impl=impl)
    assert total == 0
    total.backward()
    assert not x.hidden.grad.any()
    assert not x.weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_a_sum_of_zero(impl: str) -> None:
    hidden = torch.zeros(2, 0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(5, 8, device=DEVICE, requires_grad=True)
    labels = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl)
    total.backward()
    assert total == 0
    assert hidden.grad.shape == (2, 0, 8)
    assert not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_row_may_hold_anything(impl: str) -> None:
    case = Case(z_loss=0.01, smoothing=0.1)
    x = inputs(case)
    with torch.no_grad():
        x.hidden[1] = float("inf")
        x.hidden[4] = float("nan")
    loss = linear_cross_entropy(
        x.hidden, x.weight.detach(), x.labels, z_loss=0.01, label_smoothing=0.1, impl=impl
    )
    (grad,) = torch.autograd.grad(loss, x.hidden)
    assert loss.isfinite()
    keep = x.labels != -100
    assert grad[keep].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_logit_of_minus_infinity_is_a_class_that_never_occurs(impl: str) -> None:
    """A bias of -inf, on label 0, which stands for ignored rows inside."""
    x = inputs(Case(bias=True))
    with torch.no_grad():
        x.bias[0] = -torch.inf
    labels = torch.where(x.labels == 0, 1, x.labels)
    leaves = (x.hidden, x.weight, x.bias)
    loss = linear_cross_entropy(x.hidden, x.weight, labels, bias=x.bias, impl=impl)
    want = cross_entropy(linear(*leaves), labels)
    torch.testing.assert_close(loss, want)
    expected = torch.autograd.grad(want, leaves)
    for got, grad in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, grad, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's host cannot ask which rows count")
def test_rows_that_do_not_count_cost_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(Case(M=512, H=16, V=50))
    labels = torch.full_like(x.labels, -100)
    labels[::64] = 3
    multiplied = []
    product = chunked._logits

    def counted(h: Tensor, args: chunked.Arguments, triton: bool) -> tuple[Tensor, Tensor | None]:
        multiplied.append(h.shape[0])
        return product(h, args, triton)

    monkeypatch.setattr(chunked, "_logits", counted)
    loss = linear_cross_entropy(x.hidden, x.weight, labels)
    assert sum(multiplied) == 8
    grad, _ = torch.autograd.grad(loss, (x.hidden, x.weight))
    assert grad[::64].abs().sum(1).all()
    assert not grad[labels == -100].any()


def test_float16_gradient_survives_many_tokens_and_a_loss_scale() -> None:
    """Divided by the tokens before rounding to float16, dhidden would be zeros."""
    case = Case(M=64, H=16, V=4096, dtype=torch.float16)
    x = inputs(case)
    many = torch.tensor(2.0**16, device=DEVICE)
    loss = linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum") / 2**14
    got = torch.autograd.grad(loss * many, (x.hidden, x.weight))
    wide = x.wide()
    want = torch.autograd.grad(
        cross_entropy(linear(wide.hidden, wide.weight), wide.labels, reduction="sum") * 4,
        (wide.hidden, wide.weight),
    )
    for grad, expected in zip(got, want, strict=True):
        assert_close(grad, expected, 5e-3)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_around_the_inputs_neither_leaks_in_nor_is_touched(impl: str, transposed: bool) -> None:
    case = Case(M=9, H=20, V=37, R=3)
    clean = inputs(case)
    buffers, views = [], []
    for x in (clean.hidden, clean.weight, clean.a, clean.b):
        shape = x.shape[::-1] if transposed else x.shape
        buffer = torch.full([n + 8 for n in shape], float("nan"), device=DEVICE)
        view = buffer[4 : 4 + shape[0], 4 : 4 + shape[1]]
        view = view.t() if transposed else view
        view.copy_(x.detach())
        buffers.append(buffer)
        views.append(view.detach().requires_grad_())
    before = [b.clone() for b in buffers]
    hidden, weight, a, b = views
    loss = linear_cross_entropy(hidden, weight, clean.labels, lora=LoraFactors(a, b), impl=impl)
    want = linear_cross_entropy(
        clean.hidden, clean.weight, clean.labels, lora=LoraFactors(clean.a, clean.b), impl=impl
    )
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    grads = torch.autograd.grad(loss, views)
    wanted = torch.autograd.grad(want, (clean.hidden, clean.weight, clean.a, clean.b))
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    for now, then in zip(buffers, before, strict=True):
        assert torch.equal(now.isnan(), then.isnan())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_strided_labels_and_expanded_weights_are_read_right(impl: str, reduction: str) -> None:
    """A kernel that walked them by one element would read other memory."""
    x = inputs(Case())
    labels = torch.stack([x.labels, torch.full_like(x.labels, 3)], 1)[:, 0]
    weights = torch.tensor(0.5, device=DEVICE).expand(13)
    assert labels.stride() == (2,)
    options: dict[str, Any] = {"reduction": reduction, "impl": impl}
    loss = linear_cross_entropy(x.hidden, x.weight, labels, token_weights=weights, **options)
    want = linear_cross_entropy(x.hidden, x.weight, x.labels, **options) * 0.5
    torch.testing.assert_close(loss, want)
    # The gradient of a sum is expanded too.
    (got,) = torch.autograd.grad(loss.sum(), x.hidden)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x.hidden)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_bitwise_equal_from_run_to_run(impl: str) -> None:
    case = Case(M=64, V=130, R=3, bias=True, dtype=torch.bfloat16)
    x = inputs(case)
    first, second = (torch.autograd.grad(call(x, case, impl), x.leaves()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("features", [{}, {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 1e-2}])
def test_what_follows_the_logits_of_a_row_counts_for_nothing(features: dict[str, float]) -> None:
    """Rows of 50 logits with room for 64, of which the others are NaN, as rows of 50 alone."""
    kernel = pytest.importorskip("mmopt_kernels.linear_cross_entropy.kernel", reason="Triton")
    x = inputs(Case(M=3, V=50))
    plain = {"softcap": None, "label_smoothing": 0.0, "z_loss": 0.0}
    options = chunked.Options(-100, **(plain | features))
    alone = torch.randn(3, 50, device=DEVICE)
    poisoned = torch.full((3, 64), float("nan"), device=DEVICE)
    poisoned[:, :50] = alone
    roomy = poisoned[:, :50]
    weights = torch.tensor([1.0, 0.5, 2.0], device=DEVICE)
    columns = alone.clone(), poisoned.clone()[:, :50]
    losses, lse = kernel.launch(alone, x.labels, weights, options, 50)
    for got, want in zip(
        kernel.launch(roomy, x.labels, weights, options, 64), (losses, lse), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(roomy, alone)
    assert alone.abs().sum() > 0
    for part, room in zip(columns, (50, 64), strict=True):
        kernel.launch_columns(part, x.labels, weights, lse, options, 0, 50, room)
        torch.testing.assert_close(part, alone)


@pytest.mark.parametrize("triton", [True, False])
@torch.no_grad()
def test_logits_of_an_odd_vocabulary_begin_on_16_bytes(triton: bool) -> None:
    """For the kernel; the others read them as they come."""
    x = inputs(Case(M=3, V=37, bias=True))
    for bias in (None, x.bias):
        made = chunked._layer(x.hidden, x.weight, bias, triton)
        torch.testing.assert_close(made, linear(x.hidden, x.weight, bias))
        assert made.stride() == ((48 if triton else 37), 1)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float64_gradients_pass_gradcheck(impl: str, reduction: str) -> None:
    case = Case(
        M=4, H=3, V=5, R=2, bias=True, softcap=2.0, smoothing=0.1, z_loss=0.1, weighted=True,
        reduction=reduction, dtype=torch.float64,
    )  # fmt: skip
    x = inputs(case)
    leaves = [*x.leaves()[:-1], x.token_weights.detach().double().requires_grad_()]

    def plainly(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, w: Tensor):
        return call(Inputs(hidden, weight, x.labels, bias, a, b, w), case, impl)

    assert torch.autograd.gradcheck(plainly, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    case = Case(reduction=reduction)
    x = inputs(case)
    (grad,) = torch.autograd.grad(call(x, case).sum(), x.hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative was requested"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what torch's CPU allocator hands out")
def test_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory, forward and backward, is a few chunks, whatever the number of rows."""
    from mmopt.measure.memory import peak_tensor_bytes

    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 64 * 1000)
    x = inputs(Case(M=2048, H=16, V=1000))
    logits = 2048 * 1000 * 4

    def step(fused: bool) -> None:
        if fused:
            loss = linear_cross_entropy(x.hidden, x.weight, x.labels)
        else:
            loss = cross_entropy(linear(x.hidden, x.weight), x.labels)
        torch.autograd.grad(loss, (x.hidden, x.weight))

    assert peak_tensor_bytes(lambda: step(False)) > 2 * logits
    assert peak_tensor_bytes(lambda: step(True)) < 0.25 * logits


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_backward_opcheck(impl: str, dtype: torch.dtype) -> None:
    x = inputs(Case(M=5, R=2, bias=True, dtype=dtype))
    head = (x.hidden, x.weight, x.labels, x.bias, x.a, x.b)
    given = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE)
    op = torch.ops.mmopt.linear_cross_entropy_backward
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = (-100, 2.0, 0.1, 0.0)
    torch.library.opcheck(
        op, (*head, *given, *options, [True, True, False, True, True], impl), test_utils=checks
    )


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy_opcheck(impl: str, reduction: str) -> None:
    """Schema, fake and autograd agree."""
    case = Case(M=5, R=2, bias=True, softcap=2.0, smoothing=0.1)
    x = inputs(case)
    head = (x.hidden, x.weight, x.labels, x.bias, x.a, x.b)
    options = (-100, 2.0, 0.1, 0.0)
    if reduction == "none":
        op = torch.ops.mmopt.linear_cross_entropy_tokens
        torch.library.opcheck(op, (*head, *options, impl))
    else:
        op = torch.ops.mmopt.linear_cross_entropy
        counts = (x.labels != -100).float()
        # Only the sum is differentiable, so gradients are checked in the tests above.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (*head, counts, *options, [True] * 5, impl), test_utils=checks)


def test_one_compiled_graph_serves_varying_rows() -> None:
    """fullgraph, dynamic; nothing compiles again for another length or another scale."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    case = Case(R=4)
    x = inputs(case)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
        return linear_cross_entropy(
            hidden, x.weight, labels, lora=LoraFactors(x.a, x.b, scale), softcap=3.0
        )

    for rows, scale in ((13, 0.5), (7, 0.25), (2, 2.0)):
        hidden = x.hidden[:rows].detach().clone().requires_grad_()
        got = step(hidden, x.labels[:rows].clone(), scale)
        want = linear_cross_entropy(
            hidden, x.weight, x.labels[:rows], lora=LoraFactors(x.a, x.b, scale), softcap=3.0
        )
        torch.testing.assert_close(got, want)
        for one, other in zip(
            torch.autograd.grad(got, (hidden, x.a, x.b)),
            torch.autograd.grad(want, (hidden, x.a, x.b)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_autocast_casts_as_linear_does() -> None:
    x = inputs(Case(R=3))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = call(x, Case(R=3))
    assert loss.dtype == torch.float32
    want = linear_cross_entropy(
        x.hidden.bfloat16(), x.weight.bfloat16(), x.labels, lora=LoraFactors(x.a, x.b, 0.5)
    )
    assert torch.equal(loss, want)
    for grad in torch.autograd.grad(loss, x.leaves()):
        assert grad.dtype == torch.float32


def test_nothing_is_differentiated_without_grad() -> None:
    """The flops of evaluation are those of the logits alone, of training three times as many.

    By columns four times.
    """
    x = inputs(Case())
    one = 2 * 13 * 20 * 37
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x.hidden, x.weight, x.labels)
    assert counter.get_total_flops() == one
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x.hidden, x.weight, x.labels)
    assert counter.get_total_flops() == 3 * one
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x.hidden, x.weight.detach(), x.labels)
    assert counter.get_total_flops() == 2 * one
    half = inputs(Case(dtype=torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(half.hidden, half.weight, half.labels, impl="triton")
        assert counter.get_total_flops() == one
        loss.backward()
    assert counter.get_total_flops() == 4 * one


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the device asserts it, later")
@pytest.mark.parametrize("label", [37, -1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_out_of_range_is_named(label: int, reduction: str) -> None:
    x = inputs(Case())
    x.labels[3] = label
    with pytest.raises(KernelInputError, match=rf"label {label} of row 3 .*\[0, 37\) .* -100"):
        linear_cross_entropy(x.hidden, x.weight, x.labels, reduction=reduction)
    assert linear_cross_entropy(
        x.hidden, x.weight, torch.where(x.labels == -100, 0, x.labels), ignore_index=label
    ).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(13, 20, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"weight": torch.zeros(37, 21)}, r"weight has shape \(37, 21\), expected \[V, 20\]"),
        ({"weight": torch.zeros(37, 20).half()}, "weight has dtype torch.float16, expected torch."),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, r"labels have shape \(12,\), expected"),
        ({"labels": torch.zeros(13)}, "labels have dtype torch.float32, expected int64"),
        ({"bias": torch.zeros(20)}, r"bias has shape \(20,\), expected \(37,\)"),
        ({"token_weights": torch.zeros(2)}, r"token_weights are torch.float32 \(2,\)"),
        (
            {"lora": LoraFactors(torch.zeros(3, 20), torch.zeros(37, 4))},
            r"lora.b has shape \(37, 4\), expected \(37, 3\) because weight has 37 rows and lora.a",
        ),
        ({"lora": LoraFactors(torch.zeros(3, 9), torch.zeros(37, 3))}, "lora.a has shape"),
        # Of one value for each rank, it would scale the columns of b.
        (
            {"lora": LoraFactors(torch.zeros(3, 20), torch.zeros(37, 3), torch.ones(3))},
            r"lora.scale has shape \(3,\), expected \(\) because the op takes one adapter",
        ),
        (
            {"lora": LoraFactors(torch.zeros(3, 20), torch.zeros(37, 3), torch.tensor(1j))},
            "lora.scale is torch.complex64, expected a real number",
        ),
        (
            {
                "lora": LoraFactors(
                    torch.zeros(3, 20), torch.zeros(37, 3), torch.ones((), device="meta")
                )
            },
            "lora.scale is on meta, expected .* like hidden. Move it to",
        ),
        ({"bias": torch.zeros(37, device="meta")}, "bias is on meta, expected"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap is inf, expected a finite number above 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"reduction": "average"}, "reduction is 'average', expected one of mean"),
        ({"impl": "fast"}, "impl is 'fast', expected one of auto"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_names_both_sides(change: dict[str, Any], message: str) -> None:
    x = inputs(Case())
    arguments: dict[str, Any] = {"hidden": x.hidden, "weight": x.weight, "labels": x.labels}
    with pytest.raises(KernelInputError, match=message):
        linear_cross_entropy(**(arguments | change))


def test_triton_refuses_float64() -> None:
    x = inputs(Case(dtype=torch.float64))
    with pytest.raises(KernelInputError, match=r"impl is 'triton' and hidden is torch.float64"):
        linear_cross_entropy(x.hidden, x.weight, x.labels, impl="triton")

"""When PyTorch's CUDA kernels run an attention call, and that each is called as it expects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmopt_kernels import Intervals, KernelInputError, _triton, attention
from mmopt_kernels.attention import dispatch, ops
from mmopt_kernels.attention.reference import reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA build with everything switched on."""
    for name, backend in dispatch.BACKENDS.items():
        monkeypatch.setitem(dispatch.BACKENDS, name, replace(backend, enabled=lambda: True))


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of this test's own: what ships changes with what is measured."""
    rules = (
        dispatch.Rule("cudnn", dispatch.HALF, (64, 128), 1024, "of a test"),
        dispatch.Rule("efficient", (FP32,), (8, 64), 1, "of a test"),
    )
    table = {("sm_90", "forward"): rules, ("sm_90", "backward"): rules[:1]}
    monkeypatch.setattr(dispatch, "table", lambda: table)


def meta(
    S: int = 2048,
    T: int = 2048,
    D: int = 128,
    Hq: int = 8,
    Hkv: int = 8,
    B: int = 2,
    dtype: torch.dtype = BF16,
) -> list[Tensor]:
    """q, k and v as projections leave them, without data."""
    shapes = [(B, S, Hq, D), (B, T, Hkv, D), (B, T, Hkv, D)]
    return [torch.empty(x, dtype=dtype, device="meta").transpose(1, 2) for x in shapes]


@pytest.mark.usefixtures("built", "ruled")
@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
def test_rules_are_followed_where_they_fit_and_can_be(target: str, step: str) -> None:
    """Every combination of what the decision reads, against the rules of `ruled` in words."""
    for dtype, D, (S, T), (Hq, Hkv), causal in itertools.product(
        (FP32, FP16, BF16, torch.float64),
        (16, 64, 72, 80, 100, 128, 256),
        (
            (1, 4096),
            (1023, 1023),
            (1024, 1023),
            (1024, 1024),
            (1024, 4096),
            (4096, 1024),
            (16384, 16384),
        ),
        ((8, 8), (8, 2), (8, 1)),
        (False, True),
    ):
        q, k, v = meta(S, T, D, Hq, Hkv, dtype=dtype)
        with _triton.assuming(target):
            found = dispatch.fastest(step, q, k, v, causal)
        wanted = None
        if target == "sm_90" and (not causal or S in (1, T)):
            if dtype in (FP16, BF16) and D in (64, 72, 80, 128) and min(S, T) >= 1024:
                wanted = "cudnn"
            if dtype == FP32 and D <= 64 and Hq == Hkv and step == "forward":
                wanted = "efficient"
        assert found == wanted, (dtype, D, S, T, Hq, Hkv, causal)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_shipped_table_hands_long_plain_calls_on_hopper_to_cudnn(step: str) -> None:
    """As an H200 measured; no other call leaves before a measurement says so."""
    for target, dtype, causal in itertools.product(TARGETS, (FP32, BF16), (False, True)):
        with _triton.assuming(target):
            found = dispatch.fastest(step, *meta(16384, 16384, dtype=dtype), causal)
            assert dispatch.fastest(step, *meta(256, 256, dtype=dtype), causal) is None
        assert found == ("cudnn" if target == "sm_90" and dtype == BF16 else None)


@pytest.mark.usefixtures("built", "ruled")
def test_backward_that_must_be_deterministic_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = meta()
    with _triton.assuming("sm_90"):
        assert dispatch.fastest("forward", q, k, v, True, deterministic=True) == "cudnn"
        assert dispatch.fastest("backward", q, k, v, True, deterministic=True) is None
        assert dispatch.fastest("backward", q, k, v, True) == "cudnn"
        # What torch.use_deterministic_algorithms sets.
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert dispatch.fastest("backward", q, k, v, True) is None


@pytest.mark.usefixtures("built")
def test_every_rule_can_be_followed_and_says_where_it_is_from() -> None:
    """Both ends of what a rule covers; its source is measured or says that it is not."""
    assert dispatch.table()
    for (target, step), rules in dispatch.table().items():
        assert step in ("forward", "backward")
        for rule in rules:
            assert rule.source.startswith(("published, not measured here: ", "measured: "))
            for dtype, D in itertools.product(rule.dtypes, rule.head_dims):
                q, k, v = meta(rule.least_length, rule.least_length, D, dtype=dtype)
                assert dispatch.refusal(rule.backend, q, k, v, True, target) is None


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("backend", "shape", "causal", "target", "reason"),
    [
        ("cudnn", {}, True, "sm_90", None),
        ("cudnn", {"Hkv": 2}, True, "sm_90", None),
        ("cudnn", {"D": 256}, True, "sm_90", "head dimension 256 is not a multiple of 8 up to 128"),
        ("cudnn", {"D": 100}, True, "sm_90", "head dimension 100 is not a multiple of 8"),
        ("cudnn", {"S": 1}, True, "sm_90", None),
        ("cudnn", {"S": 2}, True, "sm_90", "2 queries of a causal mask are not 2048"),
        ("cudnn", {"S": 2}, False, "sm_90", None),
        ("cudnn", {"T": 1}, False, "sm_90", "1 keys for 2048 queries are too few"),
        ("cudnn", {"B": 70000, "S": 2, "T": 2}, False, "sm_90", "70000 sequences of 8 heads"),
        ("cudnn", {"dtype": FP32}, False, "sm_90", "q is torch.float32"),
        ("cudnn", {}, False, "gfx942", "gfx942 is no NVIDIA GPU"),
        ("cudnn", {}, False, "sm_75", "sm_75 is older than sm_80"),
        ("flash", {"D": 256}, True, "sm_90", None),
        ("flash", {"D": 256}, True, "sm_120", "256 is not a multiple of 8 up to 192"),
        ("flash", {"T": 1, "Hkv": 1}, False, "gfx942", None),
        ("flash", {"D": 264}, False, "gfx942", "head dimension 264"),
        ("cudnn", {"Hq": 70000, "S": 2, "T": 2}, False, "sm_90", "2 sequences of 70000 heads"),
        ("flash", {"S": 0}, False, "sm_80", "2048 keys for 0 queries are too few"),
        ("flash", {"B": 0}, False, "sm_80", "2048 keys for 2048 queries are too few"),
        ("efficient", {"dtype": FP32}, True, "sm_80", None),
        ("efficient", {"Hkv": 4}, True, "sm_80", "4 key heads are not 8"),
        ("efficient", {"dtype": torch.float64}, True, "sm_80", "q is torch.float64"),
    ],
)  # fmt: skip
def test_refusal_names_what_a_backend_cannot_do(
    backend: str, shape: dict[str, Any], causal: bool, target: str, reason: str | None
) -> None:
    found = dispatch.refusal(backend, *meta(**shape), causal, target)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found


@pytest.mark.usefixtures("built")
def test_rows_that_are_not_aligned_are_refused() -> None:
    q, k, v = meta()
    odd = torch.empty(2, 2048, 8, 132, dtype=BF16, device="meta").transpose(1, 2)
    for x in (odd[..., :128], odd[..., 1:129], q.mT.contiguous().mT):
        assert dispatch.refusal("flash", x, k, v, False, "sm_80") is not None
    # A stride of an axis with one element is never taken.
    one = odd.as_strided((1, 8, 2048, 128), (3, 128, 1024, 1))
    assert dispatch.refusal("flash", one, one, one, False, "sm_80") is None


def test_switches_of_torch_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without CUDA has only the efficient kernel's switch to turn."""
    x = meta()
    with sdpa_kernel(SDPBackend.MATH):
        for name in dispatch.BACKENDS:
            assert "switches it off" in str(dispatch.refusal(name, *x, False, "sm_90"))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert dispatch.refusal("efficient", *x, False, "sm_90") is None
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert dispatch.refusal("cudnn", *x, False, "sm_90") is None
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
        assert dispatch.refusal("cudnn", *x, False, "sm_90") is not None
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
        assert dispatch.refusal("cudnn", *x, False, "sm_90") is not None


@contextmanager
def fake_gpu(target: str) -> Iterator[None]:
    """Tensors on a GPU that is not there: PyTorch's own rules say what its kernels return."""
    with FakeTensorMode(), _triton.assuming(target):
        yield


def fake(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("heads_last", [True, False], ids=["BSHD", "BHSD"])
@pytest.mark.parametrize(("S", "T", "causal"), [(77, 77, True), (40, 1000, False), (1, 50, True)])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_backends_are_called_as_pytorch_declares_them(
    backend: str, S: int, T: int, causal: bool, heads_last: bool
) -> None:
    """Argument counts, shapes and dtypes, by PyTorch's own shape functions."""
    Hkv = 2 if dispatch.BACKENDS[backend].grouped else 4
    q, k, v = meta(S, T, 64, 4, Hkv)
    if not heads_last:
        q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = dispatch.forward(backend, q, k, v, causal, 0.1)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.shape == (2, 4, S)
    assert lse.dtype == FP32
    lse = lse.contiguous()
    grads = dispatch.backward(backend, out, q, k, v, out, lse, causal, 0.1)
    for got, leaf in zip(grads, (q, k, v), strict=True):
        assert got.shape == leaf.shape
        assert got.dtype == leaf.dtype


@pytest.mark.usefixtures("built")
# Not the efficient kernel: a build without CUDA cannot copy its lse out of the padding.
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_op_runs_the_backend_and_returns_what_it_promises(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the op itself runs, on tensors of a GPU that is not there: outputs as its fake says."""
    monkeypatch.setattr(dispatch, "first_able", lambda *_: (backend, ""))
    ran = []
    for step in ("forward", "backward"):
        inner = getattr(dispatch, step)
        monkeypatch.setattr(
            dispatch,
            step,
            lambda name, *args, step=step, inner=inner: (
                ran.append((step, name)) or inner(name, *args)
            ),
        )
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    rest = (None, None, None, None, True, 0.1, None, 0.0, False, "sdpa")
    with fake_gpu("sm_90"):
        q, k, grad = (fake(2, 77, 4, 64).transpose(1, 2) for _ in range(3))
        out, lse = torch.ops.mmopt.attention.default._op_dk(key, q, k, k, *rest)
        args = (grad, None, q, k, k, out, lse, *rest)
        grads = torch.ops.mmopt.attention_backward.default._op_dk(key, *args)
        promised = (
            *torch.ops.mmopt.attention(q, k, k, *rest),
            *torch.ops.mmopt.attention_backward(*args),
        )
    assert ran == [("forward", backend), ("backward", backend)]
    for got, want in zip((out, lse, *grads), promised, strict=True):
        assert got.shape == want.shape
        assert got.stride() == want.stride()
        assert got.dtype == want.dtype


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_one_query_of_a_causal_call_sees_every_key(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's causal mask starts at the top left: with it the query would see key 0 alone."""
    seen = []
    monkeypatch.setitem(
        dispatch.BACKENDS,
        backend,
        replace(
            dispatch.BACKENDS[backend],
            forward=lambda q, k, v, causal, scale: seen.append(causal),
            backward=lambda *args: seen.append(args[6]),
        ),
    )
    for S in (1, 50):
        q, k, v = meta(S, 50)
        dispatch.forward(backend, q, k, v, True, 0.1)
        dispatch.backward(backend, q, q, k, v, q, q[..., 0], True, 0.1)
    assert seen == [False, False, True, True]


def test_rows_that_pad_lse_have_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The efficient kernel's backward reads whole 32 rows: exp(score - inf) is 0."""
    given = []

    class Aten:
        @staticmethod
        def _scaled_dot_product_efficient_attention_backward(*args: Any, **_: Any) -> Any:
            given.append(args[6])
            return args[:4]

    monkeypatch.setattr(dispatch, "aten", Aten)
    q, lse = torch.zeros(1, 2, 77, 8), torch.ones(1, 2, 77)
    dispatch.backward("efficient", q, q, q, q, q, lse, False, 0.1)
    assert given[0].shape == (1, 2, 96)
    assert torch.equal(given[0][..., :77], lse)
    assert (given[0][..., 77:] == float("inf")).all()


@pytest.mark.usefixtures("built", "ruled")
def test_auto_hands_over_plain_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds, softcap, sinks, dropout and the gradient of lse keep a call here."""
    with fake_gpu("sm_90"):
        q, k, v = (fake(2, 2048, 8, 128).transpose(1, 2) for _ in range(3))
        bound, number = fake(1, 2048, dtype=torch.int32), fake(8, dtype=FP32)

        def chosen(
            step: str, *others: Any, causal: bool = True, scale: float = 0.1, impl: str = "auto"
        ) -> str | None:
            return ops._sdpa(step, impl, q, k, v, others, causal, scale, False)

        assert chosen("forward", None, None, None, None, None) == "cudnn"
        assert chosen("backward", None, None, None, None, None, None) == "cudnn"
        assert chosen("forward", causal=False) == "cudnn"
        # Keys hidden before they are scaled are not hidden by a scale that is not above 0.
        for scale in (-0.1, 0.0, 1e-40):
            assert chosen("forward", scale=scale) is None
            assert chosen("backward", scale=scale) is None
            assert chosen("forward", causal=False, scale=scale) == "cudnn"
        for others in itertools.permutations((bound, number, None, None), 2):
            assert (chosen("forward", *others) is None) == (others != (None, None))
        assert chosen("forward", 5.0) is None
        assert chosen("backward", None, None, None, None, None, number) is None
        for impl in ("triton", "reference"):
            assert chosen("forward", impl=impl) is None


@pytest.mark.usefixtures("built")
def test_explicit_sdpa_takes_the_first_that_can_and_refuses_by_name() -> None:
    with fake_gpu("sm_80"):
        for D, dtype, want in ((64, BF16, "cudnn"), (256, FP16, "flash"), (64, FP32, "efficient")):
            q = fake(1, 4, 30, D, dtype=dtype)
            assert ops._sdpa("forward", "sdpa", q, q, q, (), True, 0.1, False) == want
        q, k = fake(1, 4, 30, 64, dtype=FP32), fake(1, 2, 30, 64, dtype=FP32)
        with pytest.raises(
            KernelInputError,
            match=r"impl is 'sdpa', .* \(cudnn: q is torch.float32; flash: q is torch.float32; "
            r"efficient: 2 key heads are not 4\)",
        ):
            ops._sdpa("forward", "sdpa", q, k, k, (), True, 0.1, False)
        with pytest.raises(KernelInputError, match=r"scale is -0.1 and causal is True, expected"):
            ops._sdpa("forward", "sdpa", q, q, q, (), True, -0.1, False)
        for others, deterministic in (((3.0,), False), ((), True)):
            with pytest.raises(KernelInputError, match="expected a call without intervals, sinks"):
                ops._sdpa("backward", "sdpa", q, q, q, others, True, 0.1, deterministic)


def test_explicit_sdpa_needs_a_gpu() -> None:
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(KernelInputError, match="impl is 'sdpa' and q is on cpu, expected tensors"):
        attention(q, q, q, impl="sdpa")


def able(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[str]:
    target = _triton.target(q.device)
    names = dispatch.BACKENDS
    return [n for n in names if dispatch.refusal(n, q, k, v, causal, target) is None]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("Hkv", "S", "T", "causal", "D"),
    [(4, 300, 300, True, 64), (4, 77, 500, False, 80), (2, 1024, 1024, True, 128),
     (1, 257, 257, False, 72), (4, 1, 333, True, 64)],
)  # fmt: skip
def test_every_backend_and_every_pair_of_them_matches_the_float64_oracle(
    Hkv: int, S: int, T: int, causal: bool, D: int, dtype: torch.dtype
) -> None:
    """Any backward goes with any forward, ours included: out and lse are all that it needs."""
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, S, 4, D), (2, T, Hkv, D), (2, T, Hkv, D), (2, S, 4, D)]
    tensors = [torch.randn(s, generator=g, device="cuda").to(dtype).transpose(1, 2) for s in shapes]
    q, k, v, grad = tensors
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference(*wide, *[None] * 4, causal, D**-0.5, None, 0.0)
    wanted = torch.autograd.grad((want * grad.double()).sum(), wide)
    tolerance = {FP32: 5e-3, FP16: 4e-3, BF16: 3e-2}[dtype]  # float32: TF32 products
    scale, names = D**-0.5, able(q, k, v, causal)
    assert names or dtype == FP32
    forwards = [dispatch.forward(name, q, k, v, causal, scale) for name in names]
    forwards.append(attention(q, k, v, causal=causal, return_lse=True, impl="triton"))
    for out, lse in forwards:
        assert lse.shape == (2, 4, S)
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=1e-3)
        out, lse = ops._heads_last(out), lse.contiguous()
        for name in names:
            got = dispatch.backward(name, grad, q, k, v, out, lse, causal, scale)
            for x, expected in zip(got, wanted, strict=True):
                limit = tolerance * max(1.0, expected.abs().max().item())
                assert (x.double() - expected).abs().max().item() <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_op_through_pytorchs_kernels_matches_ours(impl: str) -> None:
    """Long enough that the table decides; gradients through autograd, and through lse for auto."""
    g = torch.Generator("cuda").manual_seed(0)
    leaves = [
        torch.randn(1, 2048, h, 128, generator=g, device="cuda")
        .bfloat16()
        .transpose(1, 2)
        .requires_grad_()
        for h in (8, 2, 2)
    ]

    def call(impl: str, through_lse: bool) -> tuple[Tensor, ...]:
        out, lse = attention(*leaves, causal=True, return_lse=True, impl=impl)
        loss = out.float().square().sum() + (lse.sum() if through_lse else 0.0)
        return (out, lse, *torch.autograd.grad(loss, leaves))

    for through_lse in (False, True) if impl == "auto" else (False,):
        for got, want in zip(call(impl, through_lse), call("triton", through_lse), strict=True):
            limit = 3e-2 * max(1.0, want.abs().max().item())
            assert (got.double() - want.double()).abs().max().item() <= limit
    if impl == "sdpa":
        with pytest.raises(KernelInputError, match="a gradient of lse"):
            call(impl, True)
        with pytest.raises(KernelInputError, match="expected a call without intervals"):
            attention(*leaves, intervals=Intervals.causal(2048, device="cuda"), impl=impl)

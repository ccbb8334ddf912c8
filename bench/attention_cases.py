"""The attention cases of bench_attention.py (CPU) and bench_gpu.py, and the peers that run them.

A case says its mask once, as a function of two positions. The dense mask that SDPA is given and
FlexAttention's block mask are made of that function; mmopt's intervals and flash-attn's options are
written apart, and tests/test_attention_cases.py holds all peers against each other.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu_peers import Unavailable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmopt_kernels import Intervals, attention, tuning

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q, k and v, `[B, H, S, D]`; what a peer runs inside the timer."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(batch, head, query, key) -> bool`, as FlexAttention takes it."""


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        mask: `full`, `causal`, or causal and more: `sliding` (a window of `span` keys), `packed`
            (documents, each half as long as the one before), `images` (blocks of `span` tokens, one
            in every `4 * span`, that see each other both ways, as Gemma 3 has them) or `padded`
            (on the right, the first sequence by half).
        S, T: queries and keys.
    """

    name: str
    mask: str
    B: int
    Hq: int
    Hkv: int
    S: int
    D: int = 64
    T: int = 0
    span: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.T == 0:
            object.__setattr__(self, "T", self.S)

    @property
    def trains(self) -> bool:
        """Whether a backward pass belongs to it: not to a decode step."""
        return self.S > 1


# Some milliseconds to some tens of them on one core. The first are part of the quick pass and of
# the gate; they are small because the gate calls each a dozen times in every pair of processes.
CPU_QUICK = (
    Case("prefill", "causal", 1, 8, 8, 256),
    Case("prefill-gqa-bf16", "causal", 1, 8, 2, 256, dtype=torch.bfloat16),
    Case("padded-batch", "padded", 4, 8, 8, 128),
    Case("image-blocks", "images", 1, 8, 2, 256, span=32),
    Case("decode", "full", 1, 8, 2, 1, T=512),
)
CPU_SLOW = (
    Case("causal-1024", "causal", 1, 4, 4, 1024),
    Case("causal-4096", "causal", 1, 2, 2, 4096),
    Case("causal-d128-1024", "causal", 1, 4, 4, 1024, D=128),
    Case("full-1024", "full", 1, 4, 4, 1024),
    Case("full-d128-1024", "full", 1, 4, 4, 1024, D=128),
    Case("gqa-8-to-1-1024", "causal", 1, 8, 1, 1024),
    Case("images-1024", "images", 1, 4, 2, 1024, span=128),
    Case("images-2048", "images", 1, 4, 2, 2048, span=256),
    Case("packed-1024", "packed", 1, 4, 4, 1024),
    Case("packed-2048", "packed", 1, 4, 4, 2048),
    Case("sliding-1024", "sliding", 1, 4, 4, 1024, span=128),
    Case("sliding-2048", "sliding", 1, 4, 4, 2048, span=128),
    Case("padded-512", "padded", 4, 4, 4, 512),
    Case("vit-577-d72", "full", 1, 8, 8, 577, D=72),
    Case("vit-1024-d80", "full", 1, 8, 8, 1024, D=80),
    Case("decode-2048", "full", 4, 8, 1, 1, T=2048),
)

# Some 32k tokens in a batch where that fills the GPU; heads as in models of 7B and more.
_GPU = torch.bfloat16
GPU = (
    Case("causal-1k", "causal", 16, 16, 16, 1024, D=128, dtype=_GPU),
    Case("causal-4k", "causal", 4, 16, 16, 4096, D=128, dtype=_GPU),
    Case("causal-16k", "causal", 1, 16, 16, 16384, D=128, dtype=_GPU),
    Case("causal-d64-4k", "causal", 4, 32, 32, 4096, D=64, dtype=_GPU),
    Case("full-4k", "full", 4, 16, 16, 4096, D=128, dtype=_GPU),
    Case("full-d64-4k", "full", 4, 32, 32, 4096, D=64, dtype=_GPU),
    Case("gqa-8-to-1-4k", "causal", 4, 32, 4, 4096, D=128, dtype=_GPU),
    Case("images-4k", "images", 4, 16, 8, 4096, D=128, span=256, dtype=_GPU),
    Case("images-16k", "images", 1, 16, 8, 16384, D=128, span=256, dtype=_GPU),
    Case("packed-4k", "packed", 4, 16, 8, 4096, D=128, dtype=_GPU),
    Case("packed-16k", "packed", 1, 16, 8, 16384, D=128, dtype=_GPU),
    Case("sliding-4k", "sliding", 4, 16, 8, 4096, D=128, span=1024, dtype=_GPU),
    Case("sliding-16k", "sliding", 1, 16, 8, 16384, D=128, span=1024, dtype=_GPU),
    Case("padded-2k", "padded", 8, 16, 8, 2048, D=128, dtype=_GPU),
    Case("vit-577-d72", "full", 32, 16, 16, 577, D=72, dtype=_GPU),
    Case("vit-1024-d80", "full", 32, 16, 16, 1024, D=80, dtype=_GPU),
    Case("decode-16k", "full", 8, 32, 4, 1, D=128, T=16384, dtype=_GPU),
    # OpenLLaMA 3B: 8 does not divide the length of a row.
    Case("padded-d100-2k", "padded", 8, 32, 32, 2048, D=100, dtype=_GPU),
    Case("decode-d100-2k", "full", 8, 32, 32, 1, D=100, T=2048, dtype=_GPU),
)


def tensors(case: Case, device: str = "cpu") -> list[Tensor]:
    """q, k and v that need gradients, as views of the `[B, S, H, D]` that projections leave."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(case.S, case.Hq), (case.T, case.Hkv), (case.T, case.Hkv)]
    return [
        torch.randn(case.B, n, h, case.D, generator=generator, device=device)
        .to(case.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n, h in shapes
    ]


# --- one mask, in each peer's terms ---------------------------------------------------------------


def document_edges(case: Case) -> list[int]:
    """0, then where each document ends: at 1/2, 3/4, 7/8, ... of the sequence, and at its end."""
    edges, length = [0], case.S
    while length > 1 and len(edges) < 6:
        edges.append(edges[-1] + length // 2)
        length -= length // 2
    return [*edges, case.S]


def lengths(case: Case, device: str) -> Tensor:
    """`[B]` tokens of each sequence that are not padding: from half of them to all."""
    return torch.linspace(case.T // 2, case.T, case.B, device=device).int()


def block_ids(case: Case, device: str) -> Tensor:
    """`[1, T]`: the image of each token, -1 for text; text before, between and after images."""
    position = torch.arange(case.T, device=device)
    image, place = position // (4 * case.span), position % (4 * case.span)
    inside = (place >= case.span) & (place < 2 * case.span)
    return torch.where(inside, image, -1)[None]


def intervals(case: Case, device: str) -> tuple[Intervals | None, bool]:
    """mmopt's `intervals` and `causal`."""
    S, T = case.S, case.T
    if case.mask in ("full", "causal"):
        return None, case.mask == "causal"
    if case.mask == "sliding":
        return Intervals.sliding_window(case.span - 1, 0, S, T, device=device), False
    if case.mask == "packed":
        edges = torch.tensor(document_edges(case), dtype=torch.int32, device=device)
        return Intervals.packed(edges, S) & Intervals.causal(S, device=device), False
    if case.mask == "images":
        return Intervals.bidirectional_blocks(block_ids(case, device), S), False
    return Intervals.key_padding(lengths(case, device), S, T=T), True


def mask_function(case: Case, device: str) -> MaskFunction | None:
    """The mask as a function; None where every query sees every key."""
    if case.mask == "full":
        return None
    shift = case.T - case.S

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + shift >= j

    if case.mask == "causal":
        return causal
    if case.mask == "sliding":
        span = case.span
        return lambda b, h, i, j: (i + shift >= j) & (i + shift - j < span)
    if case.mask == "packed":
        position = torch.arange(case.S, device=device)
        inner = torch.tensor(document_edges(case)[1:-1], device=device)
        document = torch.searchsorted(inner, position, right=True)
        return lambda b, h, i, j: causal(b, h, i, j) & (document[i] == document[j])
    if case.mask == "images":
        image = block_ids(case, device)[0]
        return lambda b, h, i, j: causal(b, h, i, j) | ((image[i] == image[j]) & (image[i] >= 0))
    real = lengths(case, device)
    return lambda b, h, i, j: causal(b, h, i, j) & (j < real[b])


def dense_mask(case: Case, device: str) -> Tensor | None:
    """Bool `[B or 1, 1, S, T]`, as Hugging Face makes one for all layers."""
    function = mask_function(case, device)
    if function is None:
        return None
    B = case.B if case.mask == "padded" else 1
    b, h, i, j = (torch.arange(n, device=device) for n in (B, 1, case.S, case.T))
    seen = function(b[:, None, None, None], h[:, None, None], i[:, None], j)
    return seen.expand(B, 1, case.S, case.T).contiguous()


def visible_pairs(case: Case) -> int:
    """(query, key) pairs that the mask leaves, over batch and query heads."""
    found, causal = intervals(case, "cpu")
    if causal and found is not None:
        found = found & Intervals.causal(case.S, case.T)
    if found is None:
        found = (
            Intervals.causal(case.S, case.T)
            if causal
            else Intervals.sliding_window(None, None, case.S, case.T)
        )
    rows = (found.hi - found.lo).clamp(min=0).sum(1, dtype=torch.int64).expand(case.B)
    return int(rows.sum()) * case.Hq


def useful_flops(case: Case, direction: str) -> int:
    """Of the products over visible pairs alone: two forward, five more backward, 2D FLOPs each."""
    products = {"forward": 2, "forward+backward": 7}[direction]
    return products * 2 * case.D * visible_pairs(case)


# --- peers: masks are made here, outside the timer ------------------------------------------------


def mmopt(case: Case, device: str) -> Op:
    """This project's op, as it chooses."""
    found, causal = intervals(case, device)
    return lambda q, k, v: attention(q, k, v, intervals=found, causal=causal)


def mmopt_triton(case: Case, device: str) -> Op:
    """This project's own kernel, where `mmopt` may hand plain calls to PyTorch's."""
    found, causal = intervals(case, device)
    return lambda q, k, v: attention(q, k, v, intervals=found, causal=causal, impl="triton")


@dataclass(frozen=True)
class OnePass:
    """`mmopt_triton` whose backward is one pass with a tile that no shipped table asks for.

    Attributes:
        candidate: which of those to tune with.
    """

    candidate: int

    def __call__(self, case: Case, device: str) -> Op:
        """Of the cases for which it was written: masks at the greatest length."""
        if case.name not in ("images-16k", "packed-16k", "sliding-16k"):
            raise Unavailable("one pass is timed with a mask at 16384 tokens alone")
        return mmopt_triton(case, device)

    def during(self, call: Callable[[], Any], device: str) -> Callable[[], Any]:
        """The same call with all that it launches under this tile, as autograd runs it too."""
        from mmopt_kernels.attention.kernel_backward import ONE_PASS

        tile = ONE_PASS[128][self.candidate]
        if device == "cpu":  # interpreted, where nothing is described
            tile = {**tile, "TMA": False, "BULK": False}
        forced: Mapping[str, tuning.Config] = {"attention_backward_one_pass": tile}

        def held() -> Any:
            with tuning.forcing(forced):
                return call()

        return held


def sdpa(case: Case, device: str) -> Op:
    """SDPA without a mask tensor."""
    if case.mask not in ("full", "causal"):
        raise Unavailable(f"SDPA has no {case.mask} mask but a dense one")
    causal, gqa = case.mask == "causal", case.Hq != case.Hkv
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def sdpa_mask(case: Case, device: str) -> Op:
    """SDPA with a dense mask, made once as for all layers of a model."""
    mask, gqa = dense_mask(case, device), case.Hq != case.Hkv
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def sdpa_backend(backend: SDPBackend, most_scores: int | None = None) -> Callable[..., Op]:
    """SDPA held to one backend, with a dense mask where it needs one.

    Args:
        most_scores: refuse cases with more scores than that.
    """

    def build(case: Case, device: str) -> Op:
        scores = case.B * case.Hq * case.S * case.T
        if most_scores is not None and scores > most_scores:
            raise Unavailable(f"{scores} scores, expected at most {most_scores}")
        call = (sdpa if case.mask in ("full", "causal") else sdpa_mask)(case, device)

        def held(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return call(q, k, v)

        return held

    return build


def flex(case: Case, device: str) -> Op:
    """FlexAttention compiled; its block mask, like every mask here, is made outside the timer."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    function, gqa = mask_function(case, device), case.Hq != case.Hkv
    block_mask = None
    if function is not None:
        B = case.B if case.mask == "padded" else None
        block_mask = create_block_mask(function, B, None, case.S, case.T, device=device)
    # As one shape of many, the next case would be compiled with dynamic shapes, and slower.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def flash_attn(case: Case, device: str) -> Op:
    """The flash-attn package, where installed and the mask is one of its options."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if case.mask == "packed":
        edges = [edge + b * case.S for b in range(case.B) for edge in document_edges(case)[:-1]]
        ends = torch.tensor([*edges, case.B * case.S], dtype=torch.int32, device=device)
        most = int(ends.diff().max())

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
            out = flash_attn_varlen_func(*flat, ends, ends, most, most, causal=True)
            return out.unflatten(0, (case.B, case.S)).transpose(1, 2)

        return varlen
    if case.mask not in ("full", "causal", "sliding"):
        raise Unavailable(f"flash-attn has no {case.mask} mask")
    window = (case.span - 1, 0) if case.mask == "sliding" else (-1, -1)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = case.mask != "full"
        return flash_attn_func(q, k, v, causal=causal, window_size=window).transpose(1, 2)

    return dense


CPU_PEERS: dict[str, Callable[[Case, str], Op]] = {
    "mmopt": mmopt,
    "sdpa": sdpa,
    "sdpa-mask": sdpa_mask,
    "flex": flex,
}
GPU_PEERS: dict[str, Callable[[Case, str], Op]] = {
    "mmopt": mmopt,
    "mmopt-triton": mmopt_triton,
    "mmopt-one-pass-32x64": OnePass(0),
    "mmopt-one-pass-32x128": OnePass(2),
    "mmopt-one-pass-64x128": OnePass(3),
    "sdpa-flash": sdpa_backend(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": sdpa_backend(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": sdpa_backend(SDPBackend.EFFICIENT_ATTENTION),
    # It keeps the scores, several times over: 2**28 of them are 1 GiB each time in float32.
    "sdpa-math": sdpa_backend(SDPBackend.MATH, most_scores=2**28),
    "flex": flex,
    "flash-attn": flash_attn,
}


def forward(case: Case, op: Op, device: str = "cpu") -> Callable[[], Tensor]:
    """A call of the op, and the layout that its caller wants next."""
    q, k, v = (x.detach() for x in tensors(case, device))

    def call() -> Tensor:
        with torch.no_grad():
            return op(q, k, v).transpose(1, 2).contiguous()

    return call


def backward(case: Case, op: Op, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward in one call, so that both run on the stream that captures a graph."""
    qkv = tensors(case, device)
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(case.B, case.S, case.Hq, case.D, generator=generator, device=device)
    grad = grad.to(case.dtype)
    return lambda: torch.autograd.grad(op(*qkv).transpose(1, 2).contiguous(), qkv, grad)


CALLS: dict[str, Callable[..., Callable[[], Any]]] = {
    "forward": forward,
    "forward+backward": backward,
}


def runnable(case: Case, build: Callable[[Case, str], Op], direction: str, device: str) -> Any:
    """What to time: a call that has run once.

    Raises:
        Unavailable: the peer cannot run this case here, in its own words.
    """
    call = CALLS[direction](case, build(case, device), device)
    if isinstance(build, OnePass):
        call = build.during(call, device)
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        # SDPA's backends, FlexAttention and flash-attn say so by raising; so does a full GPU.
        lines = str(error).splitlines()
        said = next(
            (x for x in lines if re.search("not support|No (available|viable)", x)), lines[0]
        )
        raise Unavailable(f"{type(error).__name__}: {said.strip()[:200]}") from error
    return call

"""When PyTorch's own CUDA kernels take an attention call, and how each of them is called.

They know no intervals, softcap, sinks or dropout of ours, so they are for plain calls: every key
visible, or causal with as many queries as keys. Among those `impl="auto"` takes the one that the
table in ``dispatch.json`` names, by target, pass, dtype, head dimension and length, and ours where
it names none. Forward and backward choose apart: any backward does that is given q, k, v, out and
lse, whichever kernel those came from.

Deciding reads shapes, strides and settings only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from mmopt_kernels import _triton

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """What one of PyTorch's kernels can do, apart from what `refusal` asks of all of them.

    The limits are PyTorch's (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) or tighter:
    calling the kernels directly passes by its checks.
    """

    dtypes: tuple[torch.dtype, ...]
    head_dim: int
    grouped: bool  # fewer key heads than query heads
    # On these targets backward stops at head_dim 192.
    narrow: tuple[str, ...]
    nvidia_only: bool
    least_keys: int
    # Built in, and not switched off by the user.
    enabled: Callable[[], bool]
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    # grad_out, q, k, v, out, lse, causal, scale
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float],
        tuple[Tensor, Tensor, Tensor],
    ]


@dataclass(frozen=True)
class Rule:
    """A backend, and the calls that it is the fastest for. `source` is where that is from."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int]  # least and greatest
    least_length: int  # of queries, and of keys
    source: str


# Random number states that backward takes and, without dropout, does not read.


def _no_state(q: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [q.new_empty(shape, dtype=dtype) for shape in shapes]


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    S, T = q.shape[2], k.shape[2]
    state = _no_state(q, (2,), (), dtype=torch.uint64)
    # No cumulative lengths: the batch is dense.
    return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        grad_out, q, k, v, out, lse, None, None, S, T, 0.0, causal, *state, scale=scale
    )


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse.view(q.shape[:3])


@functools.cache
def _cudnn_lse_dims() -> int:
    """4, for ``[B, H, S, 1]``, or 3: backward takes lse as forward returns it."""
    x = torch.empty(1, 1, 2, 8, dtype=torch.float16, device="meta")
    _, lse, *_ = aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)
    return lse.dim()  # type: ignore[no-any-return]


def _cudnn_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    S, T = q.shape[2], k.shape[2]
    state = _no_state(q, (), (), dtype=torch.int64)
    lse = lse.unsqueeze(3) if _cudnn_lse_dims() == 4 else lse
    # No bias and no cumulative lengths.
    return aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
        grad_out, q, k, v, out, lse, *state, None, None, None, S, T, 0.0, causal, scale=scale
    )


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    # Rows of lse are padded to a multiple of 32.
    return out, lse.narrow(2, 0, q.shape[2])


def _efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = _no_state(q, (), (), dtype=torch.int64)
    # exp(score - inf) is 0, whatever the score of a row that is not there.
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, padded, *state, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _cudnn_enabled() -> bool:
    cudnn = torch.backends.cudnn
    # 9.0 is the least that PyTorch uses for attention; without cuDNN it has no version.
    there = cudnn.enabled and (cudnn.version() or 0) >= 90000  # type: ignore[no-untyped-call]
    return there and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def _flash_enabled() -> bool:
    cuda = torch.backends.cuda
    there = cuda.is_flash_attention_available()
    return there and cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]


# In the order in which impl="sdpa" tries them.
BACKENDS = {
    "cudnn": Backend(
        dtypes=HALF,
        head_dim=128,
        grouped=True,
        narrow=(),
        nvidia_only=True,
        least_keys=2,
        enabled=_cudnn_enabled,
        forward=_cudnn_forward,
        backward=_cudnn_backward,
    ),
    "flash": Backend(
        dtypes=HALF,
        head_dim=256,
        grouped=True,
        narrow=("sm_86", "sm_89", "sm_120", "sm_121"),
        nvidia_only=False,
        least_keys=1,
        enabled=_flash_enabled,
        forward=_flash_forward,
        backward=_flash_backward,
    ),
    "efficient": Backend(
        dtypes=(*HALF, torch.float32),
        head_dim=256,
        grouped=False,
        narrow=(),
        nvidia_only=True,
        least_keys=1,
        enabled=torch.backends.cuda.mem_efficient_sdp_enabled,
        forward=_efficient_forward,
        backward=_efficient_backward,
    ),
}
# cuDNN takes no more sequences or heads.
MOST_CUDNN = 65535
# Rows are read 16 bytes at a time.
ALIGNMENT = 16


@functools.cache
def table() -> dict[tuple[str, str], tuple[Rule, ...]]:
    """The rules by target and pass, ``"forward"`` or ``"backward"``."""
    text = resources.files(__package__).joinpath("dispatch.json").read_text()
    rules: dict[tuple[str, str], tuple[Rule, ...]] = {}
    for target, entries in json.loads(text).items():
        for entry in entries:
            rule = Rule(
                backend=entry["backend"],
                dtypes=tuple(getattr(torch, name) for name in entry["dtypes"]),
                head_dims=(entry["head_dims"][0], entry["head_dims"][1]),
                least_length=entry["least_length"],
                source=entry["source"],
            )
            key = (target, entry["pass"])
            rules[key] = (*rules.get(key, ()), rule)
    return rules


def refusal(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, target: str) -> str | None:
    """Why the backend cannot take this plain call, None where it can."""
    backend = BACKENDS[name]
    B, Hq, S, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    if backend.nvidia_only and not target.startswith("sm_"):
        return f"{target} is no NVIDIA GPU"
    if target.startswith("sm_") and int(target[3:]) < 80:
        return f"{target} is older than sm_80"
    if not backend.enabled():
        return "this PyTorch lacks it, or torch.backends switches it off"
    if q.dtype not in backend.dtypes:
        return f"q is {q.dtype}"
    limit = min(backend.head_dim, 192) if target in backend.narrow else backend.head_dim
    if limit < D or D % 8:
        return f"head dimension {D} is not a multiple of 8 up to {limit}"
    if Hq != Hkv and not backend.grouped:
        return f"{Hkv} key heads are not {Hq}"
    if causal and S not in (1, T):
        return f"{S} queries of a causal mask are not {T} like the keys"
    if min(B, Hq, S) == 0 or backend.least_keys > T:
        return f"{T} keys for {S} queries are too few"
    if name == "cudnn" and max(B, Hq) > MOST_CUDNN:
        return f"{B} sequences of {Hq} heads are too many"
    for x in (q, k, v):
        offsets = (x.storage_offset(), *(x.stride(i) for i in range(3) if x.shape[i] > 1))
        if x.stride(3) != 1 or any(n * x.element_size() % ALIGNMENT for n in offsets):
            return "rows are not aligned to 16 bytes"
    return None


def fastest(
    step: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool = False
) -> str | None:
    """The backend that the table names for this plain call and that can take it, if any.

    ``step`` is ``"forward"`` or ``"backward"``. No backend adds up a gradient in one order.
    """
    target = _triton.target(q.device)
    rules = table().get((target, step), ())
    if step == "backward" and (deterministic or torch.are_deterministic_algorithms_enabled()):
        return None
    length = min(q.shape[2], k.shape[2])
    for rule in rules:
        least, most = rule.head_dims
        fits = q.dtype in rule.dtypes and least <= q.shape[3] <= most
        if fits and length >= rule.least_length:
            found = rule.backend
            return found if refusal(found, q, k, v, causal, target) is None else None
    return None


def first_able(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[str | None, str]:
    """The first backend that can take this plain call, and why those before it cannot."""
    target = _triton.target(q.device)
    reasons: list[str] = []
    for name in BACKENDS:
        reason = refusal(name, q, k, v, causal, target)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Out, in whatever layout, and lse ``[B, Hq, S]`` float32."""
    # PyTorch aligns a causal mask at the top left; the one query of ours sees every key.
    return BACKENDS[name].forward(q, k, v, causal and q.shape[2] > 1, scale)


def backward(
    name: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKENDS[name].backward(grad_out, q, k, v, out, lse, causal and q.shape[2] > 1, scale)

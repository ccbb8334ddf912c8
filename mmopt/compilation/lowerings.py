"""What mmopt has Inductor lower in another way than Inductor would."""

import functools
from typing import Any

import torch


@functools.cache
def keep_lengths_free() -> None:
    """Have the backward of a convolution over one dimension leave its length free.

    Inductor of torch 2.13 lowers `aten.convolution_backward` for its 2-D Triton templates, and on
    the way makes the strides, and with them the length of a sequence, constants of the graph, of
    1-D convolutions too, for which it then calls aten all the same. Those go to aten at once.
    """
    from torch._inductor.lowering import fallback_handler, lowerings

    op = torch.ops.aten.convolution_backward.default
    before = lowerings.get(op)
    if before is None:
        return
    aten = fallback_handler(op)  # type: ignore[no-untyped-call]

    @functools.wraps(before)
    def lower(grad_out: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        flat = len(weight.get_size()) == 3
        return (aten if flat else before)(grad_out, input, weight, *args, **kwargs)

    lowerings[op] = lower

"""How mmopt has Dynamo trace a model: the same for a compiled call and for a stored graph."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx.experimental import _config

_LOGGING = {
    method
    for name in ("info", "info_once", "warning", "warning_once")
    if (method := getattr(logging.Logger, name, None)) is not None
}


@contextmanager
def tracing(*, infer: bool) -> Iterator[None]:
    """Set what Dynamo takes for given, and in `infer` mode keep gradients out."""
    with (
        torch._dynamo.config.patch(
            # A model's floats (scales, epsilons) are constants. Left to guess whether they change,
            # Dynamo under dynamic=True lowers the graph, learns that they cannot be inputs, and
            # traces and lowers all of it once more.
            specialize_float=True,
            # Logging breaks graphs; what is logged was logged when the batch was tried eagerly.
            ignore_logging_functions=_LOGGING,
        ),
        # Sizes that happen to be equal now (three rows, three colours) need not be in the next
        # batch.
        _config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        torch.set_grad_enabled(torch.is_grad_enabled() and not infer),
    ):
        yield

"""How mmopt has a model traced and lowered: the same for a compiled call and a stored graph."""

import logging
from typing import Any

import torch
from torch.fx.experimental import _config

from mmopt.compilation.grouping import LORA_GROUPS

_LOGGING = {
    method
    for name in ("info", "info_once", "warning", "warning_once")
    if (method := getattr(logging.Logger, name, None)) is not None
}


def inductor_options() -> dict[str, Any]:
    """What Inductor is told for each graph. A pass that the user has set stays the only one."""
    if torch._inductor.config.pre_grad_custom_pass is not None:
        return {}
    return {"pre_grad_custom_pass": LORA_GROUPS}


class Tracing:
    """A context that sets what Dynamo takes for given, and in `infer` mode keeps gradients out.

    Made once and entered by every call: making the patches takes longer than entering.
    """

    def __init__(self, *, infer: bool) -> None:
        self._infer = infer
        self._patches = (
            torch._dynamo.config.patch(
                # A model's floats (scales, epsilons) are constants. Left to guess whether they
                # change, Dynamo under dynamic=True lowers the graph, learns that they cannot be
                # inputs, and traces and lowers all of it once more.
                specialize_float=True,
                # Logging breaks graphs; what is logged was logged when the batch was tried eagerly.
                ignore_logging_functions=_LOGGING,
            ),
            # Sizes that happen to be equal now (three rows, three colours) need not be in the next
            # batch.
            _config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        )

    def gradients(self) -> torch.set_grad_enabled:
        """The context of gradients alone."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self._infer)

    def __enter__(self) -> None:
        self._entered = (*self._patches, self.gradients())
        for context in self._entered:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._entered):
            context.__exit__(*error)

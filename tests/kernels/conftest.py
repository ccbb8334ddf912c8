"""Run the Triton kernels in Triton's interpreter, or on the GPU where there is one.

Triton reads TRITON_INTERPRET whenever it decorates a function, its own library's included, so the
variable has to be set before the first import of triton in the process. Test modules collected
earlier import it too (through transformers, or torch.utils.flop_counter): what sets it for the
whole suite is tests/conftest.py, and this file serves a run of this folder alone.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "tests/kernels: triton was imported before TRITON_INTERPRET=1 was set, so its kernels "
            "cannot run here. Set it in tests/conftest.py, or run TRITON_INTERPRET=1 pytest."
        )
    os.environ["TRITON_INTERPRET"] = "1"

"""What importing mmopt_kernels needs, seen from fresh processes."""

import os
import subprocess
import sys

import mmopt_kernels

# Blocks what must not be imported; None in sys.modules makes an import of it fail.
BLOCKED = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"

REFERENCE = """
import torch
import mmopt_kernels as m

q = torch.randn(1, 2, 5, 8, requires_grad=True)
for impl in ("reference", "cpu", "auto"):
    m.attention(q, q, q, causal=True, impl=impl).sum().backward()
x = torch.randn(3, 8, requires_grad=True)
for impl in ("reference", "addmm", "auto"):
    y = m.lora_linear(x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), scale=1.0, impl=impl)
    y.sum().backward()
"""


def run(code: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_op_runs_without_triton() -> None:
    """Import, forward and backward of what "auto" picks on the CPU, with Triton blocked."""
    run(BLOCKED.format(names=["triton"]) + REFERENCE)


def test_importing_and_running_on_cpu_imports_no_kernel() -> None:
    """Triton may be there all the same: torch.utils.flop_counter imports it where installed."""
    run(REFERENCE + "import sys\nassert not [n for n in sys.modules if n.endswith('.kernel')]")


def test_needs_none_of_the_packages_above_it() -> None:
    run(BLOCKED.format(names=["mmopt", "mmopt_export", "transformers", "peft"]) + REFERENCE)


def test_errors_and_version_need_no_torch() -> None:
    """Serving an artifact imports them, in an environment that may have neither."""
    run(BLOCKED.format(names=["torch", "triton"]) + "import mmopt_kernels, mmopt_kernels.errors")


def test_an_ops_name_is_its_function_whatever_was_imported_first() -> None:
    """The folder has the same name, and importing from it must not replace the function."""
    run("""
import mmopt_kernels.attention.api
from mmopt_kernels import attention, lora_linear
from mmopt_kernels.lora_linear.ops import IMPLS
import mmopt_kernels

assert attention.__name__ == "attention"
assert mmopt_kernels.lora_linear is lora_linear
""")


def test_public_names_are_exactly_the_listed_ones() -> None:
    """Nothing becomes public by accident: every name is listed, or private to the package."""
    assert mmopt_kernels.__all__ == sorted(mmopt_kernels.__all__)
    assert all(hasattr(mmopt_kernels, n) for n in mmopt_kernels.__all__)
    submodules = {n.split(".")[1] for n in sys.modules if n.startswith("mmopt_kernels.")}
    imports = {"Any", "ModuleType", "TYPE_CHECKING", "import_module", "sys"}
    found = {n for n in vars(mmopt_kernels) if not n.startswith("_")} - submodules - imports
    assert found <= set(mmopt_kernels.__all__)

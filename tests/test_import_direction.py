"""Imports go one way: mmopt_kernels <- mmopt_export <- mmopt."""

import subprocess
import sys

import pytest

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked: imports go one way")
sys.meta_path.insert(0, Block())
import importlib, pkgutil
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print("imported")
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        # Hugging Face's kernels is no part of this, but the packages above are.
        ("mmopt_kernels", ("mmopt_export", "mmopt", "transformers", "peft", "onnx")),
        ("mmopt_export", ("mmopt",)),
        ("mmopt", ("bench", "demo", "tests")),
    ],
)
def test_every_module_imports_with_the_packages_above_it_blocked(
    package: str, blocked: tuple[str, ...]
) -> None:
    code = BLOCK.format(package=package, blocked=blocked)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("imported"), result.stderr


def test_the_command_line_answers_without_importing_torch() -> None:
    code = (
        "import sys; sys.argv = ['mmopt', '--help']\n"
        "from mmopt.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: print('exit', stop.code)\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-2:] == ["exit 0", "[]"], result.stderr

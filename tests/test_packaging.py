"""The wheel: what it installs, and that it works outside the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what git tracks and what it does not ignore, not from build leftovers."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    output = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", output, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(output.glob("*.whl"))


def test_the_wheel_installs_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {one for one in top if not one.endswith(".dist-info")} == {
        "mmopt",
        "mmopt_export",
        "mmopt_kernels",
    }
    for package in ("mmopt", "mmopt_export", "mmopt_kernels"):
        assert f"{package}/py.typed" in names


def test_the_installed_wheel_runs_doctor_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A new environment with only the wheel in it; its dependencies come from this one."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--disable-pip-version-check", wheel],
        check=True,
    )  # fmt: skip
    site = next((environment / "lib").glob("python*/site-packages"))
    installed = {path.name for path in site.iterdir()}
    assert not installed & {"kernels", "export", "bench", "tests", "demo", "scripts"}
    # Only the dependencies: an editable install of the checkout there must not be found.
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    links = tmp_path / "dependencies"
    links.mkdir()
    for path in here.iterdir():
        if "mmopt" not in path.name and path.suffix != ".pth":
            (links / path.name).symlink_to(path)
    result = subprocess.run(
        [environment / "bin" / "mmopt", "doctor", "--target", "cpu", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(links)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    json.loads(result.stdout)
    where = subprocess.run(
        [python, "-c", "import mmopt, mmopt_kernels; print(mmopt.__file__, mmopt.__version__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(links)},
    )  # fmt: skip
    assert where.stdout.startswith(str(environment))
    assert where.stdout.split()[1] in wheel.name


def test_transformers_imports_from_the_checkout_with_hugging_face_kernels_installed(
    tmp_path: Path,
) -> None:
    """A folder called kernels in the checkout must not hide Hugging Face's package."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "STAND_IN = True\n"
        "class LayerRepository: pass\n"
        "class Mode: pass\n"
        "class Device: pass\n"
        "def get_kernel(*a, **k): raise RuntimeError('stand-in')\n"
        "def register_kernel_mapping(*a, **k): pass\n"
        "def replace_kernel_forward_from_hub(*a, **k): pass\n"
        "def use_kernel_forward_from_hub(name): return lambda cls: cls\n"
        "def kernelize(model, **k): return model\n"
    )
    metadata = tmp_path / "kernels-0.14.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.14.0\n")
    code = (
        "import kernels; assert kernels.STAND_IN, kernels\n"
        "import transformers; from transformers import BertModel\n"
        "import mmopt_kernels; print('imported')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True,
        # The checkout's root comes first, as when Python runs from there.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
    )  # fmt: skip
    assert result.stdout.strip() == "imported", result.stderr


def test_no_regular_package_stands_in_kernels_or_export() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "export" / "__init__.py").exists()

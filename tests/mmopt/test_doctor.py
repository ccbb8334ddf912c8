"""`mmopt doctor`: every finding is a line, whatever is missing or broken."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement as Pinned

from mmopt import doctor
from mmopt_kernels.errors import InputError

DOCTOR = """
import typer
from mmopt.cli.output import command
from mmopt.cli.doctor import doctor
typer.run(command(doctor))
"""


def run(*options: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON document of `mmopt doctor --json`."""
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR, "--json", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def shadowing(folder: Path) -> str:
    """A PYTHONPATH on which the modules of `folder` hide all others."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in document["lines"]}


@pytest.mark.slow
def test_the_cpu_target_works_where_the_tests_run() -> None:
    code, document = run("--target", "cpu")
    lines = by_name(document)
    wrong = {name: line for name, line in lines.items() if line["status"] in ("missing", "failed")}
    assert (code, wrong) == (0, {})
    assert document["target"] == "cpu"
    assert document["works"] is True
    assert lines["ORT CPUExecutionProvider"]["status"] == "ok"
    assert lines["torch.compile"]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(doctor._nvidia_smi() is not None, reason="this machine has an NVIDIA GPU")
def test_the_cuda_target_fails_without_a_gpu_and_every_wrong_line_has_a_remedy() -> None:
    code, document = run("--target", "cuda")
    assert code == 1
    assert document["works"] is False
    wrong = [line for line in document["lines"] if line["status"] in ("missing", "failed")]
    assert {"GPU and driver", "torch CUDA"} <= {line["name"] for line in wrong}
    for line in wrong:
        assert line["remedy"], line


def test_a_broken_torch_is_a_line_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: wrong ELF class')")
    code, document = run("--target", "cpu", env={"PYTHONPATH": shadowing(tmp_path)})
    assert code == 1
    lines = by_name(document)
    assert lines["torch"]["status"] == "failed"
    assert "does not import: OSError: libtorch.so: wrong ELF class" in lines["torch"]["detail"]
    assert lines["torch"]["remedy"].startswith("Run `pip install --force-reinstall torch==")
    assert lines["torch.compile"]["status"] == "failed"
    # What does not need torch is still tried.
    assert lines["onnx"]["status"] == "ok"
    assert lines["ORT CPUExecutionProvider"]["status"] == "ok"


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules hide the installed ones from the probes."""
    monkeypatch.setenv("PYTHONPATH", shadowing(tmp_path))
    return tmp_path


ONNX = doctor.Requirement("onnx", ("onnx",), "1.0")
RICH = doctor.Requirement("rich", ("rich",), "1.0")


def test_a_package_that_kills_the_process_is_a_line_and_the_others_are_tried(shadow: Path) -> None:
    (shadow / "onnx.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    killed, fine = doctor.package_lines([ONNX, RICH], "cpu")
    assert killed.status == "failed"
    assert "the process was killed by signal 11" in killed.detail
    assert fine.status == "ok"


def test_a_probe_that_hangs_is_a_line(shadow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shadow / "onnx.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 3.0)
    fine, hung = doctor.package_lines([RICH, ONNX], "cpu")
    assert fine.status == "ok"
    assert "does not import: no answer within 3 s" in hung.detail


@pytest.mark.parametrize(
    ("requirement", "target", "status", "remedy"),
    [
        (
            doctor.Requirement("nothing", ("no-such-distribution",), "2.0"),
            "cpu",
            "missing",
            "Run `pip install 'nothing>=2.0'`.",
        ),
        (
            doctor.Requirement("nothing", ("no-such-distribution",), "2.0", targets=("cuda",)),
            "cpu",
            "optional",
            "Run `pip install 'nothing>=2.0'`.",
        ),
        (
            doctor.Requirement("nothing", ("no-such-distribution",), "2", extras=doctor.TARGETS),
            "cuda",
            "missing",
            "Run `pip install 'mmopt[cuda]'`.",
        ),
        (
            doctor.Requirement("rich", ("rich",), "9999"),
            "cpu",
            "failed",
            "Run `pip install -U 'rich>=9999'`.",
        ),
        (
            doctor.Requirement("rich", ("rich", "packaging"), "1"),
            "cuda",
            "failed",
            "Run `pip uninstall -y rich packaging`, then `pip install 'mmopt[cuda]'`.",
        ),
    ],
    ids=["absent", "absent-and-optional", "absent-extra", "too-old", "installed-twice"],
)
def test_what_is_wrong_with_a_package_names_its_remedy(
    requirement: doctor.Requirement, target: doctor.Target, status: str, remedy: str
) -> None:
    (line,) = doctor.package_lines([requirement], target)
    assert (line.status, line.remedy) == (status, remedy)


def test_a_library_that_onnxruntime_only_logs_is_named() -> None:
    done = subprocess.CompletedProcess(
        [],
        1,
        "",
        "[E:onnxruntime] Failed to load library libonnxruntime_providers_cuda.so with error: "
        "libcudnn.so.9: cannot open shared object file: No such file or directory\n"
        "the node ran on CPUExecutionProvider instead\n",
    )
    reason = doctor._reason(done)
    assert reason == "the node ran on CPUExecutionProvider instead: libcudnn.so.9 is missing"


def test_the_exception_is_shown_and_not_the_hints_after_it() -> None:
    done = subprocess.CompletedProcess(
        [],
        1,
        "",
        "Traceback (most recent call last):\n  raise exc.InvalidCxxCompiler\n"
        "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found\n\n"
        "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace\n",
    )
    assert doctor._reason(done).endswith("InvalidCxxCompiler: No working C++ compiler found")


def test_an_unknown_target_is_bad_input() -> None:
    with pytest.raises(InputError, match="--target tpu is not known, expected one of: cpu, cuda"):
        doctor.diagnose("tpu")


def test_the_support_matrix_agrees_with_the_package_metadata() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"]]
    for extra in ("cpu", "cuda"):
        declared += project["optional-dependencies"][extra]
    pinned = {pin.name: str(pin.specifier) for pin in map(Pinned, declared)}
    for requirement in doctor.SUPPORT:
        for distribution in requirement.distributions:
            assert pinned[distribution] == f">={requirement.minimum}"
    assert project["requires-python"] == f">={doctor.MINIMUM_PYTHON}"

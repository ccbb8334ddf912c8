"""Every command: exit codes, one JSON document on stdout, one message on stderr, no traceback."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmopt.cli.main import app
from tiny_artifacts import make_artifact, save_pair

MMOPT = [sys.executable, "-m", "mmopt"]

# One call of each command whose input is bad in the same way: it does not exist.
BAD_CALLS = {
    "train": ["train", "/no/such/recipe.yaml"],
    "compile": ["compile", "/no/such/model"],
    "kernels": ["kernels", "--check", "/no/such/kernels.json"],
    "export": ["export", "/no/such/model", "-o", "{tmp}/out"],
    "verify": ["verify", "/no/such/artifact"],
    "serve": ["serve", "/no/such/artifact"],
    "deploy triton": ["deploy", "triton", "/no/such/artifact", "-o", "{tmp}/models"],
    "bench run": ["bench", "run", "/no/such/model"],
    "bench compare": ["bench", "compare", "/no/such/a.json", "/no/such/b.json"],
    "bench report": ["bench", "report", "/no/such/a.json"],
    "bench exact": ["bench", "exact", "{tmp}", "--baseline", "/no/such/exact.json"],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MMOPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_exits_2_with_one_message_and_no_traceback(name: str, tmp_path: Path) -> None:
    arguments = [argument.format(tmp=tmp_path) for argument in BAD_CALLS[name]]
    result = run(*arguments, "--json")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: /no/such/" in result.stderr
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert document["error"]["message"].startswith("/no/such/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_name_that_is_too_long_is_said_as_other_bad_input(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a" * 300
    bad = [argument.format(tmp=tmp_path) for argument in BAD_CALLS[name]]
    arguments = [f"/{long}" if argument.startswith("/no/such") else argument for argument in bad]
    with pytest.raises(SystemExit) as stopped:
        app([*arguments, "--json"])
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured.err
    assert json.loads(captured.out)["exit_code"] == 2
    assert f"error: /{long[:79]}" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_may_not_be_looked_at_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(SystemExit) as stopped:
        app(["verify", "closed", "--json"])
    captured = capsys.readouterr()
    assert stopped.value.code == 3
    assert captured.err.startswith("error: closed/mmopt.json may not be looked at (permission")


def test_an_error_of_the_system_that_is_no_bad_path_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        app(["verify", "broken"])


def test_a_hub_id_that_cannot_be_reached_exits_3(tmp_path: Path) -> None:
    result = run("export", "someone/not-a-cached-model", "-o", str(tmp_path / "out"), "--json")
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 3
    assert list(tmp_path.iterdir()) == []


def test_bad_usage_exits_2() -> None:
    for arguments in (
        ["export"],
        ["no-such-command"],
        ["bench", "run", "--no-such-option"],
        ["deploy", "triton", "--max-batch", "-1", "artifact", "-o", "models"],
    ):
        result = run(*arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr


def test_verify_prints_one_document_and_exits_0(tmp_path: Path) -> None:
    result = run("verify", str(make_artifact(tmp_path / "artifact")), "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["holds"] is True
    assert document["accuracy"] is None


def test_each_step_of_the_chain_prints_one_document_and_keeps_the_accuracy(
    classifier: Path, texts: Path, tmp_path: Path
) -> None:
    """The whole chain on the tiny model; nothing that a library prints may reach stdout."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {classifier}\ntask: text-classification\noutput: {tmp_path}/adapter\n"
        f"data: {{train: {texts}, test: {texts}, max_length: 6}}\n"
        "training: {epochs: 2, batch_size: 8}\ncompile: false\n"
    )
    trained = run("train", str(recipe), "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["recompiles"] is None
    adapter = ["--adapter", f"{tmp_path}/adapter"]
    exported = run("export", str(classifier), *adapter, "-o", f"{tmp_path}/out", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["status"] == "verified"
    # Texts are longer than 6 tokens: the artifact must cut them where training did.
    verified = run("verify", f"{tmp_path}/out", "--data", str(texts), "--json")
    accuracy = json.loads(trained.stdout)["test_accuracy"]
    assert json.loads(verified.stdout)["accuracy"] == accuracy


@pytest.mark.slow  # in a process of this test's: test_compile_command.py
def test_compile_prints_one_document_from_a_process_of_its_own(
    classifier: Path, adapter: Path
) -> None:
    arguments = ("--adapter", str(adapter), "--length", "8", "--rounds", "2", "--json")
    compiled = run("compile", str(classifier), *arguments)
    assert compiled.returncode == 0, compiled.stderr
    document = json.loads(compiled.stdout)
    assert document["graph_breaks"] == []
    assert document["optimization"]["rows"]


def test_a_tampered_artifact_exits_1(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    (artifact / "model.onnx").write_bytes(b"not a model")
    result = run("verify", str(artifact))
    assert result.returncode == 1
    assert "model.onnx has 11 bytes" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_export_is_signed_replaced_only_with_force_and_verified_with_the_public_key(
    classifier: Path, tmp_path: Path
) -> None:
    private, public = save_pair(tmp_path)
    output = tmp_path / "out"
    export = ("export", str(classifier), "-o", str(output), "--sign", str(private), "--json")
    done = run(*export)
    assert done.returncode == 0, done.stderr
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert "mmopt.json.sig" in first
    refused = run(*export)
    assert refused.returncode == 2
    assert "Pass --force to replace it" in json.loads(refused.stdout)["error"]["message"]
    assert run(*export, "--force").returncode == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "key.pub", "out"]

    verify = ("verify", str(output), "--public-key", str(public), "--json")
    holds = run(*verify)
    assert holds.returncode == 0, holds.stderr
    assert json.loads(holds.stdout)["signature"] == "holds"
    (output / "mmopt.json.sig").write_bytes(bytes(64))
    broken = run(*verify)
    assert broken.returncode == 1
    assert "was not signed with the key" in json.loads(broken.stdout)["error"]["message"]
    assert "Traceback" not in broken.stderr


def test_a_key_that_cannot_be_used_is_bad_input_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    for arguments in (
        ("export", "/no/such/model", "-o", str(tmp_path / "out"), "--sign", "/no/such/key.pem"),
        ("verify", "/no/such/artifact", "--public-key", "/no/such/key.pem"),
    ):
        result = run(*arguments, "--json")
        assert result.returncode == 2, result.stderr
        assert "/no/such/key.pem cannot be read" in json.loads(result.stdout)["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command_and_lists_exit_codes() -> None:
    result = run("--help")
    names = "doctor train compile kernels export verify serve deploy bench"
    for name in names.split():
        assert name in result.stdout
    assert "Exit codes" in run("export", "--help").stdout


def test_version_is_that_of_the_package() -> None:
    from mmopt import __version__

    assert run("--version").stdout.strip() == f"mmopt {__version__}"

"""Folders appear whole or not at all, whatever happens on the way."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from mmopt_export.files import require_space, sha256, staged_folder
from mmopt_kernels.errors import InputError, MmoptError


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_folder(output) as folder:
        (folder / "a").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["a"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_staged_folder_replaces_an_empty_one(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staged_folder(output) as folder:
        (folder / "a").write_text("x")
    assert (output / "a").read_text() == "x"


def write_then_fail(output: Path, error: Exception) -> None:
    with staged_folder(output) as folder:
        (folder / "a").write_text("x")
        raise error


def test_nothing_is_left_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        write_then_fail(tmp_path / "out", RuntimeError("boom"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_refused_write_exits_3_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    with pytest.raises(MmoptError, match="was not written") as caught:
        write_then_fail(tmp_path / "out", OSError(code, "refused"))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="a folder that is not empty"), staged_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is a file"), staged_folder(tmp_path / "mine"):
        pass


def test_too_little_space_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(MmoptError, match="MB free, expected at least"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_disk_that_fills_in_the_middle_of_an_export_leaves_nothing(
    classifier: Path, tmp_path: Path
) -> None:
    """A file size limit refuses the write of the weights, as a full disk does."""
    output = tmp_path / "out"
    code = (
        "import resource, sys\n"
        "import mmopt_export.pipeline as pipeline\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from mmopt.cli.main import main\n"
        f"sys.argv = ['mmopt', 'export', {str(classifier)!r}, '-o', {str(output)!r}]\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert "was not written" in result.stderr
    assert "no space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []

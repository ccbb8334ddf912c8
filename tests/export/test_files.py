"""Folders appear whole or not at all, whatever happens on the way."""

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmopt_export.files as files
from mmopt_export.files import (
    read_json,
    require_new_folder,
    require_output,
    require_space,
    same_artifact,
    sha256,
    staged_folder,
    staged_folders,
)
from mmopt_kernels.errors import InputError, MmoptError
from tiny_artifacts import make_artifact


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: the bytes of files, nothing of folders, where links point."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = b"-> " + os.readlink(path).encode()
        else:
            found[name] = path.read_bytes() if path.is_file() else b""
    return found


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


def write_then_fail(output: Path, error: BaseException, *, replace: bool = False) -> None:
    with staged_folder(output, replace=replace) as folder:
        (folder / "a").write_text("x")
        raise error


def write_all(outputs: list[Path], *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Replace several folders with new ones, and do something before they are moved in."""
    with staged_folders(outputs, replace=True) as folders:
        for folder in folders:
            (folder / "a").write_text("new")
        meanwhile()


def test_nothing_is_left_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        write_then_fail(tmp_path / "out", RuntimeError("boom"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "refused"), "no space left"),
        (OSError(errno.EROFS, "refused"), "Read-only file system"),
        # As safetensors and tokenizers say it.
        (Exception("I/O error: No space left on device (os error 28)"), "no space left"),
    ],
    ids=["full", "read-only", "rust"],
)
def test_a_refused_write_exits_3_and_leaves_nothing(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    with pytest.raises(MmoptError, match=f"was not written: {reason}") as caught:
        write_then_fail(tmp_path / "out", error)
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


@pytest.mark.parametrize("name", ["out", "deep/out"])
def test_an_output_below_a_link_to_nothing_is_refused_before_the_work(
    tmp_path: Path, name: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    message = r"lies below \S*link, a symbolic link to \S*nowhere, which does not exist\. Make"
    for refuse in (files.require_new_folder, files.require_output):
        with pytest.raises(InputError, match=message):
            refuse(link / name)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    (tmp_path / "nowhere").mkdir()
    with staged_folder(link / name) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "nowhere" / name / "a").read_text() == "new"


def test_too_little_space_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(MmoptError, match="MB free, expected at least"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# With `replace`, the `--force` of the commands.


@pytest.fixture(params=["exchange", "rename"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: in one step, and on file systems that cannot do that."""
    if request.param == "rename":
        monkeypatch.setattr(files, "_exchange", lambda _one, _other: False)
    return str(request.param)


@pytest.mark.usefixtures("exchanging")
def test_an_artifact_is_replaced_and_the_old_one_is_gone(tmp_path: Path) -> None:
    output = make_artifact(tmp_path / "out")
    with staged_folder(output, replace=True) as folder:
        (folder / "a").write_text("new")
        assert (output / "model.onnx").is_file()
    assert contents(tmp_path) == {"out": b"", "out/a": b"new"}
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~files._umask()


@pytest.mark.usefixtures("exchanging")
def test_an_artifact_stays_when_its_replacement_fails(tmp_path: Path) -> None:
    output = make_artifact(tmp_path / "out")
    before = contents(tmp_path)
    for error, raised in (
        (RuntimeError("boom"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "full"), MmoptError),
    ):
        with pytest.raises(raised):
            write_then_fail(output, error, replace=True)
        assert contents(tmp_path) == before


def test_an_exchange_is_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    if not files._exchange(one, other):
        pytest.skip("this file system cannot exchange two folders in one step")
    assert (one / "name").read_text() == "other"
    assert (other / "name").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        files._exchange(one, tmp_path / "missing")


def test_where_folders_can_be_exchanged_an_artifact_is_never_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_artifact(tmp_path / "out")
    (tmp_path / "probe").mkdir()
    if not files._exchange(output, tmp_path / "probe"):
        pytest.skip("this file system cannot exchange two folders in one step")
    files._exchange(output, tmp_path / "probe")

    def refuse(_source: Path, _place: Path) -> None:
        raise AssertionError("between two renames there is no artifact")

    monkeypatch.setattr(files.os, "rename", refuse)
    write_all([output])
    assert contents(output) == {"a": b"new"}


class _Libc:
    """A C library whose renameat2 answers that it cannot."""

    def __init__(self, code: int | None) -> None:
        if code is not None:
            self.renameat2 = _refusing(code)


def _refusing(code: int) -> Callable[..., int]:
    def renameat2(*_arguments: object) -> int:
        ctypes.set_errno(code)
        return -1

    return renameat2


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_folders_cannot_be_exchanged_an_artifact_is_replaced_by_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Other systems, old kernels, network file systems."""
    output = make_artifact(tmp_path / "out")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_args, **_options: _Libc(code))
    write_all([output])
    assert contents(tmp_path) == {"out": b"", "out/a": b"new"}


def test_an_exchange_that_is_refused_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_artifact(tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_args, **_options: _Libc(errno.EACCES))
    with pytest.raises(MmoptError, match="was not written: Permission denied"):
        write_all([output])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("fails", [1, 2])
def test_without_an_exchange_a_rename_that_fails_restores_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """The first rename takes the old artifact aside, the second puts the new one in."""
    output = make_artifact(tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(files, "_exchange", lambda _one, _other: False)
    rename, calls = os.rename, 0

    def fail(source: Path, place: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, place)

    monkeypatch.setattr(files.os, "rename", fail)
    with (
        pytest.raises(MmoptError, match="was not written: Permission denied"),
        staged_folder(output, replace=True) as folder,
    ):
        (folder / "a").write_text("new")
    assert contents(tmp_path) == before


def test_an_old_artifact_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_artifact(tmp_path / "out")

    def refuse(path: Path, **_options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    with (
        pytest.raises(MmoptError, match="was replaced and is complete, but what stood there"),
        staged_folder(output, replace=True) as folder,
    ):
        (folder / "a").write_text("new")
    assert contents(output) == {"a": b"new"}


def test_force_replaces_nothing_but_an_artifact(tmp_path: Path) -> None:
    def refused(output: Path, message: str) -> None:
        before = contents(tmp_path)
        with (
            pytest.raises(InputError, match=message),
            staged_folder(output, replace=True) as folder,
        ):
            (folder / "a").write_text("new")
        assert contents(tmp_path) == before

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"x")
    refused(photos, r"has no mmopt\.json, so mmopt did not write it and --force does not")
    (photos / "mmopt.json").write_text("{")
    refused(photos, r"is not valid JSON .* --force does not replace it")
    (photos / "mmopt.json").write_text('{"schema": 2}')
    refused(photos, "lists no files, so --force does not replace")
    refused(photos / "holiday.jpg", "is a file, expected a new or an empty folder")

    artifact = make_artifact(tmp_path / "artifact")
    (artifact / "notes.txt").write_text("mine")
    refused(artifact, r"notes\.txt is no file of the artifact")
    (artifact / "notes.txt").unlink()
    link = tmp_path / "current"
    link.symlink_to(artifact, target_is_directory=True)
    refused(link, "is a symbolic link, expected a folder or nothing")


def test_force_replaces_a_signed_or_damaged_artifact_and_makes_a_new_one(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    (artifact / "mmopt.json.sig").write_bytes(b"x")
    (artifact / "model.onnx").unlink()
    (tmp_path / "empty").mkdir()
    for output in (artifact, tmp_path / "empty", tmp_path / "new"):
        with staged_folder(output, replace=True) as folder:
            (folder / "a").write_text("new")
        assert contents(output) == {"a": b"new"}


def test_a_folder_that_somebody_fills_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    with pytest.raises(InputError, match=r"notes\.txt is no file of the artifact"):
        write_all([artifact], meanwhile=lambda: (artifact / "notes.txt").write_text("mine"))
    assert (artifact / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_without_force_an_artifact_says_how_to_replace_it(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    with (
        pytest.raises(InputError, match=r"holds an artifact already.*Pass --force to replace it"),
        staged_folder(artifact),
    ):
        pass


@pytest.mark.usefixtures("exchanging")
def test_several_folders_appear_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second cannot be moved into place: the first is taken back, old or new."""
    old, new = make_artifact(tmp_path / "old"), tmp_path / "deep" / "new"
    before = contents(tmp_path)
    move, calls = files._move, 0

    def fail(folder: Path, output: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return move(folder, output)

    monkeypatch.setattr(files, "_move", fail)
    outputs = [old, new, tmp_path / "third"]
    with pytest.raises(MmoptError, match="Read-only file system"):
        write_all(outputs)
    assert contents(tmp_path) == before
    monkeypatch.setattr(files, "_move", move)
    write_all(outputs)
    assert [contents(output) for output in outputs] == [{"a": b"new"}] * 3


def test_folders_made_above_the_output_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        write_then_fail(tmp_path / "a" / "b" / "out", RuntimeError("boom"))
    assert list(tmp_path.iterdir()) == []


# What is refused before any work is done.


@pytest.mark.parametrize(
    ("output", "relation"),
    [("model", "is"), ("model/out", "lies within"), ("model/deep/out", "lies within")],
)
def test_an_output_in_a_folder_that_is_read_is_refused(
    tmp_path: Path, output: str, relation: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for sources in (
        [tmp_path / "model"],
        [tmp_path / "link"],
        [Path("hub/id"), tmp_path / "model"],
    ):
        with pytest.raises(InputError, match=rf"{relation} .*, which is read, expected a folder"):
            require_output(tmp_path / output, sources=sources)
    with pytest.raises(InputError, match="which is read"):
        require_output(tmp_path / "x" / ".." / output, sources=[tmp_path / "model"])


def test_an_output_around_a_folder_that_is_read_is_refused_even_with_force(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    (artifact / "model").mkdir()
    with pytest.raises(InputError, match=r"contains .*model, which is read"):
        require_output(artifact, sources=[artifact / "model"], replace=True)


def test_an_output_beside_what_is_read_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    require_output(tmp_path / "model-out", sources=[tmp_path / "model"])
    require_output(tmp_path / "a" / "b", sources=[tmp_path / "model", Path("a/b")])
    require_output(make_artifact(tmp_path / "old"), sources=[tmp_path / "model"], replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old"]


@pytest.mark.parametrize("require", [require_output, require_new_folder])
def test_an_output_below_a_file_is_refused(require: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in ("out", "deep/out"):
        with pytest.raises(InputError, match="lies below the file"):
            require(tmp_path / "file" / output)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 256, "the longest name in it 256, expected at most 4095 and 255"),
        ("missing/" + "é" * 128, "the longest name in it 256"),
        ("n" * 256 + "/out", "the longest name in it 256"),
        ("/".join(["n" * 99] * 41), r"has \d{4} bytes"),
    ],
    ids=["name", "letters-of-two-bytes", "parent", "path"],
)
def test_an_output_that_no_file_system_holds_is_refused(
    tmp_path: Path, name: str, message: str, replace: bool
) -> None:
    with pytest.raises(InputError, match=message):
        require_output(tmp_path / name, replace=replace)


def test_the_longest_name_there_is_can_be_written(tmp_path: Path) -> None:
    """The folder that it is staged in has one of its own."""
    output = tmp_path / ("é" * 127)
    require_output(output)
    with staged_folder(output) as folder:
        (folder / "a").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; so the test runs as nobody, as far as files are concerned."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("as_nobody")
def test_a_folder_that_may_not_be_written_is_refused_before_and_while_writing(
    open_folder: Path,
) -> None:
    if os.geteuid() == open_folder.stat().st_uid:
        open_folder.chmod(0o555)
    for output in (open_folder / "out", open_folder / "deep" / "out"):
        with pytest.raises(MmoptError, match="was not written: Permission denied") as caught:
            require_output(output)
        assert caught.value.exit_code == 3
        with pytest.raises(MmoptError, match="was not written: Permission denied"):
            write_then_fail(output, RuntimeError("never"))
    assert list(open_folder.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of 1 MB with more options."""
    place = tmp_path / "mounted"
    place.mkdir()
    done = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size=1m{options}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root outside of a container may mount a file system")
        done.append(place)
        return place

    yield mount
    for folder in done:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_leaves_nothing(mounted: Callable[[str], Path]) -> None:
    disk = mounted("")

    def fill() -> None:
        with staged_folder(disk / "deep" / "out") as folder:
            for index in range(4):
                (folder / f"weights-{index}").write_bytes(b"x" * (300 << 10))

    with pytest.raises(MmoptError, match="no space left") as caught:
        fill()
    assert caught.value.exit_code == 3
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_is_one_message_from_every_library_that_writes(
    mounted: Callable[[str], Path],
) -> None:
    """Those written in Rust raise no OSError."""
    import onnx_ir
    from onnx import helper, numpy_helper
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    disk = mounted("")
    large = np.zeros(1 << 19, np.float32)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(large, "w")])
    model = onnx_ir.from_proto(helper.make_model(graph))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99_999)}, unk_token="w0"))
    writers: list[Callable[[Path], object]] = [
        lambda path: save_file({"w": large}, path),
        lambda path: tokenizer.save(str(path)),
        lambda path: onnx_ir.save(model, path, external_data="w.data"),
    ]

    def fill(write: Callable[[Path], object]) -> None:
        with staged_folder(disk / "out") as folder:
            write(folder / "x")

    for write in writers:
        with pytest.raises(MmoptError, match="no space left"):
            fill(write)
        assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_old_artifact(mounted: Callable[[str], Path]) -> None:
    disk = mounted("")
    output = make_artifact(disk / "out")
    before = contents(disk)

    def fill() -> None:
        with staged_folder(output, replace=True) as folder:
            (folder / "weights").write_bytes(b"x" * (2 << 20))

    with pytest.raises(MmoptError, match="no space left"):
        fill()
    assert contents(disk) == before


def test_a_read_only_file_system_is_refused_early_even_for_root(
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted(",ro")
    with pytest.raises(MmoptError, match="was not written: Read-only file system") as caught:
        require_output(disk / "out")
    assert caught.value.exit_code == 3
    with pytest.raises(MmoptError, match="was not written: Read-only file system"):
        write_then_fail(disk / "out", RuntimeError("never"))


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_save_that_fails_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """A real save of a graph with external data, a manifest and samples, refused at some write."""
    opened, calls = Path.write_text, 0
    writes: list[str] = []

    def fill(path: Path, *arguments: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        writes.append(path.name)
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *arguments, **options)

    def save() -> None:
        with staged_folder(tmp_path / "out") as folder:
            make_artifact(folder / "inner", components=("vision", "text"))
            for name in ("a", "b", "c", "d"):
                (folder / name).write_text("x")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(MmoptError, match="no space left"):
        save()
    assert len(writes) == call
    assert list(tmp_path.iterdir()) == []


# What compares artifacts and reads what others wrote.


def test_artifacts_are_the_same_byte_by_byte(tmp_path: Path) -> None:
    one = make_artifact(tmp_path / "one" / "artifact")
    other = make_artifact(tmp_path / "other" / "artifact")
    assert same_artifact(one, other) == []
    data = bytearray((other / "model.onnx.data").read_bytes())
    data[3] ^= 1
    (other / "model.onnx.data").write_bytes(data)
    (other / "more").write_bytes(b"")
    (one / "deep").mkdir()
    (one / "deep" / "er").write_bytes(b"")
    assert same_artifact(one, other) == [
        f"deep/er is only in {one}",
        f"more is only in {other}",
        "model.onnx.data differs",
    ]


def test_json_of_others_is_read_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": "[[[[{{"}]}')
    assert read_json(path, most_depth=3) == {"a": [1, {"b": "[[[[{{"}]}
    with pytest.raises(InputError, match=r"nested 3 deep, expected at most 2.*Do this"):
        read_json(path, most_depth=2, advice="Do this.")
    with pytest.raises(InputError, match="is larger than 26 bytes"):
        read_json(path, most_bytes=26)
    assert read_json(path, most_bytes=27) is not None
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


@pytest.mark.slow
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

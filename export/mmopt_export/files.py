"""Files: hashes, JSON with limits, the space they need, folders that appear whole or not at all."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_kernels.errors import InputError, MmoptError

ARTIFACT_MARKER = "mmopt.json"
"""The file that makes a folder an artifact: its manifest."""

SIGNATURE_NAME = "mmopt.json.sig"
"""The signature of the manifest, which therefore cannot list it."""

# A manifest of ours has some 200 bytes a file and 80 an adapted module: 16 MiB are 100 times
# the largest seen. Its values nest 6 deep; Python's own parser overflows its stack near 1000.
_MOST_JSON_BYTES = 16 << 20
_MOST_JSON_DEPTH = 32

# Linux's NAME_MAX and PATH_MAX, the latter without its NUL. Past them the system fails late: only
# as the finished folder is renamed, where its parents did not exist before.
_NAME_BYTES = 255
_PATH_BYTES = 4095


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One SHA-256 over the names and contents of several files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def read_json(
    path: Path,
    *,
    most_bytes: int = _MOST_JSON_BYTES,
    most_depth: int = _MOST_JSON_DEPTH,
    advice: str = "Export the model again.",
) -> Any:
    """Parse a JSON file that somebody else may have written.

    Args:
        most_bytes: the largest file that is read.
        most_depth: the deepest nesting of objects and arrays.
        advice: what the message tells the user to do.

    Raises:
        InputError: not a plain file, larger or deeper than allowed, not UTF-8, not JSON, a key
            twice in one object, or NaN or Infinity.
    """
    try:
        # Opening a pipe would wait for ever, and a device may never end.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(f"{path} is no plain file, expected one with JSON text. {advice}")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). {advice}") from error
    if len(content) > most_bytes:
        raise InputError(f"{path} is larger than {most_bytes} bytes, the most expected. {advice}")
    try:
        text = content.decode()
        if (depth := _depth(text)) > most_depth:
            raise ValueError(f"nested {depth} deep, expected at most {most_depth}")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    # JSONDecodeError and UnicodeDecodeError are among them, and integers of 5000 digits.
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). {advice}") from error


# Possessive, so that a string without an end costs one pass; brackets in strings do not count.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside of strings, without recursion."""
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in ("]", "}"):
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def is_artifact(folder: Path) -> bool:
    """Whether `folder` is a folder with an `mmopt.json` in it."""
    return folder.is_dir() and (folder / ARTIFACT_MARKER).is_file()


def require_new_folder(output: Path) -> None:
    """Refuse an output path that would overwrite something, or where no folder can be made.

    Raises:
        InputError: `output` is a file, a link, a folder with anything in it, or below a file or a
            link to nothing, or its name is too long.
    """
    _require_plain_path(output)
    if not output.exists():
        existing = next(parent for parent in output.resolve().parents if parent.exists())
        if not existing.is_dir():
            raise InputError(f"{output} lies below the file {existing}, expected a folder there.")
        return
    if _is_empty_folder(output):
        return
    if is_artifact(output):
        raise InputError(
            f"{output} holds an artifact already, expected a new or an empty folder. "
            "Pass --force to replace it, or choose another output folder."
        )
    what = "a folder that is not empty" if output.is_dir() else "a file"
    raise InputError(
        f"{output} is {what}, expected a new or an empty folder. "
        "Choose another output folder, or remove this one."
    )


def require_artifact(folder: Path) -> None:
    """Refuse to replace (`--force`) what is no artifact, or one with somebody's other files in it.

    Raises:
        InputError: no `mmopt.json`, one that lists no files, or a file that it does not list.
    """
    advice = "Choose another output folder."
    if not is_artifact(folder):
        raise InputError(
            f"{folder} has no {ARTIFACT_MARKER}, so mmopt did not write it and --force does not "
            f"replace it. {advice}"
        )
    manifest = read_json(folder / ARTIFACT_MARKER, advice=f"--force does not replace it. {advice}")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise InputError(
            f"{folder / ARTIFACT_MARKER} lists no files, so --force does not replace {folder}. "
            f"{advice}"
        )
    if foreign := sorted(_entries(folder) - {*files, ARTIFACT_MARKER, SIGNATURE_NAME}):
        raise InputError(
            f"{folder / foreign[0]} is no file of the artifact, so --force does not replace "
            f"{folder}. Move it elsewhere, or choose another output folder."
        )


def require_output(
    output: Path,
    *,
    sources: Iterable[Path] = (),
    replace: bool = False,
    ours: Callable[[Path], None] = require_artifact,
) -> None:
    """Refuse, before any work is done, a folder that cannot or must not be written.

    Args:
        output: the folder to be.
        sources: folders that are read (model, adapters); those that do not exist are ignored.
        replace: whether a folder of ours there may be replaced (`--force`).
        ours: raises InputError for a folder that must not be replaced all the same.

    Raises:
        InputError: `output` exists and may not be replaced, is too long, or is, contains or lies
            within one of `sources`.
        MmoptError: the file system is read-only, or the user may not write there (exit 3).
    """
    place = output.resolve()
    for source in filter(Path.exists, sources):
        read = source.resolve()
        if place == read:
            relation = "is"
        elif read in place.parents:
            relation = "lies within"
        elif place in read.parents:
            relation = "contains"
        else:
            continue
        raise InputError(
            f"{output} {relation} {source}, which is read, expected a folder apart from it. "
            "Choose another output folder."
        )
    _require_free(output, replace, ours)
    existing = next(parent for parent in place.parents if parent.exists())
    effective = os.access in os.supports_effective_ids
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise MmoptError(f"{output} was not written: {_reason(OSError(code, ''))}")


def _require_free(output: Path, replace: bool, ours: Callable[[Path], None]) -> None:
    """Nothing stands at `output`, an empty folder does, or with `replace` one of ours."""
    _require_plain_path(output)
    if not replace or not output.is_dir() or _is_empty_folder(output):
        require_new_folder(output)
    else:
        ours(output)


def _require_plain_path(output: Path) -> None:
    """A path that a file system can hold, and neither a link nor below one to nothing."""
    whole = len(os.fsencode(output.absolute()))
    longest = max(len(os.fsencode(part)) for part in output.absolute().parts)
    if longest > _NAME_BYTES or whole > _PATH_BYTES:
        raise InputError(
            f"the path of the output folder has {whole} bytes and the longest name in it "
            f"{longest}, expected at most {_PATH_BYTES} and {_NAME_BYTES}. Choose a shorter one."
        )
    if output.is_symlink():
        raise InputError(
            f"{output} is a symbolic link, expected a folder or nothing. "
            f"Pass {os.readlink(output)}, or remove the link."
        )
    for parent in output.absolute().parents:
        # A loop of links does not exist either.
        if parent.is_symlink() and not parent.exists():
            raise InputError(
                f"{output} lies below {parent}, a symbolic link to {os.readlink(parent)}, which "
                "does not exist. Make that folder, or remove the link."
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def require_space(folder: Path, needed: int) -> None:
    """Refuse early when the disk under `folder` has fewer than `needed` bytes free.

    Raises:
        MmoptError: too little space (exit 3).
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise MmoptError(
            f"{folder} lies on a disk with {free / 1e6:.0f} MB free, expected at least "
            f"{needed / 1e6:.0f} MB. Free some space or choose another output folder."
        )


def _itself(output: Path) -> Path:
    return output


@contextmanager
def staged_folder(
    output: Path,
    *,
    replace: bool = False,
    ours: Callable[[Path], None] = require_artifact,
    place: Callable[[Path], Path] = _itself,
) -> Iterator[Path]:
    """Yield a staging folder beside `output` that becomes `output` when the block succeeds.

    When the block fails, whatever the reason, the staging folder is removed and `output` is as
    it was before.

    Args:
        output: a new or an empty folder, or with `replace` a folder of ours, which is exchanged
            for the new one in one step where the file system can.
        replace: whether a folder of ours may be replaced.
        ours: raises InputError for a folder that must not be replaced.
        place: asked when the block has succeeded which folder beside `output` it becomes instead,
            by the same rules.

    Raises:
        InputError: `output` exists and may not be replaced.
        MmoptError: the file system refused a write (disk full, read-only); exit 3.
    """
    with staged_folders([output], replace=replace, ours=ours, place=place) as (folder,):
        yield folder


@contextmanager
def staged_folders(
    outputs: Sequence[Path],
    *,
    replace: bool = False,
    ours: Callable[[Path], None] = require_artifact,
    place: Callable[[Path], Path] = _itself,
) -> Iterator[list[Path]]:
    """`staged_folder` for several folders: all appear, or none does and all are as before."""
    for output in outputs:
        _require_free(output, replace, ours)
    staged: list[Path] = []
    moves: list[_Move] = []
    made: list[Path] = []
    try:
        for output in outputs:
            made += _make_parents(output)
            staged.append(_scratch(output))
        yield list(staged)
        for output, folder in zip(map(place, outputs), staged, strict=True):
            # mkdtemp makes the folder private to the user; an artifact is read by others too.
            folder.chmod(0o777 & ~_umask())
            # It may have changed while the block ran.
            _require_free(output, replace, ours)
            moves.append(_move(folder, output))
    except BaseException as error:
        for move in reversed(moves):
            move.undo()
        for folder in staged:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(made):
            # Another process may have put something there meanwhile: then it stays.
            with suppress(OSError):
                parent.rmdir()
        if (refused := _os_error(error)) is not None:
            raise MmoptError(
                f"{', '.join(map(str, outputs))} was not written: {_reason(refused)} "
                "Nothing was left behind."
            ) from error
        raise
    for move in moves:
        move.remove_old()


def _make_parents(output: Path) -> list[Path]:
    """Make the folders above `output`; returns those made, outermost first."""
    missing = [parent for parent in output.absolute().parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _scratch(output: Path) -> Path:
    """A new folder on the file system of `output`, so that renaming it there is one step."""
    # As much of the name as leaves room for what is added, whatever bytes its letters have.
    return Path(tempfile.mkdtemp(prefix=f".{output.name[:50]}.", dir=output.parent))


@dataclass(frozen=True)
class _Move:
    """A folder that was moved into place.

    Attributes:
        folder: where it was staged.
        output: where it is now.
        old: where what stood at `output` is now, None when nothing did.
    """

    folder: Path
    output: Path
    old: Path | None

    def undo(self) -> None:
        """Put both folders back where they were."""
        if self.old is None:
            os.rename(self.output, self.folder)
        elif not (self.old == self.folder and _exchange(self.folder, self.output)):
            os.rename(self.output, self.folder)
            os.rename(self.old, self.output)

    def remove_old(self) -> None:
        """Remove what was replaced.

        Raises:
            MmoptError: it could not be removed; the new folder is complete and in place.
        """
        if self.old is None:
            return
        try:
            shutil.rmtree(self.old)
        except OSError as error:
            raise MmoptError(
                f"{self.output} was replaced and is complete, but what stood there before is left "
                f"in {self.old} and could not be removed ({error}). Remove it by hand."
            ) from error


def _move(folder: Path, output: Path) -> _Move:
    """Move `folder` to `output`; on failure both are where they were.

    Raises:
        OSError: the file system refused.
    """
    if not output.is_dir() or _is_empty_folder(output):
        # Replaces an empty folder in one step and fails on one that has been filled meanwhile.
        os.rename(folder, output)
        return _Move(folder, output, None)
    if _exchange(folder, output):
        return _Move(folder, output, folder)
    aside = _scratch(output)
    try:
        os.rename(output, aside)
    except OSError:
        aside.rmdir()
        raise
    try:
        os.rename(folder, output)
    except BaseException:
        os.rename(aside, output)
        raise
    return _Move(folder, output, aside)


_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h: both paths count from the current folder


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (Linux renameat2); False where that does not exist.

    Raises:
        OSError: the file system can, and refused.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    paths = [ctypes.c_int, ctypes.c_char_p] * 2
    function.argtypes = [*paths, ctypes.c_uint]
    names = os.fsencode(one), os.fsencode(other)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    # An old kernel, or a file system without it (NFS, some FUSE).
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _os_error(error: BaseException) -> OSError | None:
    """The file system's refusal that an exception tells of.

    safetensors and tokenizers are written in Rust and raise exceptions of their own, with the
    number in the text: "No space left on device (os error 28)".
    """
    if isinstance(error, OSError):
        return error
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def _reason(error: OSError) -> str:
    code = error.errno or 0
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no space left ({os.strerror(code)}). Free some or choose another output "
            "folder, and run the command again."
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{os.strerror(code)}. Choose an output folder that you may write to."
    return f"{error}."


def same_artifact(one: Path, other: Path) -> list[str]:
    """What differs between two artifacts, name by name and byte by byte; empty when nothing does.

    The manifests' `name` is the name of the folder; two exports into folders of one name, or
    copies, are equal.
    """
    listed = [_entries(folder) for folder in (one, other)]
    differences = [f"{name} is only in {one}" for name in sorted(listed[0] - listed[1])]
    differences += [f"{name} is only in {other}" for name in sorted(listed[1] - listed[0])]
    for name in sorted(listed[0] & listed[1]):
        first, second = one / name, other / name
        if first.stat().st_size != second.stat().st_size or sha256(first) != sha256(second):
            differences.append(f"{name} differs")
    return differences


def _entries(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }

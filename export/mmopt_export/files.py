"""Files: hashes, the space they need, and folders that appear whole or not at all."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmopt_kernels.errors import InputError, MmoptError

_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One SHA-256 over the names and contents of several files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def require_new_folder(output: Path) -> None:
    """Refuse an output path that would overwrite something.

    Raises:
        InputError: `output` is a file, or a folder with anything in it.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        what = "a folder that is not empty" if output.is_dir() else "a file"
        raise InputError(
            f"{output} is {what}, expected a new or an empty folder. "
            "Choose another output folder, or remove this one."
        )


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


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Yield a staging folder beside `output` that becomes `output` when the block succeeds.

    When the block fails, whatever the reason, the staging folder is removed and `output` is as
    it was before.

    Raises:
        InputError: `output` exists and is not an empty folder.
        MmoptError: the file system refused a write (disk full, read-only); exit 3.
    """
    require_new_folder(output)
    staging: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield staging
        # mkdtemp makes the folder private to the user; an artifact is read by others too.
        staging.chmod(0o777 & ~_umask())
        # Replaces an empty folder in one step and fails on one that has been filled meanwhile.
        os.rename(staging, output)
        staging = None
    except OSError as error:
        raise MmoptError(
            f"{output} was not written: {_reason(error)} Nothing was left behind."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no space left ({os.strerror(error.errno)}). Free some or choose another output "
            "folder, and run the command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{os.strerror(error.errno)}. Choose an output folder that you may write to."
    return f"{error}."

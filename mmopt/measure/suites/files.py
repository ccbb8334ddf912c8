"""Files that appear whole or not at all."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmopt_kernels.errors import MmoptError


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` to `path`: the whole document appears there, or nothing changes.

    Raises:
        MmoptError: the file system refused (no such folder, disk full, read-only); exit 3.
    """
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8: all of it appears there, or nothing changes.

    Raises:
        MmoptError: the file system refused (no such folder, disk full, read-only); exit 3.
    """
    staged: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            staged = Path(file.name)
            file.write(text)
        # NamedTemporaryFile is private to the user; a result is read by others too.
        staged.chmod(0o644)
        staged.replace(path)
        staged = None
    except OSError as error:
        raise MmoptError(f"could not write {path}: {error.strerror or error}.") from error
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)

"""What `--force` may replace: an artifact that failed takes the place of none but another such.

It is left beside the one that was there, as `OUTPUT.failed`: its `parity.json` is what one needs to
find out why.
"""

from pathlib import Path

from mmopt_export.files import ARTIFACT_MARKER, is_artifact, read_json, require_artifact
from mmopt_kernels.errors import InputError


def failed_place(output: Path) -> Path:
    """Where a failed artifact goes whose `output` is taken."""
    return output.parent / f"{output.name}.failed"


def is_kept(output: Path) -> bool:
    """Whether an artifact stands at `output` that a failed one does not replace."""
    return is_artifact(output) and not _failed(output)


def require_failed(folder: Path) -> None:
    """Refuse to replace what is no failed artifact at the `failed_place` of another.

    Raises:
        InputError: it is something else.
    """
    try:
        require_artifact(folder)
        failed = _failed(folder)
    except InputError:
        failed = False
    if not failed:
        raise InputError(
            f"{folder} is where an artifact goes that fails and must not replace the one beside "
            "it, and is no failed artifact. Move it elsewhere, or choose another output folder."
        )


def _failed(folder: Path) -> bool:
    manifest = read_json(folder / ARTIFACT_MARKER)
    return isinstance(manifest, dict) and manifest.get("status") == "failed"
